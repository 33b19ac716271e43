"""`ast_match`: how the Berkeley Function-Calling Leaderboard checks calls (its AST checker, for Python).

A call is right if it names the function, gives every required parameter, gives only parameters that both the
function document and the reference list, each with the documented type and one of its allowed values, and
leaves out only parameters whose allowed values have an empty string. Several calls may come in any order, but
there must be as many as in the reference.

- Types are exact: ``true``, ``5.0`` and ``"5"`` are no integers. Only an integer passes for a float. Items of
  an array are checked too, one level deep, and not at all where some allowed value is no list (as when the
  parameter may be left out).
- A value of another type passes if the first allowed value has that type; such a reference stands for a
  variable or a null, and the value must equal an allowed one literally.
- Texts are compared in lower case, without spaces and ``, . / - _ * ^``, and with ``'`` read as ``"``: also a
  list's items and a dict's values, but no deeper. Lists compare in order.
- A dict matches an allowed one if it has only its keys, each with one of the values listed there, and lacks
  only keys that may be left out. Lists of dicts match dict by dict.
- An empty text and an empty list are right where the parameter may be left out.

Where this differs from the leaderboard's code, on purpose:

- Parallel calls: the leaderboard gives each reference call the first call that fits, so its verdict can hang
  on the order where allowed values overlap. Here calls and references are matched as a whole.
- ``true`` never equals 1; inside lists and dicts the leaderboard compares as Python does.
- The type ``any``, or one that is missing or unknown, allows every type, and so does an array without a type
  of its items. The leaderboard reads ``any`` as text, and raises on the others.
- Dicts inside a dict, or inside a list of lists, are compared literally by the leaderboard, so that no
  sensible call is right if the reference lists allowed values there. Here either reading will do.
- A plain value where a dict's list of allowed values should be is that one value.
- The leaderboard tells single from parallel queries by category; here the number of reference calls does.
- Names of functions are taken as they are: no dots become underscores.
- Calls on which the leaderboard's code raises are wrong here.
- Errors have the leaderboard's names without the names of its functions in front.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from dynprune.data.tasks import Query
from dynprune.metrics.parsing import json_equal, parse_calls

_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
}
_LEFT_OUT = ""
_NORMALIZE = str.maketrans("'", '"', " ,./-_*^")


@dataclass(frozen=True)
class Verdict:
    """What the checker says about the calls of one output.

    Attributes:
        valid: Whether they are right.
        error: The first thing that is wrong, ``None`` if nothing is: ``wrong_count``, ``wrong_func_name``,
            ``missing_required``, ``unexpected_param``, ``missing_optional``, ``type_error:simple``,
            ``type_error:nested``, ``value_error:string``, ``value_error:list/tuple``,
            ``value_error:list_dict_count``, ``value_error:dict_key``, ``value_error:dict_value``,
            ``value_error:others``; and for several calls only ``wrong_count`` or ``cannot_find_match``.
    """

    valid: bool
    error: str | None


def ast_match(output: str, query: Query) -> float:
    """1 if the output parses and its calls are right by the leaderboard's rule; else 0."""
    calls = parse_calls(output).calls
    return float(calls is not None and check_calls(calls, query).valid)


def check_calls(calls: Sequence[Mapping[str, Any]], query: Query) -> Verdict:
    """Checks calls against a query's allowed values.

    Args:
        calls: The calls, as `dynprune.metrics.parsing.parse_calls` gives them.
        query: The query; of its answers only `allowed` counts.
    """
    if len(calls) != len(query.allowed):
        return Verdict(False, "wrong_count")
    errors = [[_call_error(call, allowed, query) for call in calls] for allowed in query.allowed]
    if len(calls) == 1:
        return Verdict(errors[0][0] is None, errors[0][0])
    fits = np.array([[error is None for error in row] for row in errors], dtype=int)
    if calls and fits[linear_sum_assignment(fits, maximize=True)].sum() < len(calls):
        return Verdict(False, "cannot_find_match")
    return Verdict(True, None)


def may_be_allowed(call: Any, query: Query) -> bool:
    """Whether a call of which the end may be missing can still be right.

    Args:
        call: What there is of it; lists and dicts in it may lack items at their ends, other values are whole.
        query: The query.
    """
    if not isinstance(call, dict) or not call.keys() <= {"name", "arguments"}:
        return False
    return any(_may_fit(call, allowed, query) for allowed in query.allowed)


def _may_fit(call: Mapping[str, Any], allowed: Mapping[str, Any], query: Query) -> bool:
    name, parameters = next(iter(allowed.items()))
    arguments = call.get("arguments", {})
    if call.get("name", name) != name or not isinstance(arguments, dict):
        return False
    document = next((tool for tool in query.tools if tool["name"] == name), {})
    properties = document.get("parameters", {}).get("properties", {})
    return all(
        parameter in properties
        and parameter in parameters
        and (isinstance(value, list | dict) or _value_error(value, parameters[parameter], properties[parameter]) is None)
        for parameter, value in arguments.items()
    )


