import itertools

import numpy as np
import pytest

from dynprune.evaluation import statistics as statistics_module
from dynprune.evaluation.curves import (
    BudgetCurve,
    BudgetPoint,
    at_speed,
    average_seeds,
    compare_at_speed,
    covers,
    gap_closed,
    merge_equal,
)


def point(layers, correct, measured=None, cost=0.0):
    return BudgetPoint(layers, (layers - cost) / 30, measured, np.array(correct, dtype=float))


def curve(*points, name="router-dpo"):
    return BudgetCurve(name, points)


STATIC = curve(point(3, [1, 1, 0, 1], 0.08), point(6, [1, 0, 0, 1], 0.16), point(12, [0, 0, 1, 0], 0.3), name="static")


def test_between_two_budgets_each_query_is_interpolated_and_so_are_layers_and_times():
    between = at_speed(STATIC, 0.15)  # 4.5 layers: halfway from 3 to 6.
    np.testing.assert_allclose(between.correct_N, [1, 0.5, 0, 1])
    assert between.mean_pruned_layers == pytest.approx(4.5)
    assert between.nominal_speedup == pytest.approx(0.15)
    assert between.measured_speedup == pytest.approx(0.12)
    third = at_speed(STATIC, 8, "mean_pruned_layers")
    np.testing.assert_allclose(third.correct_N, [2 / 3, 0, 1 / 3, 2 / 3])
    np.testing.assert_allclose(at_speed(STATIC, 0.195, "measured_speedup").correct_N, [0.75, 0, 0.25, 0.75])


def test_accuracy_at_a_speed_is_numpys_interpolation_of_the_accuracies():
    rng = np.random.default_rng(0)
    layers = rng.permutation(np.sort(rng.uniform(1, 12, 6)))
    points = [point(k, rng.integers(0, 2, 50), cost=1.0) for k in layers]
    order = np.argsort(layers)
    speeds, accuracies = (layers[order] - 1) / 30, np.array([points[i].correct_N.mean() for i in order])
    for speed in rng.uniform(speeds[0], speeds[-1], 20):
        assert at_speed(curve(*points), speed).correct_N.mean() == pytest.approx(np.interp(speed, speeds, accuracies))


def test_the_interpolation_is_what_a_coin_between_the_two_budgets_reaches():
    layers_N = np.array([[2, 4, 3, 3], [6, 5, 8, 5]])
    correct_N = np.array([[1, 1, 0, 1], [0, 1, 0, 0]])
    budgets = [point(layers.mean(), correct) for layers, correct in zip(layers_N, correct_N, strict=True)]
    # Every outcome of four coins that fall on the larger budget with 1/4, weighted by its probability.
    layers, accuracy = 0.0, np.zeros(4)
    for coins in itertools.product([0, 1], repeat=4):
        chance = np.prod([0.25 if coin else 0.75 for coin in coins])
        layers += chance * np.mean([layers_N[coin, i] for i, coin in enumerate(coins)])
        accuracy += chance * np.array([correct_N[coin, i] for i, coin in enumerate(coins)])
    mixed = at_speed(curve(*budgets), layers, "mean_pruned_layers")
    np.testing.assert_allclose(mixed.correct_N, accuracy)


def test_a_budget_itself_and_the_ends_of_the_range_are_known():
    for budget in STATIC.points:
        np.testing.assert_array_equal(at_speed(STATIC, budget.nominal_speedup).correct_N, budget.correct_N)
    np.testing.assert_array_equal(at_speed(STATIC, 12 + 1e-12, "mean_pruned_layers").correct_N, [0, 0, 1, 0])


def test_budgets_of_equal_speed_count_as_one():
    tied = curve(point(2, [1, 1]), point(4, [1, 0]), point(4, [0, 0]), point(6, [0, 0]))
    np.testing.assert_allclose(at_speed(tied, 4, "mean_pruned_layers").correct_N, [0.5, 0])
    np.testing.assert_allclose(at_speed(tied, 3, "mean_pruned_layers").correct_N, [0.75, 0.5])


@pytest.mark.parametrize(
    ("speed", "axis"), [(0.09, "nominal_speedup"), (12.5, "mean_pruned_layers"), (0.31, "measured_speedup")]
)
def test_nothing_is_said_outside_the_range(speed, axis):
    assert not covers(STATIC, speed, axis)
    with pytest.raises(ValueError, match=f"curve of static goes from .* in {axis}, so nothing is known at {speed}"):
        at_speed(STATIC, speed, axis)


