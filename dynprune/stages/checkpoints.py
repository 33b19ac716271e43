"""Lightning's checkpoints, each written as a whole or not at all, as all that a run goes on from."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from dynprune.atomic import replacing


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, with its hash noted where a folder is being built."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Writes a checkpoint.

        Args:
            checkpoint: What is in it.
            path: The file.
            storage_options: As Lightning's own.
        """
        with replacing(Path(path)) as temporary:
            super().save_checkpoint(checkpoint, temporary, storage_options)


def last_of(folder: Path) -> Path | None:
    """The checkpoint that a training goes on from, if a `ModelCheckpoint` with ``save_last`` has left one in a folder."""
    last = folder / "last.ckpt"
    return last if last.exists() else None


def best_state(checkpoint: ModelCheckpoint) -> dict[str, Any]:
    """The state of the best checkpoint of a training that has ended.

    Raises:
        ValueError: If it is gone, since it was damaged before the training went on; then the others are removed too, and the
            next attempt starts over.
    """
    best = Path(checkpoint.best_model_path)
    if not best.exists():
        shutil.rmtree(best.parent)
        raise ValueError(
            f"the training went on without its best checkpoint, {best}, which had been damaged; {best.parent} is removed: type "
            "the same command again, which trains anew"
        )
    state: dict[str, Any] = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
    return state
