"""Several runs in one table: means and spread over seeds, paired tests between settings, and one picture.

Runs that differ in nothing but the seed are one setting. A row that prunes and says the same under all settings, such as the
unpruned SLM, stands there once; every other row stands there once for each setting, averaged over its seeds query by query, as
`dynprune.evaluation.comparisons` explains. `dynprune.evaluation.comparison_output` shows and writes the comparison.

Axis suffixes: S = seeds, N = queries.
"""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynprune.evaluation.accuracy import RIGHT_BY
from dynprune.evaluation.comparisons import Comparison, SeedSummary, compare, over_seeds
from dynprune.evaluation.parts import AdapterPart, ExplorationPart, P, PartEntry, RouterPart, part_entries
from dynprune.evaluation.run_results import AskedQuery, RowResult, RunResult
from dynprune.evaluation.statistics import MedianInterval, mean_interval
from dynprune.evaluation.style import method_of
from dynprune.evaluation.table import SCORES, TableRow
from dynprune.evaluation.training_curves import TrainingCurve

# Where and how a run is run, or what became of it afterwards; the seed is what is averaged over.
_NO_SETTING = {"seed", "name", "stage", "runs", "source", "export_router", "skip_completed", "logger"}
_NO_SETTING_PREFIXES = ("paths.", "hydra.", "hydra/", "hardware.", "logger.")
_NOTHING_TYPED = "default"
# Layers by which two rows may differ and still be of one size.
_SAME_SIZE = 0.5