def test_a_curve_without_times_has_no_measured_speed_and_untimed_points_are_left_out():
    untimed = curve(point(3, [1]), point(6, [0]))
    assert not covers(untimed, 0.1, "measured_speedup")
    with pytest.raises(ValueError, match="router-dpo has no measured_speedup; time it with"):
        at_speed(untimed, 0.1, "measured_speedup")
    partly = curve(point(3, [1], 0.1), point(6, [1]), point(9, [0], 0.3))
    np.testing.assert_allclose(at_speed(partly, 0.2, "measured_speedup").correct_N, [0.5])
    assert at_speed(partly, 0.15).measured_speedup is None


def test_a_comparison_at_equal_speed_is_paired_and_has_the_bca_interval_of_the_interpolated_differences():
    router = curve(point(2, [1, 1, 1, 0, 1, 0]), point(7, [1, 1, 0, 0, 1, 1]))
    static = curve(point(4, [1, 0, 1, 0, 1, 0]), point(6, [0, 0, 1, 0, 1, 0]), name="static")
    result = compare_at_speed(router, static, 5, "mean_pruned_layers")
    differences = np.array([1 - 0.5, 1, 0.4 - 1, 0, 0, 0.6])
    assert result.difference.mean == pytest.approx(differences.mean())
    assert (result.wins, result.losses) == (3, 1)
    # The percentile interval over all 6**6 resamples is near BCa's for so little skew.
    means = [np.mean(resample) for resample in itertools.product(differences, repeat=6)]
    assert (result.difference.low, result.difference.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.06)


def test_pairing_sharpens_the_comparison_of_methods_that_agree_on_most_queries():
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, 300)
    better = right.copy()
    better[np.flatnonzero(right == 0)[:20]] = 1
    a, b = curve(point(6, better)), curve(point(6, right), name="static")
    paired = compare_at_speed(a, b, 6, "mean_pruned_layers").difference
    unpaired = 2 * 1.96 * np.sqrt(better.var() / 300 + right.var() / 300)
    assert paired.low > 0
    assert paired.high - paired.low < unpaired / 2


def test_methods_on_different_queries_are_not_compared():
    with pytest.raises(ValueError, match="4 scores and the other 2"):
        compare_at_speed(STATIC, curve(point(3, [1, 0]), point(6, [1, 0])), 0.15)


def test_share_of_the_gap_is_that_of_the_accuracies():
    static = curve(point(6, [1] * 20 + [0] * 30), name="static")  # 40%
    oracle = curve(point(6, [1] * 40 + [0] * 10), name="oracle")  # 80%
    router = curve(point(6, [1] * 15 + [0] * 5 + [1] * 11 + [0] * 19))  # 52%: 5 lost, 11 won
    share = gap_closed(router, static, oracle, 6, "mean_pruned_layers")
    assert share.mean == pytest.approx((0.52 - 0.4) / (0.8 - 0.4))
    assert share.low < 0.3 < share.high


