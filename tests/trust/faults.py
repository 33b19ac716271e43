"""The whole pipeline on a tiny model, killed, cut short, corrupted, starved: it ends as an undisturbed run does.

Each trial forks a process that runs it. Kills (SIGKILL, SIGTERM, Ctrl-C) come at random moments of every stage, up to three in
a trial, and then it is run to its end. Other faults must be recovered from, or be said in one sentence that names the place;
once the sentence's advice is followed, the run ends like the others. Compared are rollouts, pairs, adapters, routers, sets and
answers.
"""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tiny import composed

from dynprune.app import run_stage
from dynprune.data.pairs import read_pairs
from dynprune.data.rollouts import read_likelihoods, read_rollouts
from dynprune.stages.pairs import PAIRS

KILLS = 54
_KILLS_A_TRIAL = 3
_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_PROCESSES = 2
_LONGEST = 240
_RUN = (
    *("experiment=tiny", "adapter=context", "adapter.bottleneck=16", "adapter.context.epochs=2", "adapter.draw.max_layers=2"),
    *("evaluation.latency.queries=1", "evaluation.latency.warmup=0", "exploration.estimate_all=true", "paths.run=outputs/run"),
)
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


@dataclass
class Found:
    """What came of the faults.

    Attributes:
        injected: By kind, how many there were.
        survived: By kind, how many were survived.
        failures: What went wrong, in a line each.
        struck: By stage, how many kills it got.
    """

    injected: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    struck: Counter[str] = field(default_factory=Counter)


def run() -> dict[str, Any]:
    """Injects all faults.

    Returns:
        ``faults_injected``, ``faults_survived``, both by kind, and what went wrong.
    """
    found = Found()
    with tempfile.TemporaryDirectory(prefix="dynprune-faults-") as scratch:
        root = Path(scratch)
        whole = root / "whole"
        assert _finish(whole).code == 0, "an undisturbed run must end"
        expected, stages = _content(whole), _intervals(whole)
        trials = [
            (root / f"kill-{number}", stages[number % len(stages)], _SIGNALS[number % len(_SIGNALS)], number)
            for number in range(KILLS // _KILLS_A_TRIAL)
        ]
        with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("fork")) as pool:
            outcomes = pool.map(partial(_killed, stages, expected), trials)
            for (folder, *_), (kills, struck, wrong) in zip(trials, outcomes, strict=True):
                found.injected["kill"] += kills
                found.survived["kill"] += 0 if wrong else kills
                found.struck += struck
                found.failures += [f"{folder.name}: {wrong}"] * bool(wrong)
            others = len(list(_others(root, whole, expected)))
            for kind, wrong in pool.map(partial(_tried, root, whole, expected), range(others)):
                found.injected[kind] += 1
                found.survived[kind] += not wrong
                found.failures += [f"{kind}: {wrong}"] * bool(wrong)
    return {
        "faults_injected": found.injected.total(),
        "faults_survived": found.survived.total(),
        "faults_by_kind": {kind: f"{found.survived[kind]} of {count}" for kind, count in found.injected.items()},
        "kills_by_stage": dict(found.struck.most_common()),
        "fault_failures": found.failures,
    }


def _start(folder: Path, *overrides: str, before: Callable[[], None] | None = None) -> int:
    """Forks a process that runs the pipeline in a folder, as its own; returns its number."""
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
        run_stage(composed(*_RUN, *overrides), multirun=False)
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


def _wait(pid: int) -> Ended:
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


def _finish(folder: Path, *overrides: str, before: Callable[[], None] | None = None) -> Ended:
    return _wait(_start(folder, *overrides, before=before))


def _typed(folder: Path) -> Ended:
    """Runs the same as the command that is typed."""
    words = [word for word in _RUN if not word.startswith("paths.run=")]
    command = [sys.executable, "-m", "dynprune", *words, "hydra.run.dir=outputs/run"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_LONGEST, check=False)
    return Ended(result.returncode, result.stdout + result.stderr)


def _intervals(folder: Path) -> list[Interval]:
    """Of each artifact its stage, and when it was begun and done, in seconds from the first one's beginning."""
    manifests = [json.loads(path.read_text()) for path in folder.glob("outputs/artifacts/*/*/manifest.json")]
    attempts = [(one["stage"], one["attempts"][0]) for one in manifests]
    first = min(attempt["started"] for _, attempt in attempts)
    return sorted((stage, one["started"] - first, one["started"] - first + one["seconds"]) for stage, one in attempts)


