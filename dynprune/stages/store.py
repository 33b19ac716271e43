"""The stages ``list`` and ``clean``: what artifacts there are, and away with those that no run uses."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import rich.table
from rich import box
from rich.console import Console
from rich.prompt import Confirm
from rich.text import Text

from dynprune.inventory import Stored, distinguishing, remove, stored
from dynprune.manifests import MANIFEST
from dynprune.stages.run import Run

log = logging.getLogger(__name__)
_SETTINGS = 6
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def list_artifacts(run: Run) -> None:
    """Prints the artifacts: what each is, from which settings, its size and age, and how many runs use it."""
    artifacts = _stored(run)
    _show(artifacts, f"Artifacts in {run.store.root}")


def clean(run: Run) -> None:
    """Removes the artifacts that no run uses, after asking; those that a process builds at this moment stay."""
    unused = [artifact for artifact in _stored(run) if not artifact.runs]
    if not unused:
        log.info("every artifact in %s is used by a run; there is nothing to remove", run.store.root)
        return
    _show(unused, f"No run under {run.config.paths.outputs} uses these")
    try:
        wanted = Confirm.ask(f"Remove {len(unused)} artifacts, {_size(sum(artifact.num_bytes for artifact in unused))}?")
    except EOFError:
        log.info("nobody is there to answer; nothing was removed")
        return
    if not wanted:
        log.info("nothing was removed")
        return
    # A run may have begun to use some of them while the question stood.
    still = {artifact.name for artifact in _stored(run) if not artifact.runs}
    for artifact in unused:
        if artifact.name not in still:
            log.info("kept %s, which a run has begun to use", artifact.name)
        elif remove(artifact):
            log.info("removed %s", artifact.name)
        else:
            log.info("kept %s, which a process builds at this moment", artifact.name)


def _stored(run: Run) -> list[Stored]:
    return stored(run.store.root, Path(run.config.paths.outputs))


def _show(artifacts: Sequence[Stored], title: str) -> None:
    table = rich.table.Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("artifact", "settings"):
        table.add_column(header, overflow="fold")
    for header in ("took", "size", "age", "runs"):
        table.add_column(header, justify="right", no_wrap=True)
    told = distinguishing(artifacts)
    for artifact in artifacts:
        settings = [f"{key}={value}" for key, value in told[artifact.name].items()]
        more = [f"… {MANIFEST} has {len(settings) - _SETTINGS} more"] if len(settings) > _SETTINGS else []
        table.add_row(
            artifact.name,
            Text(", ".join([*settings[:_SETTINGS], *more])),
            _duration(artifact.seconds) if artifact.seconds is not None else "unfinished",
            _size(artifact.num_bytes),
            _duration(time.time() - artifact.modified),
            str(len(artifact.runs)),
        )
    table.caption = f"{len(artifacts)} artifacts, {_size(sum(artifact.num_bytes for artifact in artifacts))}"
    Console().print(table)


def _size(num_bytes: float) -> str:
    unit = 0
    while num_bytes >= 1024 and unit < len(_UNITS) - 1:
        num_bytes, unit = num_bytes / 1024, unit + 1
    return f"{num_bytes:.{0 if unit == 0 else 1}f} {_UNITS[unit]}"


def _duration(seconds: float) -> str:
    """A duration in its largest unit: 45 s, 12 min, 3 h, 5 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
