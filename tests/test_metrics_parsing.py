import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynprune.metrics.parsing import MAX_DEPTH, Parsed, json_equal, parse_calls

CALL = {"name": "f", "arguments": {"a": 1}}
TEXT = '{"name": "f", "arguments": {"a": 1}}'


def argument(text):
    return f'[{{"name": "f", "arguments": {{"a": {text}}}}}]'


@pytest.mark.parametrize(
    ("output", "calls"),
    [
        (f"[{TEXT}]", (CALL,)),
        (f"[{TEXT}, {TEXT}]", (CALL, CALL)),
        (f"\n  [{TEXT}]\n", (CALL,)),
        (TEXT, (CALL,)),
        (f"```json\n[{TEXT}]\n```", (CALL,)),
        (f"```json\n{TEXT}\n```\n", (CALL,)),
        ("[]", ()),
        ('[{"arguments": {}, "name": ""}]', ({"name": "", "arguments": {}},)),
        (argument("-0.5e3"), ({"name": "f", "arguments": {"a": -500.0}},)),
        (argument('"é\\u00e9"'), ({"name": "f", "arguments": {"a": "éé"}},)),
    ],
)
def test_calls_are_read(output, calls):
    assert parse_calls(output) == Parsed(calls, None)


@pytest.mark.parametrize(
    ("output", "error"),
    [
        ("", "no_json"),
        ("I cannot help with that.", "no_json"),
        (f"Sure: [{TEXT}]", "no_json"),
        (f"[{TEXT}] Done.", "no_json"),
        (f"[{TEXT}", "no_json"),
        (f"[{TEXT},]", "no_json"),
        (f"{TEXT}; {TEXT}", "no_json"),
        ("[{'name': 'f', 'arguments': {}}]", "no_json"),
        (f"```python\n[{TEXT}]\n```", "no_json"),
        (f"```json\n[{TEXT}]", "no_json"),
        (f"Sure:\n```json\n[{TEXT}]\n```", "no_json"),
        ("```json```", "no_json"),
        ("```json`", "no_json"),
        ("\ufeff[]", "no_json"),
        ("5", "not_a_list"),
        ("null", "not_a_list"),
        (json.dumps(f"[{TEXT}]"), "not_a_list"),
        ("{}", "not_a_call"),
        ("[1]", "not_a_call"),
        (f"[[{TEXT}]]", "not_a_call"),
        (f"[{TEXT}, null]", "not_a_call"),
        ('[{"name": "f"}]', "not_a_call"),
        ('[{"name": 1, "arguments": {}}]', "not_a_call"),
        ('[{"name": "f", "arguments": []}]', "not_a_call"),
        ('[{"name": "f", "arguments": "{}"}]', "not_a_call"),
        ('[{"name": "f", "arguments": {}, "id": 1}]', "not_a_call"),
        ('[{"name": "f", "name": "f", "arguments": {}}]', "duplicate_key"),
        (argument('{"b": {"c": 1, "c": 1}}'), "duplicate_key"),
        (argument("NaN"), "not_finite"),
        (argument("-Infinity"), "not_finite"),
        (argument("1e400"), "not_finite"),
        (argument("-1e400"), "not_finite"),
        (argument("1" + "0" * 309), "not_finite"),
        (argument("9" * 100_000), "not_finite"),
    ],
)
def test_malformed_outputs_are_named(output, error):
    assert parse_calls(output) == Parsed(None, error)


def test_the_largest_doubles_are_read():
    for number in (sys.float_info.max, int(sys.float_info.max), -int(sys.float_info.max)):
        parsed = parse_calls(argument(json.dumps(number)))
        assert parsed.calls[0]["arguments"]["a"] == number


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"name": "f", "arguments": {"a": ['])
def test_a_hundred_thousand_levels_are_too_deep(opening):
    assert parse_calls(opening * 100_000).error in ("too_deep", "no_json")


def test_a_well_formed_output_of_a_hundred_thousand_levels_is_too_deep():
    assert parse_calls(argument("[" * 100_000 + "]" * 100_000)).error == "too_deep"


def test_the_limit_on_levels_is_exact():
    # The list of calls, the call and its arguments are three levels.
    inside = MAX_DEPTH - 3
    assert parse_calls(argument("[" * inside + "]" * inside)).error is None
    assert parse_calls(argument("[" * (inside + 1) + "]" * (inside + 1))).error == "too_deep"


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (5, 5.0, True),
        (5, "5", False),
        (1, True, False),
        (True, 1.0, False),
        (0, False, False),
        (False, None, False),
        (True, True, True),
        (None, None, True),
        ("", None, False),
        ([1, [2]], [1.0, [2]], True),
        ([1, [True]], [1, [1]], False),
        ([1, 2], [2, 1], False),
        ([1], [1, 1], False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": {"b": False}}, {"a": {"b": 0}}, False),
        ({"a": 1}, {"a": 1, "b": 1}, False),
        ({}, [], False),
        (2**53, 2**53 + 1, False),
        ("a", "A", False),
    ],
)
def test_json_values_compare_by_type_and_value(a, b, equal):
    assert json_equal(a, b) is equal
    assert json_equal(b, a) is equal


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.fixed_dictionaries({"name": st.text(), "arguments": st.dictionaries(st.text(), JSON)})))
def test_what_is_written_as_json_is_read_back(calls):
    assert parse_calls(json.dumps(calls)) == Parsed(tuple(calls), None)
