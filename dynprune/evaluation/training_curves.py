"""How routers learned: losses and order of held-out pairs by epoch, noted in training, as a file, and their figure."""

import csv
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning
import matplotlib
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dynprune.atomic import replacing
from dynprune.evaluation.style import DPI, GREY, INK, WIDTH, finish_axes, row_color, save, write_title

# Letters of a line over a panel.
_LONGEST_TITLE = 30
_EPOCH, _TRAINING, _VALIDATION, _ORDER = "epoch", "train/loss", "validation/loss", "validation/rewards/accuracies"


@dataclass(frozen=True)
class TrainingCurve:
    """One training.

    Attributes:
        epochs: The epochs, from 0.
        training_loss: Mean over the steps of each epoch.
        validation_loss: At the end of each epoch.
        preference_accuracy: Share of held-out pairs in the right order, at the end of each epoch.
    """

    epochs: Sequence[int]
    training_loss: Sequence[float]
    validation_loss: Sequence[float]
    preference_accuracy: Sequence[float]


class CurveNotes(Callback):
    """Notes a training's curve. It is a part of the checkpoints, so that a training that goes on has all of it."""

    def __init__(self) -> None:
        """Begins without an epoch."""
        self._epochs: list[dict[str, float]] = []
        self._losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """What is noted so far."""
        return {"epochs": list(self._epochs), "losses": list(self._losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with what was noted."""
        self._epochs, self._losses = list(state_dict["epochs"]), list(state_dict["losses"])

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes a step's loss."""
        self._losses.append(float(trainer.callback_metrics[_TRAINING]))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Notes an epoch; the validations before the first and after the last one are none."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        held_out = {name: float(trainer.callback_metrics[name]) for name in (_VALIDATION, _ORDER)}
        self._epochs.append({_EPOCH: trainer.current_epoch, _TRAINING: fmean(self._losses), **held_out})
        self._losses = []

    def write(self, path: Path) -> None:
        """Writes the curve, a line for each epoch.

        Args:
            path: The file, for `read_curve`.
        """
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [_EPOCH, _TRAINING, _VALIDATION, _ORDER], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._epochs)


def read_curve(path: Path) -> TrainingCurve:
    """Reads what `CurveNotes` wrote.

    Args:
        path: The file.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    columns = ([float(line[name]) for line in lines] for name in (_TRAINING, _VALIDATION, _ORDER))
    return TrainingCurve([int(line[_EPOCH]) for line in lines], *columns)


def build_training_curves(curves: Mapping[str, Sequence[TrainingCurve]]) -> Figure:
    """Draws how routers learned: a panel for each method's losses, and one for the order of held-out pairs.

    Args:
        curves: By method, a curve for each seed.

    Returns:
        The figure.

    Raises:
        ValueError: There are no curves.
    """
    if not curves:
        raise ValueError("The figure of training curves needs the curve of at least one router.")
    panels = len(curves) + 1
    columns = min(3, panels)
    lines = math.ceil(panels / columns)
    # In a comparison a method's setting is in its name.
    titles = {name: textwrap.fill(f"{name}: loss", _LONGEST_TITLE) for name in curves}
    title_lines = max(1 + title.count("\n") for title in titles.values())
    height = 1.2 + (1.95 + 0.15 * title_lines) * lines
    figure = Figure(figsize=(WIDTH, height), dpi=DPI / 2, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    figure.subplots_adjust(left=0.06, right=0.975, bottom=0.55 / height, top=1 - (0.8 + 0.15 * title_lines) / height)
    figure.subplots_adjust(hspace=0.5 + 0.1 * title_lines, wspace=0.3)
    for ax in axes[panels:]:
        ax.remove()
    *losses, order = axes[:panels]
    for ax, (method, seeds), color in zip(losses, curves.items(), _colors(list(curves)), strict=True):
        for curve in seeds:
            ax.plot(curve.epochs, curve.training_loss, color=color, lw=1.2, alpha=0.6, ls=(0, (3, 2)))
            ax.plot(curve.epochs, curve.validation_loss, color=color, lw=1.5)
            order.plot(curve.epochs, [100 * share for share in curve.preference_accuracy], color=color, lw=1.5, alpha=0.8)
        ax.set_title(titles[method], loc="left", fontsize=9.5, color=color, weight="bold")
    order.axhline(50, color=GREY, lw=0.9, ls=(0, (2, 2)), zorder=1)
    order.set_title("Held-out pairs in order, %", loc="left", fontsize=9.5, color=INK, weight="bold")
    for ax in axes[:panels]:
        finish_axes(ax, "", "Epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    write_title(figure, "How the routers learned", "Dashed: on the train split. Solid: on held-out queries. One line a seed.")
    return figure


def _colors(methods: Sequence[str]) -> list[str]:
    """Those of the methods' rows; where some would have the same, as settings of one method do, others by their places."""
    own = [row_color(f"router-{method}") for method in methods]
    if len(set(own)) == len(own):
        return own
    shades = matplotlib.colormaps["turbo"]
    return [to_hex(shades(0.05 + 0.9 * place / (len(methods) - 1))) for place in range(len(methods))]


def training_curves(curves: Mapping[str, Sequence[TrainingCurve]], path: Path) -> None:
    """Writes the figure of `build_training_curves` to `path`."""
    save(build_training_curves(curves), path)
