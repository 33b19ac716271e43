"""The figures: what pruning costs and saves, what adapters cannot replace, what is pruned.

Each has a function that builds the matplotlib `Figure` and one that builds and writes it. How they look is in
`dynprune.evaluation.style`.

Axis suffixes: L = layers, P = points of a curve, X = cells of a strip.
"""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dynprune.evaluation.curves import Axis, BudgetCurve, merge_equal
from dynprune.evaluation.labels import Label, place_labels, text_size
from dynprune.evaluation.statistics import Interval, mean_interval
from dynprune.evaluation.style import (
    DPI,
    GREY,
    INK,
    WIDTH,
    canvas,
    finish_axes,
    fix_limits,
    is_static,
    method_of,
    row_color,
    row_marker,
    save,
    write_title,
)
from dynprune.evaluation.table import TableRow, count_label, score_label, score_scale

# Letters of a line beside a strip: two fifths of the figure's width.
_LONGEST_LABEL = 40


def build_accuracy_speedup(rows: Sequence[TableRow], score: str = "ast_match") -> Figure:
    """Draws a score against the measured speedup, with the nominal speedup as a faint companion.

    Args:
        rows: Rows of the table. A row that was not timed is drawn hollow, at its nominal speedup.
        score: Name of the score.

    Returns:
        The figure.

    Raises:
        ValueError: There are no rows, or a row has no such score.
    """
    if not rows:
        raise ValueError("The figure of accuracy and speedup needs at least one row of the table.")
    for row in rows:
        if score not in row.scores:
            raise ValueError(f"Row {row.name!r} has no score {score!r} to draw; it has {', '.join(row.scores)}.")
    figure, ax = canvas(4.9, left=0.085, right=0.975, bottom=0.125, top=0.83)
    scale = score_scale(score)
    segments = _join_static_rows(ax, rows, score)
    for row in rows:
        y, low, high = (scale * value for value in astuple(row.scores[score]))
        segments += _draw_row(ax, row, y, low, high)
    finish_axes(ax, f"{score_label(score)}{', %' if scale == 100 else ''}", "Speedup, %")
    write_title(
        figure,
        f"{score_label(score)} against speedup",
        _legend(rows),
    )
    fix_limits(ax)
    labels = [Label(100 * _speedup(r), scale * r.scores[score].mean, r.name, row_color(r.name)) for r in rows]
    companions = [np.array([100 * row.nominal_speedup, scale * row.scores[score].mean]) for row in rows if _has_companion(row)]
    place_labels(ax, labels, segments, companions, size=9.5)
    return figure


def accuracy_speedup(rows: Sequence[TableRow], path: Path, score: str = "ast_match") -> None:
    """Writes the figure of `build_accuracy_speedup` to `path`."""
    save(build_accuracy_speedup(rows, score), path)


