"""Lightning's checkpoints, each written as a whole or not at all, as all that a run goes on from."""

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.types import _PATH
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
