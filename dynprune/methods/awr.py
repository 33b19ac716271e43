"""Advantage-weighted regression of a router (Peng et al., 2019): clone every rollout, the better the more.

−w·log π(y|x) with w = min(exp(A/β), w_max), where A = R − mean R of the query's rollouts and R = score + bonus·k/L. Several
configurations of a query were tried and the choice is one step, so the mean is its value, and nothing has to be estimated.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dynprune.methods.base import Batch, RouterTraining, check_above
from dynprune.methods.losses import awr_loss
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies.base import Policy
from dynprune.router.router import Router


class AdvantageWeightedRegression(RouterTraining):
    """Trains a router by `awr_loss`."""

    learns_from = "scores"

    def __init__(
        self,
        router: Router,
        policy: Policy,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        beta: float,
        max_weight: float,
        depth_bonus: float,
    ) -> None:
        """Sets the loss.

        Args:
            router: See `RouterTraining`.
            policy: See `RouterTraining`.
            optimizer: See `RouterTraining`.
            beta: β, above 0, the advantage that multiplies a weight by e.
            max_weight: w_max, the largest weight.
            depth_bonus: What pruning all layers would add to the score.

        Raises:
            ValueError: If β or the largest weight is not above 0.
        """
        super().__init__(router, policy, optimizer)
        check_above("beta", beta, 0, example=0.2)
        check_above("max_weight", max_weight, 0, example=20)
        self._beta, self._max_weight, self._depth_bonus = beta, max_weight, depth_bonus

    def training_loss(self, outputs: RouterOutputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of `awr_loss` over the rollouts of the batch."""
        mask_BL = batch["mask_BL"]
        deeper_B = (mask_BL.sum(dim=1) - batch["mean_pruned_B"]) / mask_BL.shape[1]
        advantage_B = batch["score_B"] - batch["mean_score_B"] + self._depth_bonus * deeper_B
        terms = awr_loss(self.policy.log_prob(outputs, mask_BL), advantage_B, beta=self._beta, max_weight=self._max_weight)
        return terms.loss_B.mean(), {"advantage": advantage_B.mean(), "weight": terms.weight_B.mean()}
