"""Files that are either complete or not there: write beside the target, flush to the disk, rename."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what the block writes there becomes `path` when it ends well.

    A reader sees the old file or the whole new one, never a part, and so does a reader after a power cut. If
    the block raises, the temporary file is removed and the old file stays as it was.

    Args:
        path: The file to create or to replace. Its folder is created where it is missing.

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
        os.replace(temporary, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until the file or the folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