@dataclass(frozen=True)
class Entry:
    """One row of the comparison.

    Attributes:
        setting: What was typed for its runs and differs from others, such as ``method=dpo``; empty where it is shared.
        shared: Whether it is the same under all settings.
        row: Name of the row in the runs' tables.
        role: The same for rows that stand for each other in different settings.
        summary: AST match over seeds.
        ids: The queries.
        correct_SN: Whether each answer is right, by seed.
        said_SN: For each query its id, the layers pruned and the output, by seed.
        num_layers: L, the SLM's decoder layers; ``None`` where its runs do not say.
        table_row: All its figures, averaged over seeds.
        runs: The runs' folders.
    """

    setting: str
    shared: bool
    row: str
    role: str
    summary: SeedSummary
    ids: tuple[str, ...]
    correct_SN: tuple[tuple[float, ...], ...]
    said_SN: tuple[tuple[tuple[str, tuple[int, ...], str], ...], ...]
    num_layers: int | None
    table_row: TableRow
    runs: tuple[Path, ...]

    @property
    def name(self) -> str:
        """What it is called where there is one column: the row, and its setting where that says more."""
        return self.table_row.name

    @property
    def prunes(self) -> bool:
        """Whether it prunes layers, not to draft only."""
        return self.row != "original" and not self.row.startswith("lossless")

    @property
    def chooses(self) -> bool:
        """Whether it may prune other layers for other queries."""
        several = any(len({layers for _, layers, _ in said_N}) > 1 for said_N in self.said_SN)
        return self.prunes and (several or _is_router(self.row))


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
        runs: Number of runs with something to compare.
        machines: The machines that were timed, each once.
        adapters: The adapters of each setting, where settings differ in them.
        explorations: The same of what was explored.
        routers: Routers that were trained alone, the best order of held-out pairs first.
        curves: How routers learned, a curve for each seed: by method, with its setting where there are several.
        asked: The queries, by their ids; none that runs have other queries under.
        origins: Of each run its folder, its seed and what was typed.
        configured: Folder and configuration of the first run whose configuration is known.
        versions: Releases of packages that the runs were made with, each once.
    """

    entries: list[Entry]
    comparisons: list[Comparison]
    failures: list[Failure]
    runs: int
    machines: list[str]
    adapters: list[PartEntry[AdapterPart]]
    explorations: list[PartEntry[ExplorationPart]]
    routers: list[PartEntry[RouterPart]]
    curves: dict[str, list[TrainingCurve]]
    asked: dict[str, AskedQuery]
    origins: list[tuple[Path, str, str]]
    configured: tuple[Path, Mapping[str, Any]] | None
    versions: list[Mapping[str, Any]]


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
    named = list(zip(settings, runs, strict=True))
    done = [(setting, run) for setting, run in named if run.rows]
    failures = [Failure(setting, run.seed, run.folder, run.failure) for setting, run in named if run.failure is not None]
    entries = _entries(done)
    machines = dict.fromkeys(_machine(run) for _, run in done)
    all_versions = [run.versions for run in runs]
    return RunComparison(
        entries,
        _comparisons(entries),
        failures,
        len(named) - len(failures),
        list(machines),
        _differing(named, AdapterPart),
        _differing(named, ExplorationPart),
        sorted(_differing(named, RouterPart), key=lambda entry: -entry.mean.preference_accuracy),
        _curves(named),
        _asked(run for _, run in done),
        [(run.folder, run.seed, " ".join(run.typed)) for run in runs],
        next(((run.folder, run.config) for run in runs if run.config), None),
        [versions for place, versions in enumerate(all_versions) if versions and versions not in all_versions[:place]],
    )


def _curves(named: Sequence[tuple[str, RunResult]]) -> dict[str, list[TrainingCurve]]:
    """How the routers of each setting learned; jobs that share a router, which no setting concerns, show it once."""
    learned: dict[str, dict[str, list[TrainingCurve]]] = {}
    for setting, run in named:
        for method, of_seeds in run.curves.items():
            by_setting = learned.setdefault(method, {})
            known = list(itertools.chain.from_iterable(by_setting.values()))
            if new := [curve for curve in of_seeds if curve not in known]:
                by_setting.setdefault(setting, []).extend(new)
    return {
        method if len(by_setting) == 1 else f"{method} {setting}".rstrip(): of_seeds
        for method, by_setting in learned.items()
        for setting, of_seeds in by_setting.items()
    }


def _asked(runs: Iterable[RunResult]) -> dict[str, AskedQuery]:
    """What each id stands for, where it stands for one query in all runs."""
    found: dict[str, set[AskedQuery]] = {}
    for run in runs:
        for id, asked in run.asked.items():
            found.setdefault(id, set()).add(asked)
    return {id: next(iter(queries)) for id, queries in found.items() if len(queries) == 1}


def _differing(named: Sequence[tuple[str, RunResult]], kind: type[P]) -> list[PartEntry[P]]:
    """One part of all runs, averaged over seeds; nothing where a table is there and the part is the same in all runs."""
    found = [(setting, run.folder, part) for setting, run in named for part in run.parts.values() if isinstance(part, kind)]
    if any(run.rows for _, run in named) and all(part == found[0][2] for _, _, part in found):
        return []
    return part_entries(found)


def _settings(runs: Sequence[RunResult]) -> list[str]:
    """What was typed for each run and not for all, without the seed; with the folder where two runs were typed alike."""
    typed = [{key: value for key, value in run.overrides.items() if _is_setting(key)} for run in runs]
    common = set.intersection(*(set(one.items()) for one in typed))
    differing = [{key: value for key, value in one.items() if (key, value) not in common} for one in typed]
    shown = _short_keys({key for one in differing for key in one})
    settings = [", ".join(f"{shown[key]}={value}" if value else shown[key] for key, value in one.items()) for one in differing]
    if any(settings):
        settings = [setting or _NOTHING_TYPED for setting in settings]
    # Two runs of one setting and one seed are two settings: something that was not typed may differ, such as a file.
    places: dict[tuple[str, str], list[int]] = {}
    for place, (setting, run) in enumerate(zip(settings, runs, strict=True)):
        places.setdefault((setting, run.seed), []).append(place)
    doubled = {settings[alike[0]] for alike in places.values() if len(alike) > 1}
    folders = _short_folders([run.folder for run in runs])
    return [
        f"{setting} {folder}".lstrip() if setting in doubled else setting
        for setting, folder in zip(settings, folders, strict=True)
    ]


def _is_setting(key: str) -> bool:
    return key not in _NO_SETTING and not key.startswith(_NO_SETTING_PREFIXES)


def _short_keys(keys: set[str]) -> dict[str, str]:
    """Each key's last part, where no other key has the same."""
    last = {key: key.rpartition(".")[2] for key in keys}
    names = list(last.values())
    return {key: name if names.count(name) == 1 else key for key, name in last.items()}


def _short_folders(folders: Sequence[Path]) -> list[str]:
    """The folders without what all of them begin with."""
    absolute = [folder.absolute() for folder in folders]
    common = os.path.commonpath([folder.parent for folder in absolute])
    return [os.path.relpath(folder, common) for folder in absolute]


