"""The guarantee, against values by hand and against simulated calibrations whose true risk is known."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats

from dynprune.evaluation.risk_control import binomial_p_value, fewest_queries, last_controlled


def test_p_values_by_hand() -> None:
    assert binomial_p_value(0, 10, 0.1) == pytest.approx(0.9**10)
    assert binomial_p_value(1, 10, 0.1) == pytest.approx(0.9**10 + 10 * 0.1 * 0.9**9)
    assert binomial_p_value(10, 10, 0.1) == 1


def test_the_exact_p_value_is_no_larger_than_hoeffding_bentkus() -> None:
    n, alpha = 200, 0.1
    for losses in range(int(alpha * n)):
        risk = losses / n
        divergence = (risk * math.log(risk / alpha) if risk else 0.0) + (1 - risk) * math.log((1 - risk) / (1 - alpha))
        bentkus = math.e * sum(math.comb(n, i) * alpha**i * (1 - alpha) ** (n - i) for i in range(losses + 1))
        assert binomial_p_value(losses, n, alpha) <= min(math.exp(-n * divergence), bentkus) + 1e-15


def lost(losses: int, n: int = 50) -> list[bool]:
    return [True] * losses + [False] * (n - losses)


def test_the_last_candidate_before_the_first_that_fails_is_taken_by_hand() -> None:
    # With n = 50 and alpha = 0.1: P(Bin ≤ 0) = 0.005, P(Bin ≤ 1) = 0.034, P(Bin ≤ 2) = 0.112.
    assert last_controlled([("a", lost(0)), ("b", lost(1)), ("c", lost(2)), ("d", lost(0))], 0.1, 0.9) == "b"
    assert last_controlled([("a", lost(0)), ("b", lost(1))], 0.1, 0.95) == "b"
    assert last_controlled([("a", lost(2)), ("b", lost(0))], 0.1, 0.9) is None


def test_no_candidate_after_the_first_that_fails_is_asked_for() -> None:
    asked = []

    def candidates() -> Iterator[tuple[int, list[bool]]]:
        for losses in (0, 20, 0):
            asked.append(losses)
            yield losses, lost(losses)

    assert last_controlled(candidates(), 0.1, 0.9) == 0
    assert asked == [0, 20]


@pytest.mark.parametrize("risks", [[0.02, 0.06, 0.1001, 0.2], [0.1001] * 8, [0.2, 0.01]])
def test_the_true_risk_exceeds_the_bound_in_at_most_a_share_delta_of_calibrations(risks: list[float]) -> None:
    alpha, confidence, n, times = 0.1, 0.8, 100, 4000
    rng = np.random.default_rng(0)
    broken = 0
    for _ in range(times):
        # The candidates share the queries, as budgets do: who is lost under a small one is lost under a large one.
        hardness = rng.random(n)
        chosen = last_controlled([(risk, (hardness < risk).tolist()) for risk in risks], alpha, confidence)
        broken += chosen is not None and chosen > alpha
    assert broken <= stats.binom.ppf(0.9999, times, 1 - confidence)
    # Where the first candidate is only just too risky, the test is hardly conservative.
    assert risks[0] != 0.1001 or broken > 0.1 * times


@pytest.mark.parametrize(("alpha", "confidence"), [(0.02, 0.9), (0.1, 0.9), (0.05, 0.95), (0.5, 0.5), (0.1, 1 - 0.9**7)])
def test_the_fewest_queries_are_those_with_which_a_candidate_without_loss_passes(alpha: float, confidence: float) -> None:
    n = fewest_queries(alpha, confidence)
    assert last_controlled([("a", lost(0, n))], alpha, confidence) == "a"
    assert last_controlled([("a", lost(0, n - 1))], alpha, confidence) is None


@pytest.mark.parametrize(("key", "alpha", "confidence"), [("loss", 0.0, 0.9), ("loss", 1.0, 0.9), ("confidence", 0.1, 1.0)])
def test_bounds_that_cannot_be_are_refused_by_their_key(key: str, alpha: float, confidence: float) -> None:
    with pytest.raises(ValueError, match=rf"evaluation\.guarantee\.{key}=.*allowed"):
        last_controlled([], alpha, confidence)