def test_interval_of_the_share_is_that_of_a_bootstrap_written_out():
    rng = np.random.default_rng(1)
    static_N = rng.random(300) < 0.4
    oracle_N = static_N | (rng.random(300) < 0.5)
    router_N = np.where(rng.random(300) < 0.5, oracle_N, static_N & (rng.random(300) < 0.9))
    curves = [curve(point(6, correct)) for correct in (router_N, static_N, oracle_N)]
    share = gap_closed(*curves, 0.2)
    draws = rng.integers(0, 300, (4000, 300))
    router_B, static_B, oracle_B = (correct.astype(float)[draws].mean(axis=1) for correct in (router_N, static_N, oracle_N))
    low, high = np.quantile((router_B - static_B) / (oracle_B - static_B), [0.025, 0.975])
    assert (share.low, share.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_a_router_as_good_as_the_oracle_closes_the_whole_gap_and_one_like_static_none_of_it():
    static, oracle = curve(point(6, [1] * 5 + [0] * 15)), curve(point(6, [1] * 15 + [0] * 5))
    for router, share in ((oracle, 1.0), (static, 0.0)):
        closed = gap_closed(router, static, oracle, 0.2)
        assert (closed.mean, closed.low, closed.high) == (share, share, share)


@pytest.mark.parametrize("oracle", [[1, 0, 1, 0] * 5, [1, 0, 0, 0] * 5, [1, 0, 1, 0] * 4 + [1, 1, 1, 0]])
def test_no_share_of_a_gap_that_is_not_there_or_may_be_chance(oracle):
    static, router = [1, 0, 1, 0] * 5, [1, 1, 1, 0] * 5
    assert gap_closed(curve(point(6, router)), curve(point(6, static)), curve(point(6, oracle)), 0.2) is None


def test_a_share_of_the_gap_needs_the_same_queries():
    one, two = curve(point(6, [1, 0])), curve(point(6, [1, 0, 1]))
    with pytest.raises(ValueError, match="router has 2, static 3 and the oracle 2"):
        gap_closed(one, two, one, 0.2)


def test_shares_of_the_gap_cover_the_truth_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(statistics_module, "_RESAMPLES", 399)
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(300):
        # Right with static 40%, with the oracle 70%; the router wins half of that gap and loses a tenth of what static has.
        static_N = rng.random(200) < 0.4
        gained_N = ~static_N & (rng.random(200) < 0.5)
        router_N = (static_N & (rng.random(200) < 0.9)) | (gained_N & (rng.random(200) < 0.5))
        share = gap_closed(*(curve(point(6, c)) for c in (router_N, static_N, static_N | gained_N)), 0.2)
        missed += not share.low <= (0.15 - 0.04) / 0.3 <= share.high
    # A binomial count of 300 at 5% lies in 5 to 27 with a probability of 0.999.
    assert 5 <= missed <= 27


def test_comparisons_at_equal_speed_cover_the_truth_though_a_routers_speed_is_a_sample_too(monkeypatch):
    """The bootstrap takes the mean layers of a router as given; over test sets drawn anew they vary."""
    monkeypatch.setattr(statistics_module, "_RESAMPLES", 399)
    rng = np.random.default_rng(4)

    def curves(size):
        hard_N = rng.random(size)
        budgets = []
        for shift in (3, 7):
            layers_N = shift + rng.integers(0, 4, size) - 2 * (hard_N > 0.5)
            budgets.append(point(layers_N.mean(), rng.random(size) < 0.95 - 0.4 * hard_N - 0.05 * layers_N))
        static = curve(*(point(k, rng.random(size) < 0.95 - 0.4 * hard_N - 0.05 * k) for k in (2, 6)), name="static")
        return curve(*budgets), static

    truth = np.subtract(*(at_speed(c, 4.5, "mean_pruned_layers").correct_N.mean() for c in curves(1_000_000)))
    missed = 0
    for _ in range(300):
        difference = compare_at_speed(*curves(200), 4.5, "mean_pruned_layers").difference
        missed += not difference.low <= truth <= difference.high
    assert 5 <= missed <= 27


def test_seeds_are_averaged_budget_by_budget_and_query_by_query():
    first = curve(point(3, [1, 0, 1], 0.1), point(6, [0, 0, 1], 0.2))
    second = curve(point(4, [1, 1, 0], 0.12), point(7, [0, 0, 1]))
    low, high = average_seeds([first, second]).points
    np.testing.assert_allclose(low.correct_N, [1, 0.5, 0.5])
    assert (low.mean_pruned_layers, low.nominal_speedup) == pytest.approx((3.5, 3.5 / 30))
    assert low.measured_speedup == pytest.approx(0.11)
    np.testing.assert_allclose(high.correct_N, [0, 0, 1])
    assert high.measured_speedup is None


@pytest.mark.parametrize("curves", [[], [STATIC, curve(*STATIC.points[:2])], [STATIC, curve(*[point(3, [1])] * 3)]])
def test_seeds_with_different_budgets_or_queries_are_not_averaged(curves):
    with pytest.raises(ValueError, match="averaged budget by budget"):
        average_seeds(curves)


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        ([], "no points"),
        ([point(3, [1]), point(6, [1, 0])], r"different numbers of queries \(\[1, 2\]\)"),
        ([point(3, [1, 2])], r"lies in \[0, 1\]"),
        ([point(3, [np.nan, 0])], r"lies in \[0, 1\]"),
    ],
)
def test_points_that_make_no_curve_are_refused(points, sentence):
    with pytest.raises(ValueError, match=sentence):
        curve(*points)


def test_several_sets_of_one_size_are_one_point_by_their_mean():
    draws = curve(point(3, [1, 0, 0], 0.08), point(7, [1, 0, 0], 0.1), point(7, [0, 1, 0], 0.2), point(7, [0, 1, 0], 0.3))
    small, large = merge_equal(draws).points
    np.testing.assert_allclose(small.correct_N, [1, 0, 0])
    np.testing.assert_allclose(large.correct_N, [1 / 3, 2 / 3, 0])
    assert (large.mean_pruned_layers, large.nominal_speedup) == pytest.approx((7, 7 / 30))
    assert large.measured_speedup == pytest.approx(0.2)
    untimed = merge_equal(curve(point(7, [1], 0.1), point(7, [0])))
    assert untimed.points[0].measured_speedup is None
    # A router costs a layer: as many layers, another budget.
    assert len(merge_equal(curve(point(7, [1]), point(7, [1], cost=1))).points) == 2
