"""Search of a predicted reward: prune as many layers as the prediction allows.

The router's heads are read as an additive logistic model of a configuration's reward,

    r(x, y) = σ(b(x) + Σ_(i in y) s_i(x)),

with the layer logits as s and logit(mu) as b. Of all configurations of size k the one with the k largest s has the
largest r, so the best of each size, and with them the deepest configuration that reaches a reward, are found
exactly, in O(N log N).

As a distribution it is the Gibbs distribution of the predicted log-odds, π(y|x) ∝ exp(Σ_(i in y) s_i) over all
configurations of at most k_max layers: P(k|x) = e_k / Σ_j e_j with the elementary symmetric polynomials of exp(s), and
a conditional Bernoulli given k. Here b cancels, and log sigma is not used at all.

Legend: B = batch, L = decoder layers of the SLM, N = layers that may be pruned, K = k_max + 1.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynprune.router.budget import CountRule, likeliest
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies.conditional_bernoulli import ConditionalBernoulliPolicy
from dynprune.router.ratio import NormalRatio, at_least_float32
from dynprune.router.topk import log_esp, top_k_mask

# Where mu rounds to 0 or 1 its logit would be infinite.
_EPSILON = 1e-6


class ValuePolicy(ConditionalBernoulliPolicy):
    """Prunes as many layers as leave the predicted reward large enough.

    Attributes:
        min_reward: Smallest predicted reward of what `mode` chooses.
        deepest: Most layers of a configuration that the prediction has learned from; beyond them it extrapolates.
    """

    name: ClassVar[str] = "value"

    def __init__(
        self,
        num_layers: int,
        prunable_layers: Sequence[int] | None = None,
        k_max: int | None = None,
        *,
        min_reward: float,
        deepest: int | None = None,
    ) -> None:
        """Fixes which configurations are possible, and the threshold.

        Args:
            num_layers: L, the number of decoder layers of the SLM.
            prunable_layers: Layers that may be pruned; all if None.
            k_max: The largest number of pruned layers; the number of prunable layers if None.
            min_reward: Smallest predicted reward, between 0 and 1.
            deepest: Most layers that `mode` prunes unless a budget is given; None for `k_max`.

        Raises:
            ValueError: As `Policy`, or if `min_reward` is not between 0 and 1.
        """
        super().__init__(num_layers, prunable_layers, k_max)
        if not 0 < min_reward < 1:
            raise ValueError(f"method.policy.min_reward={min_reward} is not allowed; allowed: between 0 and 1, for example 0.5")
        self.min_reward = min_reward
        self.deepest = deepest

    def config(self) -> dict[str, Any]:
        """Returns the name and the constructor's arguments, as JSON values."""
        return super().config() | {"min_reward": self.min_reward, "deepest": self.deepest}

    def reward_logits(self, outputs: RouterOutputs, mask_BL: Tensor) -> Tensor:
        """Returns logit_B of the predicted reward r(x, y), in float32 at least.

        Args:
            outputs: The router's outputs for B queries.
            mask_BL: One configuration for each, True where a layer is pruned; layers that may not be pruned count for
                nothing.
        """
        logits_BN = self._layer_logits(outputs).masked_fill(~self.restrict(mask_BL), 0.0)
        return _base(outputs) + logits_BN.sum(dim=1)

    def log_p_count(self, outputs: RouterOutputs) -> Tensor:
        """Returns log_p_BK of the Gibbs distribution, k = 0..k_max."""
        return log_esp(self._layer_logits(outputs), self.k_max).log_softmax(dim=1)

    @torch.no_grad()
    def sample(self, outputs: RouterOutputs, generator: torch.Generator | None = None) -> Tensor:
        """Draws mask_BL from the Gibbs distribution; otherwise as `Policy.sample`."""
        k_B = torch.multinomial(self.log_p_count(outputs).exp(), 1, generator=generator)[:, 0]
        return self._expand(self._subset_sample(self._layer_logits(outputs), k_B, generator))

    @torch.no_grad()
    def mode(self, outputs: RouterOutputs, count: CountRule = likeliest) -> Tensor:
        """Returns the deepest configuration whose predicted reward is at least `min_reward`, or that of a given size.

        Of several that are equally deep it is the one with the largest predicted reward, and none is deeper than what the
        prediction has learned from. Where no configuration reaches `min_reward`, nothing is pruned. It is found by search of
        the prediction; the likeliest configuration under `log_prob` is another one.

        Args:
            outputs: The router's outputs for B queries.
            count: What chooses k where a budget is given.

        Returns:
            mask_BL, True where a layer is pruned.
        """
        if count is not likeliest:
            return super().mode(outputs, count)
        logits_BN = self._layer_logits(outputs)
        best_BN = logits_BN.sort(dim=1, descending=True).values.cumsum(dim=1)
        most = self.k_max if self.deepest is None else min(self.deepest, self.k_max)
        best_BK = _base(outputs)[:, None] + F.pad(best_BN[:, :most], (1, 0))
        is_enough_BK = best_BK >= math.log(self.min_reward / (1 - self.min_reward))
        k_K = torch.arange(most + 1, device=logits_BN.device)
        return self._expand(top_k_mask(logits_BN, torch.where(is_enough_BK, k_K, 0).amax(dim=1)))


def _base(outputs: RouterOutputs) -> Tensor:
    """Returns b_B, the predicted log-odds without pruning."""
    if not isinstance(outputs.ratio, NormalRatio):
        raise ValueError("the policy value reads the mean of a normal ratio; type router.ratio=normal")
    return at_least_float32(outputs.ratio.mu_B).logit(_EPSILON)
