"""Artifacts: the output folders of the stages, each named by a fingerprint of all that it depends on.

A fingerprint covers the stage's own configuration, the data that it reads and the fingerprints of the
artifacts that it builds on. Two runs that agree on those share the folder, and a change that cannot matter to
a stage never redoes it::

    <root>/<stage>/<fingerprint>/            complete, never written to again; manifest.json says what made it
    <root>/<stage>/<fingerprint>.partial/    being built, or left by a run that stopped
    <root>/<stage>/<fingerprint>.lock        held by the process that builds

A folder gets its final name only when it is complete and on the disk, so whatever has that name can be read. Its manifest holds
the hashes of its files, which are checked when a process reads it first.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dynprune.atomic import NOTES, damaged, flush, noting, remove_leftovers
from dynprune.manifests import (
    MANIFEST,
    broken,
    check_content,
    content_hashes,
    peak_memory_mib,
    read_manifest,
    versions,
    write_manifest,
)

log = logging.getLogger(__name__)

USES = "artifacts.txt"
"""Where a run's folder notes the artifacts that it asked for."""
RUNS = "runs.txt"
"""Where the store notes the folders of the runs that asked for artifacts."""
_PARTIAL = ".partial"


def fingerprint(
    stage: str, version: int, config: Mapping[str, Any], data: Mapping[str, Any], upstream: Mapping[str, str]
) -> str:
    """Name what a stage makes by all that it is made from.

    The order of keys does not matter, nor how a number is spelt (1e-3 is 0.001). 1 and 1.0 do differ, as they
    do for Lightning: ``limit_train_batches: 1`` is one batch, ``1.0`` is all of them.

    Args:
        stage: The stage's name.
        version: Raised by hand when the stage's code changes what comes out for the same configuration.
        config: The stage's own resolved configuration.
        data: What identifies the data that the stage reads.
        upstream: For each artifact that the stage builds on, its name there and its fingerprint.

    Returns:
        The first 16 hexadecimal digits of the SHA-256 of the canonical JSON of the arguments.

    Raises:
        ValueError: A value has no JSON form; the message names its key path.
    """
    parts = {"config": config, "data": data, "upstream": upstream}
    identity = {"stage": stage, "version": version} | {key: _plain(part, key) for key, part in parts.items()}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Artifact:
    """A stage's complete output.

    Attributes:
        stage: The stage that made it.
        fingerprint: What it was made from; see `fingerprint`.
        folder: The folder with its files.
        manifest: What ``manifest.json`` says: stage, fingerprint, version, config, data, upstream, attempts
            (when each began, as a Unix time, and the seconds it took), wall_clock_s (over all attempts),
            counts (the stage's own), files (their hashes), versions, peak_memory_mib (of the process that
            finished it, and of its GPU), created (ISO 8601, UTC).
    """

    stage: str
    fingerprint: str
    folder: Path
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Store:
    """The artifacts under one folder, shared by any number of processes.

    Attributes:
        root: The folder; it is created with the first artifact.
        rank: This process's rank in a distributed run, 0 where there is none.
        uses: A file that notes, a line each, the artifacts that a run has asked for; ``None`` for none.
        plugins: Hashes of code that is not this package's, by module: a part of the configuration of what it concerns.
        concerned: Whether that code may change what is made from a configuration.
    """

    root: Path
    rank: int = 0
    uses: Path | None = None
    plugins: Mapping[str, str] = field(default_factory=dict)
    concerned: Callable[[Mapping[str, Any]], bool] = field(default=lambda config: True)

    def get_or_build(
        self,
        stage: str,
        version: int,
        config: Mapping[str, Any],
        data: Mapping[str, Any],
        upstream: Mapping[str, str],
        build: Callable[[Path], Mapping[str, Any]],
        resumable: bool,
        distributed: bool = False,
    ) -> Artifact:
        """Give the artifact of these inputs: the one that is there, or a new one.

        Processes that want the same artifact wait for the one that builds it. If `build` raises, or the
        process is killed, the partial folder stays; the next call with the same inputs goes on in it, or
        empties it first.

        Args:
            stage: The stage's name.
            version: See `fingerprint`.
            config: See `fingerprint`.
            data: See `fingerprint`.
            upstream: See `fingerprint`.
            build: Writes the artifact's files into the folder that it gets; returns counts for the manifest.
            resumable: Whether `build` can go on from what an earlier attempt left in the folder.
            distributed: Whether the ranks of a run meet inside `build`, as in Lightning's DDP. Then the ranks
                above 0 build along with rank 0, which holds the lock, instead of waiting for it to end.

        Raises:
            ValueError: A value has no JSON form, or the artifact that is there is broken.
            RuntimeError: This rank built along with rank 0, which did not finish.
        """
        config = self._whole(config)
        identity = {
            "stage": stage,
            "fingerprint": fingerprint(stage, version, config, data, upstream),
            "version": version,
            "config": _plain(config, "config"),
            "data": _plain(data, "data"),
            "upstream": dict(upstream),
        }
        place = self.root / stage / identity["fingerprint"]
        # Before it is there: what a run that was killed has begun is its own too.
        self._note_use(place)
        if artifact := self._find(place):
            return artifact
        if distributed and self.rank > 0:
            return self._build_along(place, build)
        with _locked(place):
            return self._find(place) or self._build(place, identity, build, resumable)

    def find(
        self, stage: str, version: int, config: Mapping[str, Any], data: Mapping[str, Any], upstream: Mapping[str, str]
    ) -> Artifact | None:
        """Give the artifact of these inputs if it is there.

        Args:
            stage: The stage's name.
            version: See `fingerprint`.
            config: See `fingerprint`.
            data: See `fingerprint`.
            upstream: See `fingerprint`.

        Raises:
            ValueError: A value has no JSON form, or the artifact is broken.
        """
        return self._find(self._place(stage, version, config, data, upstream))

    def holds(
        self, stage: str, version: int, config: Mapping[str, Any], data: Mapping[str, Any], upstream: Mapping[str, str]
    ) -> bool:
        """Whether the artifact of these inputs is complete, so that `get_or_build` has nothing to build; see `find`."""
        return self._place(stage, version, config, data, upstream).exists()

    def differing_in(
        self,
        key: str,
        stage: str,
        version: int,
        config: Mapping[str, Any],
        data: Mapping[str, Any],
        upstream: Mapping[str, str],
    ) -> Iterator[Path]:
        """Folders of artifacts, complete or not, of these inputs but for one key of the configuration.

        What a stage leaves there file by file can serve another artifact of the same kind.

        Args:
            key: The key.
            stage: See `fingerprint`.
            version: See `fingerprint`.
            config: See `fingerprint`.
            data: See `fingerprint`.
            upstream: See `fingerprint`.

        Raises:
            ValueError: A value has no JSON form, or a manifest is broken.
        """
        wanted = (version, {**_plain(self._whole(config), "config"), key: None}, _plain(data, "data"), dict(upstream))
        for path in sorted((self.root / stage).glob(f"*/{MANIFEST}")):
            if not path.exists():
                # Another process has just finished it.
                continue
            found = read_manifest(path, ("version", "config", "data", "upstream"))
            if (found["version"], {**found["config"], key: None}, found["data"], found["upstream"]) == wanted:
                if not path.parent.name.endswith(_PARTIAL):
                    check_content(path.parent, path.stat().st_mtime_ns)
                elif damaged(path.parent):
                    # Whoever goes on in it makes that anew.
                    continue
                yield path.parent

    def _whole(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """A stage's configuration with what belongs to every stage's."""
        return {**config, "plugins": dict(self.plugins)} if self.plugins and self.concerned(config) else config

    def _place(
        self, stage: str, version: int, config: Mapping[str, Any], data: Mapping[str, Any], upstream: Mapping[str, str]
    ) -> Path:
        return self.root / stage / fingerprint(stage, version, self._whole(config), data, upstream)

    def _note_use(self, place: Path) -> None:
        if self.uses is None:
            return
        run = str(self.uses.parent.resolve())
        for path, line in ((self.uses, f"{place.parent.name}/{place.name}"), (self.root / RUNS, run)):
            if line not in read_uses(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")

    def _find(self, place: Path) -> Artifact | None:
        if not place.exists():
            return None
        artifact = _read(place)
        log.info(
            "reusing %s %s (from %s, took %.1f s)",
            artifact.stage,
            artifact.fingerprint,
            artifact.manifest["created"],
            artifact.manifest["wall_clock_s"],
        )
        return artifact

    def _build(
        self,
        place: Path,
        identity: Mapping[str, Any],
        build: Callable[[Path], Mapping[str, Any]],
        resumable: bool,
    ) -> Artifact:
        partial = _partial(place)
        if partial.exists() and not resumable:
            shutil.rmtree(partial)
        remove_leftovers(partial)
        for path in damaged(partial):
            log.warning("%s is not what was written; it is removed, and made anew", path)
            path.unlink()
        attempts = _earlier_attempts(partial)
        name = f"{place.parent.name} {place.name}"
        log.info("going on with %s in %s" if attempts else "building %s in %s", name, partial)

        # Written before the work, so that an attempt that is killed leaves a trace of when it began.
        attempt: dict[str, Any] = {"started": time.time(), "seconds": None}
        manifest = {**identity, "attempts": [*attempts, attempt]}
        write_manifest(partial, manifest)
        begin = time.monotonic()
        try:
            with noting(partial):
                counts = _plain(build(partial), "counts")
        except BaseException:
            attempt["seconds"] = time.monotonic() - begin
            write_manifest(partial, manifest)
            then = "goes on from there" if resumable else "goes on from the stages before it"
            kept = f"what it wrote is kept in {partial}, and the same command {then}"
            log.warning("%s stopped after %.1f s; %s", name, attempt["seconds"], kept)
            raise
        attempt["seconds"] = time.monotonic() - begin
        manifest |= {
            "wall_clock_s": sum(each["seconds"] for each in manifest["attempts"]),
            "counts": counts,
            "files": content_hashes(partial),
            "versions": versions(),
            "peak_memory_mib": peak_memory_mib(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_manifest(partial, manifest)
        _publish(partial, place)
        log.info("made %s in %.1f s: %s", name, manifest["wall_clock_s"], place)
        return _read(place)

    def _build_along(self, place: Path, build: Callable[[Path], Mapping[str, Any]]) -> Artifact:
        partial = _partial(place)
        partial.mkdir(parents=True, exist_ok=True)
        build(partial)
        # Rank 0 has met this rank in `build`, so it holds the lock until the artifact has its final name.
        with _locked(place):
            if artifact := self._find(place):
                return artifact
        raise RuntimeError(f"rank 0 did not finish {place.parent.name} {place.name}; its own log says why")


def read_uses(path: Path) -> list[str]:
    """What `Store.uses` notes: ``stage/fingerprint`` of each artifact that a run has asked for."""
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Hold the artifact's lock, and say so when that means to wait."""
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.with_name(f"{place.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        name = f"{place.parent.name} {place.name}"
        log.info("waiting for %s, which another process builds (it holds %s)", name, lock.lock_file)
        lock.acquire(poll_interval=0.25)
    try:
        yield
    finally:
        lock.release()


def _partial(place: Path) -> Path:
    return place.with_name(f"{place.name}{_PARTIAL}")


def _earlier_attempts(partial: Path) -> list[dict[str, Any]]:
    """Read how long the earlier attempts at this folder took."""
    if not (partial / MANIFEST).exists():
        return []
    attempts: list[dict[str, Any]] = read_manifest(partial / MANIFEST, ("attempts",))["attempts"]
    for attempt in attempts:
        # Killed without a word: it lived at least until its last write.
        if attempt["seconds"] is None:
            last = max(path.stat().st_mtime for path in partial.rglob("*"))
            attempt["seconds"] = max(0.0, last - attempt["started"])
    return attempts


def _publish(partial: Path, place: Path) -> None:
    """Give a complete folder its final name, with its content on the disk before the name is."""
    for path in partial.rglob("*"):
        flush(path)
    # Not before: until it has its final name, a later attempt must see what is damaged.
    (partial / NOTES).unlink(missing_ok=True)
    flush(partial)
    os.rename(partial, place)
    flush(place.parent)


def _read(place: Path) -> Artifact:
    """Read a complete artifact and check that its manifest is the one of this folder."""
    path = place / MANIFEST
    keys = ("stage", "fingerprint", "version", "config", "data", "upstream", "wall_clock_s", "created")
    manifest = read_manifest(path, keys)
    expected = fingerprint(*(manifest[key] for key in ("stage", "version", "config", "data", "upstream")))
    if (manifest["stage"], manifest["fingerprint"], expected) != (place.parent.name, place.name, place.name):
        raise broken(path, "is of another artifact, or was edited")
    check_content(place, path.stat().st_mtime_ns)
    return Artifact(place.parent.name, place.name, place, manifest)


def _plain(value: object, key: str) -> Any:
    """Turn mappings and tuples into what JSON gives back, and refuse what JSON has no form for."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{key}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{key} is {value!r} ({type(value).__name__}), which JSON has no form for: give a string, a "
            "finite number, true, false, null, a list or a mapping."
        )
    for name in value:
        if not isinstance(name, str):
            raise ValueError(f"{key} has the key {name!r} ({type(name).__name__}): put quotes around it.")
    return {name: _plain(item, f"{key}.{name}") for name, item in value.items()}