def _killed(
    stages: list[Interval], expected: dict[str, Any], trial: tuple[Path, Interval, signal.Signals, int]
) -> tuple[int, Counter[str], str]:
    """One trial: kills, of which the first one aims at a stage, and then a run to the end.

    Returns:
        How many kills there were, the stages that they struck, and what is wrong at the end, if anything.
    """
    folder, (_, begun, done), by, number = trial
    rng = random.Random(f"kill {number}")
    whole = max(end for _, _, end in stages)
    kills, struck = 0, Counter[str]()
    for attempt in range(_KILLS_A_TRIAL):
        pid = _start(folder)
        # From the first artifact on, as the intervals are.
        after = rng.uniform(begun, done) if attempt == 0 else rng.uniform(0, 0.8 * whole)
        _wait_for_the_first(folder, pid)
        time.sleep(after)
        if os.waitpid(pid, os.WNOHANG)[0]:
            # It was faster than the kill.
            break
        now = {path.parent.name for path in folder.glob("outputs/artifacts/*/*.partial")}
        os.kill(pid, by)
        _wait(pid)
        kills += 1
        struck.update(now or {"between stages"})
    ended = _finish(folder)
    if ended.code != 0:
        return kills, struck, f"after {kills} kills it ended with {ended.code}: {ended.sentence[-300:]}"
    wrong = _difference(_content(folder), expected)
    shutil.rmtree(folder, ignore_errors=True)
    return kills, struck, wrong


