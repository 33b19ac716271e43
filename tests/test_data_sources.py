import json

import pytest

from dynprune.data.bfcl import load_bfcl
from dynprune.data.jsonl import load_jsonl, load_xlam60k, parse_record

RECORD = {
    "id": 0,
    "query": "Where can I find live giveaways for beta access and games?",
    "tools": json.dumps(
        [
            {
                "name": "live_giveaways_by_type",
                "description": "Retrieve live giveaways.",
                "parameters": {
                    "type": {"description": "The type.", "type": "str", "default": "game"},
                    "limit": {"description": "How many.", "type": "int, optional"},
                    "days": {"description": "Which days.", "type": "List[int]"},
                },
            }
        ]
    ),
    "answers": json.dumps(
        [
            {"name": "live_giveaways_by_type", "arguments": {"type": "beta", "days": [1]}},
            {"name": "live_giveaways_by_type", "arguments": {"type": "game", "days": [1]}},
        ]
    ),
}


def write(path, *lines) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def test_a_record_of_xlam_becomes_a_query_with_typed_tools_and_allowed_values():
    query = parse_record(RECORD, "row 0")
    assert query.tools[0]["parameters"] == {
        "type": "dict",
        "properties": {
            "type": {"description": "The type.", "type": "string", "default": "game"},
            "limit": {"description": "How many.", "type": "integer"},
            "days": {"description": "Which days.", "type": "array", "items": {"type": "integer"}},
        },
        "required": ["days"],
    }
    assert query.answers[0] == {"name": "live_giveaways_by_type", "arguments": {"type": "beta", "days": [1]}}
    assert [call["live_giveaways_by_type"] for call in query.allowed] == [
        {"type": ["beta"], "limit": [""], "days": [[1]]},
        {"type": ["game", ""], "limit": [""], "days": [[1]]},
    ]


def test_lists_in_place_of_json_text_and_json_schema_parameters_are_read_too(tmp_path):
    schema = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}
    record = {
        "id": "a",
        "query": "?",
        "tools": [{"name": "f", "parameters": schema}],
        "answers": [{"name": "f", "arguments": {"x": 1.5}}],
    }
    [query] = load_jsonl(write(tmp_path / "q.jsonl", record))
    assert query.tools[0]["parameters"] == {
        "type": "dict",
        "properties": {"x": {"type": "float"}},
        "required": ["x"],
    }


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", r"q\.jsonl:2: not JSON"),
        ("[1]", r"q\.jsonl:2: the line is no JSON object"),
        ({k: v for k, v in RECORD.items() if k != "tools"}, r"q\.jsonl:2: the field 'tools' is missing"),
        ({**RECORD, "tools": "[{"}, r"q\.jsonl:2: the field 'tools' is no JSON"),
        ({**RECORD, "tools": "{}"}, r"q\.jsonl:2: the field 'tools' must be a JSON list"),
        ({**RECORD, "answers": '[{"name": 1}]'}, r"q\.jsonl:2: an answer in 'answers'"),
        ({**RECORD, "query": 3}, r"q\.jsonl:2: the field 'query' must be text"),
        ({**RECORD, "tools": '[{"parameters": {}}]'}, r"q\.jsonl:2: a tool in 'tools'"),
    ],
)
def test_a_broken_line_is_named_with_file_line_and_field(tmp_path, line, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_jsonl(write(tmp_path / "q.jsonl", RECORD, line))


def test_an_empty_or_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no query"):
        load_jsonl(write(tmp_path / "q.jsonl"))
    with pytest.raises(ValueError, match="is no file"):
        load_jsonl(str(tmp_path / "none.jsonl"))


def test_a_gated_data_set_that_is_not_cached_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="accept its terms"):
        load_xlam60k("Salesforce/xlam-function-calling-60k", "main", None, None)


def bfcl_folder(tmp_path, allowed, tools=()):
    question = {
        "id": "simple_python_0",
        "question": [[{"role": "user", "content": "Area of a triangle with base 10, in metres"}]],
        "function": list(tools),
    }
    (tmp_path / "possible_answer").mkdir()
    write(tmp_path / "BFCL_v4_simple_python.json", question)
    answer = {"id": "simple_python_0", "ground_truth": [{"area": allowed}]}
    write(tmp_path / "possible_answer" / "BFCL_v4_simple_python.json", answer)
    return str(tmp_path)


def test_the_reference_answer_takes_first_values_and_leaves_out_what_the_query_does_not_say(tmp_path):
    allowed = {
        "base": [10, 10.0],
        "unit": ["metres", ""],
        "precision": [2, ""],
        "style": [""],
        "options": [{"depth": [3, 4], "note": ["", "x"]}],
        "points": [[{"x": [1]}, {"x": [2]}]],
    }
    [query] = load_bfcl(["simple_python"], root=bfcl_folder(tmp_path, allowed))
    assert query.answers == (
        {
            "name": "area",
            "arguments": {
                "base": 10,
                "unit": "metres",
                "options": {"depth": 3},
                "points": [{"x": 1}, {"x": 2}],
            },
        },
    )
    assert query.allowed == ({"area": allowed},)


def test_long_queries_can_be_left_out(tmp_path):
    root = bfcl_folder(tmp_path, {"base": [10]}, tools=[{"name": "x" * 500}])
    assert len(load_bfcl(["simple_python"], max_chars=1000, root=root)) == 1
    assert load_bfcl(["simple_python"], max_chars=400, root=root) == []


def test_unknown_categories_broken_lines_and_missing_answers_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.source\.categories has \['java'\]"):
        load_bfcl(["java"])
    root = bfcl_folder(tmp_path, {"base": [10]})
    (tmp_path / "possible_answer" / "BFCL_v4_simple_python.json").write_text("")
    with pytest.raises(ValueError, match=r"BFCL_v4_simple_python\.json:1: id 'simple_python_0' has no line"):
        load_bfcl(["simple_python"], root=root)
    (tmp_path / "BFCL_v4_simple_python.json").write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"BFCL_v4_simple_python\.json:1: not JSON"):
        load_bfcl(["simple_python"], root=root)


def test_the_wheel_has_the_queries_that_it_should_have():
    queries = load_bfcl()
    counts = {c: sum(q.category == c for q in queries) for c in {q.category for q in queries}}
    assert counts == {
        "simple_python": 400,
        "multiple": 200,
        "parallel": 200,
        "parallel_multiple": 200,
        "live_simple": 258,
        "live_multiple": 1053,
    }
