"""Tool-calling queries from templates: small sets of related tools, queries with slots, and values for these.

A benchmark's queries are few, and each states one value of each kind. A template states any of many, so that an SLM learns
to take the value from the query. A file of templates holds one set of tools in a line::

    {"tools": [{"name": "weather.today", "description": "...", "parameters": {"type": "dict", "properties": {...}}}],
     "values": {"city": ["Oslo", {"say": "the capital of Peru", "mean": "Lima"}], "days": {"range": [2, 9]}},
     "queries": [{"text": "Weather in {city} and {city_2}?",
                  "calls": [{"name": "weather.today", "arguments": {"city": "{city}"}},
                            {"name": "weather.today", "arguments": {"city": "{city_2}"}}]}]}

``{city}`` and ``{city_2}`` are different values of the slot ``city``.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynprune.data.tasks import Query

_SLOT = re.compile(r"\{([a-z][a-z0-9_]*?)((?:_[2-9])?)\}")
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "float": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "tuple": (list,),
    "dict": (dict,),
}
_SHIPPED = Path(__file__).with_name("toolboxes.jsonl")
_FIELDS = ("tools", "values", "queries")
_CHANCE_OF_ONE_TOOL = 0.4


@dataclass(frozen=True)
class Toolbox:
    """Related tools, and queries for them.

    Attributes:
        tools: Function documents, as in `Query`.
        values: For each slot a list of values, each a plain one or ``{"say", "mean"}``, or ``{"range": [low, high]}`` with
            ``"decimals"`` for numbers that are no integers.
        queries: ``{"text", "calls"}`` each.
    """

    tools: tuple[dict[str, Any], ...]
    values: Mapping[str, Any]
    queries: tuple[dict[str, Any], ...]

    @property
    def functions(self) -> frozenset[str]:
        """Names of the functions that its queries call."""
        return frozenset(str(call["name"]) for query in self.queries for call in query["calls"])


def templates_file(name: str) -> Path:
    """The file of some templates: those that come with the package by the name ``shipped``, else the path itself.

    Raises:
        ValueError: If there is no such file.
    """
    path = _SHIPPED if name == "shipped" else Path(name)
    if not path.is_file():
        raise ValueError(f"adapt.templates={name!r}: there is no such file; allowed: null, shipped, or a file of templates")
    return path


def load_templates(path: Path) -> list[Toolbox]:
    """Reads a file of templates.

    Args:
        path: JSON lines, see the module.

    Raises:
        ValueError: If a line is broken: it is no JSON, lacks a field, names an unknown tool, parameter or slot, leaves out a
            required parameter, or gives one of another type.
    """
    toolboxes = []
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}:{line}"
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg}); each line must be one JSON object") from None
        missing = [field for field in _FIELDS if not record.get(field)] if isinstance(record, dict) else list(_FIELDS)
        if missing:
            raise ValueError(f"{where}: the field {missing[0]!r} is missing; each line needs {', '.join(_FIELDS)}")
        toolbox = Toolbox(tuple(record["tools"]), record["values"], tuple(record["queries"]))
        rng = random.Random(0)
        for query in toolbox.queries:
            _check(toolbox, query, rng, where)
        toolboxes.append(toolbox)
    return toolboxes


def fill(toolbox: Toolbox, index: int, name: str, rng: random.Random) -> Query:
    """Makes a query of a template: values for its slots, and some of the tools in some order.

    Args:
        toolbox: The tools and their templates.
        index: Which of the toolbox's queries.
        name: The new query's id.
        rng: Where the choices come from.
    """
    template = toolbox.queries[index]
    slots = _slots(template)
    drawn = _drawn(slots, toolbox.values, rng)
    words = _SLOT.sub(lambda found: _said(drawn[found.group(1) + found.group(2)]), template["text"])
    answers = tuple({"name": call["name"], "arguments": _resolved(call["arguments"], drawn)} for call in template["calls"])
    called = {call["name"] for call in answers}
    tools = list(toolbox.tools)
    if rng.random() < _CHANCE_OF_ONE_TOOL:
        tools = [tool for tool in tools if tool["name"] in called]
    rng.shuffle(tools)
    kind = ("parallel" if len(answers) > 1 else "simple", "multiple" if len(tools) > 1 else "")
    return Query(
        id=name,
        category="_".join(part for part in kind if part),
        messages=({"role": "user", "content": words},),
        tools=tuple(tools),
        answers=answers,
        allowed=tuple({call["name"]: {key: [value] for key, value in call["arguments"].items()}} for call in answers),
    )


def _slots(template: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The slots of a template's text, each once: name and number."""
    return list(dict.fromkeys(_SLOT.findall(template["text"])))


