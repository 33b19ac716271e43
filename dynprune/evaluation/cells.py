"""How figures are written in tables: numbers with their intervals, grids, values for JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.text import Text

from dynprune.evaluation.statistics import Interval, MedianInterval

ABSENT = "–"
"""What stands in a cell without a figure."""


def json_value(value: Any) -> Any:
    """The value in JSON's types: NaN and infinities become null, and what JSON does not know its text."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_value(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


@dataclass(frozen=True)
class Grid:
    """A table of text: what stands in Markdown and in a report.

    Attributes:
        title: What it shows, in a few words.
        note: What goes on after the title, as a sentence.
        header: The columns' names; all columns but the first are figures.
        lines: The rows' cells.
    """

    title: str
    note: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The title and the table as Markdown."""

        def join(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = "| " + " | ".join(["---"] + ["---:"] * (len(self.header) - 1)) + " |"
        table = "\n".join([join(self.header), rule, *(join(line) for line in self.lines)])
        return f"**{self.title}**{self.note}\n\n{table}"


def parts(interval: Interval | MedianInterval | None, scale: float, digits: int = 1) -> tuple[str, str]:
    """The centre and the bounds of an interval, as text.

    Args:
        interval: The interval; ``None`` where there is no figure.
        scale: What the values are multiplied by, 100 for shares.
        digits: After the decimal point.
    """
    if interval is None:
        return ABSENT, ""
    center = interval.mean if isinstance(interval, Interval) else interval.median
    low, high = (number(scale * bound, digits) for bound in (interval.low, interval.high))
    return number(scale * center, digits), f"[{low}, {high}]"


def cell(interval: Interval | MedianInterval | None, scale: float, digits: int = 1) -> str:
    """An interval in one line, see `parts`."""
    return " ".join(parts(interval, scale, digits)).rstrip()


def stacked(interval: Interval | MedianInterval | None, scale: float) -> Text:
    """An interval in two lines of a terminal, see `parts`."""
    center, bounds = parts(interval, scale)
    return Text.assemble(center, "\n", (bounds, "dim")) if bounds else Text(center)


def number(value: float, digits: int = 1) -> str:
    """A number with so many digits after its point."""
    # Adding 0.0 turns the -0.0 of a rounded tiny negative into 0.0.
    return f"{round(value, digits) + 0.0:.{digits}f}" if math.isfinite(value) else ABSENT


def p_value(p: float | None) -> str:
    """A p value; ``None`` where nothing was tested."""
    if p is None:
        return ABSENT
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def listed(items: Mapping[str, Any]) -> str:
    """Names and values in one line, without those that are ``None``."""
    return ", ".join(f"{key} {value}" for key, value in items.items() if value is not None)
