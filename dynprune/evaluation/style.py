"""How all figures look: colours and markers of the rows, axes, titles, files.

Colours are mostly those of Okabe and Ito, which colour-blind readers tell apart, and follow the row's method in every figure;
markers and direct labels say the same without colour. No pyplot: figures are plain objects, so drawing changes no global state
and needs no display.
"""

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dynprune.atomic import replacing

DPI = 200  # At 8 inches, twice the width of a README column: sharp on dense displays.
WIDTH = 8.0
INK, GREY, FAINT = "#222222", "#6b6b6b", "#e4e4e4"
COLORS = {
    "original": INK,
    "router-fbc": "#0072B2",
    "router-dpo": "#D55E00",
    "router-orpo": "#009E73",
    "router-value": "#882255",
    "router-blind": "#8C5A2B",
    "oracle": "#7B4FA3",
    "static_accuracy": "#A0A0A0",
}
_OTHER_COLORS = ("#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = {
    "original": "s",
    "router-fbc": "D",
    "router-dpo": "^",
    "router-orpo": "v",
    "router-value": "X",
    "router-blind": "p",
    "oracle": "h",
}
_OTHER_MARKERS = ("P", "<", ">", "d")


def row_color(name: str) -> str:
    """The colour of a row in every figure: that of its method, whatever the seed, the budget or the size."""
    method = method_of(name)
    return COLORS.get(method) or (GREY if is_static(name) else _pick(_OTHER_COLORS, method))


def method_of(name: str) -> str:
    """The method of a row: its name without seed, budget and size."""
    return re.sub(r"(-s\d+)?(@.*)?$|(-[\d.]+)+$", "", name, count=1)


def is_static(name: str) -> bool:
    """Whether a row is a searched static set, or the curve of these."""
    return re.fullmatch(r"(static|static_accuracy)(-\d+)?", name) is not None


def _pick(choices: Sequence[str], name: str) -> str:
    # Python's own hash of a string differs from run to run.
    return choices[zlib.crc32(name.encode()) % len(choices)]


def row_marker(name: str) -> str:
    """The marker of a row in every figure: that of its method."""
    method = method_of(name)
    return _MARKERS.get(method) or ("o" if is_static(name) else _pick(_OTHER_MARKERS, method))


def fix_limits(ax: Axes) -> None:
    """Sets the limits for good, since labels are placed in pixels; never zooms in on less than two points."""
    ax.margins(x=0.07, y=0.08)
    for limits, set_limits, axis in (
        (ax.get_xlim(), ax.set_xlim, ax.xaxis),
        (ax.get_ylim(), ax.set_ylim, ax.yaxis),
    ):
        missing = max(0.0, 2.0 - (limits[1] - limits[0]))
        set_limits(limits[0] - missing / 2, limits[1] + missing / 2)
        axis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10]))


def canvas(height: float, **margins: float) -> tuple[Figure, Axes]:
    """A figure of one panel.

    Args:
        height: In inches.
        margins: As `Figure.subplots_adjust` takes them.
    """
    figure = Figure(figsize=(WIDTH, height), dpi=DPI / 2, facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    figure.subplots_adjust(**margins)
    return figure, ax


def finish_axes(ax: Axes, y_label: str, x_label: str, grid: Literal["both", "x", "y"] = "both") -> None:
    """Labels and grid of a panel."""
    ax.set_ylabel(y_label, color=INK, fontsize=10)
    ax.set_xlabel(x_label, color=INK, fontsize=10)
    ax.tick_params(colors=GREY, labelsize=9, length=0, which="both")
    ax.grid(color=FAINT, lw=0.8, axis=grid)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(GREY)


def write_title(figure: Figure, title: str, subtitle: str) -> None:
    """Writes the title and what explains the marks below it."""
    height = figure.get_size_inches()[1]
    figure.text(0.02, 1 - 0.17 / height, title, ha="left", va="top", fontsize=13, weight="bold", color=INK)
    figure.text(0.02, 1 - 0.45 / height, subtitle, ha="left", va="top", fontsize=9.5, color=GREY)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure, complete or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI, metadata={"Software": None} if path.suffix == ".png" else None)
