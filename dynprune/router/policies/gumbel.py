"""Gumbel top-k: sampling that gradients can pass.

The k largest of logits plus Gumbel noise are k draws without replacement (Kool et al., 2019): as a
distribution over hard configurations, Gumbel top-k *is* Plackett-Luce. So `log_prob`, `sample` and `mode` are
Plackett-Luce's, and there is one probability of a configuration, whatever the temperature. What this policy
adds is `relaxed_sample`: a draw from that very distribution whose gradient is taken through a relaxation. The
relaxed values are no configurations and have no likelihood here.

Legend: B = batch, L = decoder layers of the SLM, N = layers that may be pruned.
"""

from typing import ClassVar

import torch
from torch import Tensor

from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies.plackett_luce import PlackettLucePolicy
from dynprune.router.topk import gumbel_like, relaxed_top_k, top_k_mask


class GumbelPolicy(PlackettLucePolicy):
    """Plackett-Luce with a straight-through sample."""

    name: ClassVar[str] = "gumbel"

    def relaxed_sample(self, outputs: RouterOutputs, temperature: float, generator: torch.Generator | None = None) -> Tensor:
        """Draws configurations with straight-through gradients.

        Forward, k ~ P(k|x) and the k largest perturbed logits. Backward, successive softmaxes
        (`relaxed_top_k`) of the same perturbed logits with the real-valued count of `Ratio.sample_count`, so
        that the gradient reaches the layer logits and the ratio's head. Where a Normal's count is clipped, it
        does not reach the latter.

        Args:
            outputs: The router's outputs for B queries.
            temperature: Of the relaxation, above 0: low is less biased, high less noisy.
            generator: Source of randomness on the outputs' device; torch's default one if None.

        Returns:
            mask_BL of 0.0 and 1.0, with gradients.

        Raises:
            ValueError: If the temperature is not positive.
        """
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} is not allowed; allowed: above 0, for example 0.5")
        logits_BN = self._layer_logits(outputs)
        count_B = outputs.ratio.sample_count(self.num_prunable, self.k_max, generator)
        keys_BN = logits_BN + gumbel_like(logits_BN, generator)
        hard_BN = top_k_mask(keys_BN, count_B.floor())
        soft_BN = relaxed_top_k(keys_BN, count_B, temperature, self.k_max)
        return self._expand(hard_BN + (soft_BN - soft_BN.detach()))
