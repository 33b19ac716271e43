"""Direct labels for points in a scatter plot, placed so that they cover neither each other nor the data.

Each label may stand in any of a few hundred places around its point. A place costs what it covers (other
labels, markers, interval bars, lines) and its distance; labels are placed one after another, the most
crowded first, and then moved in turn while that lowers the cost. It is deterministic. A label far from its
point gets a thin leader.

Axis suffixes: C = candidate places, O = obstacles; a box is (x0, y0, x1, y1) in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

Array = npt.NDArray[np.float64]

_RADII_PT = (7.0, 10.0, 15.0, 22.0, 31.0, 43.0, 58.0, 76.0, 98.0)
_ANGLES = 32
_LEADER_FROM_PT = 14.0
_MARKER_PT = 5.0
_PADDING_PT = 6.0
_SWEEPS = 8
_COST_LABEL, _COST_MARKER, _COST_LINE, _COST_LEADER, _COST_OUTSIDE = 200.0, 80.0, 4.0, 30.0, 1e4


@dataclass(frozen=True)
class Label:
    """The label of one point.

    Attributes:
        x: The point, in data coordinates.
        y: The point, in data coordinates.
        text: What the label says.
        color: Colour of the text.
    """

    x: float
    y: float
    text: str
    color: str


@dataclass(frozen=True)
class _Candidates:
    """The places of one label: their boxes, their leaders as chains of small boxes, and their distances."""

    box_C4: Array
    leader_CP4: Array
    cost_C: Array


def place_labels(ax: Axes, labels: Sequence[Label], segments: Sequence[Array], points: Sequence[Array], size: float) -> None:
    """Writes the labels beside their points.

    Args:
        ax: Axes whose limits and position are final; its figure need not have been drawn.
        labels: The labels.
        segments: Lines to keep clear of, ``[2, 2]`` each: start and end in data coordinates.
        points: Further markers to keep clear of, ``[2]`` each in data coordinates.
        size: Font size in points.
    """
    if not labels:
        return
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    pixels_per_pt = figure.dpi / 72
    anchors = [_to_pixels(ax, [label.x, label.y])[0] for label in labels]
    candidates = [
        _candidates(ax, anchor, text_size(figure, label.text, size), pixels_per_pt)
        for anchor, label in zip(anchors, labels, strict=True)
    ]
    marks = [_around(at, _MARKER_PT * pixels_per_pt) for at in anchors]
    marks += [_around(_to_pixels(ax, point)[0], _MARKER_PT * pixels_per_pt) for point in points]
    lines = [_chain(_to_pixels(ax, segment), 4 * pixels_per_pt) for segment in segments]
    mark_O4, line_O4 = np.array(marks), np.concatenate([np.zeros((0, 4)), *lines])
    fixed = [
        c.cost_C
        + _COST_MARKER * _hits(c.box_C4, mark_O4).sum(1)
        + _COST_LINE * _hits(c.box_C4, line_O4).sum(1)
        + _COST_LEADER * _leader_hits(c, np.delete(mark_O4, i, axis=0))
        for i, c in enumerate(candidates)
    ]
    for label, anchor, c, choice in zip(labels, anchors, candidates, _choose(candidates, fixed), strict=True):
        _write(ax, label, anchor, c.box_C4[choice], pixels_per_pt, size)


def _choose(candidates: Sequence[_Candidates], fixed: Sequence[Array]) -> list[int]:
    """Coordinate descent over the labels, from no label at all."""
    chosen: list[int | None] = [None] * len(candidates)
    crowded_first = sorted(range(len(candidates)), key=lambda i: -float(np.median(fixed[i])))
    for _ in range(_SWEEPS):
        before = list(chosen)
        for i in crowded_first:
            cost_C = fixed[i].copy()
            for j, place in enumerate(chosen):
                if j == i or place is None:
                    continue
                other = candidates[j]
                cost_C += _COST_LABEL * _hits(candidates[i].box_C4, other.box_C4[place : place + 1]).sum(1)
                cost_C += _COST_LEADER * _hits(candidates[i].box_C4, other.leader_CP4[place]).sum(1)
                cost_C += _COST_LEADER * _leader_hits(candidates[i], other.box_C4[place : place + 1])
                cost_C += _COST_LEADER * _leader_hits(candidates[i], other.leader_CP4[place])
            chosen[i] = int(cost_C.argmin())
        if chosen == before:
            break
    return [place for place in chosen if place is not None]


def _candidates(ax: Axes, anchor: Array, size: Array, pixels_per_pt: float) -> _Candidates:
    size = size + np.array([_PADDING_PT, 0]) * pixels_per_pt
    angle, radius_pt = (grid.ravel() for grid in np.meshgrid(np.linspace(0, 2 * np.pi, _ANGLES, endpoint=False), _RADII_PT))
    direction_C2 = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    # Clipping makes the ring of places a rounded rectangle: wide texts would cover the point from an ellipse.
    center_C2 = anchor + direction_C2 * radius_pt[:, None] * pixels_per_pt
    center_C2 = center_C2 + np.clip(1.6 * direction_C2, -1, 1) * size / 2
    box_C4 = np.concatenate([center_C2 - size / 2, center_C2 + size / 2], axis=1)
    near_C2 = np.clip(anchor, box_C4[:, :2], box_C4[:, 2:])
    share_P1 = np.linspace(0.15, 0.85, 12)[:, None]
    leader_CP2 = anchor + share_P1 * (near_C2 - anchor)[:, None, :]
    leader_CP4 = np.concatenate([leader_CP2 - pixels_per_pt, leader_CP2 + pixels_per_pt], axis=2)
    leader_CP4[~_needs_leader(anchor, near_C2, pixels_per_pt)] = np.nan  # Overlaps nothing.
    frame = ax.get_window_extent()
    inside = (box_C4[:, :2] >= frame.min).all(1) & (box_C4[:, 2:] <= frame.max).all(1)
    # Between equal places, readers look to the right of a point, then above it.
    habit_C = -0.8 * direction_C2[:, 0] - 0.5 * direction_C2[:, 1]
    return _Candidates(box_C4, leader_CP4, 0.35 * radius_pt + habit_C + _COST_OUTSIDE * ~inside)


def _write(ax: Axes, label: Label, anchor: Array, box: Array, pixels_per_pt: float, size: float) -> None:
    near = np.clip(anchor, box[:2], box[2:])
    center = (box[:2] + box[2:]) / 2
    offset_pt = (center - anchor) / pixels_per_pt
    if _needs_leader(anchor, near, pixels_per_pt):
        ax.annotate(
            "",
            (label.x, label.y),
            xytext=tuple((near - anchor) / pixels_per_pt),
            textcoords="offset points",
            arrowprops={
                "arrowstyle": "-",
                "color": label.color,
                "lw": 0.7,
                "alpha": 0.6,
                "shrinkA": 0,
                "shrinkB": 4,
            },
        )
    ax.annotate(
        label.text,
        (label.x, label.y),
        xytext=(float(offset_pt[0]), float(offset_pt[1])),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=size,
        color=label.color,
        fontweight="bold",
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        zorder=6,
    )


def _needs_leader(anchor: Array, near: Array, pixels_per_pt: float) -> npt.NDArray[np.bool_]:
    return np.asarray(np.linalg.norm(near - anchor, axis=-1) > _LEADER_FROM_PT * pixels_per_pt)


def text_size(figure: Figure, text: str, size: float) -> Array:
    """Width and height in pixels of a bold text of some font size in points."""
    probe = figure.text(0, 0, text, fontsize=size, fontweight="bold")
    extent = probe.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    probe.remove()
    return np.array([extent.width, extent.height])


def _to_pixels(ax: Axes, points: npt.ArrayLike) -> Array:
    return np.asarray(ax.transData.transform(np.asarray(points, dtype=np.float64).reshape(-1, 2)))


def _around(at: Array, half: float) -> Array:
    return np.concatenate([at - half, at + half])


def _chain(ends_22: Array, step: float) -> Array:
    """A segment as a chain of small boxes."""
    count = max(2, int(np.ceil(np.hypot(*(ends_22[1] - ends_22[0])) / step)))
    at_O2 = np.linspace(ends_22[0], ends_22[1], count)
    return np.concatenate([at_O2 - step / 4, at_O2 + step / 4], axis=1)


def _hits(box_C4: Array, box_O4: Array) -> npt.NDArray[np.bool_]:
    """Which boxes overlap which: ``[C, O]``."""
    a, b = box_C4[:, None], box_O4[None]
    return np.asarray((a[..., :2] < b[..., 2:]).all(-1) & (a[..., 2:] > b[..., :2]).all(-1))


def _leader_hits(candidates: _Candidates, box_O4: Array) -> npt.NDArray[np.int64]:
    places, parts, _ = candidates.leader_CP4.shape
    hits = _hits(candidates.leader_CP4.reshape(-1, 4), box_O4)
    return np.asarray(hits.reshape(places, parts, -1).any(1).sum(1))
