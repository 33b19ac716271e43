"""Figures of how well the adapters stand in for their layers, of one run and of several.

Axis suffixes: L = layers.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dynprune.evaluation.parts import AdapterPart
from dynprune.evaluation.style import COLORS, DPI, WIDTH, finish_axes, save, write_title

_SETTING_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_SETTING_MARKERS = ("o", "^", "s", "D", "v", "P", "X")


def build_layer_error(mse_L: npt.ArrayLike, relative_error_L: npt.ArrayLike) -> Figure:
    """Draws how well an adapter stands in for each layer, and names the layers where it does worst.

    Args:
        mse_L: Mean squared error of each layer's adapter.
        relative_error_L: The same relative to what the layer does.

    Returns:
        The figure: one panel a measure, both on log scales.

    Raises:
        ValueError: The two do not have one finite error of 0 or more for each layer.
    """
    errors = [np.asarray(values, dtype=np.float64).ravel() for values in (mse_L, relative_error_L)]
    if errors[0].shape != errors[1].shape or not errors[0].size:
        raise ValueError(
            f"The figure of layer errors needs two errors for each layer, but there are {errors[0].size} "
            f"mean squared and {errors[1].size} relative errors."
        )
    if not all((np.isfinite(values) & (values >= 0)).all() for values in errors):
        raise ValueError("The figure of layer errors needs errors that are finite and not negative.")
    figure = Figure(figsize=(WIDTH, 4.9), dpi=DPI / 2, facecolor="white")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.085, right=0.975, bottom=0.115, top=0.83, hspace=0.16)
    for ax, error_L, name in ((upper, errors[1], "Relative error"), (lower, errors[0], "Mean squared error")):
        _draw_errors(ax, error_L)
        finish_axes(ax, name, "Layer" if ax is lower else "", grid="y")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    lower.set_xlim(-0.8, errors[0].size - 0.2)
    write_title(
        figure,
        "What the adapters cannot reproduce",
        "Error of each layer's adapter, log scales; the worst layers by number.",
    )
    return figure


def layer_error(mse_L: npt.ArrayLike, relative_error_L: npt.ArrayLike, path: Path) -> None:
    """Writes the figure of `build_layer_error` to `path`."""
    save(build_layer_error(mse_L, relative_error_L), path)


def build_layer_errors_compared(errors: Mapping[str, AdapterPart]) -> Figure:
    """Draws the errors of several settings' adapters, layer by layer.

    Args:
        errors: By setting.

    Returns:
        The figure: one panel a measure, both on log scales.
    """
    figure = Figure(figsize=(WIDTH, 5.4), dpi=DPI / 2, facecolor="white")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.085, right=0.975, bottom=0.11, top=0.78, hspace=0.14)
    for ax, measure, name in ((upper, "relative_error", "Relative error"), (lower, "mse", "Mean squared error")):
        ax.set_yscale("log")
        for number, (setting, part) in enumerate(errors.items()):
            error_L = np.asarray(getattr(part, measure), dtype=np.float64)
            # An error of 0 has no place on a log scale.
            error_L[error_L <= 0] = np.nan
            marker, color = _SETTING_MARKERS[number % len(_SETTING_MARKERS)], _SETTING_COLORS[number % len(_SETTING_COLORS)]
            ax.plot(np.arange(error_L.size), error_L, marker=marker, ms=5, lw=1.2, color=color, label=setting, gid="errors")
        finish_axes(ax, name, "Layer" if ax is lower else "", grid="y")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    handles, labels = upper.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.075, 0.87), ncols=3, fontsize=9, frameon=False)
    write_title(figure, "What the adapters cannot reproduce", "Error of each layer's adapter under each setting, log scales.")
    return figure


def layer_errors_compared(errors: Mapping[str, AdapterPart], path: Path) -> None:
    """Writes the figure of `build_layer_errors_compared` to `path`."""
    save(build_layer_errors_compared(errors), path)


def _draw_errors(ax: Axes, error_L: npt.NDArray[np.float64]) -> None:
    positive = error_L[error_L > 0]
    floor, ceiling = (positive.min() / 2, positive.max()) if positive.size else (1e-12, 1.0)
    ax.set_yscale("log")
    ax.set_ylim(floor, ceiling * (ceiling / floor) ** 0.2)
    worst = np.argsort(-error_L, kind="stable")[: min(4, error_L.size)]
    layers = np.arange(error_L.size)
    colors = [COLORS["router-dpo"] if layer in worst else COLORS["router-fbc"] for layer in layers]
    ax.vlines(layers, floor, np.maximum(error_L, floor), colors=colors, lw=1.6, alpha=0.45, zorder=2)
    ax.scatter(layers, np.maximum(error_L, floor), s=30, c=colors, zorder=3, gid="errors")
    for layer in worst:
        ax.annotate(
            f"{layer}",
            (layer, max(error_L[layer], floor)),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9.5,
            weight="bold",
            color=COLORS["router-dpo"],
        )
