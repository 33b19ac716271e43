"""The results table: its rows, and how they are written for programs, for people and for the terminal.

Scores and speedups are kept as shares (0.542) and shown as percentages (54.2); `partial_match` has the
scale of the original code (10 for a perfect answer, -5 for a malformed one) and is shown as it is.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rich.table
from rich import box
from rich.text import Text

from dynprune.atomic import replacing
from dynprune.evaluation.cells import ABSENT, Grid, cell, json_value, listed, number, p_value, parts, stacked
from dynprune.evaluation.comparisons import Comparison, SeedSummary
from dynprune.evaluation.statistics import Interval, MedianInterval

SCORES = {
    "json_match": "JSON match",
    "ast_match": "AST match",
    "agreement": "Agreement",
    "parse_rate": "Parsed",
    "name_match": "Function name",
    "ratio_function_calls": "Calls right",
    "partial_match": "Partial match",
}
_NOT_SHARES = {"partial_match"}
_MAIN_SCORES = ("ast_match", "agreement")
_LADDER = ("parse_rate", "name_match", "ast_match", "json_match")  # Each asks for more than the one before.
_COMPARED = (
    ", paired by query. By functions: the interval where queries that share a function are resampled together. p: McNemar, "
    "exact (over seeds: sign flips); Holm: corrected for all of them."
)
_MEASURED = ("measured_speedup", "prefill_speedup", "decode_speedup", "seconds", "cache_mib")


@dataclass(frozen=True)
class Lossless:
    """What drafts did for a row whose answers the full SLM verifies; totals over all queries.

    Attributes:
        tokens: Tokens of the answers, their stop tokens included.
        proposed: Tokens that were drafted.
        accepted: How many of those became tokens of the answers.
        passes: Passes of the full SLM, those over the prompts included.
        draft_passes: Passes of the pruned SLM.
        near_ties: Answers that differ from the full SLM's by rounding alone.
        unexplained: Answers that differ from it otherwise.
    """

    tokens: int
    proposed: int
    accepted: int
    passes: int
    draft_passes: int
    near_ties: int
    unexplained: int


@dataclass(frozen=True)
class TableRow:
    """What one way to prune did on the test queries.

    Attributes:
        name: Name of the row, such as ``original``, ``static-2``, ``router-dpo``.
        n: Number of queries behind the scores.
        scores: Mean and interval of each score; at least those of `SCORES`, others may follow.
        mean_pruned_layers: Pruned layers, averaged over queries.
        nominal_speedup: Share of layers saved, the router's cost taken off.
        measured_speedup: Share of the time saved, or ``None`` if nothing was timed.
        prefill_speedup: The same for the prompt alone.
        decode_speedup: The same for the generated tokens alone.
        seconds: Time of one query, in seconds.
        cache_mib: Keys and values of one query at its end, in MiB; pruned layers have none.
        timed: Number of queries behind the measured figures.
        truncated: Number of outputs that the token limit cut off.
        lossless: What drafts did, for a row that has the full SLM's answers; ``None`` for others.
    """

    name: str
    n: int
    scores: Mapping[str, Interval]
    mean_pruned_layers: float
    nominal_speedup: float
    measured_speedup: MedianInterval | None = None
    prefill_speedup: MedianInterval | None = None
    decode_speedup: MedianInterval | None = None
    seconds: MedianInterval | None = None
    cache_mib: MedianInterval | None = None
    timed: int = 0
    truncated: int = 0
    lossless: Lossless | None = None

    def __post_init__(self) -> None:
        """Checks the scores.

        Raises:
            ValueError: A score of `SCORES` is missing.
        """
        if missing := [name for name in SCORES if name not in self.scores]:
            raise ValueError(
                f"Row {self.name!r} of the table lacks the scores {', '.join(missing)}; a row has all of {', '.join(SCORES)}."
            )


def score_label(name: str) -> str:
    """A score's name as people read it: ``ast_match`` is "AST match"."""
    return SCORES.get(name, name.replace("_", " ").capitalize())


def score_scale(name: str) -> float:
    """What a score is multiplied by to be shown: 100 for a share, 1 for another scale."""
    return 1.0 if name in _NOT_SHARES else 100.0


def count_label(rows: Sequence[TableRow]) -> str:
    """The number of queries behind the rows, as people read it: "n = 200"."""
    counts = sorted({row.n for row in rows})
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}" if counts else "no rows"


