import itertools
import math

import numpy as np
import pytest
from intervals_by_hand import bca_over_every_resample, wilson_by_hand
from scipy.integrate import quad
from scipy.stats import beta, permutation_test

from dynprune.evaluation import statistics as statistics_module
from dynprune.evaluation.comparisons import (
    compare,
    grouped_difference,
    holm,
    over_seeds,
    paired_difference,
    paired_difference_over_seeds,
)
from dynprune.evaluation.statistics import Interval


def mcnemar_by_hand(wins, losses):
    n = wins + losses
    tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


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


@pytest.mark.slow
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


@pytest.mark.slow
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
