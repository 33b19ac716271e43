"""Baselines that are not a greedy search: block influence, unsearched sets, choices by embedding, the oracle."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprune.baselines.block_influence import block_influence, least_influential, summed_cosines
from dynprune.baselines.by_embedding import LinearChoice, cluster, loss_regression, nearest_centroid
from dynprune.baselines.oracle import oracle
from dynprune.baselines.unsearched import last_layers, random_sets
from dynprune.data.hidden_states import HiddenStateStream
from dynprune.data.rollouts import Rollout


def sums(states):
    return [(summed_cosines(states_SNd), states_SNd.shape[1]) for states_SNd in states]


def test_block_influence_is_what_hooks_on_each_layer_see_sample_by_sample(make_slm):
    slm = make_slm(num_layers=5)
    sequences = [torch.randint(0, 250, (length,)).tolist() for length in (3, 9, 4, 12)]
    expected = []
    for layer in slm.layers:
        seen = []
        handle = layer.register_forward_hook(lambda module, arguments, output, seen=seen: seen.append((arguments[0], output)))
        for sequence in sequences:
            slm.model(input_ids=torch.tensor([sequence]), use_cache=False)
        handle.remove()
        cosines = [
            (float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
            for before, after in seen
            for a, b in zip(before[0], after[0], strict=True)
        ]
        expected.append(1 - sum(cosines) / len(cosines))
    # Batches of several sequences with padding, which must not count.
    influence_L = block_influence(sums(HiddenStateStream(slm, sequences, batch_tokens=20, seed=None)))
    assert influence_L.tolist() == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 5
    for size in range(1, 6):
        assert set(least_influential(influence_L, size)) == set(sorted(range(5), key=expected.__getitem__)[:size])


def test_block_influence_of_states_with_known_angles():
    east, north, west = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 5.0]), torch.tensor([-1.0, 0.0])
    # Two tokens in one batch, one in another; layer 0 keeps the direction, layer 1 turns by 90°, by 180°, not at all.
    one = torch.stack([torch.stack([east, east]), torch.stack([3 * east, east]), torch.stack([north, west])])
    other = torch.stack([east, east, east])[:, None]
    influence_L = block_influence(sums([one, other]))
    assert influence_L.tolist() == pytest.approx([0, (1 + 2 + 0) / 3])


def test_random_sets_are_distinct_uniform_and_fixed_by_the_seed():
    every = random_sets(5, 2, 10, seed=0)
    assert sorted(every) == list(itertools.combinations(range(5), 2))
    assert random_sets(5, 2, 3, seed=0) == every[:3]
    assert random_sets(5, 2, 3, seed=1) != every[:3]
    first = [random_sets(5, 2, 1, seed)[0] for seed in range(2000)]
    counts = [first.count(pair) for pair in itertools.combinations(range(5), 2)]
    # Binomial(2000, 1/10): 200 each, with a standard deviation of 13.4.
    assert all(abs(count - 200) < 5 * 13.4 for count in counts)
    for draws in (0, 11):
        with pytest.raises(ValueError, match="there are 10 sets of 2 of 5 layers"):
            random_sets(5, 2, draws, seed=0)


def test_the_last_layers_leave_the_very_last_one():
    assert last_layers(6, 1) == (4,)
    assert last_layers(6, 3) == (2, 3, 4)
    assert last_layers(6, 5) == (0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="the last one is never pruned; allowed: 1 to 5"):
        last_layers(6, 6)


SETS = [(0, 3), (1, 2), (2, 5)]
CENTRES = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
# The set that is best around each centre. Set 0 is the best for none, though it is the best on average.
BEST = [1, 2, 2, 1]


def separable(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings around four centres, the losses of each query, and its centre."""
    rng = np.random.default_rng(seed)
    centre_Q = np.repeat(np.arange(4), 6)
    embedding_QE = CENTRES[centre_Q] + rng.uniform(-1, 1, (24, 2))
    loss_QS = np.full((24, 3), 2.0)
    loss_QS[:, 0] = 1.2
    loss_QS[np.arange(24), np.array(BEST)[centre_Q]] = 1.0
    # Single queries disagree with their neighbours, a minority of each centre.
    loss_QS[::6] = [0.9, 1.5, 1.5]
    return embedding_QE, loss_QS, centre_Q


