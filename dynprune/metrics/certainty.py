"""Scores that are certain before an output ends: whether what is there can still become a right answer.

An output is written from left to right, so a wrong function name or a wrong value shows long before the end. Each rule here is
sound, not complete: where it says that an output is lost, no continuation scores more than 0; where it does not, one may or
may not. Scores without a rule need the whole output.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pydantic_core

from dynprune.data.tasks import Query
from dynprune.metrics.ast_match import may_be_allowed
from dynprune.metrics.parsing import json_equal

Lost = Callable[[str, Query], bool]


def json_match_is_lost(output: str, query: Query) -> bool:
    """Whether `dynprune.metrics.function_calls.json_match` is 0 however the output goes on."""
    return any(not _may_become(calls, list(query.answers), open_end) for calls, open_end in _calls_so_far(output))


def ast_match_is_lost(output: str, query: Query) -> bool:
    """Whether `dynprune.metrics.ast_match.ast_match` is 0 however the output goes on."""
    names = [name for allowed in query.allowed for name in allowed]
    for calls, open_end in _calls_so_far(output):
        if len(calls) > len(query.allowed) or _calls_another(calls, names, open_end):
            return True
        if not open_end and not all(may_be_allowed(call, query) for call in calls):
            return True
    return False


def name_match_is_lost(output: str, query: Query) -> bool:
    """Whether `dynprune.metrics.function_calls.name_match` is 0 however the output goes on."""
    names = [answer["name"] for answer in query.answers]
    return any(len(calls) > len(names) or _calls_another(calls, names, open_end) for calls, open_end in _calls_so_far(output))


LOST: Mapping[str, Lost] = {
    "json_match": json_match_is_lost,
    "ast_match": ast_match_is_lost,
    "name_match": name_match_is_lost,
}
"""By score, the rule that says whether it is certain to be 0; scores that are not here need the whole output."""


def _calls_so_far(output: str) -> Iterator[tuple[list[Any], bool]]:
    """What an output holds already.

    A text that is no beginning of JSON counts as one call that is none, which no score forgives.

    Yields:
        The calls without what they have only begun, and False; then the same with the text that they have begun, if they end
        within one, and True. Nothing if nothing can be said.
    """
    # A character that has only begun is decoded as a replacement; it may turn out to be white space.
    text = output.rstrip("\ufffd").strip()
    # A fence around the answer is taken off before it is read; what is in it is not looked at here.
    # Halves of surrogate pairs are read by Python's parser alone.
    if not text or text.startswith("`") or re.search(r"\\u[dD][89a-fA-F]", text):
        return
    try:
        # A number at the end may go on.
        value = pydantic_core.from_json(text.rstrip("0123456789+-.eE"), allow_partial=True)
    except ValueError:
        yield [None], False
        return
    yield value if isinstance(value, list) else [value], False
    with suppress(ValueError):
        # Fails in the middle of a number.
        begun = pydantic_core.from_json(text, allow_partial="trailing-strings")
        if begun != pydantic_core.from_json(text, allow_partial=True):
            yield begun if isinstance(begun, list) else [begun], True


def _calls_another(calls: Sequence[Any], names: Sequence[str], open_end: bool) -> bool:
    """Whether one of the calls is none, or of a function that has no name left."""
    left = list(names)
    for number, call in enumerate(calls):
        if not isinstance(call, dict):
            return True
        if "name" not in call:
            continue
        # The name has only begun if nothing comes after it.
        begun = open_end and number == len(calls) - 1 and list(call)[-1] == "name" and isinstance(call["name"], str)
        fitting = [name for name in left if (name.startswith(call["name"]) if begun else name == call["name"])]
        if not fitting:
            return True
        left.remove(fitting[0])
    return False


def _may_become(part: Any, whole: Any, open_end: bool) -> bool:
    """Whether a JSON value that may lack items at its end can become another one.

    Args:
        part: What there is of it.
        whole: What it should become.
        open_end: Whether a text that comes last may go on.
    """
    if isinstance(part, dict) and isinstance(whole, dict):
        last = len(part) - 1
        return all(
            key in whole and _may_become(value, whole[key], open_end and number == last)
            for number, (key, value) in enumerate(part.items())
        )
    if isinstance(part, list) and isinstance(whole, list):
        last = len(part) - 1
        return len(part) <= len(whole) and all(
            _may_become(item, other, open_end and number == last)
            for number, (item, other) in enumerate(zip(part, whole, strict=False))
        )
    if open_end and isinstance(part, str) and isinstance(whole, str):
        return whole.startswith(part)
    return json_equal(part, whole)
