"""Filtered behavioural cloning: the router imitates the successful configurations (the thesis's baseline).

(μ − target)² + α·Σ loss(scores, mask) / L on the rollouts that pass the filter; with a categorical ratio −log P(k|x) stands
in place of the square.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dynprune.methods.base import Batch, RouterTraining
from dynprune.methods.losses import LayerLoss, RatioTarget, fbc_loss
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies.base import Policy
from dynprune.router.router import Router


class FilteredBehaviouralCloning(RouterTraining):
    """Trains a router by `fbc_loss`."""

    learns_from = "rollouts"

    def __init__(
        self,
        router: Router,
        policy: Policy,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        alpha: float,
        ratio_target: RatioTarget,
        layer_loss: LayerLoss,
    ) -> None:
        """Sets the loss.

        Args:
            router: See `RouterTraining`.
            policy: See `RouterTraining`.
            optimizer: See `RouterTraining`.
            alpha: Weight of the layers' term.
            ratio_target: ``middle`` or ``edge`` of the bucket of k.
            layer_loss: ``bce`` or ``mse``.

        Raises:
            ValueError: If there is no such target or loss.
        """
        super().__init__(router, policy, optimizer)
        if ratio_target not in ("middle", "edge"):
            raise ValueError(f"method.module.ratio_target={ratio_target!r} is unknown; allowed: middle, edge")
        if layer_loss not in ("bce", "mse"):
            raise ValueError(f"method.module.layer_loss={layer_loss!r} is unknown; allowed: bce, mse")
        if router.num_counts is None:
            # The equation has no σ; DDP refuses a parameter that gets no gradient.
            router.ratio_log_std.requires_grad_(False)
        self._alpha, self._ratio_target, self._layer_loss = alpha, ratio_target, layer_loss

    def training_loss(self, outputs: RouterOutputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of `fbc_loss` over the rollouts of the batch."""
        terms = fbc_loss(
            outputs.ratio,
            self.policy.restrict(outputs.layer_logits_BL),
            self.policy.restrict(batch["mask_BL"]),
            alpha=self._alpha,
            ratio_target=self._ratio_target,
            layer_loss=self._layer_loss,
        )
        metrics = {"ratio_loss": terms.ratio_loss_B.mean(), "layer_loss": terms.layer_loss_B.mean()}
        return terms.loss_B.mean(), metrics
