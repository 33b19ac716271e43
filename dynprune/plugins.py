"""One's own code: Python modules that a run imports first, which may bring scores, policies, methods, strategies or loaders.

A module registers what it brings (``SCORES["mine"] = …``, ``POLICIES["mine"] = …``), or a file of one's own configuration names
it (``_target_: mine.Method``). Its content, a package's files included, is a part of the fingerprint of whatever is made with
it, see `concerned`. What it imports is not: a helper of one's own lies in the same package, or is named as a plugin too.
"""

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dynprune.metrics.scores import SCORES
from dynprune.router.policies import POLICIES


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


def concerned(names: Sequence[str], config: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], bool]:
    """Says what modules can change: a method in a file of one's own has no part in the rollouts that it learns from.

    A module matters where its parts are named, as a target or as a policy. One that brings a score, which every answer is
    given, or of which the run names nothing, so that nobody knows what it does, matters everywhere.

    Args:
        names: The modules, imported.
        config: The run's configuration, without interpolations.

    Returns:
        Whether they may change what is made from a part of the configuration, given that part.
    """
    scoring = [score.__module__ for score in SCORES.values()]
    policies = {policy: kind.__module__ for policy, kind in POLICIES.items()}

    def named(name: str, part: Any) -> bool:
        return any(_is_of(text, name) or _is_of(policies.get(text, ""), name) for text in _texts(part))

    everywhere = any(not named(name, config) or any(_is_of(module, name) for module in scoring) for name in names)
    return lambda part: everywhere or any(named(name, part) for name in names)


def _is_of(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _texts(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    elif isinstance(part, Mapping):
        for key, value in part.items():
            # What the run imports is no use of it.
            if key != "plugins":
                yield from _texts(value)
    elif isinstance(part, Sequence):
        for item in part:
            yield from _texts(item)


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