def test_clusters_of_separable_embeddings_are_found_whatever_the_seed():
    embedding_QE, _, centre_Q = separable()
    for seed in range(5):
        centroid_CE, cluster_Q = cluster(embedding_QE, 4, seed, "key")
        assert len(set(zip(cluster_Q.tolist(), centre_Q.tolist(), strict=True))) == 4
        for c in range(4):
            np.testing.assert_allclose(centroid_CE[c], embedding_QE[cluster_Q == c].mean(axis=0))


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_no_cluster_is_empty_and_impossible_numbers_are_refused():
    centroid_CE, cluster_Q = cluster(np.array([[0.0], [0.0], [4.0]]), 3, 0, "key")
    assert sorted(centroid_CE[:, 0]) == [0, 4]
    assert centroid_CE[cluster_Q, 0].tolist() == [0, 0, 4]
    for clusters in (0, 4):
        with pytest.raises(ValueError, match=f"evaluation.x={clusters} is impossible with 3 queries"):
            cluster(np.zeros((3, 1)), clusters, 0, "evaluation.x")


def test_a_query_gets_the_set_that_suits_the_nearest_cluster():
    embedding_QE, loss_QS, _ = separable()
    choose = nearest_centroid(embedding_QE, loss_QS, SETS, clusters=4, seed=0)
    for centre, best in zip(CENTRES, BEST, strict=True):
        for offset in ([0, 0], [3, -2], [-3.5, 2.5]):
            assert choose(centre + offset) == SETS[best]
    # With one cluster it is the set of the best mean.
    assert nearest_centroid(embedding_QE, loss_QS, SETS, clusters=1, seed=0)(CENTRES[1]) == SETS[0]


def test_the_nearest_centroid_is_nearest_by_plain_distance():
    rng = np.random.default_rng(1)
    embedding_QE, loss_QS = rng.normal(size=(60, 5)), rng.normal(size=(60, 3))
    choose = nearest_centroid(embedding_QE, loss_QS, SETS, clusters=7, seed=0)
    centroid_CE, cluster_Q = cluster(embedding_QE, 7, 0, "key")
    for query in rng.normal(size=(50, 5)):
        nearest = min(range(7), key=lambda c: math.dist(query, centroid_CE[c]))
        totals = [sum(loss_QS[q, s] for q in range(60) if cluster_Q[q] == nearest) for s in range(3)]
        assert choose(query) == SETS[totals.index(min(totals))]


def test_the_regression_recovers_linear_losses_and_takes_the_lowest():
    rng = np.random.default_rng(2)
    weight_ES, bias_S = rng.normal(size=(4, 3)), rng.normal(size=3)
    embedding_QE = rng.normal(size=(80, 4))
    choose = loss_regression(embedding_QE, embedding_QE @ weight_ES + bias_S, SETS)
    for query in rng.normal(size=(50, 4)):
        predicted = query @ weight_ES + bias_S
        np.testing.assert_allclose(choose.weight_AE @ query + choose.bias_A, predicted, atol=1e-4)
        # All three are chosen by some of these queries.
        assert choose(query) == SETS[int(predicted.argmin())]


