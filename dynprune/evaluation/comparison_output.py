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
from dynprune.evaluation.cells import ABSENT, Grid, cell, json_value, number, p_value, stacked
from dynprune.evaluation.comparisons import Comparison
from dynprune.evaluation.figures import accuracy_speedup, layer_counts, layers_pruned, pruning_frequency
from dynprune.evaluation.layer_error import layer_errors_compared
from dynprune.evaluation.part_grids import layer_error_grid, part_grids, shown_setting
from dynprune.evaluation.parts import PartEntry
from dynprune.evaluation.run_comparison import Entry, Failure, RunComparison
from dynprune.evaluation.table import comparison_grid, score_label, score_scale
from dynprune.evaluation.training_curves import training_curves

# Of many settings each is compared with each: a terminal shows the surest differences, the files all.
_MOST_DIFFERENCES = 12


def write_comparison(comparison: RunComparison, folder: Path) -> list[Path]:
    """Writes ``comparison.json``, ``.csv``, ``.md`` and the figures of what there is; each complete or not at all.

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
    return [*(folder / name for name in texts), *write_figures(comparison, folder)]


def write_figures(comparison: RunComparison, folder: Path) -> list[Path]:
    """Writes the figures of what there is.

    Returns:
        What was written.
    """
    written = []
    if comparison.entries:
        accuracy_speedup([entry.table_row for entry in comparison.entries], folder / "comparison.png")
        written.append(folder / "comparison.png")
    if comparison.adapters:
        errors = {shown_setting(entry.setting): entry.mean for entry in comparison.adapters}
        layer_errors_compared(errors, folder / "layer_errors.png")
        written.append(folder / "layer_errors.png")
    depths = {entry.num_layers for entry in comparison.entries if entry.prunes and entry.num_layers is not None}
    # SLMs of different depth have no layers in common.
    if len(depths) == 1:
        num_layers = depths.pop()
        drawn = [entry for entry in comparison.entries if entry.prunes and entry.num_layers == num_layers]
        shares = {entry.name: pruning_frequency(_pruned(entry), num_layers) for entry in drawn}
        layers_pruned(shares, folder / "layers_pruned.png")
        written.append(folder / "layers_pruned.png")
    if counts := {entry.name: list(map(len, _pruned(entry))) for entry in comparison.entries if entry.chooses}:
        layer_counts(counts, folder / "layer_counts.png")
        written.append(folder / "layer_counts.png")
    if comparison.curves:
        training_curves(comparison.curves, folder / "training_curves.png")
        written.append(folder / "training_curves.png")
    return written


def _pruned(entry: Entry) -> list[tuple[int, ...]]:
    """The layers that an entry prunes, for each seed and query."""
    return [layers for said_N in entry.said_SN for _, layers, _ in said_N]


def render_comparison(comparison: RunComparison) -> Group:
    """The main columns for a terminal of 80 columns, and below them the surest differences and the runs that failed."""
    table = _empty_table(
        "Comparison of runs",
        "% with 95% intervals; spread: standard deviation over seeds, in points",
        ("setting", "row"),
        ("seeds", score_label(RIGHT_BY), "spread", "layers", "measured"),
    )
    for entry in comparison.entries:
        table.add_row(
            # Not a plain text, in which brackets would be rich's own.
            Text(shown_setting(entry.setting)),
            Text(entry.row, style="bold"),
            str(entry.summary.seeds),
            stacked(entry.summary.mean, 100),
            _spread(entry),
            number(entry.table_row.mean_pruned_layers),
            stacked(entry.table_row.measured_speedup, 100),
        )
    tables = [table] if comparison.entries else []
    tables += [_render_grid(grid) for grid in _part_grids(comparison)]
    tables += _render_differences(comparison.comparisons)
    lines = [Text(f"failed: {_typed(failure)}: {failure.reason}", style="red") for failure in comparison.failures]
    return Group(*tables, *lines)


def _render_differences(comparisons: Sequence[Comparison]) -> list[rich.table.Table]:
    """A table of the surest differences between rows that prune; without any, none."""
    between = [c for c in comparisons if not c.baseline.startswith("original")]
    if not between:
        return []
    shown = sorted(between, key=lambda c: (c.p_value is None, c.p_value, -abs(c.difference.mean)))[:_MOST_DIFFERENCES]
    which = f", the {len(shown)} surest of {len(between)}" if len(shown) < len(between) else ""
    table = _empty_table(
        "Differences",
        f"right answers, points with 95% intervals{which}; exact p, and corrected for all in comparison.md",
        ("row", "against"),
        ("difference", "p", "p (Holm)"),
    )
    for c in shown:
        difference = stacked(c.difference, score_scale(c.score))
        table.add_row(Text(c.row, style="bold"), Text(c.baseline), difference, p_value(c.p_value), p_value(c.p_holm))
    return [table]


def _render_grid(grid: Grid) -> rich.table.Table:
    name, *figures = grid.header
    table = _empty_table(grid.title, f"{grid.title}{grid.note}", (name,), figures)
    for line in grid.lines:
        table.add_row(*map(Text, line))
    return table


def _part_grids(comparison: RunComparison) -> list[Grid]:
    return part_grids(comparison.adapters, comparison.explorations, comparison.routers)


def _empty_table(title: str, caption: str, names: Sequence[str], figures: Sequence[str]) -> rich.table.Table:
    table = rich.table.Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in names:
        table.add_column(header, overflow="fold")
    for header in figures:
        table.add_column(header, justify="right", no_wrap=True)
    return table


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
        **{name: [_flat(entry) for entry in entries] for name, entries in _parts(comparison).items()},
        "failed": [asdict(failure) for failure in comparison.failures],
        "machines": comparison.machines,
    }


def _parts(comparison: RunComparison) -> dict[str, Sequence[PartEntry[Any]]]:
    return {"adapters": comparison.adapters, "explorations": comparison.explorations, "routers": comparison.routers}


def _flat(entry: PartEntry[Any]) -> dict[str, Any]:
    record = {"setting": entry.setting, "seeds": entry.seeds, **asdict(entry.mean)}
    if entry.spread is not None:
        record |= {f"{name}_spread": value for name, value in asdict(entry.spread).items()}
    return {**record, "runs": list(map(str, entry.runs))}


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
    for part, entries in _parts(comparison).items():
        for entry in map(_flat, entries):
            cells = {
                key: " ".join(map(str, value)) if isinstance(value, list | tuple) else value for key, value in entry.items()
            }
            lines.append({"part": part, **cells})
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
            shown_setting(entry.setting),
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
    grids += _part_grids(comparison)
    if comparison.adapters:
        grids.append(layer_error_grid(comparison.adapters))
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


def _spread(entry: Entry) -> str:
    return number(100 * entry.summary.spread) if entry.summary.spread is not None else ABSENT
