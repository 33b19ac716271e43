"""The policy π(y|x) over configurations: log π(y|x) = log P(k|x) + log P(y | k, x), with k = |y|.

P(k|x) is common to all policies (`dynprune.router.ratio`); a policy defines P(y | k, x). Where layers are
excluded, the policy lives on the N that may be pruned: a Normal's buckets are [k/N, (k+1)/N), and any other
configuration has probability 0.

Legend: B = batch, L = decoder layers of the SLM, N = layers that may be pruned, K = k_max + 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynprune.router.budget import CountRule, likeliest
from dynprune.router.outputs import RouterOutputs
from dynprune.router.ratio import at_least_float32
from dynprune.router.topk import top_k_mask


class Policy(ABC):
    """A distribution over configurations, given the router's outputs.

    Attributes:
        name: What the configuration calls it.
        num_layers: L.
        prunable_layers: The layers that may be pruned, sorted.
        k_max: The largest number of layers that are pruned at once.
    """

    name: ClassVar[str]

    def __init__(self, num_layers: int, prunable_layers: Sequence[int] | None = None, k_max: int | None = None) -> None:
        """Fixes which configurations are possible.

        Args:
            num_layers: L, the number of decoder layers of the SLM.
            prunable_layers: Layers that may be pruned; all if None.
            k_max: The largest number of pruned layers; the number of prunable layers if None.

        Raises:
            ValueError: If `prunable_layers` is empty, repeats a layer or names one that does not exist, or if
                `k_max` is outside 1..N.
        """
        layers = tuple(range(num_layers)) if prunable_layers is None else tuple(sorted(prunable_layers))
        if not layers:
            raise ValueError(
                f"router.prunable_layers is empty, so nothing could be pruned; allowed: null for all layers, "
                f"or a list of layers in 0..{num_layers - 1}"
            )
        wrong = [layer for layer in layers if not 0 <= layer < num_layers]
        if wrong or len(set(layers)) < len(layers):
            problem = f"names layer {wrong[0]}, which does not exist" if wrong else "names a layer twice"
            raise ValueError(
                f"router.prunable_layers={list(layers)} {problem}; allowed: different layers in 0..{num_layers - 1}"
            )
        if k_max is not None and not 1 <= k_max <= len(layers):
            raise ValueError(
                f"router.k_max={k_max} is not possible with {len(layers)} prunable layers; "
                f"allowed: 1..{len(layers)}, or null for {len(layers)}"
            )
        self.num_layers = num_layers
        self.prunable_layers = layers
        self.k_max = len(layers) if k_max is None else k_max

    @property
    def num_prunable(self) -> int:
        """N, the number of layers that may be pruned."""
        return len(self.prunable_layers)

    def config(self) -> dict[str, Any]:
        """Returns the name and the constructor's arguments as JSON values; `build_policy` reads them."""
        return {
            "name": self.name,
            "num_layers": self.num_layers,
            "prunable_layers": list(self.prunable_layers),
            "k_max": self.k_max,
        }

    def restrict(self, values_BL: Tensor) -> Tensor:
        """Returns values_BN, the columns of the layers that may be pruned."""
        if self.num_prunable == self.num_layers:
            return values_BL
        return values_BL[:, list(self.prunable_layers)]

    def allows(self, mask_BL: Tensor) -> Tensor:
        """Returns allowed_B: whether the configuration prunes at most k_max layers, all of them prunable."""
        mask_BN = self.restrict(mask_BL)
        k_B = mask_BN.sum(dim=1)
        return (k_B == mask_BL.sum(dim=1)) & (k_B <= self.k_max)

    def log_p_count(self, outputs: RouterOutputs) -> Tensor:
        """Returns log_p_BK, log P(k|x) for k = 0..k_max."""
        return outputs.ratio.log_pmf(self.num_prunable, self.k_max)

    def log_prob(self, outputs: RouterOutputs, mask_BL: Tensor) -> Tensor:
        """Returns log π(y|x) of each row, in float32 at least.

        Args:
            outputs: The router's outputs for B queries.
            mask_BL: One configuration for each, True where a layer is pruned.

        Returns:
            log_prob_B; −inf, without gradient, where the configuration is impossible (see `allows`).
        """
        logits_BN = self._layer_logits(outputs)
        allowed_B = self.allows(mask_BL)
        # Impossible rows are computed as "prune nothing", so that no NaN arises under the `where`.
        mask_BN = self.restrict(mask_BL) & allowed_B[:, None]
        log_p_B = self.log_p_count(outputs).gather(1, mask_BN.sum(dim=1, keepdim=True))[:, 0]
        return torch.where(allowed_B, log_p_B + self._subset_log_prob(logits_BN, mask_BN), -torch.inf)

    @torch.no_grad()
    def sample(self, outputs: RouterOutputs, generator: torch.Generator | None = None) -> Tensor:
        """Draws one configuration for each row.

        Args:
            outputs: The router's outputs for B queries.
            generator: Source of randomness on the outputs' device; torch's default one if None.

        Returns:
            mask_BL, True where a layer is pruned.
        """
        k_B = outputs.ratio.sample_count(self.num_prunable, self.k_max, generator).floor().long()
        return self._expand(self._subset_sample(self._layer_logits(outputs), k_B, generator))

    @torch.no_grad()
    def mode(self, outputs: RouterOutputs, count: CountRule = likeliest) -> Tensor:
        """Returns the most probable configuration of the size that a rule says: the k best layers.

        Under each of the policies the top k scores are the most probable subset of size k.

        Args:
            outputs: The router's outputs for B queries.
            count: What chooses k, see `dynprune.router.budget`; the most probable size without a budget.

        Returns:
            mask_BL, True where a layer is pruned.
        """
        return self._expand(top_k_mask(self._layer_logits(outputs), count(self.log_p_count(outputs))))

    @abstractmethod
    def _subset_log_prob(self, logits_BN: Tensor, mask_BN: Tensor) -> Tensor:
        """Returns log P(y | k, x) of each row, with k the row's own number of True."""

    @abstractmethod
    def _subset_sample(self, logits_BN: Tensor, k_B: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draws mask_BN ~ P(y | k, x)."""

    def _layer_logits(self, outputs: RouterOutputs) -> Tensor:
        return at_least_float32(self.restrict(outputs.layer_logits_BL))

    def _expand(self, values_BN: Tensor) -> Tensor:
        if self.num_prunable == self.num_layers:
            return values_BN
        values_BL = values_BN.new_zeros(len(values_BN), self.num_layers)
        values_BL[:, list(self.prunable_layers)] = values_BN
        return values_BL
