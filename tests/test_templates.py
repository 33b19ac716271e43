"""Queries from templates: what fills their slots, what a broken file is told, and what the shipped file may not hold."""

import json
import random

import pytest

from dynprune.data.bfcl import load_bfcl
from dynprune.data.splits import split_by_function
from dynprune.data.templates import Toolbox, fill, load_templates, source_of, templates_file
from dynprune.metrics.parsing import parse_calls


def tool(name: str, required: list[str], **properties) -> dict:
    return {"name": name, "description": "", "parameters": {"type": "dict", "properties": properties, "required": required}}


TEXT = {"type": "string"}
WEATHER = {
    "tools": [
        tool("weather", ["city"], city=TEXT, days={"type": "integer"}, unit={**TEXT, "enum": ["c", "f"]}),
        tool("tides", ["port"], port=TEXT, heights={"type": "array", "items": {"type": "float"}}),
    ],
    "values": {
        "city": ["Oslo", {"say": "the capital of Peru", "mean": "Lima"}, "Bergen"],
        "days": {"range": [2, 9]},
        "height": {"range": [0, 3], "decimals": 2},
        "heights": [{"say": "1 and 2.5", "mean": [1, 2.5]}],
    },
    "queries": [
        {
            "text": "{days} days of weather in {city}?",
            "calls": [{"name": "weather", "arguments": {"city": "{city}", "days": "{days}"}}],
        },
        {
            "text": "Weather in {city} and {city_2}, and tides of {heights} m at {city_3}",
            "calls": [
                {"name": "weather", "arguments": {"city": "{city}", "unit": "c"}},
                {"name": "weather", "arguments": {"city": "{city_2}"}},
                {"name": "tides", "arguments": {"port": "Port of {city_3}", "heights": "{heights}"}},
            ],
        },
        {
            "text": "Tides {height}, {city}",
            "calls": [{"name": "tides", "arguments": {"port": "{city}", "heights": [0, "{height}"]}}],
        },
    ],
}


def write(folder, *records):
    path = folder / "templates.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.fixture
def weather(tmp_path) -> Toolbox:
    [toolbox] = load_templates(write(tmp_path, WEATHER))
    return toolbox


@pytest.mark.parametrize("seed", range(20))
def test_the_calls_hold_what_the_words_say(weather, seed):
    said = {"Oslo": "Oslo", "the capital of Peru": "Lima", "Bergen": "Bergen"}
    query = fill(weather, 0, random.Random(seed))
    words = query.messages[0]["content"]
    [call] = query.answers
    days, _, city = words.removesuffix("?").partition(" days of weather in ")
    assert call == {"name": "weather", "arguments": {"city": said[city], "days": int(days)}}
    assert 2 <= int(days) <= 9
    assert query.allowed == ({"weather": {"city": [said[city]], "days": [int(days)]}},)
    several = fill(weather, 1, random.Random(seed))
    cities = [several.answers[0]["arguments"]["city"], several.answers[1]["arguments"]["city"]]
    port = several.answers[2]["arguments"]
    assert sorted([*cities, port["port"].removeprefix("Port of ")]) == ["Bergen", "Lima", "Oslo"]
    assert port["heights"] == [1, 2.5]
    decimal = fill(weather, 2, random.Random(seed))
    [tides] = decimal.answers
    assert decimal.messages[0]["content"].startswith(f"Tides {tides['arguments']['heights'][1]}, ")


