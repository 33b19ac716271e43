import json
import random
import re

import pytest

from dynprune.data.augmentation import compose, join, stated_values, swap_values, vary_tools
from dynprune.data.bfcl import load_bfcl
from dynprune.data.prompts import render_answer
from dynprune.data.tasks import Query
from dynprune.metrics.scores import SCORES


def query(words: str, arguments: dict, id_: str = "a", tools: tuple[dict, ...] = (), name: str = "f") -> Query:
    properties = {"unit": {"enum": ["km", 5]}, **{key: {"type": "integer"} for key in "ab"}}
    tool = {
        "name": name,
        "description": "",
        "parameters": {"type": "dict", "properties": properties},
    }
    return Query(
        id=id_,
        category="simple",
        messages=({"role": "system", "content": words}, {"role": "user", "content": words}),
        tools=(tool, *tools),
        answers=({"name": name, "arguments": arguments},),
        allowed=({name: {k: [v] for k, v in arguments.items()}},),
    )


def test_what_is_swapped_changes_alike_in_words_answer_and_allowed_answers_and_nothing_else_does():
    old = query(
        "From Rome to Oslo, 12 or 3.50 of 120, in km, 5 times, today, Rome; 12.5%",
        {"a": "Rome", "b": ["Oslo", {"c": 12}], "unit": "km", "n": 5, "x": True, "y": 7, "z": "unsaid", "big": 120.0},
    )
    tries = (swap_values(old, {"Aa": ["Bern", "Graz"]}, random.Random(seed)) for seed in range(99))
    # Two values that would become one leave the query as it is.
    new = next(new for new in tries if new is not old)
    arguments = new.answers[0]["arguments"]
    assert {arguments["a"], arguments["b"][0]} == {"Bern", "Graz"}
    twelve, big = arguments["b"][1]["c"], arguments["big"]
    assert 10 <= twelve <= 99
    assert 100 <= big <= 999
    assert isinstance(twelve, int)
    assert isinstance(big, float)
    assert {k: arguments[k] for k in ("unit", "n", "x", "y", "z")} == {"unit": "km", "n": 5, "x": True, "y": 7, "z": "unsaid"}
    a, b = arguments["a"], arguments["b"][0]
    assert new.messages[1]["content"] == f"From {a} to {b}, {twelve} or 3.50 of {int(big)}, in km, 5 times, today, {a}; 12.5%"
    assert new.messages[0] == old.messages[0]
    assert new.allowed == ({"f": {name: [value] for name, value in arguments.items()}},)
    assert (new.tools, new.id, old.answers[0]["arguments"]["a"]) == (old.tools, old.id, "Rome")


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("Nothing of it is said", {"a": "Rome", "n": 12}),
        ("Part of a word: Romes, 12th, v12, 12.5, 3.12", {"a": "Rome", "n": 12}),
        ("Part of a date or a time: 12/10/2023, 10-12-2023, 12:30, 9:12", {"n": 12}),
        ("Stated once, but of two: add 12", {"a": 12, "n": 12.0}),
    ],
)
def test_a_query_that_states_none_of_its_values_stays(words, arguments):
    old = query(words, arguments)
    assert swap_values(old, {"Aa": ["Bern"]}, random.Random(0)) is old


def test_values_come_by_shape_from_what_queries_state():
    values = stated_values(
        [
            query("in Rome on 2023-04-25", {"a": "Rome", "b": "2023-04-25", "c": "Bern", "n": 3}),
            query("New York, rome", {"a": "New York", "b": "rome"}),
        ]
    )
    assert values == {"Aa": ["Rome"], "0000-00-00": ["2023-04-25"], "Aa Aa": ["New York"], "a": ["rome"]}


def test_the_benchmarks_queries_stay_consistent_whatever_is_swapped():
    queries = load_bfcl(max_chars=1500)
    values, rng, changed = stated_values(queries), random.Random(0), 0
    for old in queries:
        new = swap_values(old, values, rng)
        assert SCORES["ast_match"](render_answer(new), new) == SCORES["ast_match"](render_answer(old), old)
        assert SCORES["json_match"](render_answer(new), new) == 1
        assert [set(a["arguments"]) for a in new.answers] == [set(a["arguments"]) for a in old.answers]
        words = " ".join(m["content"] for m in new.messages)
        if new is not old:
            changed += 1
            leaves = re.findall(r'"[^"]*"', json.dumps([list(a["arguments"].values()) for a in new.answers]))
            before = re.findall(r'"[^"]*"', json.dumps([list(a["arguments"].values()) for a in old.answers]))
            assert all(leaf.strip('"') in words for leaf in leaves if leaf not in before)
    assert changed > len(queries) / 2


def test_tools_that_are_called_stay_and_others_come_and_go():
    old = query("x", {}, tools=tuple({"name": f"g{i}", "parameters": {}} for i in range(6)))
    rng = random.Random(0)
    seen = [[tool["name"] for tool in vary_tools(old, rng).tools] for _ in range(50)]
    assert all("f" in names and set(names) <= {tool["name"] for tool in old.tools} for names in seen)
    assert len({names.index("f") for names in seen}) > 2
    assert len({len(names) for names in seen}) > 2


def test_joined_queries_ask_for_both_and_answer_both():
    one, other = query("Say one.", {"a": 1}), query("Say two.", {"b": 2}, id_="b", name="g")
    rng = random.Random(0)
    made = [join(one, [other], rng) for _ in range(20)]
    both = [q for q in made if len(q.answers) == 2]
    assert 0 < len(both) < 20
    for q in made:
        assert {tool["name"] for tool in q.tools} == {"f", "g"}
    for q in both:
        assert re.fullmatch(r"Say one\. (Also, |Then, |And |)Say two\.", q.messages[-1]["content"])
        assert [call["name"] for call in q.answers] == ["f", "g"]
        assert SCORES["ast_match"](render_answer(q), q) == 1
    assert all(q.answers == one.answers and q.messages == one.messages for q in made if q not in both)


def test_queries_with_a_tool_of_one_name_or_too_many_tools_are_not_joined():
    one = query("Say one.", {"a": 1})
    many = query("x", {}, id_="b", name="g", tools=tuple({"name": f"g{i}", "parameters": {}} for i in range(3)))
    rng = random.Random(0)
    assert all(join(one, [other], rng) is one for other in (one, many) for _ in range(10))


def test_a_query_joined_with_itself_asks_for_other_values_of_the_same_tool():
    one = query("Add 12 and 34.", {"a": 12, "b": 34})
    rng = random.Random(0)
    made = [q for q in (compose(one, [one], {}, rng) for _ in range(30)) if q is not one]
    assert made
    for q in made:
        assert q.tools == one.tools
        assert len(q.answers) == 2
        assert q.answers[0] == one.answers[0]
        assert q.answers[1]["arguments"] != one.answers[0]["arguments"]
        for value in q.answers[1]["arguments"].values():
            assert str(value) in q.messages[-1]["content"]
        assert SCORES["ast_match"](render_answer(q), q) == 1