def _drawn(slots: Sequence[tuple[str, str]], values: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """A value for each slot; those of one name differ in what they mean."""
    drawn: dict[str, Any] = {}
    for slot, number in slots:
        taken = [_meant(drawn[slot + other]) for other in ("", *(f"_{n}" for n in range(2, 10))) if slot + other in drawn]
        source = values[slot]
        if isinstance(source, dict):
            low, high = source["range"]
            decimals = source.get("decimals", 0)
            for _ in range(20):
                value = rng.randint(low, high) if not decimals else round(rng.uniform(low, high), decimals)
                if value not in taken:
                    break
        else:
            value = rng.choice([v for v in source if _meant(v) not in taken] or source)
        drawn[slot + number] = value
    return drawn


def _said(value: Any) -> str:
    said = value["say"] if isinstance(value, dict) and "say" in value else value
    return ", ".join(map(str, said)) if isinstance(said, list) else str(said)


def _meant(value: Any) -> Any:
    return value["mean"] if isinstance(value, dict) and "mean" in value else value


def _resolved(node: Any, drawn: Mapping[str, Any]) -> Any:
    """An argument with its slots filled: a text that is one slot takes the value itself, with its type."""
    if isinstance(node, dict):
        return {name: _resolved(child, drawn) for name, child in node.items()}
    if isinstance(node, list):
        return [_resolved(child, drawn) for child in node]
    if not isinstance(node, str):
        return node
    whole = _SLOT.fullmatch(node)
    if whole:
        return _meant(drawn[whole.group(1) + whole.group(2)])
    return _SLOT.sub(lambda found: str(_meant(drawn[found.group(1) + found.group(2)])), node)


def _check(toolbox: Toolbox, template: Mapping[str, Any], rng: random.Random, where: str) -> None:
    text = template.get("text")
    if not text or not template.get("calls"):
        raise ValueError(f"{where}: a query lacks 'text' or 'calls': {json.dumps(template)[:120]}")
    slots = {slot for slot, _ in _slots(template)}
    unknown = sorted(slots - set(toolbox.values))
    if unknown:
        raise ValueError(f"{where}: the query {text!r} has the slot {unknown[0]!r}, which 'values' lacks")
    used = {slot + number for slot, number in _SLOT.findall(json.dumps([call["arguments"] for call in template["calls"]]))}
    unsaid = sorted(used - {slot + number for slot, number in _slots(template)})
    if unsaid:
        raise ValueError(f"{where}: the query {text!r} does not say {{{unsaid[0]}}}, which its calls give")
    tools = {tool["name"]: tool for tool in toolbox.tools}
    drawn = _drawn(_slots(template), toolbox.values, rng)
    for call in template["calls"]:
        if call["name"] not in tools:
            raise ValueError(f"{where}: the query {text!r} calls {call['name']!r}, which 'tools' lacks")
        parameters = tools[call["name"]]["parameters"]
        arguments = _resolved(call["arguments"], drawn)
        left_out = sorted(set(parameters.get("required", ())) - set(arguments))
        if left_out:
            raise ValueError(f"{where}: the query {text!r} leaves out {left_out[0]!r}, which {call['name']} requires")
        for name, value in arguments.items():
            schema = parameters["properties"].get(name)
            if schema is None:
                raise ValueError(f"{where}: the query {text!r} gives {name!r}, which {call['name']} has not")
            allowed = _TYPES.get(schema.get("type", ""), (object,))
            wrong = not isinstance(value, allowed) or (
                isinstance(value, bool) and bool not in allowed and object not in allowed
            )
            if wrong or ("enum" in schema and not isinstance(value, list) and value not in schema["enum"]):
                expected = schema.get("enum", schema.get("type"))
                raise ValueError(f"{where}: the query {text!r} gives {name}={value!r}, but {call['name']} takes {expected}")


def _is_a(value: Any, kind: str) -> bool:
    if kind not in _TYPES:
        return True
    # A bool is an int for Python.
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
