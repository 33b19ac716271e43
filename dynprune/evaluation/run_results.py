"""What a finished run left in its folder, read back for a comparison with others.

A run's folder holds ``report/table.json``, ``report/samples/ROW.jsonl`` and ``report/queries.jsonl`` where it made a table, and
``failure.json`` where it is a job of a sweep that failed. What its parts came to, see `dynprune.evaluation.parts`, and how its
routers learned stands in ``report/parts.json`` beside the table, or in ``parts.json`` where it made parts alone. Each says what
was typed; of a killed run ``.hydra`` does. ``report/manifest.json`` has the hashes of what is read back.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig

from dynprune.atomic import replacing, sha256
from dynprune.data.tasks import Query
from dynprune.evaluation.agreement import agreement
from dynprune.evaluation.cells import json_value
from dynprune.evaluation.parts import PARTS, Part, read_part
from dynprune.evaluation.training_curves import TrainingCurve
from dynprune.manifests import MANIFEST, check_content, write_manifest

log = logging.getLogger(__name__)

TABLE = "report/table.json"
_FAILURE = "failure.json"
_PARTS = "parts.json"
_QUERIES = "queries.jsonl"
_OVERRIDES, _CONFIG = ".hydra/overrides.yaml", ".hydra/config.yaml"
WITH_TABLE = ("all", "evaluate", "report")
"""The stages that leave a table."""
_WITH_PARTS = ("adapters", "explore", "router")
# Keys that say how and where a run is run, and change no figure of its table.
_WHERE_AND_HOW = ("stage", "name", "paths", "logger", "skip_completed", "runs", "export_router", "source")


@dataclass(frozen=True)
class RowResult:
    """One row of a run's table.

    Attributes:
        name: Its name, without the seed of its router.
        seed: The seed of its router, or the run's.
        record: What ``table.json`` says about it.
        ids: The queries.
        said: What identifies the row's answers: for each query the pruned layers and the output.
        scores: By name, a score for each of them; ``agreement`` is among them.
    """

    name: str
    seed: int
    record: Mapping[str, Any]
    ids: tuple[str, ...]
    said: tuple[tuple[str, tuple[int, ...], str], ...]
    scores: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class AskedQuery:
    """What a run was asked.

    Attributes:
        id: The query's id.
        query: The last user message.
        reference: The reference calls, as JSON.
    """

    id: str
    query: str
    reference: str

    @classmethod
    def of(cls, query: Query) -> "AskedQuery":
        """That of a query of the data."""
        return cls(query.id, query.messages[-1]["content"], json.dumps(query.answers, ensure_ascii=False))


@dataclass(frozen=True)
class RunResult:
    """One run.

    Attributes:
        folder: Its folder.
        typed: What was typed.
        seed: Its seed.
        rows: The rows of its table; none where it failed, or made parts alone.
        machine: The machine of the table; empty where there is none.
        failure: Why there is nothing to compare; ``None`` where there is.
        parts: What its parts came to, by their names.
        curves: How its routers learned: by method, a curve for each seed.
        asked: The queries of its table, by their ids.
        num_layers: L, the SLM's decoder layers; ``None`` where its table does not say.
        config: Its configuration; empty where it is not known.
        versions: Releases of packages that it was made with; empty where they are not known.
    """

    folder: Path
    typed: tuple[str, ...]
    seed: str
    rows: Sequence[RowResult] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)
    curves: Mapping[str, Sequence[TrainingCurve]] = field(default_factory=dict)
    asked: Mapping[str, AskedQuery] = field(default_factory=dict)
    num_layers: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def overrides(self) -> dict[str, str]:
        """What was typed, by key."""
        pairs = (line.partition("=") for line in self.typed)
        return {key.lstrip("+"): value for key, _, value in pairs}


def typed() -> list[str]:
    """What was typed for the job that Hydra runs at this moment; nothing where it runs none."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def write_parts(
    folder: Path,
    seed: int,
    parts: Mapping[str, Part],
    curves: Mapping[str, Sequence[TrainingCurve]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Notes what a run's parts came to.

    Args:
        folder: The run's folder, or its report's where there is a table.
        seed: The run's seed.
        parts: By their names.
        curves: How its routers learned: by method, a curve for each seed.
        config: The run's configuration, where no table beside it says.
    """
    note = {
        "parts": {name: asdict(part) for name, part in parts.items()},
        "curves": {name: [asdict(curve) for curve in of_seeds] for name, of_seeds in (curves or {}).items()},
        "seed": seed,
        "config": config or {},
    }
    _note(folder / _PARTS, note)


def write_queries(folder: Path, queries: Sequence[Query]) -> None:
    """Writes beside a table what the SLM was asked."""
    with replacing(folder / _QUERIES) as path:
        path.write_text("".join(json.dumps(asdict(AskedQuery.of(query))) + "\n" for query in queries), encoding="utf-8")


def seal_report(report: Path) -> None:
    """Notes the hashes of what is read back from a complete report."""
    read_back = [path for path in sorted(report.rglob("*.json*")) if path != report / MANIFEST]
    write_manifest(report, {"files": {path.relative_to(report).as_posix(): sha256(path) for path in read_back}})


def _check_report(report: Path) -> None:
    """Checks that a report is what was written; that of an earlier version, which has no hashes, passes.

    Raises:
        ValueError: A file is missing, or differs.
    """
    if (report / MANIFEST).is_file():
        check_content(report, (report / MANIFEST).stat().st_mtime_ns)


def write_failure(folder: Path, error: BaseException, seed: int) -> None:
    """Notes in a run's folder why it ended without a table."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    # A user's mistake is said by its sentence alone.
    kind = "" if isinstance(error, ValueError) and first_line else f"{type(error).__name__}: "
    _note(folder / _FAILURE, {"error": f"{kind}{first_line}".rstrip(": "), "seed": seed})


def _note(target: Path, what: Mapping[str, Any]) -> None:
    with replacing(target) as path:
        path.write_text(json.dumps(json_value({**what, "overrides": typed()}), allow_nan=False), encoding="utf-8")


def failed(folder: Path, since: float = 0.0) -> bool:
    """Whether the last attempt at a job failed, and not before a time, in seconds of the file system's clock."""
    return (folder / _FAILURE).is_file() and (folder / _FAILURE).stat().st_mtime >= since


def forget_failure(folder: Path) -> None:
    """Removes the note of an attempt that failed."""
    (folder / _FAILURE).unlink(missing_ok=True)


def has_table_of(folder: Path, config: Mapping[str, Any], plugins: Mapping[str, str], inputs: Mapping[str, str]) -> bool:
    """Whether a run has left its table in a folder; where and under which name it ran does not matter.

    Args:
        folder: The folder.
        config: The run's configuration.
        plugins: Hashes of the code that is not this package's.
        inputs: Hashes of the queries and of the SLM's files.
    """
    if failed(folder) or not (folder / TABLE).is_file():
        return False
    try:
        _check_report((folder / TABLE).parent)
    except ValueError:
        log.warning("the report in %s is not what was written, so it is made anew", folder)
        return False
    table = json.loads((folder / TABLE).read_text(encoding="utf-8"))
    same_code_and_inputs = (table.get("plugins", {}), table.get("inputs", {})) == (plugins, inputs)
    return same_code_and_inputs and _what_matters(table["config"]) == _what_matters(json_value(config))


def _what_matters(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _WHERE_AND_HOW}


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run with something to compare, or of one that should have left it and did not."""
    if any((folder / name).is_file() for name in (TABLE, _FAILURE)):
        return True
    if (folder / _PARTS).is_file():
        # Some stages end without anything to compare, such as one shard of an exploration.
        return bool(read_parts(folder).parts)
    if not (folder / _CONFIG).is_file():
        return False
    return yaml.safe_load((folder / _CONFIG).read_text(encoding="utf-8")).get("stage") in (*WITH_TABLE, *_WITH_PARTS)


def read_run(folder: Path) -> RunResult:
    """Reads a run's folder.

    Raises:
        ValueError: Its table, its samples or what it says of its parts is broken, or not what was written.
    """
    for name in (_FAILURE, TABLE):
        if not (folder / name).is_file():
            continue
        if name == TABLE:
            _check_report((folder / TABLE).parent)
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            # Tables of earlier versions do not say what was typed.
            lines = tuple(map(str, found.get("overrides", [])))
            if name == _FAILURE:
                return RunResult(folder, lines, str(found["seed"]), failure=found["error"])
            run = RunResult(
                folder,
                lines,
                str(found["config"]["seed"]),
                _rows(folder, found),
                found["machine"],
                asked=_read_asked((folder / TABLE).with_name(_QUERIES)),
                num_layers=found.get("num_layers"),
                config=found["config"],
                versions=found.get("versions", {}),
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise _broken(folder / name, error) from error
        beside = (folder / TABLE).parent
        if not (beside / _PARTS).is_file():
            return run
        noted = read_parts(beside)
        return replace(run, parts=noted.parts, curves=noted.curves)
    if (folder / _PARTS).is_file():
        return read_parts(folder)
    config = yaml.safe_load((folder / _CONFIG).read_text(encoding="utf-8"))
    lines = tuple(map(str, yaml.safe_load((folder / _OVERRIDES).read_text(encoding="utf-8")) or []))
    return RunResult(folder, lines, str(config["seed"]), failure="it left nothing to compare: it has not ended, or was killed")


def read_parts(folder: Path) -> RunResult:
    """Reads what `write_parts` noted in a folder.

    Raises:
        ValueError: The note is broken.
    """
    path = folder / _PARTS
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: read_part(name, note["parts"][name]) for name in PARTS if name in note["parts"]}
        # Notes of earlier versions say less.
        learned = note.get("curves", {}).items()
        curves = {name: [TrainingCurve(**curve) for curve in of_seeds] for name, of_seeds in learned}
        return RunResult(
            folder, tuple(note["overrides"]), str(note["seed"]), parts=parts, curves=curves, config=note.get("config", {})
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _broken(path, error) from error


def _read_asked(path: Path) -> dict[str, AskedQuery]:
    """The queries; none where an earlier version wrote the table."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {asked.id: asked for asked in (AskedQuery(**json.loads(line)) for line in lines)}


def _broken(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is broken ({type(error).__name__}: {error}); run it again")


def _rows(folder: Path, table: Mapping[str, Any]) -> list[RowResult]:
    full = _read_samples(folder, table["rows"][0]["name"])
    found = []
    for record in table["rows"]:
        samples = _read_samples(folder, record["name"])
        outputs = [sample["output"] for sample in samples]
        scores = {name: tuple(float(sample["scores"][name]) for sample in samples) for name in samples[0]["scores"]}
        scores["agreement"] = tuple(agreement(outputs, [sample["output"] for sample in full]))
        name, seed = _without_seed(record["name"], table["config"])
        said = tuple((sample["id"], tuple(sample["pruned_layers"]), sample["output"]) for sample in samples)
        found.append(RowResult(name, seed, record, tuple(sample["id"] for sample in samples), said, scores))
    return found


def _read_samples(folder: Path, row: str) -> list[dict[str, Any]]:
    text = (folder / "report/samples" / f"{row}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _without_seed(name: str, config: Mapping[str, Any]) -> tuple[str, int]:
    seeds: list[int] = config["evaluation"]["router_seeds"] or [config["seed"]]
    for seed in seeds:
        stem, found, rest = name.partition(f"-s{seed}")
        if found and (not rest or rest.startswith("@")):
            return stem + rest, seed
    return name, seeds[0]