def write_table(
    rows: Sequence[TableRow],
    folder: Path,
    machine: Mapping[str, Any],
    versions: Mapping[str, Any],
    config: Mapping[str, Any],
    comparisons: Sequence[Comparison] = (),
    seeds: Mapping[str, SeedSummary] | None = None,
    overrides: Sequence[str] = (),
    plugins: Mapping[str, str] | None = None,
    inputs: Mapping[str, str] | None = None,
    num_layers: int | None = None,
) -> None:
    """Writes ``table.json``, ``table.csv`` and ``table.md``, each complete or not at all.

    Args:
        rows: Rows, in the order to show.
        folder: Folder to write into; created where it is missing.
        machine: What `dynprune.evaluation.machine.describe_machine` says.
        versions: What `dynprune.evaluation.machine.versions` says.
        config: The resolved config that the numbers come from.
        comparisons: Paired comparisons between rows.
        seeds: AST match of what has a row for each of several seeds, averaged over these.
        overrides: What was typed for the run.
        plugins: Hashes of the code that is not this package's, by module.
        inputs: Hashes of what the config names and what can change under its name: queries, the SLM's files.
        num_layers: L, the SLM's decoder layers.
    """
    seeds = seeds or {}
    document = {
        "rows": [_record(row) for row in rows],
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "seeds": {name: asdict(summary) for name, summary in seeds.items()},
        "machine": machine,
        "versions": versions,
        "config": config,
        "overrides": list(overrides),
        "plugins": dict(plugins or {}),
        "inputs": dict(inputs or {}),
        "num_layers": num_layers,
    }
    texts = {
        "table.json": json.dumps(json_value(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "table.csv": _csv(rows),
        "table.md": _markdown(grids(rows, comparisons, seeds), machine, versions),
    }
    with ExitStack() as stack:  # All three are written before the first replaces its predecessor.
        for name, text in texts.items():
            stack.enter_context(replacing(folder / name)).write_text(text, encoding="utf-8", newline="")


def render_table(rows: Sequence[TableRow]) -> rich.table.Table:
    """The main columns for a terminal of 80 columns, each interval under its number.

    Args:
        rows: Rows, in the order to show.

    Returns:
        The table, to be printed by a rich console.
    """
    table = rich.table.Table(
        title=f"Accuracy and speedup, {count_label(rows)}",
        caption="% with 95% intervals; cut: outputs that reached the token limit",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("row", overflow="fold")
    for header in (*map(score_label, _MAIN_SCORES), "layers", "nominal", "measured", "cut"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        main = [stacked(row.scores[name], score_scale(name)) for name in _MAIN_SCORES]
        table.add_row(
            Text(row.name, style="bold"),
            *main,
            number(row.mean_pruned_layers),
            number(100 * row.nominal_speedup),
            stacked(row.measured_speedup, 100),
            str(row.truncated),
        )
    return table


def _record(row: TableRow) -> dict[str, Any]:
    record = asdict(row)
    scores = record.pop("scores")
    return {"name": record.pop("name"), "n": record.pop("n"), **scores, **record}


def _csv(rows: Sequence[TableRow]) -> str:
    flat_rows = []
    for row in rows:
        flat: dict[str, Any] = {}
        for key, value in _record(row).items():
            if key in row.scores or key in _MEASURED:
                center = "mean" if key in row.scores else "median"
                value = value or {}
                flat |= {
                    key: value.get(center),
                    f"{key}_low": value.get("low"),
                    f"{key}_high": value.get("high"),
                }
            elif key == "lossless":
                flat |= {f"{key}_{name}": count for name, count in (value or {}).items()}
            else:
                flat[key] = value
        flat_rows.append(json_value(flat))
    # A dict, not a set, keeps the order of the columns.
    columns = list(dict.fromkeys(key for flat in flat_rows for key in flat))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat_rows)
    return text.getvalue()


def grids(
    rows: Sequence[TableRow], comparisons: Sequence[Comparison] = (), seeds: Mapping[str, SeedSummary] | None = None
) -> list[Grid]:
    """All figures as tables of text, the most important ones first.

    Args:
        rows: Rows, in the order to show.
        comparisons: Paired comparisons between rows.
        seeds: AST match of what has a row for each of several seeds, averaged over these.
    """
    found = [_main_grid(rows), _ladder(rows), _score_grid(rows)]
    if any(row.timed for row in rows):
        found.append(_time_grid(rows))
    if any(row.lossless for row in rows):
        found.append(_lossless_grid(rows))
    if seeds:
        found.append(_seed_grid(seeds))
    if comparisons:
        found.append(comparison_grid(comparisons))
    return found


def _markdown(all_grids: Sequence[Grid], machine: Mapping[str, Any], versions: Mapping[str, Any]) -> str:
    blocks = [grid.markdown() for grid in all_grids]
    blocks += [f"Machine: {listed(machine)}.", f"Versions: {listed(versions)}."]
    return "\n\n".join(blocks) + "\n"


def _main_grid(rows: Sequence[TableRow]) -> Grid:
    header = [
        "Row",
        *map(_header, _MAIN_SCORES),
        "Layers pruned",
        "Nominal speedup, %",
        "Measured speedup, %",
    ]
    lines = []
    for row in rows:
        speedups = [number(100 * row.nominal_speedup), cell(row.measured_speedup, 100)]
        scores = [_score(row, name) for name in _MAIN_SCORES]
        lines.append([row.name, *scores, number(row.mean_pruned_layers), *speedups])
    return Grid(
        "Accuracy and speedup",
        f", {count_label(rows)}, 95% intervals in brackets. "
        "Agreement: queries with the unpruned SLM's own output, right or wrong.",
        header,
        lines,
    )


def _ladder(rows: Sequence[TableRow]) -> Grid:
    lines = [[row.name, *(_score(row, name) for name in _LADDER)] for row in rows]
    return Grid("Accuracy ladder", ": each step asks for more than the one before.", ["Row", *map(_header, _LADDER)], lines)


def _score_grid(rows: Sequence[TableRow]) -> Grid:
    shown = {*_MAIN_SCORES, *_LADDER}
    names = [name for name in dict.fromkeys(key for row in rows for key in row.scores) if name not in shown]
    lines = [[row.name, str(row.n), *(_score(row, name) for name in names), str(row.truncated)] for row in rows]
    return Grid(
        "More scores",
        ". Truncated: outputs that reached the token limit.",
        ["Row", "n", *map(_header, names), "Truncated"],
        lines,
    )


def _time_grid(rows: Sequence[TableRow]) -> Grid:
    header = ["Row", "Timed queries", "Prefill speedup, %", "Decode speedup, %", "Seconds per query", "Cache per query, MiB"]
    lines = []
    for row in rows:
        speedups = [cell(row.prefill_speedup, 100), cell(row.decode_speedup, 100)]
        lines.append([row.name, str(row.timed), *speedups, cell(row.seconds, 1, digits=2), cell(row.cache_mib, 1)])
    return Grid("Time", ": medians over queries.", header, lines)


def _lossless_grid(rows: Sequence[TableRow]) -> Grid:
    header = [
        "Row",
        "Tokens from drafts, %",
        "Drafted tokens accepted, %",
        "Tokens per pass",
        "Pruned passes per pass",
        "Differ by rounding",
        "Differ otherwise",
    ]
    lines = []
    for row in rows:
        if (drafts := row.lossless) is not None:
            shares = [number(100 * drafts.accepted / drafts.tokens), number(100 * drafts.accepted / max(1, drafts.proposed))]
            rates = [number(drafts.tokens / drafts.passes, 2), number(drafts.draft_passes / drafts.passes, 2)]
            lines.append([row.name, *shares, *rates, f"{drafts.near_ties} of {row.n}", f"{drafts.unexplained} of {row.n}"])
    return Grid("Lossless rows", ": drafts that the unpruned SLM verifies, so its answers.", header, lines)


def _seed_grid(seeds: Mapping[str, SeedSummary]) -> Grid:
    lines = [
        [name, str(s.seeds), cell(s.mean, 100), number(100 * s.spread) if s.spread is not None else ABSENT]
        for name, s in seeds.items()
    ]
    return Grid(
        "Seeds",
        ": AST match, averaged over seeds for each query; spread: standard deviation of the seeds' means.",
        ["Row", "Seeds", "AST match, %", "Spread, points"],
        lines,
    )


def comparison_grid(comparisons: Sequence[Comparison]) -> Grid:
    """Comparisons as a table of text."""
    lines = []
    for c in comparisons:
        difference = cell(c.difference, score_scale(c.score))
        counts = [f"{c.wins} of {c.n}", f"{c.losses} of {c.n}"]
        p_values = [p_value(c.p_value), p_value(c.p_holm)]
        grouped = parts(c.difference_by_group, score_scale(c.score))[1] or ABSENT
        lines.append([c.row, c.baseline, score_label(c.score), difference, grouped, *counts, *p_values])
    header = ["Row", "Against", "Score", "Difference, points", "By functions", "Better", "Worse", "p", "p (Holm)"]
    return Grid("Comparisons", _COMPARED, header, lines)


def _header(score: str) -> str:
    return score_label(score) + (", %" if score_scale(score) == 100 else "")


def _score(row: TableRow, name: str) -> str:
    return cell(row.scores.get(name), score_scale(name))
