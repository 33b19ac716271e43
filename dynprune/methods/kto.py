"""Kahneman-Tversky optimisation of a router (Ethayarajh et al., 2024): from single rollouts, good and bad, without pairs.

λ_D·(1 − σ(β·(r − z0))) for a desirable rollout and λ_U·(1 − σ(β·(z0 − r))) for any other, with r = log π(y|x) − log π_ref(y|x).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dynprune.methods.base import Batch, RouterTraining, check_above
from dynprune.methods.losses import kto_loss
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies.base import Policy
from dynprune.router.router import Router


class KahnemanTverskyOptimization(RouterTraining):
    """Trains a router by `kto_loss`; the reference is the router as it is given, frozen."""

    learns_from = "verdicts"

    def __init__(
        self,
        router: Router,
        policy: Policy,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        beta: float,
        desirable_weight: float,
        undesirable_weight: float,
    ) -> None:
        """Sets the loss.

        Args:
            router: See `RouterTraining`.
            policy: See `RouterTraining`.
            optimizer: See `RouterTraining`.
            beta: β, how far the policy may move from the reference.
            desirable_weight: λ_D.
            undesirable_weight: λ_U.

        Raises:
            ValueError: If β or a weight is not above 0.
        """
        super().__init__(router, policy, optimizer, has_reference=True)
        check_above("beta", beta, 0, example=0.1)
        check_above("desirable_weight", desirable_weight, 0, example=1)
        check_above("undesirable_weight", undesirable_weight, 0, example=1)
        self._beta, self._desirable_weight, self._undesirable_weight = beta, desirable_weight, undesirable_weight

    def training_loss(self, outputs: RouterOutputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of `kto_loss` over the rollouts of the batch."""
        reference, mask_BL = self.reference_outputs(batch), batch["mask_BL"]
        # Each query's neighbour in the shuffled batch lends it a configuration.
        mismatched_BL = mask_BL.roll(1, dims=0)
        with torch.no_grad():
            mismatched_B = self.policy.log_prob(outputs, mismatched_BL) - self.policy.log_prob(reference, mismatched_BL)
        terms = kto_loss(
            self.policy.log_prob(outputs, mask_BL),
            self.policy.log_prob(reference, mask_BL),
            # One rollout has no neighbour.
            mismatched_B if len(mismatched_B) > 1 else torch.zeros_like(mismatched_B),
            batch["desirable_B"],
            beta=self._beta,
            desirable_weight=self._desirable_weight,
            undesirable_weight=self._undesirable_weight,
        )
        return terms.loss_B.mean(), terms.metrics()

    def calibrated(self, outputs: RouterOutputs, batch: Batch) -> tuple[Tensor, Tensor]:
        """The scores of the layers, and which of them the desirable rollouts pruned."""
        return self.layer_calibration(outputs, batch)
