import itertools
import random
from collections import Counter

import pytest

from dynprune.exploration.dfs import DepthFirstSearch
from dynprune.exploration.random_search import RandomSearch
from dynprune.exploration.strategy import Estimate, Generate, estimating_all


def drive(proposals, score, nats):
    """Drives a search to its end; returns its proposals, and the scores and estimates of all that it tried, in order."""
    made, scores, estimates = [], {}, {}
    proposal = next(proposals)
    try:
        while True:
            made.append(proposal)
            assert proposal.configurations, "a proposal may not be empty"
            assert len(scores) + len(estimates) < 20_000, "the search does not end"
            known, value = (scores, score) if isinstance(proposal, Generate) else (estimates, nats)
            for configuration in proposal.configurations:
                assert configuration not in known, "tried twice"
                known[configuration] = value(configuration)
            proposal = proposals.send([known[configuration] for configuration in proposal.configurations])
    except StopIteration:
        return made, scores, estimates


def search(strategy, num_layers, score, seed=0):
    """Drives a search that estimates nothing; returns its batches and the scores of all that it tried, in order."""
    made, scores, estimates = drive(strategy.propose(num_layers, random.Random(seed)), score, None)
    assert not estimates
    return [proposal.configurations for proposal in made], scores


def forgiving(configuration):
    return 1.0


def rugged(configuration):
    """A landscape without structure, of five levels."""
    return random.Random(repr(configuration)).randrange(5) / 4


def only_subsets_of(robust):
    return lambda configuration: float(set(configuration) <= set(robust))


