import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import beta, permutation_test

from dynprune.evaluation import statistics as statistics_module
from dynprune.evaluation.statistics import (
    Interval,
    compare,
    grouped_difference,
    holm,
    mean_interval,
    median_interval,
    over_seeds,
    paired_difference,
    paired_difference_over_seeds,
    ratio_interval,
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


def test_seeds_are_averaged_for_each_query_before_queries_are_resampled():
    scores = [[1, 0, 1, 1, 0, 1], [1, 0, 0, 1, 0, 1], [1, 1, 0, 1, 0, 1]]
    summary = over_seeds(scores)
    assert summary.mean.mean == pytest.approx(11 / 18)
    low, high = bca_over_every_resample([1, 1 / 3, 1 / 3, 1, 0, 1])
    assert (summary.mean.low, summary.mean.high) == pytest.approx((low, high), abs=0.07)
    # The seeds' own means are 4/6, 3/6 and 4/6.
    assert summary.spread == pytest.approx(math.sqrt(2 * (1 / 18) ** 2 + (2 / 18) ** 2) / math.sqrt(2))
    assert summary.seeds == 3


def test_a_single_seed_is_a_share_with_wilsons_interval_and_no_spread():
    summary = over_seeds([[1] * 7 + [0] * 3])
    assert (summary.mean.low, summary.mean.high) == pytest.approx(wilson_by_hand(7, 10))
    assert (summary.spread, summary.seeds) == (None, 1)


def test_more_seeds_that_say_the_same_do_not_narrow_an_interval():
    one = np.random.default_rng(0).integers(0, 2, 60)
    other = np.random.default_rng(1).integers(0, 2, 60)
    single = paired_difference(one, other)
    assert paired_difference_over_seeds([one] * 5, [other] * 5) == single
    assert paired_difference_over_seeds([one] * 5, other) == single


def test_difference_over_seeds_is_that_of_the_averages_by_query():
    a, b = [[1, 0, 1, 1], [1, 1, 0, 1]], [[0, 0, 1, 1], [0, 0, 0, 1], [1, 0, 0, 0]]
    result = paired_difference_over_seeds(a, b)
    assert result.difference.mean == pytest.approx(6 / 8 - 4 / 12)
    # By query: 1 - 1/3, 1/2 - 0, 1/2 - 1/3, 1 - 2/3.
    assert (result.wins, result.losses) == (4, 0)
    low, high = bca_over_every_resample([2 / 3, 1 / 2, 1 / 6, 1 / 3])
    assert (result.difference.low, result.difference.high) == pytest.approx((low, high), abs=0.05)


def test_p_over_seeds_is_the_share_of_all_sign_flips_that_differ_as_much():
    a = [[1, 0, 1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0, 1, 1]]
    b = [[0, 0, 1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0, 1]]
    difference_N = np.mean(a, axis=0) - np.mean(b, axis=0)
    flipped = [abs(np.dot(signs, difference_N)) for signs in itertools.product([-1, 1], repeat=8)]
    expected = np.mean(np.array(flipped) >= abs(difference_N.sum()) - 1e-9)
    assert 0.01 < expected < 0.2
    assert paired_difference_over_seeds(a, b).p_value == pytest.approx(expected)
    assert paired_difference_over_seeds(b, a).p_value == pytest.approx(expected)


@pytest.mark.parametrize(("wins", "losses"), [(10, 3), (0, 6), (4, 4)])
def test_p_over_seeds_that_agree_but_for_a_query_without_difference_is_mcnemars(wins, losses):
    a = [[1] * wins + [0] * losses + [1, 0]] * 2
    b = [[0] * wins + [1] * losses + [1, 0]] * 2
    # One seed of each row alone gets the last query right: averages of a half, and no difference.
    a[0], b[1] = [*a[0][:-1], 1], [*b[1][:-1], 1]
    assert paired_difference_over_seeds(a, b).p_value == pytest.approx(mcnemar_by_hand(wins, losses))


def test_p_over_seeds_of_many_queries_is_that_of_scipys_permutations():
    rng = np.random.default_rng(2)
    skill_N = rng.beta(0.6, 0.5, 200)
    a, b = rng.random((3, 200)) < skill_N + 0.04, rng.random((2, 200)) < skill_N
    permuted = permutation_test(
        (a.mean(axis=0), b.mean(axis=0)),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    )
    assert paired_difference_over_seeds(a, b).p_value == pytest.approx(permuted.pvalue, abs=0.01)


def test_comparisons_of_rows_with_seeds_have_p_values_in_the_family():
    scores = {"static-2": [0] * 6 + [1] * 6, "router-dpo": [[1] * 12, [1] * 11 + [0]], "router-fbc": [[0.5] * 12] * 2}
    dpo, fbc = compare(scores, [("router-dpo", "static-2"), ("router-fbc", "static-2")], "ast_match")
    assert (dpo.n, dpo.wins, dpo.losses) == (12, 6, 1)
    assert dpo.difference.mean == pytest.approx(5.5 / 12)
    # Six differences of 1 and one of -1/2: the sums of 5.5 and more are those of 1, 1, 1, 1, 1, 1 with either half.
    assert dpo.p_value == dpo.p_holm == pytest.approx(2 * 2 / 2**7)
    assert fbc.p_value is None


@pytest.mark.parametrize("scores", [[], [[[1]]], [[], []]])
def test_scores_that_are_not_by_seed_and_query_are_refused(scores):
    with pytest.raises(ValueError, match=r"shape \[seeds, queries\]"):
        over_seeds(scores)


def test_intervals_over_seeds_cover_the_truth_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(statistics_module, "_RESAMPLES", 399)
    rng = np.random.default_rng(7)
    # Mean of what the gain leaves of 0.1 where skill is Beta(0.6, 0.5), by numerical integration.
    truth = quad(lambda skill: min(0.1, 1 - skill) * beta(0.6, 0.5).pdf(skill), 0, 1, points=[0.9])[0]
    missed = 0
    for _ in range(400):
        skill_N = rng.beta(0.6, 0.5, 150)
        a_SN = rng.random((3, 150)) < np.clip(skill_N + 0.1, 0, 1)
        b_SN = rng.random((3, 150)) < skill_N
        difference = paired_difference_over_seeds(a_SN, b_SN).difference
        missed += not difference.low <= truth <= difference.high
    # A binomial count of 400 at 5% lies in 7 to 36 with a probability of 0.999.
    assert 7 <= missed <= 36


def test_resampling_groups_of_one_query_is_resampling_queries():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (2, 120)).astype(float)
    got = grouped_difference(a, b, np.arange(120))
    want = paired_difference(a, b).difference
    assert got.mean == pytest.approx(want.mean)
    # The same bootstrap through another statistic: equal but for the random numbers.
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=0.02)


