"""The progress bar of whatever takes longer than two seconds."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import lightning
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")


def track(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yields items while a bar shows how many have come.

    Args:
        items: Where the items come from.
        title: What is being done.
        total: How many will come.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        yield from progress.track(items, total=total, description=title)


class TrainingBar(RichProgressBar):
    """Lightning's progress bar without the loggers' version, which says nothing here."""

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands beside the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
