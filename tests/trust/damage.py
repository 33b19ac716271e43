"""The faults that are no kills: damaged files, full and read-only disks, clocks, locks, rivals, dying workers."""

import contextlib
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trust.pipeline import content, difference, ends_well, finish, intervals, start, typed, wait, wait_for_the_first

# Runs that are killed, and damaged before they go on.
HALFWAY = 24


def others(root: Path, whole: Path, expected: dict[str, Any]) -> Iterator[tuple[str, Callable[[], bool | None]]]:
    """The faults that are no kills, each as a trial that raises an AssertionError where it is not survived.

    A trial that came to no fault returns False.
    """
    for place in sorted(path.parent for path in whole.glob("outputs/artifacts/*/*/manifest.json")):
        files = [path for path in sorted(place.rglob("*")) if path.is_file() and path.stat().st_size]
        for file in dict.fromkeys([place / "manifest.json", max(files, key=lambda path: path.stat().st_size)]):
            for damage in (flip, cut, Path.unlink):
                relative = file.relative_to(whole)
                name = damage.__name__.strip("_")
                folder = root / f"{name}-{place.parent.name}-{place.name}-{file.name}"
                yield f"file {name}", lambda f=folder, r=relative, d=damage: _damaged(f, whole, r, d, expected)
    for number in range(HALFWAY):
        damage = (flip, cut)[number // (HALFWAY // 2)]
        name = f"unfinished file {damage.__name__}"
        yield (
            name,
            lambda number=number, damage=damage: _damaged_halfway(root / f"half-{number}", whole, number, damage, expected),
        )
    yield "two at once", lambda: _two_at_once(root / "two", expected)
    for hours in (-24, 24):
        yield "clock", lambda hours=hours: _clock(root / f"clock{hours}", hours, expected)
    yield "stale lock", lambda: _stale_locks(root / "locks", whole, expected)
    yield "read-only", lambda: _read_only(root / "read-only", expected)
    for size in (256 << 10, 512 << 10, 1 << 20):
        yield "disk full", lambda size=size: _full(root / f"full-{size}", size, expected)
    yield "worker dies", lambda: _worker_dies(root / "worker")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _damaged(folder: Path, whole: Path, relative: Path, damage: Callable[[Path], None], expected: dict[str, Any]) -> None:
    """A file of a finished run is damaged; a run that needs it must say so, and make it anew once the folder is removed.

    Some artifacts are not looked at once others are there.
    """
    shutil.copytree(whole, folder)
    damage(folder / relative)
    (folder / "log.txt").unlink()
    ended = finish(folder)
    place = Path(*relative.parts[:4])
    if ended.code == 3:
        assert str(place) in ended.sentence, f"{relative}: it says {ended.sentence[:200]}"
        assert "rm -r" in ended.sentence, f"{relative}: it says {ended.sentence[:200]}"
        shutil.rmtree(folder / place)
        ended = finish(folder)
    else:
        # It was not looked at, or made anew.
        said = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        name = f"{place.parent.name} {place.name}"
        assert f"made {name}" in said or f"reusing {name}" not in said, f"{relative}: it was used as it is"
        shutil.copy(whole / relative, folder / relative)
    assert ended.code == 0, f"{relative}: it ended with {ended.code}: {ended.sentence[-300:]}"
    assert not (wrong := difference(content(folder), expected)), f"{relative}: {wrong}"
    shutil.rmtree(folder)


def _damaged_halfway(folder: Path, whole: Path, number: int, damage: Callable[[Path], None], expected: dict[str, Any]) -> bool:
    """A run is killed, and a file of what it had begun is damaged; the next one makes that anew, or says what to remove.

    Returns:
        Whether there was a file to damage: the run may have been between two stages, or faster.
    """
    rng = random.Random(f"halfway {number}")
    stages = intervals(whole)
    _, begun, done = stages[number % len(stages)]
    pid = start(folder)
    wait_for_the_first(folder, pid)
    time.sleep(rng.uniform(begun, done))
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    begun_files = [
        path for place in folder.glob("outputs/artifacts/*/*.partial") for path in place.rglob("*") if path.is_file()
    ]
    filled = sorted(path for path in begun_files if path.stat().st_size)
    if not filled:
        shutil.rmtree(folder)
        return False
    damage(rng.choice(filled))
    ended = finish(folder)
    if ended.code == 3:
        places = re.findall(r"rm -r (\S+)\)", ended.sentence)
        assert places or "type the same command again" in ended.sentence, ended.sentence[-300:]
        for place in places:
            shutil.rmtree(folder / place)
        ended = finish(folder)
    ends_well(folder, ended, expected)
    shutil.rmtree(folder)
    return True


def _two_at_once(folder: Path, expected: dict[str, Any]) -> None:
    pids = [start(folder, f"paths.run=outputs/{name}") for name in ("one", "other")]
    ended = [wait(pid) for pid in pids]
    assert [one.code for one in ended] == [0, 0], str([one.sentence[-200:] for one in ended])
    assert not (wrong := difference(content(folder), expected)), wrong


def _clock(folder: Path, hours: int, expected: dict[str, Any]) -> None:
    def jumping() -> None:
        real, begin = time.time, time.monotonic()
        time.time = lambda: real() + 3600 * hours * (time.monotonic() - begin > 2)

    ends_well(folder, finish(folder, before=jumping), expected)


def _stale_locks(folder: Path, whole: Path, expected: dict[str, Any]) -> None:
    """Locks that a process of another time has left, for artifacts that are still to be made."""
    for place in whole.glob("outputs/artifacts/*/*/manifest.json"):
        lock = folder / place.parent.relative_to(whole).with_suffix(".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.write_text("99999999\n")
    ends_well(folder, finish(folder), expected)


def _read_only(folder: Path, expected: dict[str, Any]) -> None:
    with _small_disk(folder / "outputs", 64 << 20) as disk:
        (folder / "outputs/run").mkdir()
        disk("ro")
        ended = typed(folder)
        assert ended.code == 1, f"it ended with {ended.code}: {ended.sentence[-300:]}"
        assert "type paths.outputs=FOLDER" in ended.sentence, ended.sentence[-300:]
        assert "Traceback" not in ended.sentence, ended.sentence[-300:]
        disk("rw")
        ends_well(folder, finish(folder), expected)


def _full(folder: Path, size: int, expected: dict[str, Any]) -> None:
    with _small_disk(folder / "outputs", size) as disk:
        ended = typed(folder)
        assert ended.code == 1, f"with {size} bytes it ended with {ended.code}: {ended.sentence[-300:]}"
        assert os.strerror(errno.ENOSPC) in ended.sentence, ended.sentence[-300:]
        assert "once that is mended, the same command goes on" in ended.sentence, ended.sentence[-300:]
        disk(f"size={64 << 20}")
        ends_well(folder, finish(folder), expected)


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
    pid = start(folder, *many, "hardware.processes=2")
    deadline = time.monotonic() + 120
    while not list(folder.glob("outputs/artifacts/explore/*.partial/rollouts-*")):
        assert time.monotonic() < deadline, "no rollout within two minutes"
        time.sleep(0.05)
    workers = [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    os.kill(max(workers), signal.SIGKILL)
    ended = wait(pid)
    assert ended.code != 0, "it ended well"
    assert "what is done is kept" in ended.sentence, ended.sentence[-300:]
    ended = finish(folder, *many, "hardware.processes=1")
    assert ended.code == 0, ended.sentence[-300:]
    assert finish(folder / "alone", *many, "hardware.processes=1").code == 0
    assert not (wrong := difference(content(folder), content(folder / "alone"))), wrong
