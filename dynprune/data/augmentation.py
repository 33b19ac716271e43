"""New tool-calling queries made of given ones, for the training of an SLM: swapped values and joined queries.

A benchmark has some hundreds of queries. A small SLM learns from these what their answers look like before it learns to take
a value from the query, to choose a tool, or to answer with several calls.
"""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dynprune.data.tasks import Query

_MOST_TOOLS = 4
_MOST_CALLS = 4
_CHANCE_TO_DROP = 0.3
_CHANCE_OF_ITSELF = 0.3
_CHANCE_OF_BOTH = 0.5
# What a source gives may come again; so many draws a query are made to find another one.
_TRIES = 3
_YEARS = (1700, 2100)
# A number is not part of a word, of a longer number, a decimal, a date or a time.
_BOUND = (r"(?<![\w.,/:-])", r"(?![\w/-]|[.,:]\d)")


def swap_values(query: Query, values: Mapping[str, Sequence[str]], rng: random.Random) -> Query:
    """Puts other values in place of those that the query states and its answer repeats.

    A number becomes another one of as many digits, a text another one of the same shape (`stated_values`). Values that a
    tool enumerates stay, and so does everything that the query does not state literally.

    Args:
        query: The query.
        values: Texts to choose from by their shape.
        rng: Where the choice comes from.

    Returns:
        The query with its words, its answers and its allowed answers changed alike; the query itself where nothing can be
        swapped safely.
    """
    words = "\n".join(_user_words(query))
    enumerated = _enumerated(query.tools)
    swaps: dict[str, str] = {}
    leaves = list(_leaves([call["arguments"] for call in query.answers]))
    repeated = Counter(_text(leaf) for leaf in leaves)
    for leaf in leaves:
        text = _text(leaf)
        if text is None or text in enumerated:
            continue
        stated = len(re.findall(_pattern(text), words))
        # Where an answer repeats a value more often than the query states it, one of them stands for something else.
        if stated >= repeated[text]:
            same_shape = values.get(_shape(text), [text])
            swaps[text] = rng.choice(same_shape) if isinstance(leaf, str) else _other_number(text, rng)
    if not swaps or len(set(swaps.values())) < len(swaps):
        return query
    pattern = re.compile("|".join(_pattern(text) for text in sorted(swaps, key=len, reverse=True)))
    messages = tuple(
        {**m, "content": pattern.sub(lambda found: swaps[found.group()], m["content"])} if m["role"] == "user" else m
        for m in query.messages
    )
    answers = tuple({**call, "arguments": _replaced(call["arguments"], swaps)} for call in query.answers)
    changed = replace(
        query,
        messages=messages,
        answers=answers,
        allowed=tuple({call["name"]: {k: [v] for k, v in call["arguments"].items()}} for call in answers),
    )
    # One value may have held another ("10" in "10 to 20"): what is no longer stated cannot be learnt.
    new_words = "\n".join(_user_words(changed))
    return changed if all(re.search(_pattern(text), new_words) for text in swaps.values()) else query


def stated_values(queries: Sequence[Query]) -> dict[str, list[str]]:
    """The texts that queries state and their answers repeat, by shape.

    Args:
        queries: Where the texts come from.

    Returns:
        Sorted texts for each shape: a run of capitals or of small letters stands as one letter, a digit as 0, all else as it is
        (``New York`` is ``Aa Aa``, ``2023-04-25`` is ``0000-00-00``).
    """
    found: dict[str, set[str]] = defaultdict(set)
    for query in queries:
        words = "\n".join(_user_words(query))
        for leaf in _leaves([call["arguments"] for call in query.answers]):
            if isinstance(leaf, str) and leaf.strip() and re.search(_pattern(leaf), words):
                found[_shape(leaf)].add(leaf)
    return {shape: sorted(texts) for shape, texts in found.items()}


def vary_tools(query: Query, rng: random.Random) -> Query:
    """Shuffles the tools of a query and leaves out some of those that its answer does not call."""
    called = query.functions
    tools = [tool for tool in query.tools if tool["name"] in called or rng.random() >= _CHANCE_TO_DROP]
    rng.shuffle(tools)
    return replace(query, tools=tuple(tools))


@dataclass(frozen=True)
class Source:
    """Where queries with the same tools come from.

    Attributes:
        tools: Their function documents, in one order.
        draw: Gives one of these queries; which tools and system messages it has itself does not matter.
        system: What is said to the SLM before their users' words.
    """

    tools: tuple[dict[str, Any], ...]
    draw: Callable[[random.Random], Query]
    system: tuple[dict[str, str], ...] = ()