def _wait_for_the_first(folder: Path, pid: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not any(folder.glob("outputs/artifacts/*/*/manifest.json")):
        time.sleep(0.01)


def _content(folder: Path) -> dict[str, Any]:
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
                elif file.suffix in (".json", ".jsonl") and file.name != "manifest.json":
                    found[name] = file.read_text(encoding="utf-8")
    return found


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """What differs, in a few words."""
    if found.keys() != expected.keys():
        return f"other files: {sorted(found.keys() ^ expected.keys())[:4]}"
    return ", ".join(name for name in expected if found[name] != expected[name])[:300]


def _others(root: Path, whole: Path, expected: dict[str, Any]) -> Iterator[tuple[str, Callable[[], None]]]:
    """The faults that are no kills, each as a trial that raises an AssertionError where it is not survived."""
    for place in sorted(path.parent for path in whole.glob("outputs/artifacts/*/*/manifest.json")):
        files = [path for path in sorted(place.rglob("*")) if path.is_file() and path.stat().st_size]
        for file in dict.fromkeys([place / "manifest.json", max(files, key=lambda path: path.stat().st_size)]):
            for damage in (_flip, _cut, Path.unlink):
                relative = file.relative_to(whole)
                name = damage.__name__.strip("_")
                folder = root / f"{name}-{place.parent.name}-{place.name}-{file.name}"
                yield f"file {name}", lambda f=folder, r=relative, d=damage: _damaged(f, whole, r, d, expected)
    yield "two at once", lambda: _two_at_once(root / "two", expected)
    for hours in (-24, 24):
        yield "clock", lambda hours=hours: _clock(root / f"clock{hours}", hours, expected)
    yield "stale lock", lambda: _stale_locks(root / "locks", whole, expected)
    yield "read-only", lambda: _read_only(root / "read-only", expected)
    for size in (256 << 10, 512 << 10, 1 << 20):
        yield "disk full", lambda size=size: _full(root / f"full-{size}", size, expected)
    yield "worker dies", lambda: _worker_dies(root / "worker")


def _tried(root: Path, whole: Path, expected: dict[str, Any], number: int) -> tuple[str, str]:
    """One of the other trials, by its place among them: the kind of its fault, and what is wrong, if anything."""
    kind, trial = list(_others(root, whole, expected))[number]
    try:
        trial()
    except Exception as error:
        return kind, f"{type(error).__name__}: {error}"[:500]
    return kind, ""


def _ends_well(folder: Path, ended: Ended, expected: dict[str, Any]) -> None:
    assert ended.code == 0, f"it ended with {ended.code}: {ended.sentence[-300:]}"
    assert not (wrong := _difference(_content(folder), expected)), wrong


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _damaged(folder: Path, whole: Path, relative: Path, damage: Callable[[Path], None], expected: dict[str, Any]) -> None:
    """A file of a finished run is damaged; a run that needs it must say so, and make it anew once the folder is removed.

    A manifest may be damaged where nothing depends on it, and some artifacts are not looked at once others are there.
    """
    shutil.copytree(whole, folder)
    damage(folder / relative)
    (folder / "log.txt").unlink()
    ended = _finish(folder)
    place = Path(*relative.parts[:4])
    if ended.code == 3:
        assert str(place) in ended.sentence, f"{relative}: it says {ended.sentence[:200]}"
        assert "rm -r" in ended.sentence, f"{relative}: it says {ended.sentence[:200]}"
        shutil.rmtree(folder / place)
        ended = _finish(folder)
    else:
        # It was not looked at, or made anew.
        said = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        name = f"{place.parent.name} {place.name}"
        read = relative.name != "manifest.json" or damage is Path.unlink
        assert not read or f"made {name}" in said or f"reusing {name}" not in said, f"{relative}: it was used as it is"
        shutil.copy(whole / relative, folder / relative)
    assert ended.code == 0, f"{relative}: it ended with {ended.code}: {ended.sentence[-300:]}"
    assert not (wrong := _difference(_content(folder), expected)), f"{relative}: {wrong}"
    shutil.rmtree(folder)


def _two_at_once(folder: Path, expected: dict[str, Any]) -> None:
    pids = [_start(folder, f"paths.run=outputs/{name}") for name in ("one", "other")]
    ended = [_wait(pid) for pid in pids]
    assert [one.code for one in ended] == [0, 0], str([one.sentence[-200:] for one in ended])
    assert not (wrong := _difference(_content(folder), expected)), wrong


def _clock(folder: Path, hours: int, expected: dict[str, Any]) -> None:
    def jumping() -> None:
        real, begin = time.time, time.monotonic()
        time.time = lambda: real() + 3600 * hours * (time.monotonic() - begin > 2)

    _ends_well(folder, _finish(folder, before=jumping), expected)


def _stale_locks(folder: Path, whole: Path, expected: dict[str, Any]) -> None:
    """Locks that a process of another time has left, for artifacts that are still to be made."""
    for place in whole.glob("outputs/artifacts/*/*/manifest.json"):
        lock = folder / place.parent.relative_to(whole).with_suffix(".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.write_text("99999999\n")
    _ends_well(folder, _finish(folder), expected)


def _read_only(folder: Path, expected: dict[str, Any]) -> None:
    with _small_disk(folder / "outputs", 64 << 20) as disk:
        (folder / "outputs/run").mkdir()
        disk("ro")
        ended = _typed(folder)
        assert ended.code == 1, f"it ended with {ended.code}: {ended.sentence[-300:]}"
        assert "type paths.outputs=FOLDER" in ended.sentence, ended.sentence[-300:]
        assert "Traceback" not in ended.sentence, ended.sentence[-300:]
        disk("rw")
        _ends_well(folder, _finish(folder), expected)


def _full(folder: Path, size: int, expected: dict[str, Any]) -> None:
    with _small_disk(folder / "outputs", size) as disk:
        ended = _typed(folder)
        assert ended.code == 1, f"with {size} bytes it ended with {ended.code}: {ended.sentence[-300:]}"
        assert os.strerror(errno.ENOSPC) in ended.sentence, ended.sentence[-300:]
        assert "once that is mended, the same command goes on" in ended.sentence, ended.sentence[-300:]
        disk(f"size={64 << 20}")
        _ends_well(folder, _finish(folder), expected)


@contextlib.contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A disk of its own in memory; gives what changes its options. It needs root."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False)
    assert mounted.returncode == 0, f"no disk could be mounted: {mounted.stderr.decode()}"
    try:
        yield lambda option: subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True) and None
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _worker_dies(folder: Path) -> None:
    """One of two exploring processes is killed; the rest says so, and the same command goes on."""
    many = ("data=bfcl", "stage=explore", "exploration.max_queries=100", "exploration.estimate_all=false")
    pid = _start(folder, *many, "hardware.processes=2")
    deadline = time.monotonic() + 120
    while not list(folder.glob("outputs/artifacts/explore/*.partial/rollouts-*")):
        assert time.monotonic() < deadline, "no rollout within two minutes"
        time.sleep(0.05)
    workers = [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    os.kill(max(workers), signal.SIGKILL)
    ended = _wait(pid)
    assert ended.code != 0, "it ended well"
    assert "what is done is kept" in ended.sentence, ended.sentence[-300:]
    ended = _finish(folder, *many, "hardware.processes=1")
    assert ended.code == 0, ended.sentence[-300:]
    assert _finish(folder / "alone", *many, "hardware.processes=1").code == 0
    assert not (wrong := _difference(_content(folder), _content(folder / "alone"))), wrong
