"""The whole pipeline on a tiny model in a process of its own, or one of the trainings beside it, and what it made."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tiny import composed

from dynprune.app import run_stage
from dynprune.data.pairs import read_pairs
from dynprune.data.rollouts import read_likelihoods, read_rollouts
from dynprune.stages.pairs import PAIRS

_LONGEST = 240
WHOLE = (
    *("experiment=tiny", "adapter=context", "adapter.bottleneck=16", "adapter.context.epochs=2", "adapter.draw.max_layers=2"),
    *("evaluation.latency.queries=1", "evaluation.latency.warmup=0", "exploration.estimate_all=true", "paths.run=outputs/run"),
)
LOCAL = (
    *("experiment=tiny", "stage=adapters", "adapter=bottleneck", "adapter.bottleneck=16", "adapter.epochs=12"),
    "paths.run=outputs/run",
)
"""Adapters that learn by gradient, each alone."""
ADAPT = (
    *("experiment=tiny", "stage=adapt", "data.source.max_chars=600", "adapt.rank=2", "adapt.alpha=4", "adapt.epochs=2"),
    *("adapt.families=24", "evaluation.max_queries=4", "paths.run=outputs/run"),
)
"""The SLM's own delta."""
# Not compared: clocks, and what is kept for going on alone.
_UNEQUAL = ("latency", "generate")


Interval = tuple[str, float, float]
"""A stage, and when it was begun and done, in seconds from the first one's beginning."""


@dataclass
class Ended:
    """How a process ended.

    Attributes:
        code: 0 for well, 3 for a mistake said in a sentence, below 0 for a signal.
        sentence: What it said; empty where it ended well.
    """

    code: int
    sentence: str = ""


def start(folder: Path, *overrides: str, command: Sequence[str] = WHOLE, before: Callable[[], None] | None = None) -> int:
    """Forks a process that runs a command in a folder, as its own; returns its number."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        os.setsid()
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        Path("outputs/run").mkdir(parents=True, exist_ok=True)
        if before is not None:
            before()
        run_stage(composed(*command, *overrides), multirun=False)
        code = 0
    except KeyboardInterrupt:
        code = 130
    except (ValueError, OSError) as error:
        _say(str(error))
        code = 3
    except BaseException:
        _say(traceback.format_exc())
    finally:
        os._exit(code)


def _say(text: str) -> None:
    # Not in the folder under test, which may be full.
    with contextlib.suppress(OSError):
        Path(f"/tmp/dynprune-said-{os.getpid()}").write_text(text, encoding="utf-8")


def wait(pid: int) -> Ended:
    """Waits for a process; one that takes too long is killed, and that is its end."""
    deadline = time.monotonic() + _LONGEST
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            said = Path(f"/tmp/dynprune-said-{pid}")
            sentence = said.read_text(encoding="utf-8") if said.exists() else ""
            said.unlink(missing_ok=True)
            return Ended(os.waitstatus_to_exitcode(status), sentence)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return Ended(-signal.SIGKILL, f"it hung for {_LONGEST} s")


def finish(folder: Path, *overrides: str, command: Sequence[str] = WHOLE, before: Callable[[], None] | None = None) -> Ended:
    return wait(start(folder, *overrides, command=command, before=before))


def typed(folder: Path) -> Ended:
    """Runs the same as the command that is typed."""
    words = [word for word in WHOLE if not word.startswith("paths.run=")]
    command = [sys.executable, "-m", "dynprune", *words, "hydra.run.dir=outputs/run"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_LONGEST, check=False)
    return Ended(result.returncode, result.stdout + result.stderr)


def intervals(folder: Path) -> list[Interval]:
    """Of each artifact its stage, and when it was begun and done, in seconds from the first one's beginning."""
    manifests = [json.loads(path.read_text()) for path in folder.glob("outputs/artifacts/*/*/manifest.json")]
    attempts = [(one["stage"], one["attempts"][0]) for one in manifests]
    first = min(attempt["started"] for _, attempt in attempts)
    return sorted((stage, one["started"] - first, one["started"] - first + one["seconds"]) for stage, one in attempts)


def wait_for_the_first(folder: Path, pid: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not any(folder.glob("outputs/artifacts/*/*/manifest.json")):
        time.sleep(0.01)


def content(folder: Path) -> dict[str, Any]:
    """What a run made, by artifact."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("outputs/artifacts/*/*/manifest.json")):
        place, stage = path.parent, path.parent.parent.name
        if stage in _UNEQUAL:
            continue
        if stage == "explore":
            rollouts = list(read_rollouts(place))
            assert len({(r.id, r.pruned_layers) for r in rollouts}) == len(rollouts), "a rollout is there twice"
            found[f"{stage}/{place.name}"] = (rollouts, list(read_likelihoods(place)))
        elif stage == "pairs":
            found[f"{stage}/{place.name}"] = list(read_pairs(place / PAIRS))
        else:
            for file in sorted(place.rglob("*")):
                name = f"{stage}/{place.name}/{file.relative_to(place)}"
                if file.suffix == ".safetensors":
                    found[name] = {key: tensor.tolist() for key, tensor in load_file(file).items()}
                elif file.suffix in (".json", ".jsonl", ".csv") and file.name != "manifest.json":
                    found[name] = file.read_text(encoding="utf-8")
    return found


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """What differs, in a few words."""
    if found.keys() != expected.keys():
        return f"other files: {sorted(found.keys() ^ expected.keys())[:4]}"
    return ", ".join(name for name in expected if found[name] != expected[name])[:300]


def ends_well(folder: Path, ended: Ended, expected: dict[str, Any]) -> None:
    assert ended.code == 0, f"it ended with {ended.code}: {ended.sentence[-300:]}"
    assert not (wrong := difference(content(folder), expected)), wrong
