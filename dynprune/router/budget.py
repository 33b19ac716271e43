"""How many layers a trained router prunes when it is told how fast to be: one router, every budget.

A rule takes log P(k|x) of some queries and says k for each. All rules prune the layers with the highest scores; they differ in
k alone. Which configuration of a given size is the best one to prune does not depend on the budget.

Legend: B = batch, Q = queries of a calibration set, K = k_max + 1 counts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

CountRule = Callable[[Tensor], Tensor]
# Halvings after which an interval of any width met here is below float64's resolution at its ends.
_HALVINGS = 100


def likeliest(log_p_BK: Tensor) -> Tensor:
    """The rule without a budget: the k of the greatest probability, the smaller one of two equals.

    Args:
        log_p_BK: log P(k|x), k = 0..k_max.

    Returns:
        k_B, int64.
    """
    return log_p_BK.argmax(dim=1)


def same_count(k: int) -> CountRule:
    """The rule that prunes k layers for every query: the router says only which.

    Args:
        k: Layers to prune, at most k_max.
    """
    return lambda log_p_BK: torch.full((len(log_p_BK),), k, device=log_p_BK.device)


def with_bonus(bonus: float) -> CountRule:
    """The rule argmax_k of log P(k|x) + λ·k: each query gets its own k, more under a larger λ.

    Of all ways to choose a k for each query that prune as many layers in total, this has the greatest Σ log P(k|x) (Everett,
    1963, on Lagrange multipliers): λ is the price of a layer that is kept, the same for every query.

    Args:
        bonus: λ, in nats a layer.
    """

    def rule(log_p_BK: Tensor) -> Tensor:
        k_K = torch.arange(log_p_BK.shape[1], dtype=torch.float64, device=log_p_BK.device)
        return (log_p_BK.double() + bonus * k_K).argmax(dim=1)

    return rule


def bonus_for_mean(log_p_QK: Tensor, least_mean: float) -> float:
    """Finds the λ of `with_bonus` under which a calibration set prunes at least so many layers on average, and no step more.

    The mean is a step function of λ that never falls, so bisection finds where it first reaches the wanted mean, and where it
    next rises. The λ in the middle between the two is returned: at an edge, the rounding of one more pass could tip queries.

    Args:
        log_p_QK: log P(k|x) of the calibration set, finite.
        least_mean: The mean number of pruned layers to reach, at most k_max.

    Returns:
        λ, in nats a layer.
    """
    assert least_mean <= log_p_QK.shape[1] - 1, "no rule prunes more than k_max layers"
    total = least_mean * len(log_p_QK)
    first = _first_bonus(log_p_QK, total)
    return (first + _first_bonus(log_p_QK, float(with_bonus(first)(log_p_QK).sum()) + 1)) / 2


def _first_bonus(log_p_QK: Tensor, total: float) -> float:
    """The least λ under which at least so many layers are pruned in total, or the end of the range in which λ matters."""
    # Beyond the widest gap between two log-probabilities all queries prune k_max layers, or none.
    limit = float(log_p_QK.double().max() - log_p_QK.double().min()) + 1
    low, high = -limit, limit
    # The sum of few float64 integers: a total that was computed as mean times Q may be off by rounding, hence the slack.
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if with_bonus(middle)(log_p_QK).sum() >= total - 1e-6 else (middle, high)
    return high