def family(source: Source, other: Source, size: int, compose_share: float, rng: random.Random) -> list[Query]:
    """Different queries with the same tools in the same order, so that all of them begin with the same prompt.

    With some probability the other source's tools stand beside the source's own, unless that would be more than four or two
    different ones of one name: then a query is one of the source, or one of the other source, or asks for both. Where they
    cannot stand beside each other, and at times where they could, half of the queries ask for two things of the source.

    Args:
        source: Where the queries come from.
        other: Another source, to join it with.
        size: How many queries; there are fewer where the sources do not give as many different ones.
        compose_share: Probability that the family is joined with the other source, or asks for two things, 0..1.
        rng: Where the choices come from.
    """
    sources, tools, system = [source], source.tools, source.system
    composed = rng.random() < compose_share
    if composed and rng.random() >= _CHANCE_OF_ITSELF:
        added = tuple(tool for tool in other.tools if tool not in tools)
        names = [tool["name"] for tool in (*tools, *added)]
        if added and len(set(names)) == len(names) <= _MOST_TOOLS:
            sources, tools = [source, other], tuple(rng.sample((*tools, *added), len(names)))
            system = (*system, *(message for message in other.system if message not in system))
    found: dict[str, Query] = {}
    for _ in range(_TRIES * size):
        if len(found) == size:
            break
        first, second = rng.sample(sources, 2) if len(sources) == 2 else (source, source)
        query = first.draw(rng)
        if composed and rng.random() < _CHANCE_OF_BOTH:
            query = _both(query, second.draw(rng), rng)
        said = tuple(message for message in query.messages if message["role"] != "system")
        found.setdefault("\n".join(_user_words(query)), replace(query, tools=tools, messages=(*system, *said)))
    return list(found.values())


def _both(query: Query, other: Query, rng: random.Random) -> Query:
    """Asks for two things in one query: the users' words one after the other, and so the calls.

    Returns:
        The new query; the first query itself where the calls would be the same twice, or more than four.
    """
    if query.answers == other.answers or len(query.answers) + len(other.answers) > _MOST_CALLS:
        return query
    link = rng.choice((" Also, ", " Then, ", " And ", " "))
    first, second = (" ".join(_user_words(q)) for q in (query, other))
    return replace(
        query,
        id=f"{query.id}+{other.id}",
        category="parallel_multiple",
        messages=({"role": "user", "content": first + link + second},),
        answers=query.answers + other.answers,
        allowed=query.allowed + other.allowed,
    )


def _user_words(query: Query) -> list[str]:
    return [message["content"] for message in query.messages if message["role"] == "user"]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for child in value.values():
            yield from _leaves(child)
    elif isinstance(value, list):
        for child in value:
            yield from _leaves(child)
    else:
        yield value


def _replaced(value: Any, swaps: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _replaced(child, swaps) for name, child in value.items()}
    if isinstance(value, list):
        return [_replaced(child, swaps) for child in value]
    text = _text(value)
    if text is None or text not in swaps:
        return value
    return swaps[text] if isinstance(value, str) else type(value)(swaps[text])


def _text(leaf: Any) -> str | None:
    """A value as a query would state it; ``None`` for what has no such form."""
    if isinstance(leaf, bool) or leaf is None or leaf == "":
        return None
    if isinstance(leaf, float) and leaf.is_integer():
        return str(int(leaf))
    return str(leaf)


def _pattern(text: str) -> str:
    return _BOUND[0] + re.escape(text) + _BOUND[1]


def _shape(text: str) -> str:
    return re.sub(r"\d", "0", re.sub(r"[a-z]+", "a", re.sub(r"[A-Z]+", "A", text)))


def _other_number(text: str, rng: random.Random) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        return text
    whole, _, decimals = text.partition(".")
    low, high = (0 if len(whole) == 1 else 10 ** (len(whole) - 1)), 10 ** len(whole) - 1
    if _YEARS[0] <= int(whole) <= _YEARS[1]:
        low, high = _YEARS
    number = str(rng.randint(max(low, 1 if not decimals else 0), high))
    if not decimals:
        return number
    # A last digit that is not zero: 2.50 would be written 2.5.
    return number + "." + "".join(str(rng.randint(0, 9)) for _ in decimals[1:]) + str(rng.randint(1, 9))


def _enumerated(tools: Sequence[dict[str, Any]]) -> frozenset[str]:
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            found.extend(node["enum"] if isinstance(node.get("enum"), list) else ())
            for child in node.values():
                visit(child)
        elif isinstance(node, list):
            for child in node:
                visit(child)

    visit(list(tools))
    return frozenset(value if isinstance(value, str) else json.dumps(value) for value in found)
