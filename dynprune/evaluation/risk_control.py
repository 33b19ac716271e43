"""How much pruning is safe: accuracy loss kept under a bound with a stated confidence, without assumptions on the SLM.

Learn then Test (Angelopoulos et al., 2021, arXiv 2110.01052) with losses of 0 and 1. For each candidate, the hypothesis is that
its risk, the probability of a loss on a new query, is above α. Under it the number of losses among n independent queries is
stochastically larger than Binomial(n, α), so that

    p = P(Binomial(n, α) ≤ losses seen)

is a valid p-value: the exact binomial tail, of which the Hoeffding-Bentkus p-value of their proposition 1 is a bound for losses
in between. Candidates are tested in a fixed order, each at the full level δ, until one is not rejected (their section 3.1,
fixed-sequence testing): the probability that any of those that passed has a risk above α is at most δ.

This holds for queries drawn like the new ones that nothing about the candidates was chosen by.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

from scipy import stats

Candidate = TypeVar("Candidate")


def binomial_p_value(losses: int, n: int, alpha: float) -> float:
    """P(Binomial(n, α) ≤ losses), the p-value of "the risk is above α".

    Args:
        losses: Queries that were lost.
        n: All queries.
        alpha: α, the bound on the risk.
    """
    return float(stats.binom.cdf(losses, n, alpha))


def last_controlled(
    candidates: Iterable[tuple[Candidate, Sequence[bool]]], alpha: float, confidence: float
) -> Candidate | None:
    """The last candidate of a fixed sequence whose risk is controlled, or ``None`` if not even the first one's is.

    Args:
        candidates: Candidates, the safest first, and whether each query was lost under them: the full SLM right, the pruned one
            wrong. The share of such queries is no smaller than the loss in accuracy, which wins offset. No candidate after the
            first that fails is asked for.
        alpha: α, the bound on the risk, in (0, 1).
        confidence: 1 − δ, in (0, 1).

    Raises:
        ValueError: If the bound or the confidence is out of range.
    """
    _check(alpha, confidence)
    last = None
    for candidate, lost in candidates:
        # A share that is 1 − 0.9 in floating point must not turn a p-value of 0.1 away.
        if binomial_p_value(sum(lost), len(lost), alpha) > (1 - confidence) + 1e-12:
            break
        last = candidate
    return last


def fewest_queries(alpha: float, confidence: float) -> int:
    """The queries without which not even a candidate that loses none of them passes: the least n with (1 − α)ⁿ ≤ δ.

    Args:
        alpha: α, the bound on the risk, in (0, 1).
        confidence: 1 − δ, in (0, 1).

    Raises:
        ValueError: If the bound or the confidence is out of range.
    """
    _check(alpha, confidence)
    return math.ceil(math.log(1 - confidence) / math.log1p(-alpha) - 1e-9)


def _check(alpha: float, confidence: float) -> None:
    for key, value, example in (("loss", alpha, 0.02), ("confidence", confidence, 0.9)):
        if not 0 < value < 1:
            raise ValueError(
                f"evaluation.guarantee.{key}={value} is not allowed; allowed: above 0 and below 1, such as {example}"
            )
