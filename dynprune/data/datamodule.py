"""The DataModule that all training shares: it streams hidden states to adapters, rollouts and preference pairs to routers."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning
from torch.utils.data import DataLoader, IterableDataset

# Items in a batch for validation, at least: its size is a matter of speed, but for losses that compare a batch's items (KTO).
_VALIDATED_TOGETHER = 256


class StreamData(lightning.LightningDataModule):
    """Streams for training and validation.

    A stream yields whole batches (hidden states), or single items that ``collate`` puts together (rollouts and pairs). A stream
    with ``set_epoch`` is told each epoch, so that its order is drawn anew and yet repeatable.

    Attributes:
        training: The stream to train on.
    """

    def __init__(
        self,
        training: IterableDataset[Any],
        validation: Sequence[IterableDataset[Any]],
        batch_size: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        """Binds the streams.

        Args:
            training: The stream to train on.
            validation: The streams to validate on.
            batch_size: Items in a batch of training; ``None`` where the streams yield batches.
            collate: Makes a batch of items.
        """
        super().__init__()
        self.training = training
        self._validation = validation
        self._batch_size = batch_size
        self._collate = collate

    def train_dataloader(self) -> DataLoader[Any]:
        """The training stream, in this epoch's order."""
        set_epoch = getattr(self.training, "set_epoch", None)
        if set_epoch is not None and self.trainer is not None:
            set_epoch(self.trainer.current_epoch)
        return DataLoader(self.training, batch_size=self._batch_size, collate_fn=self._collate)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The validation streams."""
        size = None if self._batch_size is None else max(self._batch_size, _VALIDATED_TOGETHER)
        return [DataLoader(stream, batch_size=size, collate_fn=self._collate) for stream in self._validation]
