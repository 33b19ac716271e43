"""Files that are either complete or not there: write beside the target, flush to the disk, rename.

While a folder is being built, the hash of each file that is put there is noted in it, so that a later attempt can tell what is
still as it was written.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NOTES = "written.txt"
"""Where a folder that is being built notes its files: a line for each time that one is written, its SHA-256 and its path."""
_noting: list[Path] = []


@contextmanager
def noting(folder: Path) -> Iterator[None]:
    """Note the hash of what `replacing` puts into a folder, as long as the block runs.

    Args:
        folder: The folder; it must exist.
    """
    # Some writers resolve the paths that they are given.
    root = folder.resolve()
    _noting.append(root)
    try:
        yield
    finally:
        _noting.remove(root)


def damaged(folder: Path) -> list[Path]:
    """Find the files of a folder that are not as they were noted; what is not noted, or not there any more, passes.

    Args:
        folder: A folder that was built inside `noting`.
    """
    path = folder / NOTES
    # A kill tears a line; a note that is damaged itself makes its file look so, which costs no more than its content.
    lines = path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []
    notes: dict[str, set[str]] = {}
    for noted, space, name in (line.partition(" ") for line in lines):
        # Of a folder from elsewhere: no name leads out of it.
        if space and ".." not in Path(name).parts and not Path(name).is_absolute():
            notes.setdefault(name, set()).add(noted)
    found = {name: _sha256_if_there(folder / name) for name in notes}
    return [folder / name for name, digest in found.items() if digest is not None and digest not in notes[name]]


def _sha256_if_there(path: Path) -> str | None:
    # Another process may be replacing it, or publishing its folder.
    try:
        return sha256(path)
    except (FileNotFoundError, IsADirectoryError):
        return None


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed inside `replacing` left in a folder that nobody else writes to.

    Args:
        folder: The folder.
    """
    for leftover in list(folder.rglob(".*.*")):
        if leftover.is_dir():
            shutil.rmtree(leftover)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path, appended: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `path`; what the block writes there becomes `path` when it ends well.

    A reader sees the old file or the whole new one, never a part, and so does a reader after a power cut. If
    the block raises, the temporary file is removed and the old file stays as it was.

    Args:
        path: The file to create or to replace. Its folder is created where it is missing.
        appended: Whether more will be written behind its end, so that its hash is not to be noted.

    Yields:
        The path to write to: in the same folder, with the same suffix, since some writers look at the suffix.

    Raises:
        FileNotFoundError: The block wrote no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own, so that writers that refuse an existing file, or write in two steps, work as well.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        flush(temporary)
        if not appended:
            _note(path, temporary)
        os.replace(temporary, path)
    flush(path.parent)


@dataclass(frozen=True)
class Pieces:
    """What a stage has made so far, piece by piece in numbered files, for the attempt after this one.

    Attributes:
        folder: The folder.
        stem: What the files' names begin with; a hyphen and the number follow.
        suffix: What they end with.
    """

    folder: Path
    stem: str
    suffix: str = ".json"

    def read(self) -> Iterator[str]:
        """Gives the pieces' texts, in the order in which they were added."""
        for path in sorted(self.folder.glob(f"{self.stem}-*{self.suffix}")):
            yield path.read_text(encoding="utf-8")

    def add(self, text: str) -> None:
        """Writes one more piece, under a number above the largest, since some may have been removed."""
        numbers = (int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"{self.stem}-*{self.suffix}"))
        with replacing(self.folder / f"{self.stem}-{1 + max(numbers, default=-1):05d}{self.suffix}") as path:
            path.write_text(text, encoding="utf-8")

    def remove(self) -> None:
        """Takes them away once the whole is there, so that what is left is the same, however often it was stopped."""
        for path in self.folder.glob(f"{self.stem}-*{self.suffix}"):
            path.unlink()


def _note(path: Path, content: Path) -> None:
    """Notes what a file is about to hold: a kill before it does leaves the older content, which was noted as well."""
    path = path.parent.resolve() / path.name
    for root in _noting:
        if path.is_relative_to(root):
            with (root / NOTES).open("a", encoding="utf-8") as file:
                # On a line of its own, even if a kill tore the one before.
                file.write(f"\n{sha256(content)} {path.relative_to(root).as_posix()}")
            flush(root / NOTES)


def flush(path: Path) -> None:
    """Wait until the file or the folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
