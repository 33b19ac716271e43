"""Value regression of a router: predict each configuration's reward, then search the prediction.

BCE(r(x, y), score) on all rollouts, with r(x, y) = σ(b(x) + Σ_(i in y) s_i(x)); the policy that searches r is
`dynprune.router.policies.value`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dynprune.methods.base import Batch, RouterTraining
from dynprune.methods.losses import value_loss
from dynprune.metrics.calibration import Calibration
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies.base import Policy
from dynprune.router.policies.value import ValuePolicy
from dynprune.router.router import Router


class ValueRegression(RouterTraining):
    """Trains a router by `value_loss`."""

    learns_from = "scores"
    # From 2 on it prunes no deeper than the rollouts do.
    version = 2
    policy: ValuePolicy

    def __init__(self, router: Router, policy: Policy, optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]) -> None:
        """Checks the policy.

        Args:
            router: See `RouterTraining`.
            policy: See `RouterTraining`; a `ValuePolicy`.
            optimizer: See `RouterTraining`.

        Raises:
            ValueError: If it is another policy, or the router's ratio is categorical.
        """
        if not isinstance(policy, ValuePolicy):
            raise ValueError(f"method.policy.name={policy.name} predicts no reward; allowed for value regression: value")
        if router.num_counts is not None:
            raise ValueError("method=value reads the mean of a normal ratio as the reward; type router.ratio=normal")
        super().__init__(router, policy, optimizer)
        self.calibration = Calibration(["reward"])
        # The equation has no σ; DDP refuses a parameter that gets no gradient.
        router.ratio_log_std.requires_grad_(False)

    def on_fit_start(self) -> None:
        """Lets the search go no deeper than the training data does: what is predicted beyond it is extrapolation."""
        self.policy.deepest = self.trainer.datamodule.training.deepest  # type: ignore[attr-defined]

    def training_loss(self, outputs: RouterOutputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of `value_loss` over the rollouts of the batch."""
        reward_logit_B = self.policy.reward_logits(outputs, batch["mask_BL"])
        return value_loss(reward_logit_B, batch["score_B"]).mean(), {"reward": reward_logit_B.sigmoid().mean()}

    def calibrated(self, outputs: RouterOutputs, batch: Batch) -> tuple[Tensor, Tensor]:
        """The predicted rewards and the scores."""
        reward_B = self.policy.reward_logits(outputs, batch["mask_BL"]).sigmoid()
        return reward_B[:, None], batch["score_B"][:, None]