STRATEGIES = [
    DepthFirstSearch(),
    DepthFirstSearch(children_at_once=8),
    DepthFirstSearch(branch_factor=5, min_branch_factor=3, max_scenarios=200, children_at_once=2),
    RandomSearch(stop_below=0.0),
    RandomSearch(configurations_per_size=40, stop_below=0.0, max_configurations=100),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_layers", [4, 12])
def test_a_search_starts_without_pruning_and_tries_sorted_sets_of_existing_layers(strategy, num_layers):
    batches, scores = search(strategy, num_layers, rugged)

    assert batches[0] == ((),)
    for configuration in scores:
        assert isinstance(configuration, tuple)
        assert list(configuration) == sorted(set(configuration) & set(range(num_layers)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_follows_from_its_seed_alone(strategy):
    first = search(strategy, 12, rugged, seed=3)

    assert search(strategy, 12, rugged, seed=3) == first
    assert search(strategy, 12, rugged, seed=4) != first


@pytest.mark.parametrize("strategy", [DepthFirstSearch(require_success=1.0), RandomSearch(require_success=1.0)])
def test_a_query_that_the_unpruned_slm_fails_is_left_alone(strategy):
    assert search(strategy, 12, lambda configuration: 0.9)[0] == [((),)]
    assert len(search(strategy, 12, forgiving)[0]) > 1


# Depth-first search


@pytest.mark.parametrize("children_at_once", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [1, 2, 9, 20, 100])
@pytest.mark.parametrize("score", [forgiving, rugged])
def test_dfs_spends_its_budget_and_no_more(children_at_once, budget, score):
    strategy = DepthFirstSearch(max_scenarios=budget, children_at_once=children_at_once)
    counts = {len(search(strategy, 28, score, seed)[1]) for seed in range(20)}

    assert max(counts) <= budget
    if score is forgiving:
        assert counts == {budget}


@pytest.mark.parametrize("children_at_once", [1, 3, 8])
def test_dfs_tries_a_configuration_only_below_one_whose_score_has_not_fallen(children_at_once):
    strategy = DepthFirstSearch(max_scenarios=150, children_at_once=children_at_once)
    fallen_seen = 0
    for seed in range(20):
        batches, scores = search(strategy, 10, rugged, seed)
        order = {configuration: turn for turn, batch in enumerate(batches) for configuration in batch}
        # By brute force: reached from no pruning by steps of one layer, none of which lowered the score.
        alive = {(): True}
        for configuration in list(scores)[1:]:
            parents = [
                parent
                for parent in itertools.combinations(configuration, len(configuration) - 1)
                if alive.get(parent) and order[parent] < order[configuration]
            ]
            assert parents
            alive[configuration] = any(scores[configuration] >= scores[parent] for parent in parents)
            fallen_seen += not alive[configuration]
    assert fallen_seen > 100


def test_dfs_of_twenty_scenarios_is_nineteen_layers_deep_where_everything_is_forgiven():
    batches, _ = search(DepthFirstSearch(), 28, forgiving)

    assert [len(batch) for batch in batches] == [1] * 20
    assert [len(batch[0]) for batch in batches] == list(range(20))
    for (smaller,), (larger,) in itertools.pairwise(batches):
        assert set(smaller) < set(larger)


def test_dfs_with_siblings_together_spends_the_same_budget_on_eight_four_two_two_two_one():
    batches, _ = search(DepthFirstSearch(children_at_once=8), 28, forgiving)

    assert [len(batch) for batch in batches] == [1, 8, 4, 2, 2, 2, 1]
    assert [len(batch[0]) for batch in batches] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("children_at_once", [1, 8])
def test_dfs_finds_the_largest_set_of_layers_that_can_go(children_at_once):
    robust = (1, 3, 4, 6)
    strategy = DepthFirstSearch(branch_factor=8, min_branch_factor=8, max_scenarios=10_000, children_at_once=children_at_once)
    _, scores = search(strategy, 8, only_subsets_of(robust))

    succeeded = {configuration for configuration, score in scores.items() if score == 1.0}
    every_subset = {c for k in range(5) for c in itertools.combinations(robust, k)}
    assert succeeded == every_subset


@pytest.mark.parametrize("children_at_once", [1, 3, 8])
def test_dfs_halves_its_branches_from_level_to_level_down_to_two(children_at_once):
    strategy = DepthFirstSearch(max_scenarios=10_000, children_at_once=children_at_once)
    _, scores = search(strategy, 40, lambda configuration: float(len(configuration) < 5))

    sizes = Counter(len(configuration) for configuration in scores)
    assert sizes == {0: 1, 1: 8, 2: 8 * 4, 3: 8 * 4 * 2, 4: 8 * 4 * 2 * 2, 5: 8 * 4 * 2 * 2 * 2}


def test_dfs_searches_a_child_to_its_end_before_the_next_sibling():
    batches, _ = search(DepthFirstSearch(max_scenarios=10_000), 40, lambda c: float(len(c) < 2))

    assert [len(batch[0]) for batch in batches] == [0, *[1, 2, 2, 2, 2] * 8]


def test_dfs_with_siblings_together_goes_on_below_the_best_of_them():
    strategy = DepthFirstSearch(branch_factor=8, max_scenarios=100, children_at_once=8)

    def score(configuration):
        return {0: 0.4, 1: sum(configuration) / 40}.get(len(configuration), 0.0)

    batches, _ = search(strategy, 40, score)

    held = sorted((c for c in batches[1] if score(c) >= 0.4), reverse=True)
    assert 2 <= len(held) < 8
    assert [set.intersection(*map(set, batch)) for batch in batches[2:]] == [set(c) for c in held]


@pytest.mark.parametrize("children_at_once", [1, 8])
def test_dfs_never_prunes_an_excluded_layer(children_at_once):
    strategy = DepthFirstSearch(excluded_layers=[0, 5], max_scenarios=10_000, children_at_once=children_at_once)
    _, scores = search(strategy, 6, forgiving)

    assert set().union(*scores) == {1, 2, 3, 4}
    assert (1, 2, 3, 4) in scores


@pytest.mark.parametrize("layer", [-1, 12])
def test_dfs_names_the_key_of_an_excluded_layer_that_is_not_there(layer):
    with pytest.raises(ValueError, match=rf"exploration\.strategy\.excluded_layers.*\[{layer}\].*0 to 11"):
        DepthFirstSearch(excluded_layers=[3, layer]).propose(12, random.Random(0))


def test_dfs_refuses_to_exclude_every_layer():
    with pytest.raises(ValueError, match=r"exploration\.strategy\.excluded_layers leaves none"):
        DepthFirstSearch(excluded_layers=[0, 1]).propose(2, random.Random(0))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"min_branch_factor": 0}, "min_branch_factor"),
        ({"branch_factor": 1}, "branch_factor"),
        ({"max_scenarios": 0}, "max_scenarios"),
        ({"children_at_once": 0}, "children_at_once"),
    ],
)
def test_dfs_names_the_key_of_a_setting_that_is_too_small(settings, key):
    with pytest.raises(ValueError, match=rf"exploration\.strategy\.{key}="):
        DepthFirstSearch(**settings)


# Random search


