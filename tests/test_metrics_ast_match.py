import json

import pytest

from dynprune.data.tasks import Query
from dynprune.metrics.ast_match import Verdict, ast_match, check_calls


def tool(name, properties, required=()):
    return {
        "name": name,
        "description": "",
        "parameters": {"type": "dict", "properties": properties, "required": list(required)},
    }


def query(tools, *allowed, category="simple"):
    return Query(
        id="q",
        category=category,
        messages=(),
        tools=tuple(tools),
        answers=(),
        allowed=allowed,
    )


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


def error_of(value, options, schema):
    """The verdict on one argument whose parameter has the schema and these allowed values."""
    one = query([tool("f", {"p": schema})], {"f": {"p": options}})
    verdict = check_calls([call("f", p=value)], one)
    assert verdict.valid == (verdict.error is None)
    assert ast_match(json.dumps([call("f", p=value)]), one) == float(verdict.valid)
    return verdict.error


STRING, INTEGER, FLOAT, BOOLEAN = ({"type": name} for name in ("string", "integer", "float", "boolean"))
DICT, ANY = {"type": "dict"}, {"type": "any"}


def array(items, outer="array"):
    return {"type": outer, "items": {"type": items}}


@pytest.mark.parametrize(
    ("schema", "options", "value", "error"),
    [
        (INTEGER, [5], 5, None),
        (INTEGER, [5, 6], 6, None),
        (INTEGER, [5], 7, "value_error:others"),
        (INTEGER, [5], 5.0, "type_error:simple"),
        (INTEGER, [5], "5", "type_error:simple"),
        (INTEGER, [1], True, "type_error:simple"),
        (INTEGER, [5], None, "type_error:simple"),
        (INTEGER, [5], [5], "type_error:simple"),
        (FLOAT, [5.0], 5.0, None),
        (FLOAT, [5.0], 5, None),
        (FLOAT, [5], 5.0, None),
        (FLOAT, [5], 5, None),
        (FLOAT, [5.0], 5.1, "value_error:others"),
        (FLOAT, [1.0], True, "type_error:simple"),
        (FLOAT, [5.0], "5.0", "type_error:simple"),
        (BOOLEAN, [True], True, None),
        (BOOLEAN, [True], False, "value_error:others"),
        (BOOLEAN, [True], 1, "type_error:simple"),
        (BOOLEAN, [False], 0, "type_error:simple"),
        (BOOLEAN, [True], "true", "type_error:simple"),
        (STRING, ["5"], 5, "type_error:simple"),
    ],
)
def test_numbers_and_booleans_keep_their_types(schema, options, value, error):
    assert error_of(value, options, schema) == error


@pytest.mark.parametrize(
    ("options", "value", "error"),
    [
        (["April 1, 2024"], "april 1 2024", None),
        (["April 1, 2024"], "April1,2024", None),
        (["2024/04/01"], "2024-04.01", None),
        (["x_y*z^2"], "XYZ2", None),
        (["it's"], 'it"s', None),
        (["New York", "NYC"], "nyc", None),
        (["a"], "b", "value_error:string"),
        (["a+b"], "ab", "value_error:string"),
        (["a"], "a\n", "value_error:string"),
        (["a;b"], "a:b", "value_error:string"),
        (["a", ""], "", None),
        (["a", ""], "-", None),
        (["a"], "", "value_error:string"),
        (["STRASSE"], "straße", "value_error:string"),
    ],
)
def test_texts_are_compared_without_case_spaces_and_some_punctuation(options, value, error):
    assert error_of(value, options, STRING) == error