def _entries(done: Sequence[tuple[str, RunResult]]) -> list[Entry]:
    members: dict[str, dict[str, list[tuple[RunResult, RowResult]]]] = {}
    for setting, run in done:
        for row in run.rows:
            members.setdefault(row.name, {}).setdefault(setting, []).append((run, row))
    settings = {setting for setting, _ in done}
    entries = []
    for name, by_setting in members.items():
        if by_setting.keys() == settings and _is_shared(list(by_setting.values())):
            # The one with the most seeds, and of these one that says most; every setting timed it, and its times stand for all.
            most = max(by_setting.values(), key=lambda found: (len(found), found[0][0].num_layers is not None))
            entries.append(_entry("", True, most, name))
            continue
        for setting, found in by_setting.items():
            # A row of one setting alone says by its name which setting it is of.
            entries.append(_entry(setting, False, found, f"{name} {setting}".rstrip() if len(by_setting) > 1 else name))
    order = list(dict.fromkeys(setting for setting, _ in done))
    return sorted(entries, key=lambda entry: -1 if entry.shared else order.index(entry.setting))


def _is_shared(by_setting: Sequence[Sequence[tuple[RunResult, RowResult]]]) -> bool:
    """Whether a row pruned and said the same under all settings, for each seed that they have in common."""
    if any(row.record.get("lossless") for found in by_setting for _, row in found):
        # It says what the unpruned SLM says, whatever drafts; what differs is its time.
        return False
    said = [{(run.seed, row.seed): row.said for run, row in found} for found in by_setting]
    return all(_agree(said[0], other) for other in said[1:])


def _agree(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    if len(set(one.values())) == len(set(other.values())) == 1:
        # It does not hang on the seed.
        return set(one.values()) == set(other.values())
    common = one.keys() & other.keys()
    return bool(common) and all(one[seed] == other[seed] for seed in common)


def _entry(setting: str, shared: bool, members: Sequence[tuple[RunResult, RowResult]], name: str) -> Entry:
    rows = [result for _, result in members]
    if len({result.ids for result in rows}) > 1:
        places = ", ".join(str(run.folder) for run, _ in members)
        raise ValueError(
            f"the runs {places} differ by their seeds alone, but {rows[0].name} answered other queries in some of them; "
            "compare runs on the same queries, or leave some out of runs"
        )
    timings = [result.record["measured_speedup"] for result in rows if result.record["measured_speedup"]]
    timed = sum(result.record["timed"] for result in rows)
    if len({result.said for result in rows}) == 1:
        # Nothing in it hangs on the seed: it is one row, timed several times.
        rows = rows[:1]
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
        measured_speedup=_over_timings(timings),
        timed=timed,
        truncated=sum(record["truncated"] for record in records),
    )
    return Entry(
        setting,
        shared,
        rows[0].name,
        _role(rows[0].name, members[0][0]),
        over_seeds(correct_SN),
        rows[0].ids,
        correct_SN,
        tuple(result.said for result in rows),
        next((run.num_layers for run, _ in members if run.num_layers is not None), None),
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
    routers = {method_of(other.name) for other in run.rows if _is_router(other.name)}
    return f"router{row.removeprefix(method_of(row))}" if _is_router(row) and len(routers) == 1 else row


def _is_router(row: str) -> bool:
    return row.startswith("router-")


def _comparisons(entries: Sequence[Entry]) -> list[Comparison]:
    """Settings against each other; within a setting routers against each other, all against no pruning, routers against sets.

    What answered other queries cannot be paired.
    """
    pairs: dict[tuple[str, str], None] = {}
    for a, b in itertools.combinations(entries, 2):
        budgets = a.row.partition("@")[2] == b.row.partition("@")[2]
        both_routers = _is_router(a.row) and _is_router(b.row) and budgets
        of_settings = a.setting != b.setting and not a.shared and not b.shared and a.role == b.role
        if a.ids == b.ids and a.row != "original" and (of_settings or (both_routers and _meet(a, b))):
            pairs[b.name, a.name] = None
    for a in entries:
        if a.row == "original" or a.row.startswith("oracle") or (a.shared and not _is_router(a.row)):
            continue
        for b in entries:
            same_size = abs(a.table_row.mean_pruned_layers - b.table_row.mean_pruned_layers) <= _SAME_SIZE
            a_set = _is_router(a.row) and same_size and not _is_router(b.row) and not b.row.startswith(("oracle", "lossless"))
            if a is not b and a.ids == b.ids and _meet(a, b) and (b.row == "original" or a_set):
                pairs[a.name, b.name] = None
    by_name = {entry.name: entry.correct_SN for entry in entries}
    return compare(by_name, list(pairs), RIGHT_BY)


def _meet(a: Entry, b: Entry) -> bool:
    """Whether two rows stand in one table."""
    return a.shared or b.shared or a.setting == b.setting


def _machine(run: RunResult) -> str:
    shown = [str(run.machine[key]) for key in ("cpu", "cores", "accelerator") if run.machine.get(key) is not None]
    return ", ".join(shown)
