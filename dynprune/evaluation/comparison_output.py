"""How a comparison of runs is shown in a terminal and written into files."""

import csv
import io
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich.table
from rich import box
from rich.console import Group
from rich.text import Text

from dynprune.atomic import replacing
from dynprune.evaluation.accuracy import RIGHT_BY
from dynprune.evaluation.cells import ABSENT, Grid, cell, json_value, number, stacked
from dynprune.evaluation.figures import accuracy_speedup
from dynprune.evaluation.run_comparison import Entry, Failure, RouterEntry, RunComparison
from dynprune.evaluation.table import comparison_grid, score_label

_IN_ALL_RUNS = "all"


def write_comparison(comparison: RunComparison, folder: Path) -> list[Path]:
    """Writes ``comparison.json``, ``.csv``, ``.md``, and ``.png`` where a run has a table; each complete or not at all.

    Returns:
        What was written.
    """
    texts = {
        "comparison.json": json.dumps(json_value(_document(comparison)), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "comparison.csv": _csv(comparison),
        "comparison.md": _markdown(comparison),
    }
    with ExitStack() as stack:
        for name, text in texts.items():
            stack.enter_context(replacing(folder / name)).write_text(text, encoding="utf-8", newline="")
    written = [folder / name for name in texts]
    if comparison.entries:
        accuracy_speedup([entry.table_row for entry in comparison.entries], folder / "comparison.png")
        written.append(folder / "comparison.png")
    return written


def render_comparison(comparison: RunComparison) -> Group:
    """The main columns for a terminal of 80 columns, and below them the runs that failed."""
    table = _empty_table(
        "Comparison of runs",
        "% with 95% intervals; spread: standard deviation over seeds, in points",
        ("setting", "row"),
        ("seeds", score_label(RIGHT_BY), "spread", "layers", "measured"),
    )
    for entry in comparison.entries:
        table.add_row(
            # Not a plain text, in which brackets would be rich's own.
            Text(_shown(entry)),
            Text(entry.row, style="bold"),
            str(entry.summary.seeds),
            stacked(entry.summary.mean, 100),
            _spread(entry),
            number(entry.table_row.mean_pruned_layers),
            stacked(entry.table_row.measured_speedup, 100),
        )
    tables = [table] if comparison.entries else []
    if comparison.routers:
        tables.append(_render_routers(comparison.routers))
    lines = [Text(f"failed: {_typed(failure)}: {failure.reason}", style="red") for failure in comparison.failures]
    return Group(*tables, *lines)


def _render_routers(routers: Sequence[RouterEntry]) -> rich.table.Table:
    table = _empty_table(
        "Routers on held-out queries",
        "pairs in order: share in which the winner is likelier, %; spread: over seeds, in points",
        ("setting",),
        ("seeds", "pairs in order", "spread", "loss"),
    )
    for line in _router_lines(routers):
        table.add_row(*map(Text, line))
    return table


def _empty_table(title: str, caption: str, names: Sequence[str], figures: Sequence[str]) -> rich.table.Table:
    table = rich.table.Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in names:
        table.add_column(header, overflow="fold")
    for header in figures:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _router_lines(routers: Sequence[RouterEntry]) -> list[list[str]]:
    return [
        [
            _shown(entry),
            str(entry.seeds),
            number(100 * entry.preference_accuracy),
            number(100 * entry.spread) if entry.spread is not None else ABSENT,
            number(entry.validation_loss, 3),
        ]
        for entry in routers
    ]


def _document(comparison: RunComparison) -> dict[str, Any]:
    return {
        "entries": [
            {
                "setting": entry.setting,
                "row": entry.row,
                "seeds": entry.summary.seeds,
                "spread": entry.summary.spread,
                "n": entry.table_row.n,
                **{name: asdict(interval) for name, interval in entry.table_row.scores.items()},
                "mean_pruned_layers": entry.table_row.mean_pruned_layers,
                "nominal_speedup": entry.table_row.nominal_speedup,
                "measured_speedup": asdict(entry.table_row.measured_speedup) if entry.table_row.measured_speedup else None,
                "runs": [str(folder) for folder in entry.runs],
            }
            for entry in comparison.entries
        ],
        "comparisons": [asdict(test) for test in comparison.comparisons],
        "routers": [asdict(entry) for entry in comparison.routers],
        "failed": [asdict(failure) for failure in comparison.failures],
        "machines": comparison.machines,
    }


def _csv(comparison: RunComparison) -> str:
    lines: list[dict[str, Any]] = []
    for record in _document(comparison)["entries"]:
        flat: dict[str, Any] = {"failed": ""}
        for key, value in record.items():
            if isinstance(value, dict):
                flat |= {key if part in ("mean", "median") else f"{key}_{part}": number for part, number in value.items()}
            else:
                flat[key] = " ".join(value) if isinstance(value, list) else value
        lines.append(flat)
    lines += [{**asdict(entry), "runs": " ".join(map(str, entry.runs))} for entry in comparison.routers]
    lines += [{"failed": failure.reason, "setting": _typed(failure), "runs": failure.folder} for failure in comparison.failures]
    columns = list(dict.fromkeys(key for line in lines for key in line if key != "failed"))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, "failed"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def comparison_grids(comparison: RunComparison) -> list[Grid]:
    """All figures as tables of text."""
    header = ["Setting", "Row", "Seeds", "AST match, %", "Spread, points", "Agreement, %", "Layers pruned"]
    header += ["Nominal speedup, %", "Measured speedup, %"]
    lines = [
        [
            _shown(entry),
            entry.row,
            str(entry.summary.seeds),
            cell(entry.summary.mean, 100),
            _spread(entry),
            cell(entry.table_row.scores["agreement"], 100),
            number(entry.table_row.mean_pruned_layers),
            number(100 * entry.table_row.nominal_speedup),
            cell(entry.table_row.measured_speedup, 100),
        ]
        for entry in comparison.entries
    ]
    note = (
        ", 95% intervals over queries in brackets. Spread: standard deviation of the seeds' means. Measured speedup over "
        "several seeds: the mean of their medians, and the range of these."
    )
    grids = [Grid("Runs compared", note, header, lines)] if lines else []
    if comparison.routers:
        note = (
            ". Pairs in order: held-out pairs in which the winner is likelier. Spread: standard deviation over seeds, points."
        )
        header = ["Setting", "Seeds", "Pairs in order, %", "Spread", "Validation loss"]
        grids.append(Grid("Routers on held-out queries", note, header, _router_lines(comparison.routers)))
    if comparison.comparisons:
        grids.append(comparison_grid(comparison.comparisons))
    if comparison.failures:
        failed = [[_typed(failure), failure.reason, str(failure.folder)] for failure in comparison.failures]
        grids.append(Grid("Failed runs", ".", ["Setting", "Reason", "Folder"], failed))
    return grids


def machines_sentence(comparison: RunComparison) -> str:
    """Where the runs were timed."""
    several = " Speedups of different machines do not compare." if len(comparison.machines) > 1 else ""
    return f"Timed on: {'; '.join(comparison.machines)}.{several}" if comparison.machines else ""


def _markdown(comparison: RunComparison) -> str:
    blocks = [*(grid.markdown() for grid in comparison_grids(comparison)), machines_sentence(comparison)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _typed(failure: Failure) -> str:
    return ", ".join(part for part in (failure.setting, f"seed={failure.seed}") if part)


def _shown(entry: Entry | RouterEntry) -> str:
    return entry.setting or _IN_ALL_RUNS


def _spread(entry: Entry) -> str:
    return number(100 * entry.summary.spread) if entry.summary.spread is not None else ABSENT
