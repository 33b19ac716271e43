import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprune.data.bfcl import load_bfcl
from dynprune.data.prompts import render_answer
from dynprune.data.tasks import Query
from dynprune.metrics.certainty import LOST
from dynprune.metrics.scores import SCORES

RULES = sorted(LOST)


def query(*calls: dict) -> Query:
    tools = tuple(
        {"name": name, "parameters": {"type": "dict", "properties": {k: {"type": "any"} for k in "abc"}, "required": []}}
        for name in sorted({call["name"] for call in calls})
    )
    allowed = tuple({call["name"]: {k: [v] for k, v in call["arguments"].items()}} for call in calls)
    return Query("q", "simple", ({"role": "user", "content": "x"},), tools, calls, allowed)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-20, 120) | st.floats(-2, 2, width=16) | st.text('ab1e"\\ é', max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)
CALLS = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "fe", "g"]), "arguments": st.dictionaries(st.sampled_from("abc"), VALUES, max_size=2)}
)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=400, deadline=None)
@given(reference=st.lists(CALLS, min_size=1, max_size=2), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_no_beginning_of_an_output_that_scores_is_lost(name, reference, indent, ascii_only):
    asked = query(*reference)
    # What the metric itself accepts is the oracle: some references, such as null where nothing may be null, score 0 throughout.
    outputs = [json.dumps(reference, indent=indent, ensure_ascii=ascii_only), json.dumps(reference[::-1], indent=indent)]
    if len(reference) == 1:
        outputs.append(json.dumps(reference[0], indent=indent))
    outputs += [f" {outputs[0]}\n", f"```json\n{outputs[0]}\n```"]
    for output in outputs:
        if SCORES[name](output, asked) == 1:
            assert not any(LOST[name](output[:end], asked) for end in range(len(output) + 1))


@pytest.mark.parametrize("name", RULES)
def test_no_beginning_of_a_right_answer_to_the_benchmark_is_lost_and_wrong_ones_are_lost_early(name):
    queries = random.Random(0).sample(load_bfcl(), 150)
    shares = []
    for asked, other in itertools.pairwise(queries):
        answer = render_answer(asked)
        if SCORES[name](answer, asked) == 1:
            assert not any(LOST[name](answer[:end], asked) for end in range(len(answer) + 1))
        wrong = render_answer(other)
        lost_at = next((end for end in range(len(wrong)) if LOST[name](wrong[:end], asked)), None)
        if lost_at is not None:
            assert SCORES[name](wrong, asked) == 0
            shares.append(lost_at / len(wrong))
    assert len(shares) > 140
    assert sum(shares) / len(shares) < 0.5


ONE = query({"name": "f", "arguments": {"a": 12, "b": "ab", "c": [1, {"a": True}]}})


@pytest.mark.parametrize(
    ("output", "rules"),
    [
        ("", ""),
        (" ", ""),
        ("`", ""),
        ("\ufffd", ""),
        ('[{"name": "f", "arguments": {"b": "\\ud83dx"}}]', ""),
        ('[{"name": "f", "arguments": {"b": "ab\ufffd', ""),
        ("[", ""),
        ('{"name": "f", "argu', ""),
        ('[{"name": "f", "arguments": {"a": 1', ""),
        ('[{"name": "f", "arguments": {"a": 12, "b": "ax', "json_match"),
        ('[{"name": "f", "arguments": {"c": [1, {', ""),
        ('[{"name": "f", "arguments": {"a": 12, "b": "ab', ""),
        ('[{"name": "f', ""),
        ('[{"name": "fx', "json_match ast_match name_match"),
        ('[{"name": "f", "arguments": {"b": "\\u00', ""),
        ("Sure", "json_match ast_match name_match"),
        ('[{"name": "g"', "json_match ast_match name_match"),
        ('[{"name": "f", "arguments": {"a": 1,', "json_match ast_match"),
        ('[{"name": "f", "arguments": {"a": 13}', "json_match ast_match"),
        ('[{"name": "f", "arguments": {"x": "', "json_match"),
        ('[{"name": "f", "arguments": {"x": []', "json_match ast_match"),
        ('[{"name": "f", "arguments": {"b": "ax"', "json_match ast_match"),
        ('[{"name": "f", "arguments": {"c": [2, ', "json_match"),
        ('[{"name": "f", "arguments": {}}, {"name": "f"', "json_match ast_match name_match"),
        ('[{"name": "f", "parameters": {}', "json_match ast_match"),
        ("[1, ", "json_match ast_match name_match"),
    ],
)
def test_what_is_lost_where(output, rules):
    assert [name for name in ("json_match", "ast_match", "name_match") if LOST[name](output, ONE)] == rules.split()


def test_scores_that_need_the_whole_output_have_no_rule():
    assert set(LOST) < set(SCORES)
    assert not {"parse_rate", "partial_match", "partial_match_normalized", "ratio_function_calls"} & set(LOST)


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 80), st.text('[]{}",: \\ue9d8af"name"12.-+E\n`é\x01', max_size=6))
def test_any_text_gets_a_verdict_and_a_verdict_is_final(end, rest):
    answer = render_answer(ONE)
    output = answer[:end] + rest
    for name in RULES:
        if LOST[name](output, ONE):
            assert SCORES[name](output, ONE) == 0
            assert SCORES[name](output + answer[end:], ONE) == 0
            assert LOST[name](output + " ", ONE)
