"""Several runs in one table: means and spread over seeds, paired tests between settings, and one picture.

Runs that differ in nothing but the seed are one setting. A row that says the same in all runs, such as the unpruned SLM, stands
there once; every other row stands there once for each setting, averaged over its seeds query by query, as
`dynprune.evaluation.comparisons` explains.

Axis suffixes: S = seeds, N = queries.
"""

import csv
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rich.table
from rich import box
from rich.console import Group
from rich.text import Text

from dynprune.atomic import replacing
from dynprune.evaluation.accuracy import RIGHT_BY
from dynprune.evaluation.cells import ABSENT, Grid, cell, json_value, number, stacked
from dynprune.evaluation.comparisons import Comparison, SeedSummary, compare, over_seeds
from dynprune.evaluation.figures import accuracy_speedup
from dynprune.evaluation.run_results import RowResult, RunResult
from dynprune.evaluation.statistics import MedianInterval, mean_interval
from dynprune.evaluation.style import method_of
from dynprune.evaluation.table import SCORES, TableRow, comparison_grid, score_label

# Said by every run, or where and how it runs, not what.
_NO_SETTING = {"seed", "name", "stage", "runs", "skip_completed", "logger", "debug"}
_NO_SETTING_PREFIXES = ("paths.", "hydra.", "hydra/", "hardware.")
# Layers by which two rows may differ and still be of one size.
_SAME_SIZE = 0.5
_IN_ALL_RUNS = "all"


@dataclass(frozen=True)
class Entry:
    """One row of the comparison.

    Attributes:
        setting: What was typed for its runs and differs from others, such as ``method=dpo``; empty where all say the same.
        row: Name of the row in the runs' tables.
        role: The same for rows that stand for each other in different settings.
        summary: AST match over seeds.
        ids: The queries.
        correct_SN: Whether each answer is right, by seed.
        table_row: All its figures, averaged over seeds.
        runs: The runs' folders.
    """

    setting: str
    row: str
    role: str
    summary: SeedSummary
    ids: tuple[str, ...]
    correct_SN: tuple[tuple[float, ...], ...]
    table_row: TableRow
    runs: tuple[Path, ...]

    @property
    def name(self) -> str:
        """What it is called where there is one column: the row, and its setting where that says more."""
        return self.table_row.name


@dataclass(frozen=True)
class RouterEntry:
    """What routers of one setting came to, where nothing but routers was trained.

    Attributes:
        setting: See `Entry`.
        seeds: Number of runs.
        validation_loss: Mean of their least losses on held-out data; losses of different methods do not compare.
        preference_accuracy: Mean share of held-out pairs in the right order.
        spread: Standard deviation (n - 1) of that share; ``None`` for a single run.
        runs: The runs' folders.
    """

    setting: str
    seeds: int
    validation_loss: float
    preference_accuracy: float
    spread: float | None
    runs: tuple[Path, ...]


@dataclass(frozen=True)
class Failure:
    """A run with nothing to compare.

    Attributes:
        setting: What was typed for it and differs from others.
        seed: What was typed as its seed.
        folder: Its folder.
        reason: Why there is no table.
    """

    setting: str
    seed: str
    folder: Path
    reason: str


@dataclass(frozen=True)
class RunComparison:
    """What several runs say about each other.

    Attributes:
        entries: The rows.
        comparisons: The paired tests.
        failures: The runs with nothing to compare.
        machines: The machines that were timed, each once.
        routers: Routers that were trained alone, the best order of held-out pairs first.
    """

    entries: list[Entry]
    comparisons: list[Comparison]
    failures: list[Failure]
    machines: list[str]
    routers: list[RouterEntry]


