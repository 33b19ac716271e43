"""A policy: layers drawn one after another with equal chances for all that are left, whatever the router says.

It learns nothing but how many layers to prune, and so shows what a choice of layers is worth.
"""

import torch
from torch import Tensor

from dynprune.router.policies import POLICIES, Policy
from dynprune.router.topk import top_k_mask


class IndependentPolicy(Policy):
    """P(y | k, x) = 1 / (N choose k)."""

    name = "independent"

    def _subset_log_prob(self, logits_BN: Tensor, mask_BN: Tensor) -> Tensor:
        n, k_B = torch.tensor(float(logits_BN.shape[1])), mask_BN.sum(dim=1).float()
        return torch.lgamma(k_B + 1) + torch.lgamma(n - k_B + 1) - torch.lgamma(n + 1)

    def _subset_sample(self, logits_BN: Tensor, k_B: Tensor, generator: torch.Generator | None) -> Tensor:
        return top_k_mask(torch.rand(logits_BN.shape, generator=generator), k_B)


POLICIES[IndependentPolicy.name] = IndependentPolicy