@pytest.mark.parametrize(
    ("schema", "options", "value", "error"),
    [
        (array("integer"), [[1, 2]], [1, 2], None),
        (array("integer"), [[1, 2]], [2, 1], "value_error:list/tuple"),
        (array("integer"), [[1, 2], [2, 1]], [2, 1], None),
        (array("integer"), [[1, 2]], [1], "value_error:list/tuple"),
        (array("integer"), [[1, 2]], [1, 2.0], "type_error:nested"),
        (array("integer"), [[1, 2]], ["1", "2"], "type_error:nested"),
        (array("integer"), [[1, 0]], [True, False], "type_error:nested"),
        (array("integer"), [[1, 2]], "1, 2", "type_error:simple"),
        (array("float"), [[1.0, 2.0]], [1, 2], "type_error:nested"),  # the leaderboard converts no items
        (array("float"), [[1, 2]], [1, 2], None),
        (array("string"), [["New York", "L.A."]], ["new-york", "la"], None),
        (array("string"), [["a", "b"]], "ab", "type_error:simple"),
        (array("string"), [["a"], ""], [], None),
        (array("string"), [["a"]], [], "value_error:list/tuple"),
        (array("string"), [[], ""], [], None),
        (array("float", "tuple"), [[1.5, 2.5]], [1.5, 2.5], None),
        (array("float", "tuple"), [[1.5, 2.5]], [2.5, 1.5], "value_error:list/tuple"),
        (array("array"), [[[1, 2], [3]]], [[1, 2], [3]], None),
        (array("array"), [[[1, 2], [3]]], [[1, 2], 3], "type_error:nested"),
        (array("array"), [[["A b"]]], [["ab"]], "value_error:list/tuple"),  # normalised one level deep only
        # Where the parameter may be left out, the leaderboard does not check types of items.
        (array("integer"), [[1, 2], ""], [1.0, 2.0], None),
    ],
)
def test_lists_match_in_order_with_items_of_the_type(schema, options, value, error):
    assert error_of(value, options, schema) == error


PERSON = {"name": ["John Doe", "J. Doe"], "age": [30], "note": ["", "vip"]}


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"name": "john doe", "age": 30}, None),
        ({"name": "JDoe", "age": 30.0, "note": "VIP"}, None),
        ({"age": 30, "name": "J. Doe", "note": ""}, None),
        ({"name": "Jane", "age": 30}, "value_error:dict_value"),
        ({"name": "John Doe", "age": "30"}, "value_error:dict_value"),
        ({"name": "John Doe"}, "value_error:dict_key"),
        ({"name": "John Doe", "age": 30, "zip": 1}, "value_error:dict_key"),
        ({}, "value_error:dict_key"),
        (PERSON, "value_error:dict_value"),
        ([["name", "John Doe"], ["age", 30]], "type_error:simple"),
    ],
)
def test_dicts_match_key_by_key(value, error):
    assert error_of(value, [PERSON], DICT) == error


def test_any_of_several_allowed_dicts_will_do():
    options = ["", {"a": [1]}, {"b": [2]}]
    assert error_of({"b": 2}, options, DICT) is None
    assert error_of({"a": 2}, options, DICT) == "value_error:dict_key"
    assert error_of({}, ["", {}], DICT) is None


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ([{"item": "Burgers", "n": 5}, {"item": "wings"}], None),
        ([{"item": "wings", "n": 5}, {"item": "burgers"}], "value_error:dict_value"),
        ([{"item": "burgers", "n": 5}], "value_error:list_dict_count"),
        ([], "value_error:list_dict_count"),
        ([{"item": "burgers", "n": 5}, {"item": "wings", "n": 6}], "value_error:dict_value"),
        ([{"item": "burgers", "n": 5}, {"dish": "wings"}], "value_error:dict_key"),
        ([{"item": "burgers", "n": 5}, "wings"], "type_error:nested"),
        ({"item": "burgers", "n": 5}, "type_error:simple"),
    ],
)
def test_lists_of_dicts_match_dict_by_dict_in_order(value, error):
    options = [[{"item": ["burgers"], "n": [5]}, {"item": ["wings", "chicken wings"], "n": ["", 7]}]]
    assert error_of(value, options, array("dict")) == error


@pytest.mark.parametrize(
    ("schema", "options", "value", "error"),
    [
        (STRING, ["", None], None, None),
        (STRING, ["", None], "", None),
        (STRING, ["", None], "null", "value_error:others"),
        (INTEGER, ["", None], None, None),
        (INTEGER, ["", None], 3, "value_error:others"),
        (STRING, [None, "Abc"], "Abc", None),
        (STRING, [None, "Abc"], "abc", "value_error:others"),
        (STRING, ["Abc", None], None, "type_error:simple"),
        (INTEGER, ["my_var"], "my_var", None),
        (INTEGER, ["my_var"], "my var", "value_error:others"),
        (STRING, [True], True, None),
        (STRING, [True], "true", "value_error:others"),
        (STRING, [True], 1, "type_error:simple"),
        (array("float"), ["data"], "data", None),
        (INTEGER, [""], 3, "value_error:others"),
        (INTEGER, [""], "", "type_error:simple"),
    ],
)
def test_a_reference_of_another_type_is_compared_literally(schema, options, value, error):
    assert error_of(value, options, schema) == error


