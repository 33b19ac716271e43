"""JSON by its grammar (RFC 8259), read by recursive descent: an oracle that shares no code with what it checks.

Stricter where the project is: a key twice in one object is an error, and so is a number that is no double.
"""

import math
import re
from collections.abc import Callable
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_TEXT = re.compile(r'[^"\\\x00-\x1f]*')
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_HEX = re.compile(r"[0-9a-fA-F]{4}")
_WORDS = {"true": True, "false": False, "null": None}


class Malformed(Exception):
    """What is read is no JSON."""


def read(text: str, most_levels: int) -> Any:
    """Reads a whole text.

    Raises:
        Malformed: If it is no JSON, or nested deeper.
    """
    value, end = _value(text, _skip(text, 0), most_levels)
    if _skip(text, end) != len(text):
        raise Malformed
    return value


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _value(text: str, at: int, levels: int) -> tuple[Any, int]:
    first = text[at : at + 1]
    if first in ("{", "["):
        if levels == 0:
            raise Malformed
        return (_object if first == "{" else _array)(text, at + 1, levels - 1)
    if first == '"':
        return _string(text, at + 1)
    for word, value in _WORDS.items():
        if text.startswith(word, at):
            return value, at + len(word)
    return _number(text, at)


def _number(text: str, at: int) -> tuple[Any, int]:
    match = _NUMBER.match(text, at)
    # No double has so many digits before its point.
    if match is None or (match[1] is None and match[2] is None and len(match[0]) > 400):
        raise Malformed
    if not math.isfinite(float(match[0])):
        raise Malformed
    return (int(match[0]) if match[1] is None and match[2] is None else float(match[0])), match.end()


def _string(text: str, at: int) -> tuple[str, int]:
    parts = []
    while True:
        match = _TEXT.match(text, at)
        assert match is not None
        parts.append(match[0])
        at = match.end()
        if text[at : at + 1] == '"':
            # Halves of a pair, escaped one after the other, are one character.
            joined = "".join(parts)
            return joined.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass"), at + 1
        if text[at : at + 1] != "\\":
            raise Malformed
        escape = text[at + 1 : at + 2]
        if escape == "u" and (code := _HEX.match(text, at + 2)):
            parts.append(chr(int(code[0], 16)))
            at = code.end()
        elif escape in _ESCAPES and escape:
            parts.append(_ESCAPES[escape])
            at += 2
        else:
            raise Malformed


def _array(text: str, at: int, levels: int) -> tuple[list[Any], int]:
    items: list[Any] = []

    def one(at: int) -> int:
        item, at = _value(text, at, levels)
        items.append(item)
        return at

    return items, _listed(text, at, "]", one)


def _object(text: str, at: int, levels: int) -> tuple[dict[str, Any], int]:
    items: dict[str, Any] = {}

    def one(at: int) -> int:
        if text[at : at + 1] != '"':
            raise Malformed
        key, at = _string(text, at + 1)
        at = _skip(text, at)
        if key in items or text[at : at + 1] != ":":
            raise Malformed
        items[key], at = _value(text, _skip(text, at + 1), levels)
        return at

    return items, _listed(text, at, "}", one)


def _listed(text: str, at: int, closing: str, one: Callable[[int], int]) -> int:
    """Reads what stands between commas up to a bracket, each by a function from its place to its end; gives the end."""
    at = _skip(text, at)
    if text[at : at + 1] == closing:
        return at + 1
    while True:
        at = _skip(text, one(_skip(text, at)))
        if text[at : at + 1] == closing:
            return at + 1
        if text[at : at + 1] != ",":
            raise Malformed
        at += 1
