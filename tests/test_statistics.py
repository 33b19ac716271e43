import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

from dynprune.evaluation.statistics import (
    Interval,
    compare,
    holm,
    mean_interval,
    median_interval,
    paired_difference,
)

Z = 1.959963984540054


def wilson_by_hand(successes, n, z=Z):
    p = successes / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return center - half, center + half


def mcnemar_by_hand(wins, losses):
    n = wins + losses
    tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


def bca_over_every_resample(sample, confidence=0.95):
    """BCa of the mean from its definition, with all n**n resamples in place of random ones."""
    n = len(sample)
    means = np.sort([np.mean(resample) for resample in itertools.product(sample, repeat=n)])
    normal, mean = NormalDist(), np.mean(sample)
    below = (np.mean(means < mean - 1e-12) + np.mean(means <= mean + 1e-12)) / 2
    bias = normal.inv_cdf(below)
    left_out = np.array([np.mean(np.delete(sample, i)) for i in range(n)])
    spread = left_out.mean() - left_out
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    bounds = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + normal.inv_cdf(tail)
        bounds.append(np.quantile(means, normal.cdf(bias + z / (1 - acceleration * z))))
    return bounds


@pytest.mark.parametrize(("successes", "n"), [(7, 10), (61, 100), (0, 20), (20, 20), (1, 1)])
def test_interval_of_a_share_is_wilsons(successes, n):
    interval = mean_interval([1] * successes + [0] * (n - successes))
    assert interval.mean == successes / n
    assert (interval.low, interval.high) == pytest.approx(wilson_by_hand(successes, n), abs=1e-9)


def test_wilson_interval_of_7_of_10_has_the_published_bounds():
    interval = mean_interval([True] * 7 + [False] * 3)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.3968, 0.8922)


def test_confidence_sets_the_width_of_a_share_s_interval():
    interval = mean_interval([1] * 7 + [0] * 3, confidence=0.9)
    expected = wilson_by_hand(7, 10, z=1.6448536269514722)
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-9)


def test_interval_of_a_skewed_mean_is_the_bca_over_every_resample():
    sample = [-5.0, 0.3, 1.1, 2.7, 4.2, 10.0]
    interval = mean_interval(sample)
    low, high = bca_over_every_resample(sample)
    assert interval.mean == pytest.approx(np.mean(sample))
    assert interval.low == pytest.approx(low, abs=0.12)
    assert interval.high == pytest.approx(high, abs=0.12)


def test_interval_of_a_large_symmetric_sample_is_close_to_the_normal_one():
    values = np.random.default_rng(3).normal(2.0, 1.0, size=800)
    half = Z * values.std(ddof=1) / math.sqrt(values.size)
    interval = mean_interval(values)
    assert (interval.low, interval.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_same_seed_gives_the_same_interval_and_another_seed_another():
    values = [0.1, 0.5, 0.9, 0.2, 0.7]
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


@pytest.mark.parametrize("values", [[3.5], [-5.0] * 30, [0.3 - 0.2, 0.4 - 0.3]])
def test_interval_of_values_without_spread_collapses_onto_the_mean(values):
    interval = mean_interval(values)
    assert interval.low == interval.high == interval.mean == pytest.approx(values[0])


def test_median_interval_is_the_percentile_bootstraps():
    sample = [0.02, 0.05, 0.11, 0.12, 0.30]
    medians = [np.median(resample) for resample in itertools.product(sample, repeat=5)]
    interval = median_interval(sample)
    assert interval.median == 0.11
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(medians, [0.025, 0.975])))


def test_median_interval_of_one_value_collapses_onto_it():
    interval = median_interval([0.2])
    assert (interval.median, interval.low, interval.high) == (0.2, 0.2, 0.2)


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [float("inf"), 1.0]])
def test_values_that_are_no_sample_are_refused(values):
    with pytest.raises(ValueError, match="An interval needs"):
        mean_interval(values)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_a_confidence_outside_0_to_1_is_refused(confidence):
    with pytest.raises(ValueError, match="between 0 and 1"):
        mean_interval([0, 1], confidence=confidence)


@pytest.mark.parametrize(("wins", "losses"), [(10, 3), (3, 10), (0, 6), (4, 4), (0, 0)])
def test_mcnemar_p_is_the_two_sided_binomial_on_discordant_queries(wins, losses):
    a = [1] * wins + [0] * losses + [1] * 5 + [0] * 5
    b = [0] * wins + [1] * losses + [1] * 5 + [0] * 5
    result = paired_difference(a, b)
    assert (result.wins, result.losses) == (wins, losses)
    assert result.p_value == pytest.approx(mcnemar_by_hand(wins, losses))
    assert result.difference.mean == pytest.approx((wins - losses) / len(a))


def test_paired_interval_follows_the_differences_not_the_spread_between_queries():
    easy_and_hard = np.linspace(0, 100, 40)
    gain = np.tile([0.9, 1.1], 20)
    difference = paired_difference(easy_and_hard + gain, easy_and_hard).difference
    assert 0.9 < difference.low < 1.0 < difference.high < 1.1


def test_paired_interval_is_the_bca_of_the_differences():
    a, b = np.array([3.0, 1.0, 4.0, 1.5, 9.0, 2.6]), np.array([2.0, 1.8, 2.8, 1.8, 2.8, 4.5])
    difference = paired_difference(a, b).difference
    assert (difference.low, difference.high) == pytest.approx(bca_over_every_resample(a - b), abs=0.12)


def test_scores_that_are_not_0_or_1_have_no_mcnemar_p():
    assert paired_difference([0.5, 1.0, 0.0], [1.0, 1.0, 0.0]).p_value is None


def test_rows_scored_on_different_numbers_of_queries_are_not_compared():
    with pytest.raises(ValueError, match="2 scores and the other 3"):
        paired_difference([0, 1], [0, 1, 1])


def test_holm_multiplies_step_by_step_and_never_decreases():
    # Sorted: 0.01 * 4, then 0.02 * 3, then 0.03 * 2 (raised to the 0.06 before it), then 0.5 * 1.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])


def test_holm_stops_at_1_and_takes_no_tests():
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_comparisons_made_together_are_corrected_together():
    scores = {"original": [1] * 12, "static-2": [0] * 6 + [1] * 6, "router-dpo": [0] * 8 + [1] * 4}
    first, second = compare(scores, [("static-2", "original"), ("router-dpo", "original")], "ast_match", seed=4)
    assert (first.row, first.baseline, first.score, first.n) == ("static-2", "original", "ast_match", 12)
    assert (first.wins, first.losses) == (0, 6)
    assert first.difference.mean == -0.5
    assert (first.p_value, second.p_value) == pytest.approx((2 / 2**6, 2 / 2**8))
    assert (first.p_holm, second.p_holm) == pytest.approx((2 / 2**6, 4 / 2**8))


def test_comparisons_without_a_p_value_leave_the_others_correction_alone():
    scores = {"a": [1] * 6, "b": [0] * 6, "c": [0.5] * 6}
    without, tested = compare(scores, [("a", "c"), ("a", "b")], "ratio_function_calls")
    assert (without.p_value, without.p_holm) == (None, None)
    assert tested.p_holm == tested.p_value == pytest.approx(2 / 2**6)
    assert without.difference == Interval(0.5, 0.5, 0.5)


def test_comparing_an_unknown_row_names_the_rows_there_are():
    with pytest.raises(ValueError, match=r"'router-ipo'.*original, static-2"):
        compare({"original": [1], "static-2": [0]}, [("router-ipo", "original")], "ast_match")
