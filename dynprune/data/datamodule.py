"""The DataModule that all training shares: it streams hidden states to adapters, rollouts and preference pairs to routers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning
from torch.utils.data import DataLoader, IterableDataset

# Items in a batch for validation, at least: its size is a matter of speed, but for losses that compare a batch's items (KTO).
_VALIDATED_TOGETHER = 256


class ResumableLoader(DataLoader[Any]):
    """A loader that Lightning asks how far it is when it writes a checkpoint, and tells when it goes on from one.

    What was given out already is drawn again and passed over, so this is for batches that cost little to draw.
    """

    _given = 0
    _passed_over = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises one of its own iterators.
        """Iterates over the batches that were not given out yet."""
        passed_over, self._passed_over = self._passed_over, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= passed_over:
                self._given = number + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches were given out."""
        return {"given": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next iteration begin after the batches that were given out."""
        self._passed_over = self._given = state["given"]


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
        resumable: bool = False,
    ) -> None:
        """Binds the streams.

        Args:
            training: The stream to train on.
            validation: The streams to validate on.
            batch_size: Items in a batch of training; ``None`` where the streams yield batches.
            collate: Makes a batch of items.
            resumable: Whether the training can go on in the midst of an epoch; see `ResumableLoader`.
        """
        super().__init__()
        self.training = training
        self._validation = validation
        self._batch_size = batch_size
        self._collate = collate
        self._loader = ResumableLoader if resumable else DataLoader

    def train_dataloader(self) -> DataLoader[Any]:
        """The training stream, in this epoch's order."""
        set_epoch = getattr(self.training, "set_epoch", None)
        if set_epoch is not None and self.trainer is not None:
            set_epoch(self.trainer.current_epoch)
        return self._loader(self.training, batch_size=self._batch_size, collate_fn=self._collate)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The validation streams."""
        size = None if self._batch_size is None else max(self._batch_size, _VALIDATED_TOGETHER)
        return [DataLoader(stream, batch_size=size, collate_fn=self._collate) for stream in self._validation]