def build_budget_curve(curves: Sequence[BudgetCurve], full: Interval) -> Figure:
    """Draws each method's AST match against its nominal speedup, and against the measured one where there is one.

    Args:
        curves: The methods: routers, static sets, the oracle.
        full: AST match of the unpruned SLM.

    Returns:
        The figure: a panel for each speedup, on one scale. Several sets of a size are drawn as their mean. A point that was
        not timed is in the upper one alone, and where none was timed there is no lower one.

    Raises:
        ValueError: There are no curves.
    """
    if not curves:
        raise ValueError("The figure of budget curves needs at least one curve.")
    curves = [merge_equal(curve) for curve in curves]
    panels: dict[Axis, str] = {"nominal_speedup": "Nominal speedup, %", "measured_speedup": "Measured speedup, %"}
    if not any(_has(curve, "measured_speedup") for curve in curves):
        del panels["measured_speedup"]
    height = 1.35 + 3.3 * len(panels)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI / 2, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.085, right=0.975, bottom=0.55 / height, top=1 - 0.8 / height, hspace=0.2)
    drawn = [
        [_draw_curve(ax, curve, axis) for curve in curves if _has(curve, axis)] for ax, axis in zip(axes, panels, strict=True)
    ]
    for ax, x_label in zip(axes, panels.values(), strict=True):
        ax.axhline(100 * full.mean, color=INK, lw=1.2, ls=(0, (5, 3)), zorder=2, gid="original/line")
        ax.axhspan(100 * full.low, 100 * full.high, color=INK, alpha=0.05, lw=0, zorder=0, gid="original/band")
        finish_axes(ax, "AST match, %", x_label)
        ax.tick_params(labelbottom=True)
        ax.plot([0], [100 * full.mean], row_marker("original"), ms=7, mfc=INK, mec="white", mew=1.2, zorder=5, gid="original")
    fix_limits(axes[0])
    left, right = axes[0].get_xlim()
    right += 0.1 * (right - left)  # Lines end at the right, where their labels need room.
    axes[0].set_xlim(left, right)
    for ax, lines in zip(axes, drawn, strict=True):
        ends = [Label(points_P2[-1, 0], points_P2[-1, 1], name, row_color(name)) for name, points_P2 in lines]
        level = Label(0, 100 * full.mean, "original", INK)
        segments = [points_P2[i : i + 2] for _, points_P2 in lines for i in range(len(points_P2) - 1)]
        segments.append(np.array([[left, 100 * full.mean], [right, 100 * full.mean]]))
        place_labels(ax, [*ends, level], segments, [at for _, points_P2 in lines for at in points_P2[:-1]], size=9.5)
    write_title(
        figure,
        "AST match at each budget",
        f"Bands: 95% intervals of each method alone, n = {len(curves[0].points[0].correct_N)}; differences paired by query are "
        f"sharper.",
    )
    return figure


def budget_curve(curves: Sequence[BudgetCurve], full: Interval, path: Path) -> None:
    """Writes the figure of `build_budget_curve` to `path`."""
    save(build_budget_curve(curves, full), path)


def build_layers_pruned(frequency: Mapping[str, Sequence[float]]) -> Figure:
    """Draws how often each row prunes each layer: one strip a row, one cell a layer.

    Args:
        frequency: By row name, the share of queries for which each of the L layers is pruned.

    Returns:
        The figure.

    Raises:
        ValueError: There are no rows, their numbers of layers differ, or a share is not between 0 and 1.
    """
    if not frequency:
        raise ValueError("The figure of pruned layers needs at least one row.")
    num_layers = len(next(iter(frequency.values())))
    for name, share_L in frequency.items():
        if len(share_L) != num_layers or not all(0 <= share <= 1 for share in share_L):
            raise ValueError(
                f"Row {name!r} needs a share between 0 and 1 for each of the {num_layers} layers in the "
                f"figure of pruned layers."
            )
    figure = _draw_strips(frequency, {name: sum(share_L) for name, share_L in frequency.items()}, "Layer")
    write_title(figure, "Which layers are pruned", "Share of queries, in %; right: pruned layers per query.")
    return figure


def pruning_frequency(configurations: Sequence[Sequence[int]], num_layers: int) -> list[float]:
    """The share of configurations in which each of the L layers is pruned.

    Args:
        configurations: The pruned layers, one entry a query; at least one.
        num_layers: L.
    """
    pruned = Counter(layer for layers in configurations for layer in set(layers))
    return [pruned[layer] / len(configurations) for layer in range(num_layers)]


def layers_pruned(frequency: Mapping[str, Sequence[float]], path: Path) -> None:
    """Writes the figure of `build_layers_pruned` to `path`."""
    save(build_layers_pruned(frequency), path)


