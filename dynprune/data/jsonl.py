"""Queries in the form of Salesforce/xlam-function-calling-60k: the Hub's data set, or the same fields in a file of one's own.

Each record has ``id``, ``query``, ``tools`` and ``answers``, the last two as JSON text (a file of one's own may also hold the
lists themselves). ``parameters`` of a tool is a flat map from names to ``{"type", "description", "default"}`` with Python-like
types such as ``str, optional`` or ``List[int]``; a parameter without default and without ``optional`` is required.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError

from dynprune.data.tasks import Query

_FIELDS = ("id", "query", "tools", "answers")
_TYPES = {
    "str": "string",
    "string": "string",
    "int": "integer",
    "integer": "integer",
    "float": "float",
    "number": "float",
    "double": "float",
    "bool": "boolean",
    "boolean": "boolean",
    "list": "array",
    "array": "array",
    "set": "array",
    "tuple": "tuple",
    "dict": "dict",
    "object": "dict",
}


def load_jsonl(path: str, max_chars: int | None = None) -> list[Query]:
    """Reads queries from a file with one JSON object a line.

    Args:
        path: The file.
        max_chars: Leave out queries whose tools and words together have more characters; ``None`` keeps all.

    Raises:
        ValueError: If the file is missing or empty, or a line is broken; with file, line and field.
    """
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"data.source.path={path!r} is no file; give one with {', '.join(_FIELDS)} on each line")
    queries = []
    for where, record in _lines(source):
        query = parse_record(record, where)
        if max_chars is None or query.num_chars <= max_chars:
            queries.append(query)
    if not queries:
        raise ValueError(
            f"{path} has no query (of at most data.source.max_chars={max_chars} characters); "
            f"each line must be a JSON object with {', '.join(_FIELDS)}"
        )
    return queries


def load_xlam60k(name: str, revision: str, max_chars: int | None, max_queries: int | None) -> list[Query]:
    """Reads the data set from the Hub.

    Args:
        name: Id of the data set.
        revision: Commit or tag.
        max_chars: As for `load_jsonl`.
        max_queries: Keep the first so many; ``None`` keeps all.

    Raises:
        ValueError: If the data set cannot be had (it is gated), or a record is broken.
    """
    try:
        records = load_dataset(name, revision=revision, split="train")
    except (OSError, DatasetNotFoundError) as error:
        raise ValueError(
            f"data.source.name={name!r} at revision {revision!r} is not in the local cache and the Hub did not give it "
            f"({str(error).splitlines()[0]}); accept its terms on its page and type: hf auth login, "
            "or use data=bfcl, which needs no Hub"
        ) from error
    queries = []
    for row, record in enumerate(records):
        query = parse_record(dict(record), f"{name} row {row}")
        if max_chars is None or query.num_chars <= max_chars:
            queries.append(query)
        if max_queries is not None and len(queries) == max_queries:
            break
    return queries


def parse_record(record: Any, where: str) -> Query:
    """Reads one record.

    Args:
        record: The decoded JSON object.
        where: File and line, or data set and row, for error messages.

    Raises:
        ValueError: If a field is missing or not what it should be.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where}: the line is no JSON object; it needs the fields {', '.join(_FIELDS)}")
    for field in _FIELDS:
        if field not in record:
            raise ValueError(f"{where}: the field {field!r} is missing; each record needs {', '.join(_FIELDS)}")
    if not isinstance(record["query"], str):
        raise ValueError(f"{where}: the field 'query' must be text")
    tools = [_tool(tool, where) for tool in _list(record, "tools", where)]
    by_name = {tool["name"]: tool for tool in tools}
    answers = []
    for call in _list(record, "answers", where):
        if not isinstance(call.get("name"), str) or not isinstance(call.get("arguments"), dict):
            raise ValueError(f"{where}: an answer in 'answers' is not {{'name': text, 'arguments': {{…}}}}")
        answers.append({"name": call["name"], "arguments": call["arguments"]})
    return Query(
        id=str(record["id"]),
        category=f"calls_{min(len(answers), 3)}",
        messages=({"role": "user", "content": record["query"]},),
        tools=tuple(tools),
        answers=tuple(answers),
        allowed=tuple({call["name"]: _allowed(call, by_name.get(call["name"], {}))} for call in answers),
    )


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not text.strip():
                continue
            try:
                yield where, json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg}); each line must be one JSON object") from None


def _list(record: dict[str, Any], field: str, where: str) -> list[dict[str, Any]]:
    value = record[field]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: the field {field!r} is no JSON ({error.msg})") from None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{where}: the field {field!r} must be a JSON list of objects")
    return value


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(tool.get("name"), str) or not isinstance(tool.get("parameters", {}), dict):
        raise ValueError(f"{where}: a tool in 'tools' is not {{'name': text, 'parameters': {{…}}}}")
    parameters = tool.get("parameters", {})
    if parameters.get("type") in ("object", "dict") and isinstance(parameters.get("properties"), dict):
        required = list(parameters.get("required", []))
        properties = {name: _parameter(spec) for name, spec in parameters["properties"].items()}
    else:
        required = [
            name
            for name, spec in parameters.items()
            if not (isinstance(spec, dict) and ("default" in spec or "optional" in str(spec.get("type"))))
        ]
        properties = {name: _parameter(spec) for name, spec in parameters.items()}
    return {
        "name": tool["name"],
        "description": tool.get("description", ""),
        "parameters": {"type": "dict", "properties": properties, "required": required},
    }


def _parameter(spec: Any) -> dict[str, Any]:
    """Reads a parameter's Python-like type: ``str, optional`` is a string, ``List[int]`` an array of integers."""
    parameter: dict[str, Any] = dict(spec) if isinstance(spec, dict) else {"type": str(spec)}
    if isinstance(parameter.get("properties"), dict):
        parameter["properties"] = {name: _parameter(child) for name, child in parameter["properties"].items()}
    written = str(parameter.get("type", "any")).removesuffix(", optional").strip()
    outer, _, inner = written.partition("[")
    parameter["type"] = _TYPES.get(outer.strip().lower(), "any")
    if parameter["type"] in ("array", "tuple") and "items" not in parameter:
        item = _TYPES.get(inner.rstrip("]").split(",")[0].strip().lower())
        if item is not None:
            parameter["items"] = {"type": item}
    return parameter


def _allowed(call: dict[str, Any], tool: dict[str, Any]) -> dict[str, list[Any]]:
    """What the checker accepts: the reference value, and leaving out what the reference gives as its default."""
    parameters: dict[str, Any] = tool["parameters"] if tool else {}
    allowed: dict[str, list[Any]] = {}
    for name, spec in parameters.get("properties", {}).items():
        if name in call["arguments"]:
            value = call["arguments"][name]
            allowed[name] = [_nested_allowed(value)]
            if "default" in spec and spec["default"] == value:
                allowed[name].append("")
        elif name not in parameters["required"]:
            allowed[name] = [spec["default"], ""] if "default" in spec else [""]
    for name, value in call["arguments"].items():
        # The data set has some calls with arguments that their tool does not list.
        allowed.setdefault(name, [_nested_allowed(value)])
    return allowed


def _nested_allowed(value: Any) -> Any:
    """Writes a dict's values as lists of allowed values, as the checker reads them."""
    if isinstance(value, dict):
        return {name: [_nested_allowed(item)] for name, item in value.items()}
    if isinstance(value, list):
        return [_nested_allowed(item) for item in value]
    return value
