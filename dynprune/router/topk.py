"""Choosing k of N layers: relaxations that have gradients, and the exact algebra of fixed-size subsets.

- `soft_permutation`: Sinkhorn sorting in the log domain (Cuturi et al., 2019, with the squared cost of the
  thesis).
- `relaxed_top_k`: successive softmaxes (Xie and Ermon, 2019), for Gumbel top-k with gradients.
- `log_esp`, `sample_conditional_bernoulli`: elementary symmetric polynomials, which normalise independent
  Bernoullis conditioned on exactly k successes (Chen, Dempster and Liu, 1994).

Legend: B = batch, N = layers that may be pruned (i counts them), R = ranks (= N), K = k_max + 1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynprune.router.logspace import log1mexp


def top_k_mask(values_BN: Tensor, k_B: Tensor) -> Tensor:
    """Returns mask_BN, True at the k largest values of each row; of equals, the earlier layer wins.

    Args:
        values_BN: What to rank by.
        k_B: How many to take in each row, 0..N.
    """
    order_BN = values_BN.argsort(dim=1, descending=True, stable=True)
    rank_BN = order_BN.argsort(dim=1)
    return rank_BN < k_B[:, None]


def soft_permutation(scores_BN: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Sorts softly: returns the log of a matrix that says how much layer i has rank j, largest first.

    Entropic optimal transport between the scores and the sorted scores, with cost (s_i − s_(j))². Each
    iteration normalises columns, then rows: rows sum to 1 always, columns only in the limit.

    Args:
        scores_BN: Scores in (0, 1).
        epsilon: Entropic regularisation; smaller is closer to a hard sort.
        iterations: Number of iterations, at least 1.

    Returns:
        log_p_BNR.
    """
    sorted_BR = scores_BN.sort(dim=1, descending=True).values
    log_p_BNR = -((scores_BN[:, :, None] - sorted_BR[:, None, :]) ** 2) / epsilon
    for _ in range(iterations):
        log_p_BNR = log_p_BNR - log_p_BNR.logsumexp(dim=1, keepdim=True)
        log_p_BNR = log_p_BNR - log_p_BNR.logsumexp(dim=2, keepdim=True)
    return log_p_BNR