def _call_error(call: Mapping[str, Any], allowed: Mapping[str, Any], query: Query) -> str | None:
    name, parameters = next(iter(allowed.items()))
    if call["name"] != name:
        return "wrong_func_name"
    document = next((tool for tool in query.tools if tool["name"] == name), {})
    schema = document.get("parameters", {})
    properties, arguments = schema.get("properties", {}), call["arguments"]
    if any(parameter not in arguments for parameter in schema.get("required", ())):
        return "missing_required"
    for parameter, value in arguments.items():
        if parameter not in properties or parameter not in parameters:
            return "unexpected_param"
        if error := _value_error(value, parameters[parameter], properties[parameter]):
            return error
    if any(key not in arguments and _LEFT_OUT not in options for key, options in parameters.items()):
        return "missing_optional"
    return None


def _value_error(value: Any, options: Sequence[Any], schema: Mapping[str, Any]) -> str | None:
    expected = _declared_type(schema)
    if expected is None:
        return _match_error(value, options)
    listed = _listed_type(options)
    found = float if expected is float and type(value) is int else type(value)
    if found is not expected and found is not listed:
        return "type_error:simple"
    if found is list and expected is list and not _items_have_type(value, options, schema):
        return "type_error:nested"
    if listed is not None and listed is not expected:
        return None if any(_deep_match(value, option) for option in options) else "value_error:others"
    return _match_error(value, options)


def _declared_type(schema: object) -> type | None:
    written = schema.get("type") if isinstance(schema, dict) else None
    return _TYPES.get(written) if isinstance(written, str) else None


def _listed_type(options: Sequence[Any]) -> type | None:
    return next((type(option) for option in options if option != _LEFT_OUT), None)


def _items_have_type(value: Sequence[Any], options: Sequence[Any], schema: Mapping[str, Any]) -> bool:
    expected = _declared_type(schema.get("items"))
    return expected is None or any(
        not isinstance(option, list) or all(type(item) in (expected, _listed_type(option)) for item in value)
        for option in options
    )


def _match_error(value: Any, options: Sequence[Any]) -> str | None:
    if isinstance(value, dict):
        return _dict_error(value, options)
    if isinstance(value, list):
        return _list_error(value, options)
    if any(_text_match(value, option) or json_equal(value, option) for option in options):
        return None
    return "value_error:string" if isinstance(value, str) else "value_error:others"


def _list_error(value: Sequence[Any], options: Sequence[Any]) -> str | None:
    error: str | None = "value_error:list/tuple"
    for option in options:
        listed = [] if option == _LEFT_OUT else option
        if not isinstance(listed, list):
            continue
        if len(listed) != len(value):
            error = "value_error:list_dict_count" if any(isinstance(item, dict) for item in listed) else error
            continue
        error = next(filter(None, map(_item_error, value, listed)), None)
        if error is None:
            return None
    return error


def _item_error(item: Any, listed: Any) -> str | None:
    if isinstance(item, dict) and isinstance(listed, dict):
        return _entries_error(item, listed)
    return None if _text_match(item, listed) or _deep_match(item, listed) else "value_error:list/tuple"


def _dict_error(value: Mapping[str, Any], options: Sequence[Any]) -> str | None:
    error: str | None = "value_error:others"
    for option in options:
        if isinstance(option, dict):
            error = _entries_error(value, option)
            if error is None:
                return None
    return error


def _entries_error(value: Mapping[str, Any], allowed: Mapping[str, Any]) -> str | None:
    # Some references have a plain value in place of a list of allowed ones.
    options = {key: listed if isinstance(listed, list) else [listed] for key, listed in allowed.items()}
    if any(key not in options for key in value):
        return "value_error:dict_key"
    if any(key not in value and _LEFT_OUT not in listed for key, listed in options.items()):
        return "value_error:dict_key"
    for key, item in value.items():
        if not any(_text_match(item, option) or _deep_match(item, option) for option in options[key]):
            return "value_error:dict_value"
    return None


def _deep_match(value: Any, option: Any) -> bool:
    """Compares literally, or reading dicts inside as keys with allowed values."""
    if isinstance(value, dict) and isinstance(option, dict):
        return json_equal(value, option) or _entries_error(value, option) is None
    if isinstance(value, list) and isinstance(option, list):
        return len(value) == len(option) and all(map(_deep_match, value, option))
    return json_equal(value, option)


def _text_match(value: Any, option: Any) -> bool:
    return isinstance(value, str) and isinstance(option, str) and _normalized(value) == _normalized(option)


def _normalized(text: str) -> str:
    return text.translate(_NORMALIZE).lower()
