"""Filtered behavioural cloning: the router imitates the successful configurations (the thesis's baseline).

On the rollouts that pass the filter, with ``objective: heads`` the thesis's regression of the two heads, (μ − target)² +
α·Σ loss(scores, mask) / L (with a categorical ratio −log P(k|x) in place of the square), and with ``objective: likelihood``
−log π(y|x).
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from dynprune.methods.base import Batch, RouterTraining
from dynprune.methods.losses import LayerLoss, RatioTarget, effective_number_weights, fbc_loss
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies.base import Policy
from dynprune.router.router import Router


class FilteredBehaviouralCloning(RouterTraining):
    """Trains a router by `fbc_loss`, or by likelihood."""

    learns_from = "successes"

    def __init__(
        self,
        router: Router,
        policy: Policy,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        objective: Literal["heads", "likelihood"],
        alpha: float,
        ratio_target: RatioTarget,
        layer_loss: LayerLoss,
        balance: Literal["none", "effective_number", "focal"],
        balance_beta: float,
        balance_gamma: float,
    ) -> None:
        """Sets the loss.

        Args:
            router: See `RouterTraining`.
            policy: See `RouterTraining`.
            optimizer: See `RouterTraining`.
            objective: ``heads`` or ``likelihood``; all that follows is of ``heads`` alone.
            alpha: Weight of the layers' term.
            ratio_target: ``middle`` or ``edge`` of the bucket of k.
            layer_loss: ``bce`` or ``mse``.
            balance: How BCE makes up for the few layers that are pruned: ``none``, ``effective_number`` or ``focal``.
            balance_beta: β of ``effective_number``, from 0 to below 1.
            balance_gamma: γ of ``focal``, at least 0.

        Raises:
            ValueError: If there is no such objective, target, loss or balance, or they do not go together.
        """
        super().__init__(router, policy, optimizer)
        if objective not in ("heads", "likelihood"):
            raise ValueError(f"method.module.objective={objective!r} is unknown; allowed: heads, likelihood")
        if ratio_target not in ("middle", "edge"):
            raise ValueError(f"method.module.ratio_target={ratio_target!r} is unknown; allowed: middle, edge")
        if layer_loss not in ("bce", "mse"):
            raise ValueError(f"method.module.layer_loss={layer_loss!r} is unknown; allowed: bce, mse")
        if balance not in ("none", "effective_number", "focal"):
            raise ValueError(f"method.module.balance={balance!r} is unknown; allowed: none, effective_number, focal")
        if balance != "none" and (objective, layer_loss) != ("heads", "bce"):
            raise ValueError(
                f"method.module.balance={balance} weighs the layers' cross-entropy; allowed with "
                "method.module.objective=heads method.module.layer_loss=bce alone"
            )
        if not 0 <= balance_beta < 1:
            raise ValueError(f"method.module.balance_beta={balance_beta} is not allowed; allowed: from 0 to below 1, as 0.999")
        if balance_gamma < 0:
            raise ValueError(f"method.module.balance_gamma={balance_gamma} is not allowed; allowed: at least 0, as 2")
        if objective == "heads" and router.num_counts is None:
            # The equation has no σ; DDP refuses a parameter that gets no gradient.
            router.ratio_log_std.requires_grad_(False)
        self._objective = objective
        self._alpha, self._ratio_target, self._layer_loss = alpha, ratio_target, layer_loss
        self._balance, self._balance_beta = balance, balance_beta
        self._focal_gamma = balance_gamma if balance == "focal" else 0.0
        self._class_weights = (1.0, 1.0)

    def on_fit_start(self) -> None:
        """Weighs the two classes by how often they occur in the whole of the training data."""
        if self._balance == "effective_number":
            stream = self.trainer.datamodule.training  # type: ignore[attr-defined]
            num_kept = stream.num_items * self.policy.num_prunable - stream.num_pruned
            self._class_weights = effective_number_weights(stream.num_pruned, num_kept, self._balance_beta)

    def training_loss(self, outputs: RouterOutputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of `fbc_loss`, or of −log π, over the rollouts of the batch."""
        if self._objective == "likelihood":
            logp = self.policy.log_prob(outputs, batch["mask_BL"]).mean()
            return -logp, {"logps/chosen": logp.detach()}
        terms = fbc_loss(
            outputs.ratio,
            self.policy.restrict(outputs.layer_logits_BL),
            self.policy.restrict(batch["mask_BL"]),
            alpha=self._alpha,
            ratio_target=self._ratio_target,
            layer_loss=self._layer_loss,
            class_weights=self._class_weights,
            focal_gamma=self._focal_gamma,
        )
        metrics = {"ratio_loss": terms.ratio_loss_B.mean(), "layer_loss": terms.layer_loss_B.mean()}
        return terms.loss_B.mean(), metrics

    def calibrated(self, outputs: RouterOutputs, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """The scores of the layers, and which of them the rollouts pruned; a policy's likelihood leaves their level open."""
        return self.layer_calibration(outputs, batch) if self._objective == "heads" else None