def compare_runs(runs: Sequence[RunResult]) -> RunComparison:
    """Compares runs.

    Args:
        runs: The runs, in the order to show.

    Raises:
        ValueError: There are no runs.
    """
    if not runs:
        raise ValueError("there are no runs to compare; type stage=compare runs='outputs/multiruns/…/*'")
    settings = _settings(runs)
    done = [(setting, run) for setting, run in zip(settings, runs, strict=True) if run.rows]
    failures = [
        Failure(setting, run.overrides.get("seed", ""), run.folder, run.failure)
        for setting, run in zip(settings, runs, strict=True)
        if run.failure is not None
    ]
    entries = _entries(done)
    machines = dict.fromkeys(_machine(run) for _, run in done)
    routers = _router_entries([(setting, run) for setting, run in zip(settings, runs, strict=True) if run.router is not None])
    return RunComparison(entries, _comparisons(entries), failures, list(machines), routers)


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
    table = rich.table.Table(
        title="Comparison of runs",
        caption="% with 95% intervals; spread: standard deviation over seeds, in points",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("setting", overflow="fold")
    table.add_column("row", overflow="fold")
    for header in ("seeds", score_label(RIGHT_BY), "spread", "layers", "measured"):
        table.add_column(header, justify="right", no_wrap=True)
    for entry in comparison.entries:
        table.add_row(
            entry.setting or _IN_ALL_RUNS,
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
    table = rich.table.Table(
        title="Routers on held-out queries",
        caption="pairs in order: share in which the winner is likelier, %; spread: over seeds, in points",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("setting", overflow="fold")
    for header in ("seeds", "pairs in order", "spread", "loss"):
        table.add_column(header, justify="right", no_wrap=True)
    for line in _router_lines(routers):
        table.add_row(*line)
    return table


def _router_lines(routers: Sequence[RouterEntry]) -> list[list[str]]:
    return [
        [
            entry.setting or _IN_ALL_RUNS,
            str(entry.seeds),
            number(100 * entry.preference_accuracy),
            number(100 * entry.spread) if entry.spread is not None else ABSENT,
            number(entry.validation_loss, 3),
        ]
        for entry in routers
    ]


def _router_entries(trained: Sequence[tuple[str, RunResult]]) -> list[RouterEntry]:
    members: dict[str, list[RunResult]] = {}
    for setting, run in trained:
        members.setdefault(setting, []).append(run)
    entries = []
    for setting, runs in members.items():
        found = [run.router for run in runs if run.router is not None]
        order_S = np.array([one["preference_accuracy"] for one in found])
        entries.append(
            RouterEntry(
                setting,
                len(found),
                float(np.mean([one["validation_loss"] for one in found])),
                float(order_S.mean()),
                float(order_S.std(ddof=1)) if len(found) > 1 else None,
                tuple(run.folder for run in runs),
            )
        )
    return sorted(entries, key=lambda entry: -entry.preference_accuracy)


def _settings(runs: Sequence[RunResult]) -> list[str]:
    """What was typed for each run and not for all, without the seed; with the folder where two runs were typed alike."""
    typed = [{key: value for key, value in run.overrides.items() if _is_setting(key)} for run in runs]
    common = set.intersection(*(set(one.items()) for one in typed))
    differing = [{key: value for key, value in one.items() if (key, value) not in common} for one in typed]
    shown = _short_keys({key for one in differing for key in one})
    settings = [", ".join(f"{shown[key]}={value}" for key, value in one.items()) for one in differing]
    # Two runs of one setting and one seed are two settings: something that was not typed may differ, such as a file.
    places: dict[tuple[str, str | None], list[int]] = {}
    for place, (setting, run) in enumerate(zip(settings, runs, strict=True)):
        places.setdefault((setting, run.overrides.get("seed")), []).append(place)
    for alike in places.values():
        if len(alike) > 1:
            for place in alike:
                settings[place] = f"{settings[place]} {runs[place].folder.name}".lstrip()
    return settings


def _is_setting(key: str) -> bool:
    return key not in _NO_SETTING and not key.startswith(_NO_SETTING_PREFIXES)


def _short_keys(keys: set[str]) -> dict[str, str]:
    """Each key's last part, where no other key has the same."""
    last = {key: key.rpartition(".")[2] for key in keys}
    names = list(last.values())
    return {key: name if names.count(name) == 1 else key for key, name in last.items()}


def _entries(done: Sequence[tuple[str, RunResult]]) -> list[Entry]:
    members: dict[tuple[str, str], list[tuple[RunResult, RowResult]]] = {}
    for setting, run in done:
        for row in run.rows:
            members.setdefault((setting, row.name), []).append((run, row))
    settings = {setting for setting, _ in done}
    said: dict[str, list[dict[tuple[str | None, int], RowResult]]] = {}
    for (_, name), found in members.items():
        said.setdefault(name, []).append({(run.overrides.get("seed"), row.seed): row for run, row in found})
    shared = {name for name, by_setting in said.items() if len(by_setting) == len(settings) and _all_alike(by_setting)}
    entries: dict[tuple[str, str], Entry] = {}
    for (setting, name), found in members.items():
        if name in shared:
            # Every setting timed it; the first one's times stand for all.
            entries.setdefault(("", name), _entry("", name, found, name))
        else:
            # A row of one setting alone says by its name which setting it is of.
            entries[setting, name] = _entry(setting, name, found, f"{name} {setting}".rstrip() if len(said[name]) > 1 else name)
    return sorted(entries.values(), key=lambda entry: bool(entry.setting))


def _all_alike(by_setting: Sequence[Mapping[tuple[str | None, int], RowResult]]) -> bool:
    """Whether a row said the same under all settings, seed by seed."""
    said = [{seed: (row.ids, row.outputs) for seed, row in by_seed.items()} for by_seed in by_setting]
    return all(other == said[0] for other in said)


def _entry(setting: str, row: str, members: Sequence[tuple[RunResult, RowResult]], name: str) -> Entry:
    if len({result.outputs for _, result in members}) == 1:
        # Nothing in it hangs on the seed: it is one row, not several.
        members = members[:1]
    rows = [result for _, result in members]
    records = [result.record for result in rows]
    correct_SN = tuple(result.scores[RIGHT_BY] for result in rows)
    scores = {
        score: mean_interval(np.mean([result.scores[score] for result in rows], axis=0))
        for score in SCORES
        if all(score in result.scores for result in rows)
    }
    table_row = TableRow(
        name=name,
        n=len(rows[0].ids),
        scores=scores,
        mean_pruned_layers=float(np.mean([record["mean_pruned_layers"] for record in records])),
        nominal_speedup=float(np.mean([record["nominal_speedup"] for record in records])),
        measured_speedup=_over_timings([record["measured_speedup"] for record in records if record["measured_speedup"]]),
        timed=sum(record["timed"] for record in records),
        truncated=sum(record["truncated"] for record in records),
    )
    return Entry(
        setting,
        row,
        _role(row, members[0][0]),
        over_seeds(correct_SN),
        rows[0].ids,
        correct_SN,
        table_row,
        tuple(dict.fromkeys(run.folder for run, _ in members)),
    )


def _over_timings(timings: Sequence[Mapping[str, float]]) -> MedianInterval | None:
    """One timing with its interval; of several, the mean of their medians and the range of these."""
    if not timings:
        return None
    if len(timings) == 1:
        return MedianInterval(**timings[0])
    medians = [timing["median"] for timing in timings]
    return MedianInterval(float(np.mean(medians)), min(medians), max(medians))


def _role(row: str, run: RunResult) -> str:
    """A router's budget, where its run has one router: so that routers of different methods stand for each other."""
    routers = {method_of(other.name) for other in run.rows if other.name.startswith("router-")}
    return f"router{row.removeprefix(method_of(row))}" if row.startswith("router-") and len(routers) == 1 else row


def _comparisons(entries: Sequence[Entry]) -> list[Comparison]:
    """Settings against each other, and each of them against what is the same in all runs, where it prunes as many layers."""
    shared = [entry for entry in entries if not entry.setting and not entry.row.startswith("oracle")]
    own = [entry for entry in entries if entry.setting or entry.row.startswith("router-")]
    pairs = [(b, a) for a, b in itertools.combinations(own, 2) if a.role == b.role]
    for a in own:
        for b in shared:
            same_size = abs(a.table_row.mean_pruned_layers - b.table_row.mean_pruned_layers) <= _SAME_SIZE
            if a is not b and (b.row == "original" or same_size):
                pairs.append((a, b))
    # What answered other queries cannot be paired.
    pairs = [(a, b) for a, b in pairs if a.ids == b.ids and a.row != "original"]
    by_name = {entry.name: entry.correct_SN for entry in entries}
    return compare(by_name, [(a.name, b.name) for a, b in pairs], RIGHT_BY)


def _machine(run: RunResult) -> str:
    shown = [str(run.machine[key]) for key in ("cpu", "cores", "accelerator") if run.machine.get(key) is not None]
    return ", ".join(shown)


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
            entry.setting or _IN_ALL_RUNS,
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
    seed = f"seed={failure.seed}" if failure.seed else ""
    return ", ".join(part for part in (failure.setting, seed) if part) or failure.folder.name


def _spread(entry: Entry) -> str:
    return number(100 * entry.summary.spread) if entry.summary.spread is not None else ABSENT
