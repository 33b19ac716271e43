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

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from dynprune.data.augmentation import Source
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
_CHANCE_OF_ONE_TOOL = 0.4


class _Parameters(BaseModel, extra="allow"):
    properties: dict[str, dict[str, Any]]
    required: list[str] = []


class _Tool(BaseModel, extra="allow"):
    name: str = Field(min_length=1)
    parameters: _Parameters


class _Call(BaseModel, extra="forbid"):
    name: str
    arguments: dict[str, Any]


class _Template(BaseModel, extra="forbid"):
    text: str = Field(min_length=1)
    calls: list[_Call] = Field(min_length=1)


class _Range(BaseModel, extra="forbid"):
    range: tuple[float, float]
    decimals: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.range
        if low > high or (self.decimals == 0 and not (low.is_integer() and high.is_integer())):
            raise ValueError(f"range {list(self.range)} does not rise, or has numbers that are not whole without 'decimals'")
        return self


class _Record(BaseModel, extra="forbid"):
    tools: list[_Tool] = Field(min_length=1)
    values: dict[str, _Range | Annotated[list[Any], Field(min_length=1)]]
    queries: list[_Template] = Field(min_length=1)


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
        ValueError: If there is no line, or one is broken: it is no JSON, lacks a field, names an unknown tool, parameter or
            slot, leaves out a required parameter, gives one of another type, or asks for more different values than there are.
    """
    toolboxes = []
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                toolboxes.append(_toolbox(text, f"{path}:{line}"))
    if not toolboxes:
        raise ValueError(f"{path} holds no templates; each line must be one JSON object with tools, values and queries")
    return toolboxes


def source_of(toolbox: Toolbox, rng: random.Random) -> Source:
    """Some of a toolbox's tools in some order, and queries that these answer, of one template after the other.

    Args:
        toolbox: The tools and their templates.
        rng: Where the choice of tools and the templates' order come from.
    """
    tools = list(toolbox.tools)
    queries = list(range(len(toolbox.queries)))
    if rng.random() < _CHANCE_OF_ONE_TOOL:
        called = _called(toolbox.queries[rng.choice(queries)])
        tools = [tool for tool in tools if tool["name"] in called]
        queries = [index for index in queries if _called(toolbox.queries[index]) <= called]
    rng.shuffle(tools)
    rng.shuffle(queries)
    order = itertools.cycle(queries)
    return Source(tuple(tools), lambda rng: fill(toolbox, next(order), rng))


def fill(toolbox: Toolbox, index: int, rng: random.Random) -> Query:
    """Makes a query of a template: values for its slots.

    Args:
        toolbox: The tools and their templates.
        index: Which of the toolbox's queries.
        rng: Where the values come from.
    """
    template = toolbox.queries[index]
    drawn = _drawn(_slots(template), toolbox.values, rng)
    words = _SLOT.sub(lambda found: _said(drawn[found.group(1) + found.group(2)]), template["text"])
    answers = tuple({"name": call["name"], "arguments": _resolved(call["arguments"], drawn)} for call in template["calls"])
    return Query(
        id=f"{toolbox.tools[0]['name']}-{index}",
        category="template",
        messages=({"role": "user", "content": words},),
        tools=toolbox.tools,
        answers=answers,
        allowed=tuple({call["name"]: {key: [value] for key, value in call["arguments"].items()}} for call in answers),
    )


def _called(template: Mapping[str, Any]) -> set[str]:
    return {call["name"] for call in template["calls"]}


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
            value = None
            while value is None or value in taken:
                value = round(rng.uniform(low, high), decimals) if decimals else rng.randint(int(low), int(high))
        else:
            value = rng.choice([value for value in source if _meant(value) not in taken])
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


def _toolbox(text: str, where: str) -> Toolbox:
    """Reads one line.

    Raises:
        ValueError: See `load_templates`.
    """
    try:
        _Record.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        what = f"{place}: {first['msg']}" if place else first["msg"]
        raise ValueError(f"{where}: {what}; dynprune/data/templates.py shows how a line looks") from None
    # As it was written: the order of a tool's fields is part of what the SLM reads.
    record = json.loads(text)
    toolbox = Toolbox(tuple(record["tools"]), record["values"], tuple(record["queries"]))
    for query in toolbox.queries:
        _check(toolbox, query, where)
    return toolbox


def _check(toolbox: Toolbox, template: Mapping[str, Any], where: str) -> None:
    text, slots = template["text"], _slots(template)
    query = f"{where}: the query {text!r}"
    stray = re.search(r"\{\s*[A-Za-z_]\w*\s*\}", _SLOT.sub("", text))
    if stray:
        raise ValueError(f"{query} has {stray.group()}, which is no slot: its name has small letters, digits and underscores")
    for slot, count in Counter(slot for slot, _ in slots).items():
        if slot not in toolbox.values:
            raise ValueError(f"{query} has the slot {slot!r}, which 'values' lacks")
        if len(_all_of(toolbox.values[slot], count)) < count:
            raise ValueError(f"{query} has {count} different values of {slot!r}, but 'values' has fewer")
    used = {slot + number for slot, number in _SLOT.findall(json.dumps([call["arguments"] for call in template["calls"]]))}
    unsaid = sorted(used - {slot + number for slot, number in slots})
    if unsaid:
        raise ValueError(f"{query} does not say {{{unsaid[0]}}}, which its calls give")
    tools = {tool["name"]: tool["parameters"] for tool in toolbox.tools}
    choices = {slot + number: _all_of(toolbox.values[slot]) for slot, number in slots}
    for call in template["calls"]:
        if call["name"] not in tools:
            raise ValueError(f"{query} calls {call['name']!r}, which 'tools' lacks")
        parameters = tools[call["name"]]
        left_out = sorted(set(parameters.get("required", ())) - set(call["arguments"]))
        if left_out:
            raise ValueError(f"{query} leaves out {left_out[0]!r}, which {call['name']} requires")
        unknown = sorted(set(call["arguments"]) - set(parameters["properties"]))
        if unknown:
            raise ValueError(f"{query} gives {unknown[0]!r}, which {call['name']} has not")
        # Each value of each slot comes once, at least.
        for turn in range(max([1, *map(len, choices.values())])):
            drawn = {name: values[turn % len(values)] for name, values in choices.items()}
            for name, value in _resolved(call["arguments"], drawn).items():
                schema = parameters["properties"][name]
                if not _fits(value, schema):
                    takes = schema.get("enum", schema.get("type"))
                    raise ValueError(f"{query} gives {name}={value!r}, but {call['name']} takes {takes}")


def _all_of(source: Any, count: int = 2) -> list[Any]:
    """The values of a slot that differ in what they mean; of a range the ends and others, as many as asked for."""
    if isinstance(source, dict):
        decimals = source.get("decimals", 0)
        low, high = source["range"]
        steps = min(count - 1, round((high - low) * 10**decimals))
        inner = [round(low + number / 10**decimals, decimals) for number in range(steps)]
        return [float(value) if decimals else int(value) for value in (*inner, high)]
    return list({json.dumps(_meant(value)): value for value in source}.values())


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    kind = schema.get("type")
    if kind in _TYPES:
        # A bool is an int for Python.
        if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
            return False
        if isinstance(value, list) and isinstance(schema.get("items"), dict):
            return all(_fits(item, schema["items"]) for item in value)
        if isinstance(value, dict) and isinstance(schema.get("properties"), dict):
            return all(_fits(child, schema["properties"].get(name, {})) for name, child in value.items())
    allowed = schema.get("enum")
    return not allowed or all(item in allowed for item in (value if isinstance(value, list) else [value]))
