"""Ends a training whose loss is no number any more: what follows would be lost, and would look like a result."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

_SHOWN = 8
# From a batch, its epoch and its number in it: ids of the queries that it holds.
IdsOf = Callable[[Any, int, int], Sequence[str]]


def stated_ids(batch: Any, epoch: int, number: int) -> Sequence[str]:
    """The ids that a batch states itself, if it does."""
    ids: Sequence[str] = batch.get("ids", ()) if isinstance(batch, Mapping) else ()
    return ids


class FiniteLoss(Callback):
    """Refuses a loss that is NaN or infinite before its gradient reaches the weights."""

    def __init__(self, name: str, ids_of: IdsOf = stated_ids) -> None:
        """Names the training.

        Args:
            name: What is trained.
            ids_of: What names the queries of a batch; it is asked once, when the loss is no number.
        """
        self._name = name
        self._ids_of = ids_of
        self._batch: Any = None
        self._number = 0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch, to name what is in it."""
        self._batch, self._number = batch, batch_idx

    def on_before_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: torch.Tensor) -> None:
        """Looks at the loss.

        Raises:
            ValueError: If it is NaN or infinite; says at which step, on which queries, and where the last good weights are.
        """
        if torch.isfinite(loss):
            return
        ids = list(dict.fromkeys(self._ids_of(self._batch, trainer.current_epoch, self._number)))
        queries = f", of the queries {', '.join(ids[:_SHOWN])}{', …' * (len(ids) > _SHOWN)}" if ids else ""
        # The newest is that of the last of them.
        kept = [path for callback in trainer.checkpoint_callbacks if (path := getattr(callback, "best_model_path", ""))]
        raise ValueError(
            f"{self._name}: the loss is {loss.item()} at step {trainer.global_step} (batch {self._number} of epoch "
            f"{trainer.current_epoch}{queries}); "
            + (f"the last good weights are in {kept[-1]}" if kept else "no epoch has left its weights")
            + "; a smaller learning rate is what helps most often"
        )