OPTIONAL = query(
    [tool("f", {"a": INTEGER, "b": INTEGER, "c": INTEGER, "d": INTEGER}, required=["a"])],
    {"f": {"a": [1], "b": [2, ""], "c": [3]}},
)


@pytest.mark.parametrize(
    ("calls", "error"),
    [
        ([call("f", a=1, b=2, c=3)], None),
        ([call("f", a=1, c=3)], None),
        ([call("f", c=3, a=1)], None),
        ([call("f", a=1, b=0, c=3)], "value_error:others"),
        ([call("f", b=2, c=3)], "missing_required"),
        ([call("f", a=1, b=2)], "missing_optional"),
        ([call("f", a=1, c=3, d=4)], "unexpected_param"),  # in the document, but not in the reference
        ([call("f", a=1, c=3, z=4)], "unexpected_param"),
        ([call("F", a=1, c=3)], "wrong_func_name"),
        ([], "wrong_count"),
        ([call("f", a=1, c=3), call("f", a=1, c=3)], "wrong_count"),
    ],
)
def test_parameters_are_required_optional_or_unexpected(calls, error):
    assert check_calls(calls, OPTIONAL) == Verdict(error is None, error)


def test_a_parameter_of_the_reference_that_the_document_lacks_is_unexpected():
    one = query([tool("f", {"a": INTEGER})], {"f": {"a": [1], "b": [2, ""]}})
    assert check_calls([call("f", a=1)], one) == Verdict(True, None)
    assert check_calls([call("f", a=1, b=2)], one) == Verdict(False, "unexpected_param")


def test_names_keep_their_dots():
    one = query([tool("math.sqrt", {"x": INTEGER})], {"math.sqrt": {"x": [4]}})
    assert check_calls([call("math.sqrt", x=4)], one).valid
    assert check_calls([call("math_sqrt", x=4)], one).error == "wrong_func_name"


def test_the_document_is_that_of_the_function_called():
    tools = [tool("g", {"x": STRING}), tool("f", {"x": INTEGER})]
    assert check_calls([call("f", x=1)], query(tools, {"f": {"x": [1]}}, category="multiple")).valid
    assert check_calls([call("g", x="1")], query(tools, {"f": {"x": [1]}})).error == "wrong_func_name"


PARALLEL = query(
    [tool("f", {"x": INTEGER}), tool("g", {"s": STRING})],
    {"f": {"x": [1]}},
    {"f": {"x": [2]}},
    {"g": {"s": ["a", "b"]}},
    category="parallel_multiple",
)


@pytest.mark.parametrize(
    ("calls", "error"),
    [
        ([call("f", x=1), call("f", x=2), call("g", s="a")], None),
        ([call("g", s="B"), call("f", x=2), call("f", x=1)], None),
        ([call("f", x=1), call("f", x=1), call("g", s="a")], "cannot_find_match"),
        ([call("f", x=2), call("f", x=2), call("g", s="a")], "cannot_find_match"),
        ([call("f", x=1), call("f", x=2), call("g", s="c")], "cannot_find_match"),
        ([call("f", x=1), call("f", x=2)], "wrong_count"),
        ([call("f", x=1), call("f", x=2), call("g", s="a"), call("g", s="b")], "wrong_count"),
        ([], "wrong_count"),
    ],
)
def test_parallel_calls_come_in_any_order_but_in_the_right_number(calls, error):
    assert check_calls(calls, PARALLEL) == Verdict(error is None, error)


@pytest.mark.parametrize("calls", [[call("f", x=1), call("f", x=2)], [call("f", x=2), call("f", x=1)]])
def test_overlapping_allowed_values_do_not_make_the_order_matter(calls):
    # The first reference call fits both calls, the second only one of them.
    overlapping = query([tool("f", {"x": INTEGER})], {"f": {"x": [1, 2]}}, {"f": {"x": [1]}})
    assert check_calls(calls, overlapping).valid


