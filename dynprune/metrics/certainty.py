"""Scores that are certain before an output ends: whether what is there can still become a right answer.

An output is written from left to right, so a wrong function name or a wrong value shows long before the end. Each rule here is
sound, not complete: where it says that an output is lost, no continuation scores more than 0; where it does not, one may or
may not. Scores without a rule need the whole output.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pydantic_core

from dynprune.data.tasks import Query
from dynprune.metrics.ast_match import may_be_allowed
from dynprune.metrics.parsing import json_equal

Lost = Callable[[str, Query], bool]


def json_match_is_lost(output: str, query: Query) -> bool:
    """Whether `dynprune.metrics.function_calls.json_match` is 0 however the output goes on."""
    calls = _calls_so_far(output)
    return calls is not None and not _may_become(calls, list(query.answers))


def ast_match_is_lost(output: str, query: Query) -> bool:
    """Whether `dynprune.metrics.ast_match.ast_match` is 0 however the output goes on."""
    calls = _calls_so_far(output)
    if calls is None:
        return False
    return len(calls) > len(query.allowed) or not all(may_be_allowed(call, query) for call in calls)


def name_match_is_lost(output: str, query: Query) -> bool:
    """Whether `dynprune.metrics.function_calls.name_match` is 0 however the output goes on."""
    calls = _calls_so_far(output)
    if calls is None:
        return False
    left = [answer["name"] for answer in query.answers]
    for call in calls:
        if not isinstance(call, dict) or ("name" in call and call["name"] not in left):
            return True
        if "name" in call:
            left.remove(call["name"])
    return False


LOST: Mapping[str, Lost] = {
    "json_match": json_match_is_lost,
    "ast_match": ast_match_is_lost,
    "name_match": name_match_is_lost,
}
"""By score, the rule that says whether it is certain to be 0; scores that are not here need the whole output."""


def _calls_so_far(output: str) -> list[Any] | None:
    """What an output holds already, without what it has only begun; ``None`` if nothing can be said.

    A text that is no beginning of JSON counts as one call that is none, which no score forgives.
    """
    text = output.strip()
    # A fence around the answer is taken off before it is read; what is in it is not looked at here.
    if not text or text.startswith("`"):
        return None
    try:
        # A number at the end may go on.
        value = pydantic_core.from_json(text.rstrip("0123456789+-.eE"), allow_partial=True)
    except ValueError:
        return [None]
    return value if isinstance(value, list) else [value]


def _may_become(part: Any, whole: Any) -> bool:
    """Whether a JSON value that may lack items at its end can become another one."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(key in whole and _may_become(value, whole[key]) for key, value in part.items())
    if isinstance(part, list) and isinstance(whole, list):
        return len(part) <= len(whole) and all(map(_may_become, part, whole))
    return json_equal(part, whole)
