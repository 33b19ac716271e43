"""Independent Bernoullis conditioned on exactly k successes.

    log P(y | k, x) = Σ_(i in y) logit_i − log e_k(exp(logits))

e_k is the elementary symmetric polynomial, so the probability is exact, normalised, differentiable and
O(N·k_max). Adding a constant to all logits changes nothing: how many layers are pruned is the ratio's matter
alone.

Legend: B = batch, N = layers that may be pruned.
"""

from typing import ClassVar

import torch
from torch import Tensor

from dynprune.router.policies.base import Policy
from dynprune.router.topk import log_esp, sample_conditional_bernoulli


class ConditionalBernoulliPolicy(Policy):
    """The maximum-entropy distribution over subsets of size k with given layer logits."""

    name: ClassVar[str] = "conditional_bernoulli"

    def _subset_log_prob(self, logits_BN: Tensor, mask_BN: Tensor) -> Tensor:
        k_B1 = mask_BN.sum(dim=1, keepdim=True)
        # Sums of more members than any row has are needed by none.
        log_e_B = log_esp(logits_BN, int(k_B1.max())).gather(1, k_B1)[:, 0]
        return logits_BN.masked_fill(~mask_BN, 0.0).sum(dim=1) - log_e_B

    def _subset_sample(self, logits_BN: Tensor, k_B: Tensor, generator: torch.Generator | None) -> Tensor:
        return sample_conditional_bernoulli(logits_BN, k_B, generator)