def test_the_regression_is_the_ridge_solution_of_the_penalty_that_leaves_one_out_best():
    rng = np.random.default_rng(3)
    embedding_QE, loss_QS = rng.normal(size=(12, 6)), rng.normal(size=(12, 3))

    def fitted(rows: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """The normal equations, with an intercept that is not penalised."""
        design = np.column_stack([embedding_QE[rows], np.ones(len(rows))])
        normal = design.T @ design + np.diag([penalty] * 6 + [0.0])
        solution = np.linalg.solve(normal, design.T @ loss_QS[rows])
        return solution[:-1], solution[-1]

    def left_out_error(penalty: float) -> float:
        errors = []
        for left_out in range(12):
            weight_ES, bias_S = fitted(np.delete(np.arange(12), left_out), penalty)
            errors.append((embedding_QE[left_out] @ weight_ES + bias_S - loss_QS[left_out]) ** 2)
        return float(np.mean(errors))

    penalties = [10 ** (exponent / 2) for exponent in range(-8, 9)]
    weight_ES, bias_S = fitted(np.arange(12), min(penalties, key=left_out_error))
    choose = loss_regression(embedding_QE, loss_QS, SETS)
    np.testing.assert_allclose(choose.weight_AE, weight_ES.T, atol=1e-8)
    np.testing.assert_allclose(choose.bias_A, bias_S, atol=1e-8)


def test_a_library_of_one_set_leaves_no_choice():
    embedding_QE, loss_QS, _ = separable()
    assert loss_regression(embedding_QE, loss_QS[:, :1], SETS[:1])(CENTRES[0]) == SETS[0]
    assert nearest_centroid(embedding_QE, loss_QS[:, :1], SETS[:1], 4, 0)(CENTRES[0]) == SETS[0]


def test_a_choice_is_read_as_it_was_written(tmp_path):
    embedding_QE, loss_QS, _ = separable()
    written = loss_regression(embedding_QE, loss_QS, SETS)
    written.save(tmp_path / "choice.npz")
    read = LinearChoice.load(tmp_path / "choice.npz")
    for name in ("weight_AE", "bias_A", "sets_AK"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))


def rollout(query: str, layers: tuple[int, ...], score: float) -> Rollout:
    return Rollout(query, layers, score, "")


def test_without_a_budget_the_oracle_takes_the_best_and_among_equals_the_deepest():
    tried = [
        [rollout("a", (), 1), rollout("a", (1,), 1), rollout("a", (1, 2), 0)],
        [rollout("b", (), 0), rollout("b", (0,), 0)],
        [rollout("c", (), 0), rollout("c", (0, 1), 1), rollout("c", (0, 3), 1), rollout("c", (0, 1, 2), 0.5)],
    ]
    assert [best.pruned_layers for best in oracle(tried, 0)] == [(1,), (0,), (0, 1)]


def test_the_oracle_spends_its_budget_where_it_costs_least():
    tried = [
        [rollout("a", (), 1), rollout("a", (1,), 1), rollout("a", (1, 2, 3), 0)],
        [rollout("b", (), 1), rollout("b", (0, 1), 1), rollout("b", (0, 1, 2), 0.9)],
    ]
    assert [best.pruned_layers for best in oracle(tried, 1.5)] == [(1,), (0, 1)]
    assert [best.pruned_layers for best in oracle(tried, 2)] == [(1,), (0, 1, 2)]
    assert [best.pruned_layers for best in oracle(tried, 3)] == [(1, 2, 3), (0, 1, 2)]
    with pytest.raises(ValueError, match=r"asks for 3\.1 layers on average.*prunes 3 at most"):
        oracle(tried, 3.1)


TRIED = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0, 1 / 3, 0.5, 2 / 3, 1, -5, 10])), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(TRIED, st.floats(0, 4))
def test_the_oracle_is_the_best_of_all_combinations_within_the_budget(options, mean_layers):
    tried = [[rollout(str(q), tuple(range(size)), score) for size, score in o] for q, o in enumerate(options)]
    allowed = [
        (sum(Fraction(r.score).limit_denominator(6) for r in combination), sum(len(r.pruned_layers) for r in combination))
        for combination in itertools.product(*tried)
        if sum(len(r.pruned_layers) for r in combination) >= mean_layers * len(tried) - 1e-9
    ]
    if not allowed:
        with pytest.raises(ValueError, match="asks for"):
            oracle(tried, mean_layers)
        return
    chosen = oracle(tried, mean_layers)
    assert [best.id for best in chosen] == [str(q) for q in range(len(tried))]
    assert all(best in options for best, options in zip(chosen, tried, strict=True))
    score = sum(Fraction(best.score).limit_denominator(6) for best in chosen)
    assert (score, sum(len(best.pruned_layers) for best in chosen)) == max(allowed)