def test_a_source_gives_each_template_that_its_tools_answer_before_one_comes_again(weather):
    rng = random.Random(0)
    orders = set()
    for _ in range(60):
        source = source_of(weather, rng)
        names = tuple(tool["name"] for tool in source.tools)
        orders.add(names)
        told = [source.draw(rng).messages[0]["content"].split()[0] for _ in range(6)]
        kinds = ["days" if word.isdigit() else word for word in told]
        answered = {("weather",): {"days"}, ("tides",): {"Tides"}}.get(names, {"days", "Weather", "Tides"})
        assert set(kinds[: len(answered)]) == answered
        assert kinds == kinds[: len(answered)] * (6 // len(answered))
    assert orders == {("weather",), ("tides",), ("weather", "tides"), ("tides", "weather")}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r.pop("values"), r"templates\.jsonl:1: values: Field required; .+ shows how a line looks"),
        (lambda r: r["tools"].clear(), r":1: tools: List should have at least 1 item"),
        (
            lambda r: r["tools"].__setitem__(0, {"type": "function", "function": r["tools"][0]}),
            r":1: tools\.0\.name: Field required",
        ),
        (lambda r: r["tools"][0].pop("parameters"), r":1: tools\.0\.parameters: Field required"),
        (lambda r: r["queries"].append("weather?"), r":1: queries\.3: "),
        (lambda r: r["queries"][0].pop("calls"), r":1: queries\.0\.calls: Field required"),
        (lambda r: r["queries"][0]["calls"][0].pop("arguments"), r":1: queries\.0\.calls\.0\.arguments: Field required"),
        (lambda r: r["values"].update(days={"from": 1, "to": 2}), r":1: values\.days"),
        (lambda r: r["values"].update(days={"range": [0.5, 2.5]}), r":1: values\.days.+whole without 'decimals'"),
        (lambda r: r["values"].update(days={"range": [5, 2]}), r":1: values\.days.+does not rise"),
        (lambda r: r["values"].update(city=[]), r":1: values\.city"),
        (lambda r: r["values"].pop("days"), r"has the slot 'days', which 'values' lacks"),
        (lambda r: r["values"].update(city=["Oslo", "Bergen"]), r"has 3 different values of 'city', but 'values' has fewer"),
        (lambda r: r["values"].update(city=["Oslo", "Rome", {"say": "Roma", "mean": "Rome"}]), r"'values' has fewer"),
        (
            lambda r: r["values"].update(days={"range": [2, 2]}) or r["queries"][0].update(text="{days} {days_2} {city}"),
            "has fewer",
        ),
        (lambda r: r["queries"][0].update(text="Weather in {city}?"), r"does not say \{days\}, which its calls give"),
        (lambda r: r["queries"][0].update(text="{days} days in {city}, {City}?"), r"has \{City\}, which is no slot"),
        (lambda r: r["queries"][0]["calls"][0].update(name="rain"), r"calls 'rain', which 'tools' lacks"),
        (lambda r: r["queries"][0]["calls"][0]["arguments"].pop("city"), r"leaves out 'city', which weather requires"),
        (lambda r: r["queries"][0]["calls"][0]["arguments"].update(at=1), r"gives 'at', which weather has not"),
        (lambda r: r["queries"][0]["calls"][0]["arguments"].update(days="{city}"), r"gives days='.+', but weather takes int"),
        (lambda r: r["queries"][0]["calls"][0]["arguments"].update(days=True), r"gives days=True, but weather takes integer"),
        (lambda r: r["queries"][1]["calls"][0]["arguments"].update(unit="k"), r"gives unit='k', but weather takes \['c', 'f'"),
        # Each value counts, not only the one that happens to be drawn, and what is inside a list.
        (lambda r: r["values"].update(days=[1, 2, 3, 4, 5, 6, 7, 8, "nine"]), r"gives days='nine', but weather takes integer"),
        (lambda r: r["values"].update(heights=[[1, 2], [1, "2"]]), r"gives heights=\[1, '2'\], but tides takes array"),
    ],
)
def test_a_broken_line_is_told_where_and_what(tmp_path, change, sentence):
    record = json.loads(json.dumps(WEATHER))
    change(record)
    with pytest.raises(ValueError, match=sentence):
        load_templates(write(tmp_path, record))


def test_what_is_no_json_or_no_file_is_refused_and_blank_lines_are_not(tmp_path):
    path = write(tmp_path, WEATHER)
    # A line separator inside a text ends no line.
    path.write_text(path.read_text().replace("Tides", "Tides\u2028") + "\n\n")
    assert len(load_templates(path)) == 1
    path.write_text(path.read_text() + "{")
    with pytest.raises(ValueError, match=r"templates\.jsonl:3: Invalid JSON"):
        load_templates(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"templates\.jsonl holds no templates"):
        load_templates(path)
    with pytest.raises(ValueError, match=r"adapt\.templates='nowhere'.+allowed: null, shipped"):
        templates_file("nowhere")


@pytest.fixture(scope="module")
def shipped() -> list[Toolbox]:
    return load_templates(templates_file("shipped"))


def test_no_held_out_query_calls_a_function_of_the_shipped_templates(shipped):
    trained = frozenset().union(*(toolbox.functions for toolbox in shipped))
    # The quickstart's splits, see conf/data/bfcl.yaml and conf/base/splits.yaml.
    splits = split_by_function(load_bfcl(max_chars=2400), {"adapt": 0.5, "train": 0.16, "validation": 0.07, "test": 0.27}, 0)
    for name in ("train", "validation", "test"):
        assert not [query.id for query in splits[name] if query.functions & trained], name


def test_every_shipped_template_gives_a_query_that_reads_and_an_answer_that_parses(shipped):
    rng = random.Random(0)
    for toolbox in shipped:
        for index in range(len(toolbox.queries)):
            query = fill(toolbox, index, rng)
            words = query.messages[0]["content"]
            assert not [slot for slot in toolbox.values if f"{{{slot}}}" in words], words
            assert parse_calls(json.dumps(list(query.answers))).calls == query.answers
            assert query.functions <= {tool["name"] for tool in query.tools}