def build_layer_counts(counts: Mapping[str, Sequence[int]]) -> Figure:
    """Draws how many layers each row prunes: one strip a row, one cell a number of layers.

    Args:
        counts: By row name, the number of pruned layers for each query.

    Returns:
        The figure.

    Raises:
        ValueError: There are no rows, or a row has no queries.
    """
    if not counts or not all(counts.values()):
        raise ValueError("The figure of numbers of pruned layers needs at least one row, and each row at least one query.")
    largest = max(max(of_row) for of_row in counts.values())
    shares = {name: np.bincount(of_row, minlength=largest + 1) / len(of_row) for name, of_row in counts.items()}
    figure = _draw_strips(shares, {name: float(np.mean(of_row)) for name, of_row in counts.items()}, "Pruned layers")
    write_title(figure, "How many layers are pruned", "Share of queries, in %; right: pruned layers per query.")
    return figure


def layer_counts(counts: Mapping[str, Sequence[int]], path: Path) -> None:
    """Writes the figure of `build_layer_counts` to `path`."""
    save(build_layer_counts(counts), path)


def _draw_strips(shares: Mapping[str, npt.ArrayLike], means: Mapping[str, float], x_label: str) -> Figure:
    """One strip a row, one cell a value, darker for a larger share; beside the strip its mean."""
    cells = len(np.asarray(next(iter(shares.values()))))
    # The row of a comparison has its setting in its name, which may be long.
    labels = {name: textwrap.fill(name, _LONGEST_LABEL) for name in shares}
    strip_height = 0.18 + 0.18 * max(1 + label.count("\n") for label in labels.values())
    height = strip_height * len(shares) + 1.35
    figure, ax = canvas(height, right=0.925, bottom=0.55 / height, top=1 - 0.8 / height)
    longest = max(text_size(figure, label, 9.5)[0] for label in labels.values())
    figure.subplots_adjust(left=0.045 + longest / figure.bbox.width)
    for position, (name, share_X) in enumerate(shares.items()):
        shades = LinearSegmentedColormap.from_list(name, ["#f1f1f1", row_color(name)])
        strip = np.asarray(share_X, dtype=np.float64)[None]
        edges = np.arange(cells + 1) - 0.5
        mesh = ax.pcolormesh(edges, [position - 0.4, position + 0.4], strip, cmap=shades, vmin=0, vmax=1, ec="white", lw=1.2)
        mesh.set_gid(name)
        name_style = {"ha": "right", "color": row_color(name), "weight": "bold"}
        _write_beside(ax, (0, position), -8, labels[name], name_style)
        _write_beside(ax, (1, position), 8, f"{means[name]:.1f}", {"color": INK})
        if cells <= 32:
            _write_shares(ax, strip[0], position, shades)
    _write_beside(ax, (1, -0.75), 8, "mean", {"color": GREY})
    finish_axes(ax, "", x_label)
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    ax.set_yticks([])
    ax.set_xlim(-0.5, cells - 0.5)
    ax.set_ylim(len(shares) - 0.5, -0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    return figure


def _speedup(row: TableRow) -> float:
    return row.nominal_speedup if row.measured_speedup is None else row.measured_speedup.median


def _join_static_rows(ax: Axes, rows: Sequence[TableRow], score: str) -> list[npt.NDArray[np.float64]]:
    """Draws a line from the original through the static rows of each family, in order of pruned layers."""
    origin = [row for row in rows if row.name == "original"]
    families: dict[str, list[TableRow]] = {}
    for row in sorted(rows, key=lambda row: row.mean_pruned_layers):
        if is_static(row.name):
            families.setdefault(method_of(row.name), list(origin)).append(row)
    segments = []
    for family, members in families.items():
        points = np.array([[100 * _speedup(r), score_scale(score) * r.scores[score].mean] for r in members])
        ax.plot(*points.T, color=GREY, lw=1.4, alpha=0.7, zorder=2, gid=f"{family}/line")
        segments += [points[i : i + 2] for i in range(len(points) - 1)]
    return segments


def _legend(rows: Sequence[TableRow]) -> str:
    timed = [row.measured_speedup is not None for row in rows]
    return (
        ("Solid: measured on the clock. Pale: nominal (layers). " if any(timed) else "")
        + ("Hollow: nominal, not timed. " if not all(timed) else "")
        + f"Bars: 95% intervals, {count_label(rows)}."
    )


def _has_companion(row: TableRow) -> bool:
    return row.measured_speedup is not None and abs(row.nominal_speedup - row.measured_speedup.median) > 1e-6


def _draw_row(ax: Axes, row: TableRow, y: float, low: float, high: float) -> list[npt.NDArray[np.float64]]:
    """Draws the marker, the bars and the nominal companion of a row; gives the bars as segments."""
    x, color, measured = 100 * _speedup(row), row_color(row.name), row.measured_speedup
    bars = {"score": np.array([[x, low], [x, high]])}
    if measured is not None:
        bars["measured"] = np.array([[100 * measured.low, y], [100 * measured.high, y]])
    for kind, ends in bars.items():
        ax.plot(*ends.T, color=color, lw=1.1, alpha=0.55, zorder=3, gid=f"{row.name}/{kind}")
    if _has_companion(row):
        at, marker = 100 * row.nominal_speedup, row_marker(row.name)
        ax.plot([x, at], [y, y], color=color, lw=0.9, ls=(0, (1, 2.5)), alpha=0.5, zorder=1)
        ax.plot([at], [y], marker, ms=6, mfc=color, mec="none", alpha=0.28, gid=f"{row.name}/nominal")
    face, edge = ("white", color) if measured is None else (color, "white")
    ax.plot([x], [y], row_marker(row.name), ms=8, mfc=face, mec=edge, mew=1.2, zorder=5, gid=row.name)
    return list(bars.values())


def _has(curve: BudgetCurve, axis: Axis) -> bool:
    return any(getattr(point, axis) is not None for point in curve.points)


def _points(curve: BudgetCurve, axis: Axis) -> npt.NDArray[np.float64]:
    """Speedup, AST match and the bounds of its interval, in %: ``[P, 4]``, by speedup."""
    known = sorted((p for p in curve.points if getattr(p, axis) is not None), key=lambda p: getattr(p, axis))
    points = [[getattr(point, axis), *astuple(mean_interval(point.correct_N))] for point in known]
    return 100 * np.array(points, dtype=np.float64)


def _draw_curve(ax: Axes, curve: BudgetCurve, axis: Axis) -> tuple[str, npt.NDArray[np.float64]]:
    """Draws a method's line, markers and band; gives its name and its points in the axes: ``[P, 2]``."""
    points_P4, color = _points(curve, axis), row_color(curve.name)
    speedup_P, accuracy_P, low_P, high_P = points_P4.T
    ax.fill_between(speedup_P, low_P, high_P, color=color, alpha=0.1, lw=0, zorder=1, gid=f"{curve.name}/band")
    style = (0, (1, 1.5)) if curve.name == "oracle" else "-"
    ax.plot(speedup_P, accuracy_P, color=color, lw=1.8, ls=style, zorder=3)
    ax.plot(speedup_P, accuracy_P, row_marker(curve.name), ms=6, mfc=color, mec="white", mew=0.8, zorder=4, gid=curve.name)
    return curve.name, points_P4[:, :2]


def _write_beside(ax: Axes, at: tuple[float, float], offset_pt: float, text: str, style: dict[str, Any]) -> None:
    """Writes beside a strip: `at` is a share of the axes' width and a strip's position."""
    ax.annotate(
        text,
        at,
        xycoords=ax.get_yaxis_transform(),
        xytext=(offset_pt, 0),
        textcoords="offset points",
        va="center",
        fontsize=9.5,
        **style,
    )


def _write_shares(ax: Axes, share_X: npt.NDArray[np.float64], position: int, shades: Colormap) -> None:
    for at, share in enumerate(share_X):
        if 0.005 <= share < 0.995:
            luma = float(np.dot(shades(share)[:3], (0.299, 0.587, 0.114)))
            ink = "white" if luma < 0.55 else INK
            ax.text(at, position, f"{100 * share:.0f}", ha="center", va="center", color=ink, fontsize=7)
