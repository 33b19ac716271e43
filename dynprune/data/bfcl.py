"""The Berkeley Function-Calling Leaderboard's questions and possible answers, read from the files of its wheel.

The wheel ``bfcl-eval`` is installed with ``--no-deps`` and never imported: only its JSON files are used.
"""

import importlib.util
import json
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from dynprune.data.tasks import Query

CATEGORIES = (
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
)


def load_bfcl(categories: Sequence[str] = CATEGORIES, max_chars: int | None = None, root: str | None = None) -> list[Query]:
    """Reads the queries of some categories.

    Args:
        categories: Names of categories, a subset of `CATEGORIES`.
        max_chars: Leave out queries whose tools and messages together have more characters; ``None`` keeps all.
        root: Folder with ``BFCL_v4_*.json`` and ``possible_answer/``; by default that of the installed wheel.

    Returns:
        The queries, in the order of the files.

    Raises:
        ValueError: If a category is unknown, the wheel is missing, or a line is broken.
    """
    unknown = set(categories) - set(CATEGORIES)
    if unknown:
        raise ValueError(
            f"data.source.categories has {sorted(unknown)}, but the Berkeley wheel has {list(CATEGORIES)} for us; "
            "for example data.source.categories=[simple_python,multiple]"
        )
    folder = Path(root) if root else _wheel_folder()
    queries: list[Query] = []
    for category in categories:
        questions = folder / f"BFCL_v4_{category}.json"
        allowed = {
            record["id"]: record["ground_truth"]
            for _, record in _records(folder / "possible_answer" / questions.name, ("id", "ground_truth"))
        }
        for line, record in _records(questions, ("id", "question", "function")):
            if record["id"] not in allowed:
                raise ValueError(f"{questions}:{line}: id {record['id']!r} has no line in {folder / 'possible_answer'}")
            query = _query(record, category, allowed[record["id"]])
            if max_chars is None or query.num_chars <= max_chars:
                queries.append(query)
    return queries


def _wheel_folder() -> Path:
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "data=bfcl reads the files of the wheel bfcl-eval, which is not installed; "
            "type: pip install --no-deps bfcl-eval==2026.3.23"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _records(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; data.source.root must hold BFCL_v4_*.json and possible_answer/, or be null")
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{line}: not JSON ({error.msg}); each line must be one JSON object") from None
            for field in fields:
                if field not in record:
                    raise ValueError(f"{path}:{line}: the field {field!r} is missing")
            yield line, record


def _query(record: dict[str, Any], category: str, allowed: list[dict[str, Any]]) -> Query:
    messages = tuple(record["question"][0])
    text = " ".join(message["content"] for message in messages).lower()
    required = {tool["name"]: set(tool.get("parameters", {}).get("required", ())) for tool in record["function"]}
    answers = tuple(
        {"name": name, "arguments": _reference_arguments(arguments, text, required.get(name, set()))}
        for call in allowed
        for name, arguments in call.items()
    )
    return Query(
        id=record["id"],
        category=category,
        messages=messages,
        tools=tuple(record["function"]),
        answers=answers,
        allowed=tuple(allowed),
    )


def _reference_arguments(allowed: dict[str, Any], text: str, required: Set[str]) -> dict[str, Any]:
    """Chooses one right answer among the allowed ones: for each parameter the first value that the query states, or the first.

    A parameter that may be left out is left out unless the query states its value: what the query does not say cannot be
    learnt from it.
    """
    arguments = {}
    for name, listed in allowed.items():
        # Inside nested dicts some of the leaderboard's values are plain, not lists of allowed ones.
        values = listed if isinstance(listed, list) else [listed]
        given = [value for value in values if value != ""]
        stated = [value for value in given if str(value).lower() in text]
        if stated:
            arguments[name] = _reference_value(stated[0], text)
        elif given and ("" not in values or name in required):
            arguments[name] = _reference_value(given[0], text)
        elif values and name in required:
            arguments[name] = ""
    return arguments


def _reference_value(value: Any, text: str) -> Any:
    """Resolves the allowed values nested inside a dict, or inside the dicts of a list."""
    if isinstance(value, dict):
        return _reference_arguments(value, text, frozenset())
    if isinstance(value, list):
        return [_reference_value(item, text) for item in value]
    return value
