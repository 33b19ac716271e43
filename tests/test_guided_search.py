"""Beam search and Monte-Carlo tree search on rewards whose best sets are known by brute force."""

import itertools
import random
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprune.exploration.beam import BeamSearch
from dynprune.exploration.mcts import MonteCarloTreeSearch
from dynprune.exploration.strategy import Generate, likeliest_of_each_size

UNLIMITED = 10_000


def search(strategy, num_layers, nats, seed=0, score=lambda configuration: 1.0):
    """Drives a search to its end; returns its proposals, its estimates and what it generated after no pruning."""
    proposals = strategy.propose(num_layers, random.Random(seed))
    made, estimates, generated = [], {}, {}
    proposal = next(proposals)
    try:
        while True:
            made.append(proposal)
            assert proposal.configurations, "a proposal may not be empty"
            known, value = (generated, score) if isinstance(proposal, Generate) else (estimates, nats)
            for configuration in proposal.configurations:
                assert list(configuration) == sorted(set(configuration) & set(range(num_layers)))
                assert configuration not in known, "asked for twice"
                known[configuration] = value(configuration)
            proposal = proposals.send([known[configuration] for configuration in proposal.configurations])
    except StopIteration:
        assert made[0] == Generate(((),))
        return made, estimates, [configuration for configuration in generated if configuration]


def additive(num_layers, seed=0):
    """Each layer costs its own; two sets are never alike."""
    costs = [random.Random(f"{seed}-{layer}").expovariate(5) for layer in range(num_layers)]
    return lambda configuration: 0.1 + sum(costs[layer] for layer in configuration)


def rugged(configuration):
    """No structure at all: only looking at a set tells what it is worth."""
    return random.Random(repr(configuration)).random()


def every_subset(layers):
    return [c for size in range(len(layers) + 1) for c in itertools.combinations(layers, size)]


def best_of_size(nats, layers, size):
    return min(itertools.combinations(layers, size), key=nats)


BEAM = BeamSearch(candidates=None, max_estimates=UNLIMITED, max_configurations=UNLIMITED)
MCTS = MonteCarloTreeSearch(max_estimates=UNLIMITED, max_configurations=UNLIMITED)


def with_(strategy, **changes):
    return type(strategy)(**{**vars(strategy), **changes})


# What they find


@pytest.mark.parametrize("num_layers", [1, 4, 8])
@pytest.mark.parametrize("nats", [additive(8), rugged])
@pytest.mark.parametrize("strategy", [with_(BEAM, width=UNLIMITED), MCTS, with_(MCTS, uct_constant=5.0, widening=3.0)])
def test_where_nothing_is_left_out_every_subset_is_estimated_and_the_best_of_each_size_is_generated(strategy, num_layers, nats):
    _, estimates, generated = search(with_(strategy, confirmed=1), num_layers, nats)

    assert sorted(estimates) == sorted(every_subset(range(num_layers)))
    assert generated == [best_of_size(nats, range(num_layers), size) for size in range(1, num_layers + 1)]


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_one_wide_finds_the_best_sets_of_layers_that_cost_their_own_each(seed):
    nats = additive(12, seed)
    _, estimates, generated = search(with_(BEAM, width=1, confirmed=1, depth=6), 12, nats)

    assert generated == [best_of_size(nats, range(12), size) for size in range(1, 7)]
    assert len(estimates) == 1 + 12 + 11 + 10 + 9 + 8 + 7


def test_a_beam_keeps_the_best_of_a_depth_and_estimates_their_children_alone():
    made, estimates, _ = search(with_(BEAM, width=2, depth=3), 6, rugged)

    for smaller, larger in itertools.pairwise([proposal.configurations for proposal in made[2:-1]]):
        best = sorted(smaller, key=estimates.get)[:2]
        assert set(larger) == {tuple(sorted({*parent, layer})) for parent in best for layer in set(range(6)) - set(parent)}


def test_a_tree_search_finds_better_sets_than_as_many_random_ones():
    def best(sets, nats):
        return [min(nats(c) for c in sets if len(c) == size) for size in range(1, 7)]

    found, at_random = [], []
    for seed in range(20):
        nats, rng = additive(20, seed), random.Random(seed)
        found.append(best(search(MonteCarloTreeSearch(depth=6, max_estimates=96), 20, nats, seed)[1], nats))
        at_random.append(best([rng.sample(range(20), size) for size in range(1, 7) for _ in range(16)], nats))
    for size in range(3, 7):
        mean_found, mean_at_random = (fmean(row[size - 1] for row in rows) for rows in (found, at_random))
        assert mean_found < 0.8 * mean_at_random


def test_a_tree_search_returns_to_what_was_worth_more_the_more_the_smaller_its_constant():
    def share_below_the_good_layer(uct_constant):
        shares = []
        for seed in range(10):
            strategy = MonteCarloTreeSearch(depth=5, uct_constant=uct_constant, max_estimates=150)
            _, estimates, _ = search(strategy, 12, lambda c: 0.0 if 0 in c or not c else 5.0, seed)
            larger = [configuration for configuration in estimates if len(configuration) > 1]
            shares.append(fmean(0 in configuration for configuration in larger))
        return fmean(shares)

    # Of all sets of two to five of twelve layers, 35% have a given one.
    assert share_below_the_good_layer(0.1) > 0.65
    assert share_below_the_good_layer(100.0) < 0.55


# Budgets and duplicates

