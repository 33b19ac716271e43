import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from intervals_by_hand import Z, bca_over_every_resample, wilson_by_hand

from dynprune.evaluation.statistics import (
    Interval,
    mean_interval,
    median_interval,
    ratio_interval,
)


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


def bca_of_a_ratio_over_every_resample(above, below, confidence=0.95):
    """BCa of a ratio of means from its definition, with all n**n resamples of the queries."""
    above, below = np.array(above), np.array(below)
    n = len(above)
    ratio = above.sum() / below.sum()
    ratios = np.sort([above[list(i)].sum() / below[list(i)].sum() for i in itertools.product(range(n), repeat=n)])
    normal = NormalDist()
    bias = normal.inv_cdf((np.mean(ratios < ratio - 1e-12) + np.mean(ratios <= ratio + 1e-12)) / 2)
    left_out = np.array([np.delete(above, i).sum() / np.delete(below, i).sum() for i in range(n)])
    spread = left_out.mean() - left_out
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    bounds = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + normal.inv_cdf(tail)
        bounds.append(np.quantile(ratios, normal.cdf(bias + z / (1 - acceleration * z))))
    return bounds


def test_interval_of_a_ratio_is_the_bca_over_every_resample_of_the_queries():
    above, below = [0.4, -0.3, 1.2, 0.9, 0.1, 1.6], [1.0, 0.6, 1.1, 2.0, 0.7, 1.5]
    interval = ratio_interval(above, below)
    assert interval.mean == pytest.approx(3.9 / 6.9)
    assert (interval.low, interval.high) == pytest.approx(bca_of_a_ratio_over_every_resample(above, below), abs=0.02)


def test_interval_of_a_ratio_of_many_queries_is_close_to_the_delta_methods():
    rng = np.random.default_rng(5)
    below = rng.normal(1.0, 0.5, 600)
    above = 0.4 * below + rng.normal(0, 0.3, 600)
    ratio = above.mean() / below.mean()
    half = Z * (above - ratio * below).std(ddof=1) / math.sqrt(600) / below.mean()
    interval = ratio_interval(above, below)
    assert (interval.low, interval.high) == pytest.approx((ratio - half, ratio + half), abs=0.1 * half)


def test_a_ratio_that_is_the_same_for_every_query_has_no_width():
    assert ratio_interval([0.5, 1.0, 1.5], [1.0, 2.0, 3.0]) == Interval(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "below", [[0.0] * 8, [-1.0] * 8, [1.0, -1.0] * 4, [1.0, 1.0, -1.0, -1.0, 1.0, -1.0, 1.0, -0.9], [1.0] + [0.0] * 7]
)
def test_nothing_is_divided_by_a_denominator_that_is_not_above_0_beyond_chance(below):
    assert ratio_interval([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0], below) is None


def test_a_ratio_needs_the_same_queries_above_and_below():
    with pytest.raises(ValueError, match="3 scores and the other 2"):
        ratio_interval([1, 0, 1], [1, 1])
