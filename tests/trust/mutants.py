"""The code changed in small ways, one at a time: does a fast test notice?

mutmut makes the mutants of policies, methods and their losses, metrics, pruning and the cache: an operator turned round, a
number one off, an argument left out, a value replaced by None. A sample of them, drawn with a fixed seed, is run against the
fast tests that reach the changed function. A mutant is killed when one fails; those that no test reaches count as survivors.
All survivors are in [surviving_mutants.diff](surviving_mutants.diff).
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from dynprune.atomic import replacing

SAMPLE = 300
_PROCESSES = 2
_MUTATED = (
    *("dynprune/router/policies/*.py", "dynprune/methods/*.py", "dynprune/metrics/*.py"),
    *(f"dynprune/slm/{name}.py" for name in ("pruning", "cache", "prompt_states", "layers", "padding")),
)
_TESTS = (
    *("policies", "ratio", "topk", "budget", "losses", "methods", "reference_curves", "router", "calibration", "certainty"),
    *("metrics_ast_match", "metrics_function_calls", "metrics_parsing", "metrics_scores", "likelihood", "padding"),
    *("pruning", "prompt_states"),
)
# The fastest tests come first: a mutant that one of them kills costs no more.
_ORDER = """
import json, pathlib

def pytest_collection_modifyitems(items):
    known = pathlib.Path("mutmut-stats.json")
    if known.exists():
        seconds = json.loads(known.read_text())["duration_by_test"]
        items.sort(key=lambda item: seconds.get(item.nodeid, 0))
"""
_COPIED = ("dynprune", "conf", "tests", "docs", "pyproject.toml", "README.md")
# What mutmut keeps as the exit code of a mutant: pytest's, or its own for a mutant that ran too long or was killed by a signal.
_SURVIVED = {0: "survived", 5: "reached by no test", 33: "reached by no test"}


def run(folder: Path) -> dict[str, Any]:
    """Tries a sample of the mutants.

    Args:
        folder: Where the survivors are written to.

    Returns:
        The figures of the report.
    """
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for path in map(Path, _COPIED):
            if path.is_dir():
                shutil.copytree(path, copy / path, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, copy / path)
        mutated = sorted(path.relative_to(copy) for pattern in _MUTATED for path in copy.glob(pattern))
        _configure(copy, mutated)
        names = _names(copy, mutated)
        tried = sorted(random.Random(0).sample(names, min(SAMPLE, len(names))))
        _mutmut(copy, "run", "--max-children", str(_PROCESSES), *tried)
        codes = _exit_codes(copy, mutated)
        survivors = {name: _SURVIVED[codes[name]] for name in tried if codes[name] in _SURVIVED}
        with replacing(folder / "surviving_mutants.diff") as path:
            path.write_text("\n".join(_mutmut(copy, "show", name) for name in survivors), encoding="utf-8")
    return {
        "mutants": len(names),
        "mutants_tried": len(tried),
        "mutants_killed": len(tried) - len(survivors),
        "mutants_killed_share": round(1 - len(survivors) / len(tried), 4),
        "survivors_by_module": dict(Counter(name.partition(".x")[0] for name in survivors).most_common()),
        "survivors_by_reason": dict(Counter(survivors.values()).most_common()),
    }


def _configure(copy: Path, mutated: list[Path]) -> None:
    """Tells mutmut, whose settings are read from the folder it runs in, what to change and which tests to run."""
    settings = {
        "source_paths": ["dynprune"],
        "only_mutate": [str(path) for path in mutated],
        "also_copy": ["conf", "docs", "README.md", "conftest.py"],
        "pytest_add_cli_args": ["-m", "not slow", "-p", "no:cacheprovider"],
        "pytest_add_cli_args_test_selection": [f"tests/test_{name}.py" for name in _TESTS],
    }
    lines = [f"{key} =\n" + "".join(f"    {value}\n" for value in values) for key, values in settings.items()]
    (copy / "conftest.py").write_text(_ORDER, encoding="utf-8")
    (copy / "setup.cfg").write_text("[mutmut]\n" + "".join(lines), encoding="utf-8")


def _names(copy: Path, mutated: list[Path]) -> list[str]:
    """All mutants that there are, by the names that mutmut gives them."""
    code = (
        "import json, sys, pathlib\n"
        "from mutmut.mutation.file_mutation import mutate_file_contents as mutate\n"
        "from mutmut.utils.format_utils import get_mutant_name as name\n"
        "paths = map(pathlib.Path, sys.argv[1:])\n"
        "print(json.dumps([name(path, key) for path in paths for key in mutate(str(path), path.read_text()).mutant_names]))"
    )
    command = [sys.executable, "-c", code, *map(str, mutated)]
    return json.loads(subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True).stdout)


def _mutmut(copy: Path, *arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("mutmut")), *arguments]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"mutmut {arguments[0]} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def _exit_codes(copy: Path, mutated: list[Path]) -> dict[str, int]:
    codes: dict[str, int] = {}
    for path in mutated:
        kept = copy / "mutants" / f"{path}.meta"
        codes |= json.loads(kept.read_text(encoding="utf-8"))["exit_code_by_key"]
    return codes