def gumbel_like(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws standard Gumbel noise in the shape, dtype and device of `values`.

    Args:
        values: The pattern.
        generator: Source of randomness on the same device; torch's default one if None.
    """
    return -torch.empty_like(values, requires_grad=False).exponential_(generator=generator).log()


def relaxed_top_k(keys_BN: Tensor, count_B: Tensor, temperature: float, k_max: int) -> Tensor:
    """Takes the top `count` keys softly: one softmax after the other, each without what the former ones took.

    The j-th softmax counts with weight min(max(count − j, 0), 1), so that a count between two integers takes
    part of a layer, and the result has a gradient in the count.

    Args:
        keys_BN: What to rank by, for example logits plus Gumbel noise.
        count_B: How many layers to take, real, 0..k_max.
        temperature: Of the softmaxes, above 0; as it goes to 0 the result goes to the hard top-k of an
            integer count.
        k_max: Number of softmaxes.

    Returns:
        soft_BN, not negative, with row sums equal to the counts.
    """
    soft_BN = torch.zeros_like(keys_BN)
    # A softmax that rounds to 1 leaves log(1 − 1); one unit of resolution below 1, it stays finite.
    largest = -torch.finfo(keys_BN.dtype).eps
    for j in range(k_max):
        log_p_BN = (keys_BN / temperature).log_softmax(dim=1)
        soft_BN = soft_BN + (count_B - j).clamp(0, 1)[:, None] * log_p_BN.exp()
        keys_BN = keys_BN + log1mexp(log_p_BN.clamp(max=largest))
    return soft_BN


def log_esp(logits_BN: Tensor, k_max: int) -> Tensor:
    """Returns the logarithms of the elementary symmetric polynomials e_0..e_k_max of exp(logits).

    e_k is the sum over all subsets of k layers of the product of their weights; the cost is O(N·k_max).

    Args:
        logits_BN: Logarithms of the weights.
        k_max: The largest order, 0..N.

    Returns:
        log_e_BK.
    """
    log_e_BK: Tensor = _LogEsp.apply(logits_BN, k_max)
    return log_e_BK


class _LogEsp(torch.autograd.Function):
    """`log_esp` with its gradient written out, in half the time of recorded steps.

    e_k(first i) = e_k(first i − 1) + w_i·e_(k−1)(first i − 1), and of a sum's logarithm each term gets its share of the sum.
    """

    @staticmethod
    def forward(ctx: Any, logits_BN: Tensor, k_max: int) -> Tensor:
        prefixes = _prefix_log_esps(logits_BN, k_max)
        ctx.save_for_backward(logits_BN, *prefixes)
        return prefixes[-1].T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BK: Tensor) -> tuple[Tensor, None]:
        logits_BN, *prefixes = ctx.saved_tensors
        grad_NB, grad_KB = torch.empty_like(logits_BN.T), grad_BK.T
        for i in reversed(range(logits_BN.shape[1])):
            before_KB, after_KB = prefixes[i], prefixes[i + 1]
            taking = len(after_KB) - 1
            share = (before_KB[:taking] + logits_BN[:, i] - after_KB[1:]).exp_().mul_(grad_KB[1:])
            grad_NB[i] = share.sum(dim=0)
            grad_KB = grad_KB[: len(before_KB)].clone()
            grad_KB[1:] -= share[: len(before_KB) - 1]
            grad_KB[:taking] += share
        return grad_NB.T, None


@torch.no_grad()
def sample_conditional_bernoulli(logits_BN: Tensor, k_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws from independent Bernoullis given that exactly k succeed: P(y) = exp(Σ logits(y)) / e_k.

    Exact, without rejection. Goes through the layers from the last to the first: with r still to take among
    the first i, layer i is taken with probability w_i·e_(r−1)(first i − 1) / e_r(first i).

    Args:
        logits_BN: Log-odds of each layer, finite.
        k_B: How many to take in each row, 0..N.
        generator: Source of randomness on the device of `logits_BN`; torch's default one if None.

    Returns:
        mask_BN with exactly k_B True in each row.
    """
    n = logits_BN.shape[1]
    prefixes = _prefix_log_esps(logits_BN, n)
    uniform_BN = torch.rand(logits_BN.shape, dtype=logits_BN.dtype, device=logits_BN.device, generator=generator)
    mask_BN = torch.zeros_like(logits_BN, dtype=torch.bool)
    remaining_B = k_B.clone()
    for i in reversed(range(n)):
        before_B = prefixes[i].gather(0, (remaining_B - 1).clamp(min=0)[None])[0]
        after_B = prefixes[i + 1].gather(0, remaining_B[None])[0]
        # Where all that remain must be taken, the two are the same sum, and exp(0) is above any uniform draw.
        take_B = (uniform_BN[:, i] < (before_B + logits_BN[:, i] - after_B).exp()) & (remaining_B > 0)
        mask_BN[:, i] = take_B
        remaining_B = remaining_B - take_B.long()
    return mask_BN


def _prefix_log_esps(logits_BN: Tensor, k_max: int) -> list[Tensor]:
    """Returns, for i = 0..N, log e_0..e_min(i, k_max) of the first i weights, each (orders, B)."""
    # The table grows by a row a step, instead of starting from −inf, whose log-sum has no gradient.
    log_e_KB = logits_BN.new_zeros(1, logits_BN.shape[0])
    table = [log_e_KB]
    for logit_B in logits_BN.T.contiguous():
        taken_KB = log_e_KB + logit_B
        grown_KB = logits_BN.new_zeros(min(len(log_e_KB), k_max) + 1, logits_BN.shape[0])
        both = len(log_e_KB)
        torch.logaddexp(log_e_KB[1:], taken_KB[:-1], out=grown_KB[1:both])
        grown_KB[both:] = taken_KB[both - 1 : len(grown_KB) - 1]
        log_e_KB = grown_KB
        table.append(log_e_KB)
    return table
