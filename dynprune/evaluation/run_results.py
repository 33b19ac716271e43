"""What a finished run left in its folder, read back for a comparison with others.

A run's folder holds ``report/table.json`` and ``report/samples/ROW.jsonl``, or ``router.json`` where it trained a router alone,
and what it was told to do in ``.hydra/overrides.yaml``. A job of a sweep that failed left ``failure.json`` in their place.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dynprune.atomic import replacing
from dynprune.evaluation.agreement import agreement
from dynprune.evaluation.cells import json_value

TABLE = "report/table.json"
_FAILURE = "failure.json"
_ROUTER = "router.json"
_OVERRIDES = ".hydra/overrides.yaml"
# Keys that say how and where a run is run, and change no figure of its table.
_WHERE_AND_HOW = ("stage", "name", "paths", "logger", "skip_completed", "runs")


@dataclass(frozen=True)
class RowResult:
    """One row of a run's table.

    Attributes:
        name: Its name, without the seed of its router.
        seed: The seed of its router, or the run's.
        record: What ``table.json`` says about it.
        ids: The queries.
        outputs: What was said to each of them.
        scores: By name, a score for each of them; ``agreement`` is among them.
    """

    name: str
    seed: int
    record: Mapping[str, Any]
    ids: tuple[str, ...]
    outputs: tuple[str, ...]
    scores: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class RunResult:
    """One run.

    Attributes:
        folder: Its folder.
        overrides: What was typed, by key.
        rows: The rows of its table; none where it failed.
        machine: The machine; empty where it failed.
        failure: Why there is nothing to compare; ``None`` where there is.
        router: What the training of a router alone came to, see `write_router`; ``None`` for a run with a table.
    """

    folder: Path
    overrides: Mapping[str, str]
    rows: Sequence[RowResult]
    machine: Mapping[str, Any]
    failure: str | None = None
    router: Mapping[str, float] | None = None


def write_router(folder: Path, validation_loss: float, preference_accuracy: float, best_epoch: int) -> None:
    """Notes in a run's folder what the training of its router came to.

    Args:
        folder: The folder.
        validation_loss: The least loss on held-out data.
        preference_accuracy: Share of held-out pairs in the right order, with that checkpoint.
        best_epoch: The epoch of that checkpoint.
    """
    record = {"validation_loss": validation_loss, "preference_accuracy": preference_accuracy, "best_epoch": best_epoch}
    with replacing(folder / _ROUTER) as path:
        path.write_text(json.dumps(record), encoding="utf-8")


def write_failure(folder: Path, error: BaseException) -> None:
    """Notes in a run's folder why it ended without a table."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    # A user's mistake is said by its sentence alone.
    kind = "" if isinstance(error, ValueError) and first_line else f"{type(error).__name__}: "
    with replacing(folder / _FAILURE) as path:
        path.write_text(json.dumps({"error": f"{kind}{first_line}".rstrip(": ")}), encoding="utf-8")


def forget_failure(folder: Path) -> None:
    """Removes the note of an attempt that failed."""
    (folder / _FAILURE).unlink(missing_ok=True)


def failure_of(folder: Path) -> str | None:
    """Why a run ended without a table; ``None`` where nothing is noted."""
    path = folder / _FAILURE
    return str(json.loads(path.read_text(encoding="utf-8"))["error"]) if path.is_file() else None


def has_table_of(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a run of this configuration has left its table in a folder; where and under which name it ran does not matter."""
    if failure_of(folder) is not None or not (folder / TABLE).is_file():
        return False
    table = json.loads((folder / TABLE).read_text(encoding="utf-8"))
    return _what_matters(table["config"]) == _what_matters(json_value(config))


def _what_matters(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _WHERE_AND_HOW}


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, whatever became of it."""
    return any((folder / name).is_file() for name in (TABLE, _ROUTER, _FAILURE, _OVERRIDES))


def read_run(folder: Path) -> RunResult:
    """Reads a run's folder.

    Raises:
        ValueError: Its table or its samples are broken.
    """
    overrides = _overrides(folder)
    if (failure := failure_of(folder)) is not None:
        return RunResult(folder, overrides, (), {}, failure)
    if not (folder / TABLE).is_file():
        if (folder / _ROUTER).is_file():
            return RunResult(folder, overrides, (), {}, router=json.loads((folder / _ROUTER).read_text(encoding="utf-8")))
        return RunResult(folder, overrides, (), {}, "it has not ended, or was killed")
    try:
        table = json.loads((folder / TABLE).read_text(encoding="utf-8"))
        return RunResult(folder, overrides, _rows(folder, table), table["machine"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'report'} is broken ({type(error).__name__}: {error}); run it again") from error


def _overrides(folder: Path) -> dict[str, str]:
    if not (folder / _OVERRIDES).is_file():
        return {}
    lines: list[str] = yaml.safe_load((folder / _OVERRIDES).read_text(encoding="utf-8")) or []
    pairs = (str(line).partition("=") for line in lines)
    return {key.lstrip("+"): value for key, _, value in pairs}


def _rows(folder: Path, table: Mapping[str, Any]) -> list[RowResult]:
    config = table["config"]
    full = _read_samples(folder, table["rows"][0]["name"])
    found = []
    for record in table["rows"]:
        samples = _read_samples(folder, record["name"])
        outputs = tuple(sample["output"] for sample in samples)
        scores = {name: tuple(float(sample["scores"][name]) for sample in samples) for name in samples[0]["scores"]}
        scores["agreement"] = tuple(agreement(outputs, [sample["output"] for sample in full]))
        name, seed = _without_seed(record["name"], config)
        found.append(RowResult(name, seed, record, tuple(sample["id"] for sample in samples), outputs, scores))
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