def test_random_search_tries_some_of_each_size_until_the_layers_end():
    batches, _ = search(RandomSearch(configurations_per_size=5, stop_below=0.0), 9, forgiving)

    # Six layers may go: there are 6, 15, 20, 15, 6, 1 configurations of each size.
    assert [len(batch) for batch in batches] == [1, 5, 5, 5, 5, 5, 1]
    assert [{len(c) for c in batch} for batch in batches] == [{k} for k in range(7)]
    assert set().union(*batches[-1]) == {2, 3, 4, 5, 6, 7}


def test_random_search_tries_all_of_a_size_where_they_are_few():
    batches, _ = search(RandomSearch(20, stop_below=0.0, first_excluded=1, last_excluded=0), 6, forgiving)

    for size, batch in enumerate(batches):
        every = set(itertools.combinations(range(1, 6), size))
        assert set(batch) == every


def test_random_search_draws_every_configuration_equally_often():
    strategy = RandomSearch(configurations_per_size=2, stop_below=1.1, first_excluded=0, last_excluded=0)
    layers, searches = 5, 2000
    drawn = Counter(
        configuration for seed in range(searches) for configuration in search(strategy, layers, forgiving, seed)[0][1]
    )

    assert len(drawn) == layers
    # Each is in 2 of 5 searches; five standard deviations of that binomial count are 110.
    assert all(abs(count - searches * 2 / 5) < 110 for count in drawn.values())


@pytest.mark.parametrize(("threshold", "last_size"), [(1.0, 2), (0.51, 3), (0.5, 4), (0.25, 5), (0.0, 9)])
def test_random_search_stops_at_the_first_size_whose_mean_is_below_the_threshold(threshold, last_size):
    # Of the four of a size: all succeed at one layer, three at two, two at three, one at four, then none.
    turns = Counter()

    def score(configuration):
        size = len(configuration)
        turns[size] += 1
        return float(size == 0 or turns[size] <= 5 - size)

    strategy = RandomSearch(4, stop_below=threshold, first_excluded=0, last_excluded=1)
    batches, _ = search(strategy, 10, score)

    assert [{len(c) for c in batch} for batch in batches] == [{size} for size in range(last_size + 1)]


@pytest.mark.parametrize("cap", [1, 2, 6, 13, 21])
def test_random_search_keeps_its_cap_exactly(cap):
    _, scores = search(RandomSearch(5, stop_below=0.0, max_configurations=cap), 12, forgiving)

    assert len(scores) == cap


def test_random_search_leaves_the_edges_alone():
    _, scores = search(RandomSearch(50, stop_below=0.0, first_excluded=3, last_excluded=2), 9, forgiving)

    assert set().union(*scores) == {3, 4, 5, 6}


@pytest.mark.parametrize("num_layers", [1, 3])
def test_random_search_refuses_edges_that_leave_no_layer(num_layers):
    with pytest.raises(ValueError, match=rf"first_excluded=2 and last_excluded=1 .*none of the {num_layers} "):
        RandomSearch().propose(num_layers, random.Random(0))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"configurations_per_size": 0}, "configurations_per_size"),
        ({"first_excluded": -1}, "first_excluded"),
        ({"last_excluded": -1}, "last_excluded"),
        ({"max_configurations": 0}, "max_configurations"),
    ],
)
def test_random_search_names_the_key_of_a_setting_that_is_too_small(settings, key):
    with pytest.raises(ValueError, match=rf"exploration\.strategy\.{key}="):
        RandomSearch(**settings)


# Estimates of whatever is generated


@pytest.mark.parametrize("strategy", [DepthFirstSearch(max_scenarios=30), RandomSearch(stop_below=0.0)])
def test_a_search_that_estimates_all_generates_as_before_and_estimates_each_configuration_at_the_end(strategy):
    batches, plain = search(strategy, 12, rugged, seed=5)
    made, scores, estimates = drive(estimating_all(strategy.propose(12, random.Random(5))), rugged, len)

    assert scores == plain
    assert [proposal.configurations for proposal in made[:-1]] == batches
    assert made[-1] == Estimate(tuple(plain))
    assert list(estimates) == list(plain)


def test_what_a_search_estimated_itself_is_not_estimated_again():
    def proposals():
        yield Generate(((),))
        assert (yield Estimate(((1,), (2,)))) == [10.0, 20.0]
        assert (yield Generate(((2,), (3,)))) == [0.2, 0.3]

    made, *_ = drive(estimating_all(proposals()), lambda c: sum(c) / 10, lambda c: 10.0 * sum(c))
    assert made[1:] == [Estimate(((1,), (2,))), Generate(((2,), (3,))), Estimate(((), (3,)))]
