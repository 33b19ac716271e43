"""One's own code: Python modules that a run imports first, which may bring scores, policies, methods, strategies or loaders.

A module registers what it brings (``SCORES["mine"] = …``, ``POLICIES["mine"] = …``), or a file of one's own configuration names
it (``_target_: mine.Method``). What such a module holds can change any result, so its content, a package's files included, is a
part of every fingerprint. What it imports is not: a helper of one's own is named as a plugin too.
"""

import hashlib
import importlib
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path


def import_plugins(names: Sequence[str]) -> dict[str, str]:
    """Imports modules, from the folder that the command was typed in too.

    Args:
        names: The modules.

    Returns:
        By module, a hash of its file, or of all files with code where it is a package.

    Raises:
        ValueError: There is no such module, or it is no file.
    """
    if isinstance(names, str) or names is None:
        raise ValueError(f"plugins={names} is no list of modules; allowed: plugins=[mine] for a mine.py, or plugins=[]")
    if names and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    return {name: _imported(name) for name in names}


@cache
def _imported(name: str) -> str:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0] and error.name != name:
            # The module is there, and what it imports is not.
            raise
        raise ValueError(
            f"plugins names {name!r}, which is no module in {Path.cwd()} or on Python's path; allowed: [mine] for a mine.py"
        ) from error
    if module.__file__ is None:
        raise ValueError(f"plugins names {name!r}, which is a folder; allowed: a file with code, such as {name}/__init__.py")
    # Once for each process: what was imported is what counts, whatever becomes of the file.
    file = Path(module.__file__)
    files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
