"""What lies in the store of artifacts: what each is, what it was made with, how large and old it is, and which runs use it.

A run notes the artifacts that it asks for in its folder (``artifacts.txt``). An artifact is used if a run's folder notes it, or
if another one that is used was made from it.
"""

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dynprune.artifacts import RUNS, USES, read_uses
from dynprune.manifests import MANIFEST, read_manifest

_PARTIAL = ".partial"
_LOCK = ".lock"
# Last parts of keys whose values nobody reads, and which say nothing that others do not.
_UNREADABLE = ("_target_", "_partial_", "content", "delta_content", "encoder", "origin", "sha256")


@dataclass(frozen=True)
class Stored:
    """One artifact.

    Attributes:
        name: ``stage/fingerprint``.
        folder: Its folder.
        complete: Whether it was finished.
        modified: When it was last written to, as a Unix time.
        num_bytes: Size of its files.
        seconds: How long it took to make; ``None`` where it is not complete.
        config: The settings that it was made with, as dotted keys.
        upstream: Fingerprints of the artifacts that it was made from.
        runs: Names of the runs that use it, directly or through others.
    """

    name: str
    folder: Path
    complete: bool
    modified: float
    num_bytes: int
    seconds: float | None
    config: Mapping[str, Any]
    upstream: tuple[str, ...]
    runs: tuple[str, ...] = ()

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return self.name.partition("/")[0]


def stored(root: Path, outputs: Path) -> list[Stored]:
    """Lists the artifacts, by stage and age.

    Args:
        root: The folder of the store.
        outputs: The folder under which runs are looked for.
    """
    found = [_read(folder) for folder in root.glob("*/*") if folder.is_dir() and (folder / MANIFEST).is_file()]
    users = _users(found, root, outputs)
    with_runs = [Stored(**{**vars(artifact), "runs": tuple(sorted(users.get(artifact.name, ())))}) for artifact in found]
    return sorted(with_runs, key=lambda artifact: (artifact.stage, artifact.modified))


def distinguishing(artifacts: Sequence[Stored]) -> dict[str, dict[str, Any]]:
    """By artifact, the settings in which artifacts of its stage differ, those that say most first."""
    told: dict[str, dict[str, Any]] = {}
    for stage in {artifact.stage for artifact in artifacts}:
        of_stage = [artifact for artifact in artifacts if artifact.stage == stage]
        keys = dict.fromkeys(key for artifact in of_stage for key in artifact.config)
        differing = [
            key
            for key in keys
            if len({json.dumps(artifact.config.get(key)) for artifact in of_stage}) > 1
            and key.rpartition(".")[2] not in _UNREADABLE
        ]
        for artifact in of_stage:
            # What something is called says most, and the deeper a key lies the less.
            keys_of = sorted(differing, key=lambda key: (key.rpartition(".")[2] != "name", key.count(".")))
            told[artifact.name] = {key: artifact.config[key] for key in keys_of if key in artifact.config}
    return told


def remove(artifact: Stored) -> bool:
    """Removes an artifact, unless a process builds it at this moment.

    Returns:
        Whether it is gone.
    """
    place = artifact.folder.with_name(artifact.folder.name.removesuffix(_PARTIAL))
    lock = FileLock(place.with_name(place.name + _LOCK))
    try:
        with lock.acquire(timeout=0):
            # Its name goes first, so that nobody takes half of it for a whole one.
            doomed = artifact.folder.with_name(f".{artifact.folder.name}.removed")
            artifact.folder.rename(doomed)
            shutil.rmtree(doomed)
    except Timeout:
        return False
    with suppress(OSError):
        place.with_name(place.name + _LOCK).unlink()
    return True


def _read(folder: Path) -> Stored:
    manifest = read_manifest(folder / MANIFEST, ("config", "data", "upstream"))
    files = list(_files(folder))
    return Stored(
        f"{folder.parent.name}/{folder.name.removesuffix(_PARTIAL)}",
        folder,
        not folder.name.endswith(_PARTIAL),
        max((file.st_mtime for file in files), default=folder.stat().st_mtime),
        sum(file.st_size for file in files),
        manifest.get("wall_clock_s"),
        dict(_flat({"config": manifest["config"], "data": manifest["data"]})),
        tuple(manifest["upstream"].values()),
    )


def _files(folder: Path) -> Iterator[os.stat_result]:
    for path in folder.rglob("*"):
        # Whoever builds here renames and removes files meanwhile.
        with suppress(FileNotFoundError):
            if stat.S_ISREG((found := path.stat()).st_mode):
                yield found


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix.removeprefix("config."), value


def _users(artifacts: Sequence[Stored], root: Path, outputs: Path) -> dict[str, set[str]]:
    """By artifact, the runs that use it."""
    by_fingerprint: dict[str, list[Stored]] = {}
    for artifact in artifacts:
        by_fingerprint.setdefault(artifact.name.partition("/")[2], []).append(artifact)
    users: dict[str, set[str]] = {}
    # Runs are found below the outputs, and by what the store itself notes, wherever they are.
    places = {path.parent.resolve() for path in outputs.rglob(USES)} | {Path(line) for line in read_uses(root / RUNS)}
    for folder in sorted(places):
        path, run = folder / USES, os.path.relpath(folder, outputs)
        waiting = [name.partition("/")[2] for name in read_uses(path)]
        while waiting:
            for artifact in by_fingerprint.get(waiting.pop(), ()):
                if run not in users.setdefault(artifact.name, set()):
                    users[artifact.name].add(run)
                    waiting += artifact.upstream
    return users