def test_queries_that_come_twice_count_once_where_groups_are_resampled():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 2, (2, 80)).astype(float)
    once = paired_difference(a, b).difference
    twice = grouped_difference(np.tile(a, 2), np.tile(b, 2), np.tile(np.arange(80), 2))
    naive = paired_difference(np.tile(a, 2), np.tile(b, 2)).difference
    assert twice.mean == pytest.approx(once.mean)
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high), abs=0.02)
    assert twice.high - twice.low > 1.3 * (naive.high - naive.low)


def test_the_interval_over_groups_covers_where_queries_of_a_group_fail_together():
    rng = np.random.default_rng(2)
    covered, naive = [], []
    for _ in range(150):
        # 40 groups of 5 queries; a group's rows differ by a draw of its own, 0 in the mean.
        group = np.repeat(np.arange(40), 5)
        difference = np.repeat(rng.normal(size=40), 5) + rng.normal(size=200) * 0.3
        for found, interval in (
            (covered, grouped_difference(difference, np.zeros(200), group)),
            (naive, paired_difference(difference, np.zeros(200)).difference),
        ):
            found.append(interval.low <= 0 <= interval.high)
    # 95% are meant; three standard errors of 150 draws are 5 points. Single queries resampled, about 62% cover.
    assert np.mean(covered) > 0.89
    assert np.mean(naive) < 0.8
