import json

import pytest

from dynprune.data.prompts import render_answer
from dynprune.data.tasks import Query
from dynprune.metrics.function_calls import (
    exact_match,
    json_match,
    name_match,
    parse_rate,
    partial_match,
    partial_match_normalized,
    ratio_function_calls,
)


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


def query(*answers):
    return Query(id="q", category="c", messages=(), tools=(), answers=answers, allowed=())


def said(*calls):
    return json.dumps(list(calls))


F1, F2, G = call("f", a=1), call("f", a=2), call("g", b="x", c=True)
MALFORMED = "f(a=1)"
ALL = (exact_match, json_match, ratio_function_calls, name_match, parse_rate, partial_match_normalized)


@pytest.mark.parametrize("answers", [(), (F1,), (F1, F1), (F1, F2, G), (call("h", s="Zürich 東京"),)])
def test_the_answer_that_the_slm_is_trained_on_is_perfect(answers):
    output = render_answer(query(*answers))
    assert [score(output, query(*answers)) for score in ALL] == [1.0] * len(ALL)
    assert partial_match(output, query(*answers)) == 10.0


@pytest.mark.parametrize("output", ["", MALFORMED, "null", '[{"name": "f"}]', said(F1) + "!"])
def test_a_malformed_output_is_worth_nothing(output):
    assert [score(output, query(F1)) for score in ALL] == [0.0] * len(ALL)
    assert partial_match(output, query(F1)) == -5.0


@pytest.mark.parametrize(
    "output",
    [
        '[{"name":"f","arguments":{"a":1}}]',
        '[{"arguments": {"a": 1}, "name": "f"}]',
        '[{"name": "f", "arguments": {"a": 1}}]\n',
        '```json\n[{"name": "f", "arguments": {"a": 1}}]\n```',
        '{"name": "f", "arguments": {"a": 1}}',
        '[{"name": "f", "arguments": {"a": 1.0}}]',
    ],
)
def test_another_spelling_matches_as_json_but_not_exactly(output):
    assert exact_match(output, query(F1)) == 0.0
    assert json_match(output, query(F1)) == 1.0


@pytest.mark.parametrize(
    ("output", "answers"),
    [
        (said(F2, F1), (F1, F2)),
        (said(F1), (F1, F1)),
        (said(F1, F1), (F1,)),
        (said(call("f", a=True)), (F1,)),
        (said(call("f", a="1")), (F1,)),
        (said(call("g", b="x", c=1)), (G,)),
        (said(call("g", b="X", c=True)), (G,)),
        (said(call("g", b="x")), (G,)),
        (said(), (F1,)),
        (said(F1), ()),
    ],
)
def test_json_match_takes_order_types_and_counts_seriously(output, answers):
    assert json_match(output, query(*answers)) == 0.0


@pytest.mark.parametrize(
    ("output", "answers", "ratio"),
    [
        (said(F2, F1), (F1, F2), 1.0),
        (said(F1), (F1, F2), 0.5),
        (said(F1, F1), (F1, F2), 0.5),
        (said(F1), (F1, F1), 0.5),
        (said(F1, F2), (F1,), 0.5),
        (said(F1, F1, F1), (F1,), 1 / 3),
        (said(F1, G), (F2, G, F1), 2 / 3),
        (said(call("f", a=True)), (F1,), 0.0),
        (said(call("f", a=1.0)), (F1,), 1.0),
        (said(call("f", a=1, z=0)), (F1,), 0.0),
        (said(), (F1,), 0.0),
        (said(F1), (), 0.0),
    ],
)
def test_ratio_counts_calls_one_to_one(output, answers, ratio):
    assert ratio_function_calls(output, query(*answers)) == pytest.approx(ratio, abs=1e-12)


@pytest.mark.parametrize(
    ("output", "answers", "points"),
    [
        (said(call("f", a=9)), (F1,), 5.0),  # the name alone
        (said(call("f")), (F1,), 5.0),
        (said(call("h", a=1)), (F1,), 0.0),  # arguments count only under the right name
        (said(call("g", b="x", c=False)), (G,), 7.5),
        (said(call("g", b="x", c=1)), (G,), 7.5),
        (said(call("g", b="x")), (G,), 7.5),
        (said(call("h")), (call("h"),), 10.0),
        (said(call("h", a=1)), (call("h"),), 5.0),
        (said(F1), (F1, G), 5.0),
        (said(F1, call("g")), (F1, G), 7.5),
        (said(F1, call("g", b="x")), (F1, G), 8.75),
        # One function called twice: in a dict by name the last call would stand for both.
        (said(F1, F2), (F1, F2), 10.0),
        (said(F2, F1), (F1, F2), 10.0),
        (said(F1), (F1, F2), 5.0),
        (said(F1, F1), (F1, F2), 7.5),
        # The first reference call must leave the perfect call to the second.
        (said(call("g", b="x", c=True), call("g", b="x", c=False)), (call("g", b="x"), G), 10.0),
        (said(call("g", b="x", c=True), call("g", b="y")), (call("g", b="x"), G), 10 * (1.0 + 0.5) / 2),
        # Beyond the reference: free, as in the thesis's code.
        (said(F1, G), (F1,), 10.0),
        (said(call("f", a=1, z=0)), (F1,), 10.0),
        (said(), (F1,), 0.0),
        (said(F1), (), 0.0),
    ],
)
def test_partial_match_shares_ten_points(output, answers, points):
    assert partial_match(output, query(*answers)) == pytest.approx(points, abs=1e-12)
    assert partial_match_normalized(output, query(*answers)) == pytest.approx((points + 5) / 15, abs=1e-12)


@pytest.mark.parametrize(
    ("output", "answers", "same"),
    [
        (said(F2, G), (G, F1), 1.0),
        (said(F1, F1), (F1, F2), 1.0),
        (said(F1), (F1, F2), 0.0),
        (said(F1, G), (F1, F2), 0.0),
        (said(call("F")), (F1,), 0.0),
        (said(), (F1,), 0.0),
    ],
)
def test_name_match_compares_names_as_a_multiset(output, answers, same):
    assert name_match(output, query(*answers)) == same


def test_parse_rate_asks_only_for_the_form():
    assert parse_rate(said(call("nobody", asked="for this")), query(F1)) == 1.0
    assert parse_rate(said(), query(F1)) == 1.0
