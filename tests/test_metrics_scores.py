import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprune.data.tasks import Query
from dynprune.metrics.scores import SCORES, MeanScore, get_score, mean_scores, perfect_score

SCHEMAS = {
    "s": {"type": "string"},
    "n": {"type": "integer"},
    "l": {"type": "array", "items": {"type": "float"}},
    "d": {"type": "dict"},
    "e": {"type": "array", "items": {"type": "dict"}},
    "x": {"type": "any"},
}
TOOL = {
    "name": "f",
    "description": "",
    "parameters": {"type": "dict", "properties": SCHEMAS, "required": ["s"]},
}
ARGUMENTS = {"s": "a", "n": 1, "l": [1.5], "d": {"k": {"m": 2}}, "e": [{"k": True}], "x": None}
ALLOWED = {
    "f": {
        "s": ["a", ""],
        "n": [1, None],
        "l": [[1.5], ""],
        "d": [{"k": [{"m": [2]}]}, ""],
        "e": [[{"k": [True]}], ""],
        "x": [None, 5],
    }
}


def query(calls, category="simple"):
    return Query(
        id="q",
        category=category,
        messages=(),
        tools=(TOOL,),
        answers=({"name": "f", "arguments": ARGUMENTS},) * calls,
        allowed=(ALLOWED,) * calls,
    )


QUERIES = [query(0), query(1), query(3, "parallel")]
JSON = st.recursive(
    st.sampled_from([None, True, False, 0, 1, 1.5, -0.0, "a", "", "A."]) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("km"), inner, max_size=2),
    max_leaves=6,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["f", "g"]),
            "arguments": st.dictionaries(st.sampled_from([*SCHEMAS, "z"]), JSON),
        }
    ),
    max_size=4,
)
# Texts of all kinds, JSON of all kinds, and lists of calls that are nearly right.
FRAGMENTS = st.text(alphabet='[]{}",:1eE-. nul`json\\')
OUTPUTS = st.text() | FRAGMENTS | JSON.map(json.dumps) | CALLS.map(json.dumps)


def bounds(name):
    return (-5.0, 10.0) if name == "partial_match" else (0.0, 1.0)


@settings(max_examples=300, deadline=None)
@given(OUTPUTS)
def test_no_output_makes_a_score_raise_or_leave_its_range(output):
    for name, score in SCORES.items():
        low, high = bounds(name)
        for asked in QUERIES:
            value = score(output, asked)
            assert type(value) is float
            assert low <= value <= high


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"name": "f", "arguments": {"d": {"k": ['])
@pytest.mark.parametrize("closing", ["", "]"])
def test_a_hundred_thousand_levels_score_as_malformed(opening, closing):
    output = opening * 100_000 + closing * 100_000
    for name, score in SCORES.items():
        assert score(output, QUERIES[1]) == bounds(name)[0]


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("asked", QUERIES, ids=lambda asked: str(len(asked.answers)))
def test_the_reference_answer_has_the_highest_score_and_nonsense_the_lowest(name, asked):
    low, high = bounds(name)
    assert get_score(name, "key")(json.dumps(list(asked.answers)), asked) == high == perfect_score(name)
    assert get_score(name, "key")("nonsense", asked) == low


def test_an_unknown_score_is_refused_with_the_list_of_scores():
    message = r"='bleu' is unknown; allowed: json_match, ast_match, .*partial_match_normalized"
    with pytest.raises(ValueError, match=r"exploration\.score" + message):
        get_score("bleu", "exploration.score")
    with pytest.raises(ValueError, match=message):
        MeanScore("bleu")


def test_the_table_finds_the_scores_that_it_shows():
    assert {"json_match", "ast_match", "parse_rate", "ratio_function_calls", "partial_match"} <= SCORES.keys()


RIGHT = json.dumps(list(QUERIES[1].answers))
PARSED = "[]"


def test_the_mean_is_over_queries_and_not_over_updates():
    mean = MeanScore("partial_match")
    mean.update([RIGHT, PARSED, "nonsense"], [QUERIES[1]] * 3)
    mean.update([RIGHT], [QUERIES[1]])
    assert mean.compute().item() == pytest.approx((10 + 0 - 5 + 10) / 4)
    mean.reset()
    mean.update(["nonsense"], [QUERIES[1]])
    assert mean.compute().item() == -5.0


def test_processes_with_unequal_numbers_of_queries_are_averaged_by_query():
    ranks = [MeanScore("json_match"), MeanScore("json_match")]
    ranks[0].update([RIGHT] * 3, [QUERIES[1]] * 3)
    ranks[1].update([PARSED], [QUERIES[1]])
    states = [{"total": rank.total.clone(), "count": rank.count.clone()} for rank in ranks]

    # What torch.distributed would gather, state by state, in the order in which torchmetrics asks for it.
    gathered = iter([[state[name] for state in states] for name in ("total", "count")])
    ranks[0].sync(dist_sync_fn=lambda _, group: next(gathered), distributed_available=lambda: True)
    assert (ranks[0].total / ranks[0].count).item() == 0.75
    ranks[0].unsync()
    assert ranks[0].compute().item() == 1.0


def test_scores_that_agree_on_the_first_batch_stay_apart():
    means = mean_scores(["json_match", "parse_rate", "partial_match"])
    means.update([RIGHT], [QUERIES[1]])
    means.update([PARSED], [QUERIES[1]])
    assert {name: value.item() for name, value in means.compute().items()} == {
        "json_match": 0.5,
        "parse_rate": 1.0,
        "partial_match": 5.0,
    }


def test_outputs_without_a_query_are_refused():
    with pytest.raises(ValueError, match="zip"):
        MeanScore("json_match").update([RIGHT, RIGHT], [QUERIES[1]])


def test_a_mean_can_be_pickled():
    mean = MeanScore("ast_match")
    mean.update([RIGHT, PARSED], [QUERIES[1]] * 2)
    copy = pickle.loads(pickle.dumps(mean))
    assert torch.equal(copy.compute(), torch.tensor(0.5))