def test_no_reference_call_asks_for_no_call():
    assert check_calls([], query([])).valid
    assert check_calls([call("f")], query([])).error == "wrong_count"


@pytest.mark.parametrize(
    ("schema", "options", "value", "valid"),
    [
        # true is never 1, wherever it stands; Python says that they are equal.
        (array("integer"), [[1], ""], [True], False),
        (array("array"), [[[1]]], [[True]], False),
        (DICT, [{"on": [True]}], {"on": 1}, False),
        (DICT, [{"on": [1]}], {"on": 1}, True),
        # Any, unknown and absent types are not checked.
        (ANY, ["a b"], "AB", True),
        (ANY, [5], 5, True),
        (ANY, ["x", 5], 5, True),
        (ANY, [5], 6, False),
        (ANY, [1], True, False),
        (ANY, [{"a": [1]}], {"a": 1}, True),
        (ANY, [[{"a": [1]}]], [{"a": 1}], True),
        ({"type": "datetime"}, [5], 5, True),
        ({"type": ["string", "null"]}, [5], 5, True),
        ({}, [5], 5, True),
        ({"type": "array"}, [["a", 1]], ["A", 1], True),
        ({"type": "array", "items": "string"}, [["a", 1]], ["A", 1], True),
        ({"type": "array"}, [[{"a": [1]}]], [{"a": 1}], True),
        # Dicts deeper inside: literal, or keys with their allowed values.
        (DICT, [{"at": [{"x": 1.5, "y": 2}]}], {"at": {"x": 1.5, "y": 2}}, True),
        (DICT, [{"at": [{"x": [1, 2], "y": ["", 2]}]}], {"at": {"x": 2}}, True),
        (DICT, [{"at": [{"x": [1, 2], "y": ["", 2]}]}], {"at": {"x": 3}}, False),
        (DICT, [{"at": [{"x": ["a", "b"]}]}], {"at": {"x": ["a", "b"]}}, True),
        (DICT, [{"at": [{"x": ["a", "b"]}]}], {"at": {"x": "b"}}, True),
        (DICT, [{"at": [[{"x": [1]}]]}], {"at": [{"x": 1}]}, True),
        (DICT, [{"at": [[{"x": [1]}]]}], {"at": [{"x": True}]}, False),
        (STRING, [{"x": [1]}], {"x": 1}, True),
        # A plain value in place of a list of allowed ones.
        (DICT, [{"x": "abc"}], {"x": "ABC"}, True),
        (DICT, [{"x": "abc"}], {"x": "a"}, False),
        (DICT, [{"x": "abc"}], {}, False),
        (DICT, [{"x": 5}], {"x": 5}, True),
        # The leaderboard's code raises on these.
        (array("dict"), [[{"a": [1]}], ""], [1], False),
        (array("dict"), [[{"a": [1]}], None], [{"a": 2}], False),
        (DICT, [None, {"a": [1]}], {"b": 1}, False),
    ],
)
def test_the_checker_differs_from_the_leaderboard_on_purpose(schema, options, value, valid):
    assert (error_of(value, options, schema) is None) is valid


def test_an_output_is_parsed_strictly_before_it_is_checked():
    good = '[{"name": "f", "arguments": {"a": 1, "c": 3}}]'
    assert ast_match(good, OPTIONAL) == 1.0
    assert ast_match(f"```json\n{good}\n```", OPTIONAL) == 1.0
    assert ast_match(good[1:-1], OPTIONAL) == 1.0
    assert ast_match(f"Here: {good}", OPTIONAL) == 0.0
    assert ast_match(good.replace("3", "NaN"), OPTIONAL) == 0.0
    assert ast_match(good.replace('"c": 3', '"c": 3, "c": 3'), OPTIONAL) == 0.0


def test_arguments_nested_very_deeply_are_wrong_and_no_crash():
    deep = {"x": 1}
    for _ in range(100_000):
        deep = {"x": [deep]}
    for schema, options in [(DICT, [{"x": [{"x": [1]}]}]), (ANY, [5]), (array("dict"), [[{"x": [1]}]])]:
        for value in (deep, [deep]):
            one = query([tool("f", {"p": schema})], {"f": {"p": options}})
            assert not check_calls([call("f", p=value)], one).valid
