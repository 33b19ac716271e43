"""The whole pipeline on a tiny model, killed, cut short, corrupted, starved: it ends as an undisturbed run does.

Each trial forks a process that runs it. Kills (SIGKILL, SIGTERM, Ctrl-C) come at random moments of every stage, up to three in
a trial, and then it is run to its end; the same where adapters learn by gradient and where the SLM's delta is trained. What
writes a checkpoint each half minute does so five times a second here. Other faults must be recovered from, or be said in one
sentence that names the place; once the sentence's advice is followed, the run ends like the others. Compared are rollouts,
pairs, adapters, deltas, routers, sets and answers.
"""

import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from dynprune.stages.checkpoints import StepCheckpoints
from trust.damage import others
from trust.pipeline import (
    ADAPT,
    LOCAL,
    WHOLE,
    Interval,
    content,
    difference,
    finish,
    intervals,
    start,
    wait,
    wait_for_the_first,
)

# By what is run: how many kills.
KILLS = {WHOLE: 54, LOCAL: 6, ADAPT: 9}
_KILLS_A_TRIAL = 3
_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_PROCESSES = 2


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
        for number, (command, kills) in enumerate(KILLS.items()):
            assert finish(root / f"whole-{number}", command=command).code == 0, "an undisturbed run must end"
            _kill_often(command, kills, root / f"whole-{number}", found)
        whole = root / "whole-0"
        expected = content(whole)
        with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("fork")) as pool:
            count = len(list(others(root, whole, expected)))
            for kind, wrong in pool.map(partial(_tried, root, whole, expected), range(count)):
                if wrong is None:
                    continue
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


def _kill_often(command: Sequence[str], kills: int, whole: Path, found: Found) -> None:
    """Kills a command in all of its stages, each trial beside the folder of an undisturbed run."""
    expected, stages = content(whole), intervals(whole)
    trials = [
        (whole.with_name(f"{whole.name}-kill-{number}"), stages[number % len(stages)], _SIGNALS[number % len(_SIGNALS)], number)
        for number in range(kills // _KILLS_A_TRIAL)
    ]
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("fork")) as pool:
        outcomes = pool.map(partial(_killed, command, stages, expected), trials)
        for (folder, *_), (struck_times, struck, wrong) in zip(trials, outcomes, strict=True):
            found.injected["kill"] += struck_times
            found.survived["kill"] += 0 if wrong else struck_times
            found.struck += struck
            found.failures += [f"{folder.name}: {wrong}"] * bool(wrong)


def _write_checkpoints_often() -> None:
    StepCheckpoints.seconds = 0.2


def _killed(
    command: Sequence[str],
    stages: list[Interval],
    expected: dict[str, Any],
    trial: tuple[Path, Interval, signal.Signals, int],
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
        pid = start(folder, command=command, before=_write_checkpoints_often)
        # From the first artifact on, as the intervals are.
        after = rng.uniform(begun, done) if attempt == 0 else rng.uniform(0, 0.8 * whole)
        wait_for_the_first(folder, pid)
        time.sleep(after)
        if os.waitpid(pid, os.WNOHANG)[0]:
            # It was faster than the kill.
            break
        now = {path.parent.name for path in folder.glob("outputs/artifacts/*/*.partial")}
        os.kill(pid, by)
        wait(pid)
        kills += 1
        struck.update(now or {"between stages"})
    ended = finish(folder, command=command, before=_write_checkpoints_often)
    if ended.code != 0:
        return kills, struck, f"after {kills} kills it ended with {ended.code}: {ended.sentence[-300:]}"
    wrong = difference(content(folder), expected)
    shutil.rmtree(folder, ignore_errors=True)
    return kills, struck, wrong


def _tried(root: Path, whole: Path, expected: dict[str, Any], number: int) -> tuple[str, str | None]:
    """One of the other trials, by its place among them: the kind of its fault, and what is wrong, if anything.

    It is ``None`` where there was no fault after all.
    """
    kind, trial = list(others(root, whole, expected))[number]
    try:
        return kind, None if trial() is False else ""
    except Exception as error:
        return kind, f"{type(error).__name__}: {error}"[:500]