guided = st.one_of(
    st.builds(
        BeamSearch,
        width=st.integers(1, 5),
        depth=st.integers(1, 9),
        candidates=st.none() | st.integers(1, 5),
        confirmed=st.integers(1, 4),
        max_configurations=st.integers(1, 20),
        max_estimates=st.integers(1, 60),
        excluded_layers=st.lists(st.integers(0, 3), max_size=3),
    ),
    st.builds(
        MonteCarloTreeSearch,
        depth=st.integers(1, 9),
        uct_constant=st.floats(0, 3),
        widening=st.floats(0, 3),
        children_at_once=st.integers(1, 5),
        confirmed=st.integers(1, 4),
        max_configurations=st.integers(1, 20),
        max_estimates=st.integers(1, 60),
        excluded_layers=st.lists(st.integers(0, 3), max_size=3),
    ),
)


@given(strategy=guided, num_layers=st.integers(4, 9), seed=st.integers(0, 10**6), flat=st.booleans())
@settings(max_examples=300, deadline=None)
def test_budgets_are_kept_nothing_is_asked_for_twice_and_the_likeliest_are_confirmed(strategy, num_layers, seed, flat):
    # `search` itself refuses whatever is asked for twice.
    made, estimates, generated = search(strategy, num_layers, (lambda _: 1.0) if flat else rugged, seed)

    assert len(estimates) <= strategy.max_estimates
    assert 1 + len(generated) <= strategy.max_configurations
    assert all(len(configuration) <= strategy.depth for configuration in estimates)
    assert not set(strategy.excluded_layers) & set().union(*estimates)
    assert set(generated) <= set(estimates)
    for size in range(1, num_layers + 1):
        of_size = sorted(value for configuration, value in estimates.items() if len(configuration) == size)
        confirmed = sorted(estimates[configuration] for configuration in generated if len(configuration) == size)
        assert confirmed == of_size[: len(confirmed)]
        assert len(confirmed) <= strategy.confirmed
    again = search(strategy, num_layers, (lambda _: 1.0) if flat else rugged, seed)
    assert again == (made, estimates, generated)


@pytest.mark.parametrize("budget", [1, 2, 3, 17, 50, 256])
@pytest.mark.parametrize("strategy", [with_(BEAM, width=70), MCTS])
def test_a_budget_that_is_smaller_than_the_space_is_spent_to_the_last_estimate(strategy, budget):
    _, estimates, _ = search(with_(strategy, max_estimates=budget), 8, rugged)
    assert len(estimates) == budget


@pytest.mark.parametrize("budget", [1, 2, 7, 16])
@pytest.mark.parametrize("strategy", [BEAM, MCTS])
def test_a_budget_of_generations_is_spent_on_the_best_of_each_size_first(strategy, budget):
    _, _, generated = search(with_(strategy, max_configurations=budget, confirmed=2), 8, additive(8))
    sizes = [len(configuration) for configuration in generated]
    # Of the largest size there is one set only.
    assert sizes == [*range(1, 9), *range(1, 8)][: budget - 1]


@pytest.mark.parametrize("strategy", [BeamSearch(), MonteCarloTreeSearch()])
def test_another_seed_searches_otherwise(strategy):
    assert search(strategy, 12, rugged, seed=3)[1] != search(strategy, 12, rugged, seed=4)[1]


@pytest.mark.parametrize("strategy", [BeamSearch(require_success=1.0), MonteCarloTreeSearch(require_success=1.0)])
def test_a_query_that_the_unpruned_slm_fails_is_left_alone(strategy):
    made, estimates, _ = search(strategy, 12, rugged, score=lambda configuration: 0.9)
    assert (made, estimates) == ([Generate(((),))], {})
    assert len(search(strategy, 12, rugged)[1]) > 1


def test_what_is_worth_generating_is_the_best_of_each_size_then_the_second_best():
    nats = {(): 0.0, (1,): 0.3, (2,): 0.2, (3,): 0.4, (1, 2): 0.9, (1, 2, 3): 0.8, (1, 2, 4): 0.7}

    assert likeliest_of_each_size(nats, 2, 9) == ((2,), (1, 2), (1, 2, 4), (1,), (1, 2, 3))
    assert likeliest_of_each_size(nats, 1, 9) == ((2,), (1, 2), (1, 2, 4))
    assert likeliest_of_each_size(nats, 2, 4) == ((2,), (1, 2), (1, 2, 4), (1,))
    assert likeliest_of_each_size(nats, 2, 0) == ()


# Mistakes


@pytest.mark.parametrize("strategy", [BeamSearch, MonteCarloTreeSearch])
def test_an_excluded_layer_that_is_not_there_is_named_and_one_must_be_left(strategy):
    with pytest.raises(ValueError, match=r"exploration\.strategy\.excluded_layers.*\[12\].*0 to 11"):
        strategy(excluded_layers=[3, 12]).propose(12, random.Random(0))
    with pytest.raises(ValueError, match=r"exploration\.strategy\.excluded_layers leaves none"):
        strategy(excluded_layers=[0, 1]).propose(2, random.Random(0))


@pytest.mark.parametrize(
    ("strategy", "key", "value"),
    [
        *((s, key, 0) for s in (BeamSearch, MonteCarloTreeSearch) for key in ("depth", "confirmed", "max_configurations")),
        *((s, "max_estimates", 0) for s in (BeamSearch, MonteCarloTreeSearch)),
        (BeamSearch, "width", 0),
        (BeamSearch, "candidates", 0),
        (MonteCarloTreeSearch, "children_at_once", 0),
        (MonteCarloTreeSearch, "uct_constant", -0.1),
        (MonteCarloTreeSearch, "widening", -1.0),
    ],
)
def test_the_key_of_a_setting_that_is_too_small_is_named(strategy, key, value):
    with pytest.raises(ValueError, match=rf"exploration\.strategy\.{key}="):
        strategy(**{key: value})
