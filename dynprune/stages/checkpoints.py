"""Lightning's checkpoints, each written as a whole or not at all, as all that a run goes on from."""

import random
import shutil
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from dynprune.atomic import replacing
from dynprune.data.datamodule import ResumableLoader

_STEP, _LAST = "step.ckpt", "last.ckpt"


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


class StepSeeds(Callback):
    """Seeds each step by its place, so that what is random in it, dropout for example, does not hang on where it went on."""

    def __init__(self, seed: int) -> None:
        """Binds the seed.

        Args:
            seed: The training's.
        """
        self._seed = seed

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seeds all generators: Python's, NumPy's and torch's."""
        seed = random.Random(f"{self._seed}-{trainer.current_epoch}-{batch_idx}").getrandbits(32)
        lightning.seed_everything(seed, verbose=False)


class StepCheckpoints(Callback):
    """Writes a checkpoint in the midst of an epoch now and then, beside those of a `ModelCheckpoint` at the epochs' ends.

    A training that is killed then makes again what it did since the last of both: some seconds and the step in flight, or the
    validation.
    """

    seconds = 30.0
    """Time between two of them, in seconds."""

    def __init__(self, folder: Path) -> None:
        """Binds the place.

        Args:
            folder: Where the `ModelCheckpoint` writes its own.
        """
        self._path = folder / _STEP
        self._written = time.monotonic()
        self._given = 0

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch are done: none at its end."""
        return {"given": self._given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Takes over how many are done."""
        self._given = state_dict["given"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Lets the loader go on after the batches that are done."""
        loader = trainer.train_dataloader
        assert isinstance(loader, ResumableLoader), "only such a loader can go on in the midst of an epoch"
        # Lightning would tell it itself, but makes it before it reads the checkpoint where the schedule asks for its length.
        loader.load_state_dict({"given": self._given})
        self._given = 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes one if it is time, and no gradients wait for those of other batches."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and not trainer.is_last_batch and time.monotonic() - self._written >= self.seconds:
            self._given = batch_idx + 1
            trainer.save_checkpoint(self._path)
            self._given, self._written = 0, time.monotonic()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Removes that of the epoch before, whose end has one of its own by now."""
        self._path.unlink(missing_ok=True)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Removes that of the last epoch."""
        self._path.unlink(missing_ok=True)


class BestCheckpoint(ModelCheckpoint):
    """The checkpoint of the epoch with the least of what is monitored; its folder may be moved between two attempts."""

    def __init__(self, folder: Path, monitor: str) -> None:
        """Binds place and figure.

        Args:
            folder: Where to.
            monitor: The name of what is logged.
        """
        super().__init__(folder, monitor=monitor, mode="min", save_top_k=1, enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over which one is the best; Lightning would forget it where the folder has another name."""
        assert self.dirpath is not None
        folder = Path(self.dirpath)

        def here(path: str) -> str:
            return str(folder / Path(path).name) if path else path

        paths = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        models = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": models, "dirpath": self.dirpath})


def epoch_checkpoints(folder: Path) -> ModelCheckpoint:
    """Lightning's callback that writes a checkpoint at the end of each epoch, over that of the one before.

    It comes after a `BestCheckpoint`, which would leave one of the best epochs alone, and whose state is a part of this one.

    Args:
        folder: Where to.
    """
    # One that is there already is of an attempt that was killed: beside it, the new one would not be found.
    return ModelCheckpoint(folder, filename=_LAST.removesuffix(".ckpt"), enable_version_counter=False)


def last_of(folder: Path) -> Path | None:
    """The checkpoint that a training goes on from.

    Args:
        folder: Where `epoch_checkpoints` writes, and perhaps `StepCheckpoints`.
    """
    # That of a step may be older than the end of its epoch, and never is of an epoch before.
    return next((path for path in (folder / _STEP, folder / _LAST) if path.exists()), None)


def best_of(checkpoint: BestCheckpoint) -> dict[str, Any]:
    """The best checkpoint of a training that has ended.

    Raises:
        ValueError: If it is gone, since it was damaged before the training went on; then the others are removed too, and the
            next attempt starts over.
    """
    best = Path(checkpoint.best_model_path)
    if not best.exists():
        assert checkpoint.dirpath is not None
        shutil.rmtree(checkpoint.dirpath)
        raise ValueError(
            f"the training went on without its best checkpoint, {best}, which had been damaged; {best.parent} is removed: type "
            "the same command again, which trains anew"
        )
    found: dict[str, Any] = torch.load(best, map_location="cpu", weights_only=True)
    return found
