import json
import random
import re
from dataclasses import replace

import pytest

from dynprune.data.augmentation import Source, family, stated_values, swap_values, vary_tools
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


def source(made: Query) -> Source:
    return Source(made.tools, lambda rng: swap_values(made, {}, rng))


def test_a_family_has_its_sources_tools_in_their_order_and_different_queries():
    tools = tuple({"name": f"g{i}", "parameters": {}} for i in range(2))
    one, other = query("Add 12 and 34.", {"a": 12, "b": 34}, tools=tools), query("Say two.", {"b": 2}, id_="b", name="h")
    made = family(source(one), source(other), 5, 0.0, random.Random(0))
    assert len({q.messages[-1]["content"] for q in made}) == len(made) == 5
    for q in made:
        assert q.tools == one.tools
        a, b = re.fullmatch(r"Add (\d+) and (\d+)\.", q.messages[-1]["content"]).groups()
        assert q.answers == ({"name": "f", "arguments": {"a": int(a), "b": int(b)}},)
    # Nothing else can be asked of what states no value.
    assert len(family(source(query("x", {"a": 7})), source(other), 5, 0.0, random.Random(0))) == 1


def test_families_of_two_sources_have_the_tools_of_both_and_ask_for_one_or_the_other_or_both():
    one, other = query("Say one.", {"a": 1}), query("Say two.", {"b": 2}, id_="b", name="g")
    made = [family(source(one), source(other), 9, 1.0, random.Random(seed)) for seed in range(40)]
    joined = [queries for queries in made if len(queries[0].tools) == 2]
    # The others would ask twice for the same.
    assert all(len(queries) == 1 and queries[0].tools == one.tools for queries in made if queries not in joined)
    assert 20 < len(joined) < 36
    assert {tuple(tool["name"] for tool in queries[0].tools) for queries in joined} == {("f", "g"), ("g", "f")}
    for queries in joined:
        assert len({json.dumps(q.tools) for q in queries}) == 1
    asked = {q.messages[-1]["content"]: q for queries in joined for q in queries}
    links = {"Also, ", "Then, ", "And ", ""}
    sentences = ("Say one.", "Say two.")
    both = {f"{first} {link}{second}" for first in sentences for second in sentences if first != second for link in links}
    assert set(asked) == both | set(sentences)
    for words, q in asked.items():
        calls = {"one": {"name": "f", "arguments": {"a": 1}}, "two": {"name": "g", "arguments": {"b": 2}}}
        assert list(q.answers) == [calls[said] for said in re.findall("one|two", words)]
        assert SCORES["ast_match"](render_answer(q), q) == 1


def test_a_family_asks_twice_with_other_values():
    one = query("Add 12 and 34.", {"a": 12, "b": 34})
    # Its own tool is no other one.
    made = [q for seed in range(9) for q in family(source(one), source(one), 6, 1.0, random.Random(seed))]
    twice = [q for q in made if len(q.answers) == 2]
    assert 0 < len(twice) < len(made)
    for q in twice:
        assert q.answers[0] != q.answers[1]
        numbers = [value for call in q.answers for value in call["arguments"].values()]
        assert [int(number) for number in re.findall(r"\d+", q.messages[-1]["content"])] == numbers
        assert SCORES["ast_match"](render_answer(q), q) == 1


@pytest.mark.parametrize("names", [["f"], ["g0", "g1", "g2", "g3"]])
def test_sources_with_a_tool_of_one_name_or_too_many_tools_are_not_joined(names):
    one = query("Say one.", {"a": 1})
    other = query("x", {}, id_="b", tools=tuple({"name": name, "parameters": {}} for name in names))
    for seed in range(10):
        for q in family(source(one), source(other), 3, 1.0, random.Random(seed)):
            assert (q.tools, q.answers) == (one.tools, one.answers)


def test_all_queries_of_a_family_have_the_system_messages_of_both_sources():
    def said(made: Query, role: str) -> list[str]:
        return [message["content"] for message in made.messages if message["role"] == role]

    one, other = query("Say one.", {"a": 1}), query("Say two.", {"b": 2}, id_="b", name="g")
    system = [{"role": "system", "content": word} for word in ("Be kind.", "Be brief.")]
    sources = [replace(source(one), system=tuple(system[:1])), replace(source(other), system=tuple(system))]
    made = [q for seed in range(20) for q in family(*sources, 9, 1.0, random.Random(seed)) if len(q.tools) == 2]
    assert {tuple(said(q, "system")) for q in made} == {("Be kind.", "Be brief.")}
    assert len({len(q.answers) for q in made}) == 2
    alone = family(*sources, 9, 0.0, random.Random(0))
    assert [(said(q, "system"), said(q, "user")) for q in alone] == [(["Be kind."], ["Say one."])]


def test_a_query_asks_for_four_things_at_most():
    def several(name: str, count: int) -> Query:
        made = query(f"{name}!", {}, name=name)
        calls = tuple({"name": name, "arguments": {"a": number}} for number in range(count))
        return replace(made, answers=calls, allowed=tuple({name: {"a": [number]}} for number in range(count)))

    for count, most in ((2, 4), (3, 3)):
        sources = [source(several(name, count)) for name in "fg"]
        made = [q for seed in range(9) for q in family(*sources, 9, 1.0, random.Random(seed))]
        assert max(len(q.answers) for q in made) == most
