r"""Plackett-Luce without replacement: k layers drawn one after the other, each in proportion to exp(logit).

A configuration is a set, so its probability is a sum over the k! orders in which it can be drawn. The sum is
computed for every k by one integral, and never by enumeration. Give layer i a clock that rings after an
exponential time of rate θ_i = exp(logit_i). The order of ringing is the order of drawing, so y is drawn
exactly if all of y rings before anything else does. With Θ = Σ_(i not in y) θ_i, time in units of 1/Θ, and x
its logarithm,

    P(y | k, x) = ∫ exp(x − exp(x)) · Π_(i in y) (1 − exp(−exp(x) θ_i / Θ)) dx.

The integrand is entire and falls off at both ends, so that the trapezoidal rule converges exponentially and
needs fewer nodes than Gauss-Legendre does. The limits hold for any logits, since the product grows with x,
but no faster than exp(k·x): the mass below −16 is at most exp(−16) of the whole, that above ln(m + 7√m + 20)
at most a Gamma(m = k + 1) variable's tail. A step of 1/√(N + 1) follows the narrowest peak, of width 1/√(k +
1). The error in log P is below 1e-5.

Legend: B = batch, N = layers that may be pruned, Q = nodes of the quadrature.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from dynprune.router.logspace import log_inverse_cloglog
from dynprune.router.policies.base import Policy
from dynprune.router.topk import gumbel_like, top_k_mask


class PlackettLucePolicy(Policy):
    """Plackett-Luce over sets: normalised, differentiable, exact to 1e-5 through one integral."""

    name: ClassVar[str] = "plackett_luce"

    def _subset_log_prob(self, logits_BN: Tensor, mask_BN: Tensor) -> Tensor:
        n = logits_BN.shape[1]
        k_B = mask_BN.sum(dim=1)
        is_certain_B = (k_B == 0) | (k_B == n)
        # A certain row borrows another mask meanwhile: its own complement may be empty, and has no log-sum.
        any_mask_N = torch.arange(n, device=logits_BN.device) > 0
        safe_BN = torch.where(is_certain_B[:, None], any_mask_N, mask_BN)
        log_others_B = logits_BN.masked_fill(safe_BN, -torch.inf).logsumexp(dim=1)
        log_rate_BN = logits_BN - log_others_B[:, None]

        log_time_Q, step = _log_time_nodes(n)
        log_time_Q = log_time_Q.to(logits_BN)
        log_rung_BQN = log_inverse_cloglog(log_time_Q[:, None] + log_rate_BN[:, None, :])
        log_all_rung_BQ = log_rung_BQN.masked_fill(~safe_BN[:, None, :], 0.0).sum(dim=2)
        log_integral_B = (log_time_Q - log_time_Q.exp() + log_all_rung_BQ).logsumexp(dim=1) + math.log(step)
        return torch.where(is_certain_B, 0.0, log_integral_B)

    def _subset_sample(self, logits_BN: Tensor, k_B: Tensor, generator: torch.Generator | None) -> Tensor:
        # Gumbel top-k: log-rate minus log-time of an exponential clock is the logit plus Gumbel noise.
        return top_k_mask(logits_BN + gumbel_like(logits_BN, generator), k_B)


def _log_time_nodes(num_layers: int) -> tuple[Tensor, float]:
    """Returns the nodes log_time_Q and the distance between them; the module's docstring derives both."""
    m = num_layers + 1
    low, high = -16.0, math.log(m + 7 * math.sqrt(m) + 20)
    nodes = math.ceil((high - low) / min(0.25, 1 / math.sqrt(m))) + 1
    return torch.linspace(low, high, nodes, dtype=torch.float64), (high - low) / (nodes - 1)
