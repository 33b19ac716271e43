"""What all methods that train a router share: the forward pass, the validation on preference pairs, the optimiser.

A method is one file with a subclass that says which data it learns from and names its equation in `training_loss`.

Shapes: B = batch, L = layers, N = layers that may be pruned, R = rows, C = columns of what is predicted.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import lightning
import torch
from torch import Tensor

from dynprune.metrics.calibration import Calibration
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies.base import Policy
from dynprune.router.router import Router

Batch = Mapping[str, Any]


def check_above(key: str, value: float, least: float, example: float) -> None:
    """Refuses a setting of a method that is not above a number.

    Args:
        key: Its name in ``method.module``.
        value: Its value.
        least: What it must be above.
        example: A value to type.

    Raises:
        ValueError: If it is not.
    """
    if not value > least:
        raise ValueError(f"method.module.{key}={value} is not allowed; allowed: above {least:g}, for example {example:g}")


class RouterTraining(lightning.LightningModule):
    """A router in training.

    A batch holds ``ids`` of the queries, ``inputs`` (embeddings of them, or their tokens where the encoder is trained) and what
    the stream's items hold, stacked: ``mask_BL``, ``score_B``, ``desirable_B``, ``mean_score_B`` and ``mean_pruned_B``
    (`RolloutStream`), or ``winner_mask_BL``, ``loser_mask_BL``, ``winner_score_B`` and ``loser_score_B`` (`PairStream`).
    Masks are True where a layer is pruned.

    Attributes:
        learns_from: What the method trains on: preference ``pairs``; ``successes``, the rollouts that pass the filter of
            ``method.min_score`` and ``method.min_share_of_deepest``; ``verdicts``, all rollouts, each with whether it passes;
            ``scores``, all rollouts, and no filter is asked for.
        version: Raised by hand when the method's code changes what is learned from the same settings.
        router: The router.
        policy: The distribution over configurations that the router's outputs define.
        calibration: How well what `calibrated` returns is calibrated; its columns are the layers that may be pruned.
    """

    learns_from: ClassVar[Literal["pairs", "successes", "verdicts", "scores"]]
    version: ClassVar[int] = 1

    def __init__(
        self,
        router: Router,
        policy: Policy,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        has_reference: bool = False,
    ) -> None:
        """Binds a router to its policy and optimiser.

        Args:
            router: The router to train.
            policy: Its policy.
            optimizer: Makes the optimiser for the parameters.
            has_reference: Whether a frozen copy of the router as it is given is kept, for `reference_outputs`.
        """
        super().__init__()
        # A checkpoint holds what is trained alone.
        self.strict_loading = False
        self.router = router
        self.policy = policy
        self._optimizer = optimizer
        self._reference = copy.deepcopy(router).requires_grad_(False).eval() if has_reference else None
        self.calibration = Calibration([f"layer_{layer}" for layer in policy.prunable_layers])

    @abstractmethod
    def training_loss(self, outputs: RouterOutputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The method's equation.

        Args:
            outputs: The router's outputs for the batch.
            batch: The batch.

        Returns:
            The mean loss, and what to log beside it.
        """

    def outputs(self, batch: Batch) -> RouterOutputs:
        """The router's outputs for the queries of a batch."""
        return _outputs(self.router, batch)

    @torch.no_grad()
    def reference_outputs(self, batch: Batch) -> RouterOutputs:
        """The outputs of the router that training started from."""
        assert self._reference is not None, "the method keeps no reference"
        return _outputs(self._reference, batch)

    def calibrated(self, outputs: RouterOutputs, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """What the method predicts as a probability, if anything, and what came true.

        Args:
            outputs: The router's outputs for a batch of its own kind.
            batch: The batch.

        Returns:
            probability_RC and outcome_RC, 0 to 1 both; None where the method predicts no probability.
        """
        return None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss, metrics = self.training_loss(self.outputs(batch), batch)
        # Over all processes: what one of them logs is the curve of the whole batch.
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        # The names that the field uses: rewards/chosen, logps/rejected and so on, as in TRL.
        self.log_dict(metrics)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The method's loss on held-out data of its own kind, and on pairs how often the winner is the likelier one.

        On data of its own kind it is also measured how well the method's probabilities are calibrated, if it has any.

        Checkpoints are chosen by the loss. The other figure is the same for every method, so that methods can be compared,
        but it is no guide: heads that were never trained prune half of the layers, and more pruning often wins a pair.
        """
        outputs = self.outputs(batch)
        if ("winner_mask_BL" in batch) == (self.learns_from == "pairs"):
            loss, _ = self.training_loss(outputs, batch)
            self._log_validation("loss", loss, len(outputs.layer_logits_BL))
            calibrated = self.calibrated(outputs, batch)
            if calibrated is not None:
                self.calibration.update(*calibrated)
        if "winner_mask_BL" in batch:
            margin_B = self.policy.log_prob(outputs, batch["winner_mask_BL"]) - self.policy.log_prob(
                outputs, batch["loser_mask_BL"]
            )
            # Two impossible configurations give inf - inf: the policy does not tell them apart.
            preferred_B = margin_B.nan_to_num(nan=0.0) > 0
            self._log_validation("rewards/accuracies", preferred_B.float().mean(), len(preferred_B))

    def on_validation_epoch_end(self) -> None:
        """Logs calibration over all of the held-out data: expected calibration error and Brier score, in all and by layer."""
        if self.calibration.update_called:
            self.log_dict({f"validation/calibration/{name}": error for name, error in self.calibration.compute().items()})
            self.calibration.reset()

    def layer_calibration(self, outputs: RouterOutputs, batch: Batch) -> tuple[Tensor, Tensor]:
        """For `calibrated`: the scores of the layers, and which of them the desirable rollouts pruned."""
        desirable_B = batch["desirable_B"]
        score_BN = self.policy.restrict(outputs.layer_logits_BL).sigmoid()
        return score_BN[desirable_B], self.policy.restrict(batch["mask_BL"])[desirable_B]

    def _log_validation(self, name: str, value: Tensor, size: int) -> None:
        # The loaders of rollouts and of pairs log under different names already.
        self.log(f"validation/{name}", value, prog_bar=True, batch_size=size, sync_dist=True, add_dataloader_idx=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out what training does not change, a frozen encoder and the reference: some 90 MB each with MiniLM."""
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name not in frozen}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser of the config, over what is trained."""
        return self._optimizer([p for p in self.router.parameters() if p.requires_grad])


def _outputs(router: Router, batch: Batch) -> RouterOutputs:
    inputs = batch["inputs"]
    return router(inputs["embedding_BE"] if "embedding_BE" in inputs else router.encode(inputs))
