"""The thesis's policy: Sinkhorn's soft ranks, multiplied over layers as if they were independent.

p_i = the mass that a soft permutation of the scores puts on layer i's first k ranks, and
P(y | k, x) := Π_(i in y) p_i · Π_(i not in y) (1 − p_i).

This is not normalised over the subsets of size k: the product also gives weight to subsets of other sizes.
The tests record by how much. It is kept to reproduce the thesis; for a proper likelihood take
`conditional_bernoulli`.

Legend: B = batch, N = layers that may be pruned, R = ranks (= N).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynprune.router.policies.base import Policy
from dynprune.router.topk import sample_conditional_bernoulli, soft_permutation


class SinkhornPolicy(Policy):
    """Product of Sinkhorn's inclusion probabilities.

    Sampling renormalises: given k, configurations are drawn in proportion to exp(log_prob) among those of
    size k.
    """

    name: ClassVar[str] = "sinkhorn"

    def __init__(
        self,
        num_layers: int,
        prunable_layers: Sequence[int] | None = None,
        k_max: int | None = None,
        epsilon: float = 0.1,
        iterations: int = 2,
    ) -> None:
        """Fixes which configurations are possible, and the sort.

        Args:
            num_layers: L, the number of decoder layers of the SLM.
            prunable_layers: Layers that may be pruned; all if None.
            k_max: The largest number of pruned layers; the number of prunable layers if None.
            epsilon: Sinkhorn's entropic regularisation, in squared score units; the thesis's is 0.1.
            iterations: Sinkhorn iterations; the thesis's is 2.

        Raises:
            ValueError: As `Policy`, or if `epsilon` is not positive or `iterations` is below 1.
        """
        super().__init__(num_layers, prunable_layers, k_max)
        if epsilon <= 0:
            raise ValueError(f"router.sinkhorn.epsilon={epsilon} is not allowed; allowed: above 0, for example 0.1")
        if iterations < 1:
            raise ValueError(f"router.sinkhorn.iterations={iterations} is not allowed; allowed: 1 or more, for example 2")
        self.epsilon = epsilon
        self.iterations = iterations

    def config(self) -> dict[str, Any]:
        """Returns the name and the constructor's arguments, as JSON values."""
        return super().config() | {"epsilon": self.epsilon, "iterations": self.iterations}

    def _subset_log_prob(self, logits_BN: Tensor, mask_BN: Tensor) -> Tensor:
        log_in_BN, log_out_BN = self._log_inclusion(logits_BN, mask_BN.sum(dim=1))
        return torch.where(mask_BN, log_in_BN, log_out_BN).sum(dim=1)

    def _subset_sample(self, logits_BN: Tensor, k_B: Tensor, generator: torch.Generator | None) -> Tensor:
        # Independent inclusions, renormalised over the subsets of size k, are a conditional Bernoulli.
        log_in_BN, log_out_BN = self._log_inclusion(logits_BN, k_B)
        # Only at k = 0 and k = N, where the outcome is fixed, are the log-odds infinite.
        return sample_conditional_bernoulli((log_in_BN - log_out_BN).clamp(-1e3, 1e3), k_B, generator)

    def _log_inclusion(self, logits_BN: Tensor, k_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log p and log(1 − p) of each layer, at each row's k."""
        log_p_BNR = soft_permutation(logits_BN.sigmoid(), self.epsilon, self.iterations)
        rank_R = torch.arange(logits_BN.shape[1], device=logits_BN.device)
        is_top_B1R = (rank_R < k_B[:, None])[:, None, :]
        # Not −inf: where no rank is left, a log-sum of nothing but −inf has NaN as its gradient.
        nothing = torch.finfo(logits_BN.dtype).min
        log_in_BN = log_p_BNR.masked_fill(~is_top_B1R, nothing).logsumexp(dim=2)
        # Rows sum to 1, so 1 − p is the mass on the other ranks: a sum, where a difference would cancel.
        log_out_BN = log_p_BNR.masked_fill(is_top_B1R, nothing).logsumexp(dim=2)
        return log_in_BN, log_out_BN
