import numpy as np
import pytest

from dynprune.evaluation.speedup import measured_speedup, nominal_speedup


@pytest.mark.parametrize(
    ("mean_pruned_layers", "router_cost_layers", "percent"),
    [(0, 0, 0.0), (2, 0, 7.1), (3, 0, 10.7), (5, 0, 17.9), (5.5, 1, 16.1), (5.8, 1, 17.1), (6, 1, 17.9)],
)
def test_nominal_speedup_is_that_of_the_thesis_with_28_layers(mean_pruned_layers, router_cost_layers, percent):
    assert round(100 * nominal_speedup(mean_pruned_layers, router_cost_layers, 28), 1) == percent


def test_router_that_prunes_less_than_it_costs_has_a_negative_nominal_speedup():
    assert nominal_speedup(0.4, 1, 30) == pytest.approx(-0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((29, 1, 28), "0 to 28"),
        ((-1, 0, 28), "0 to 28"),
        ((2, -1, 28), "0 or more"),
        ((0, 0, 0), "at least one"),
    ],
)
def test_impossible_layer_counts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        nominal_speedup(*arguments)


def test_measured_speedup_is_the_median_of_each_querys_own_ratio():
    # Pooling the times instead would give 1 - 99/111.
    result = measured_speedup([0.5, 8.0, 90.5], [1.0, 10.0, 100.0])
    assert result.median == pytest.approx(0.2)
    assert (result.low, result.high) == pytest.approx((0.095, 0.5))


def test_measured_speedup_is_paired_and_so_exact_where_every_query_gains_the_same():
    full = np.geomspace(0.1, 60, 25)
    result = measured_speedup(0.8 * full, full)
    assert (result.median, result.low, result.high) == pytest.approx((0.2, 0.2, 0.2))


def test_measured_speedup_of_a_slower_run_is_negative():
    assert measured_speedup([1.5], [1.0]).median == pytest.approx(-0.5)


def test_times_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="1 times with pruning and 2 without"):
        measured_speedup([1.0], [1.0, 2.0])


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_not_positive_is_named(wrong):
    with pytest.raises(ValueError, match="query 1 without pruning"):
        measured_speedup([1.0, 1.0], [1.0, wrong])
