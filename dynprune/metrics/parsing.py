"""Reading an output of the SLM as a list of calls, strictly, and comparing JSON values.

An output, stripped of white space, must be a JSON list of ``{"name": text, "arguments": object}``. A single
such object is read as a list of one, and a surrounding ```` ```json ```` fence is taken off; nothing else is
repaired, since the parse rate is itself a figure that the project reports. JSON is stricter here than in
Python's `json`: no NaN, no Infinity, no number that overflows a double, no key twice in one object.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

ParseError = Literal[
    "no_json",  # not JSON, or text before or after it
    "not_a_list",  # JSON, but neither a list nor an object
    "not_a_call",  # an item is not exactly {"name": text, "arguments": object}
    "duplicate_key",  # a key twice in one object
    "not_finite",  # NaN, Infinity, or a number beyond the largest double
    "too_deep",  # nested deeper than MAX_DEPTH
]

MAX_DEPTH = 64
"""Levels of lists and objects that an output may have; Python's own limit depends on the caller's stack."""

_MAX_DIGITS = 400
_FENCE, _FENCE_END = "```json", "```"


@dataclass(frozen=True)
class Parsed:
    """An output as calls, or why it is none.

    Attributes:
        calls: The calls, ``{"name", "arguments"}`` each, in order; ``None`` if the output is malformed.
        error: What is wrong, one of `ParseError`; ``None`` if nothing is.
    """

    calls: tuple[dict[str, Any], ...] | None
    error: ParseError | None


class _Rejected(Exception):
    def __init__(self, error: ParseError) -> None:
        super().__init__(error)
        self.error = error


def parse_calls(output: str) -> Parsed:
    """Reads an output as a list of calls. No text makes it raise.

    Args:
        output: What the SLM said, special tokens left out.
    """
    text = output.strip()
    if text.startswith(_FENCE) and text.endswith(_FENCE_END):
        text = text[len(_FENCE) : -len(_FENCE_END)].strip()
    try:
        value = json.loads(
            text,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_reject_constant,
            object_pairs_hook=_unique_keys,
        )
        _check_depth(value)
    except _Rejected as rejected:
        return Parsed(None, rejected.error)
    except RecursionError:
        return Parsed(None, "too_deep")
    except json.JSONDecodeError:
        return Parsed(None, "no_json")
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list):
        return Parsed(None, "not_a_list")
    if not all(_is_call(call) for call in calls):
        return Parsed(None, "not_a_call")
    return Parsed(tuple(calls), None)


def json_equal(a: Any, b: Any) -> bool:
    """Tells whether two JSON values are equal: 5 is 5.0, but ``true`` is not 1 (as in Python), nor "5" 5."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(json_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(json_equal, a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return bool(a == b)


def _is_call(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"name", "arguments"}
        and isinstance(value["name"], str)
        and isinstance(value["arguments"], dict)
    )


def _parse_int(text: str) -> int:
    # Longer ones are not even converted: int() takes quadratic time, and raises beyond 4,300 digits.
    if len(text) > _MAX_DIGITS:
        raise _Rejected("not_finite")
    number = int(text)
    try:
        float(number)
    except OverflowError:
        raise _Rejected("not_finite") from None
    return number


def _parse_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _Rejected("not_finite")
    return number


def _reject_constant(_: str) -> NoReturn:
    raise _Rejected("not_finite")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise _Rejected("duplicate_key")
    return unique


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nested = [item for item in level if isinstance(item, (list, dict))]
        if not nested:
            return
        level = [child for item in nested for child in (item.values() if isinstance(item, dict) else item)]
    raise _Rejected("too_deep")
