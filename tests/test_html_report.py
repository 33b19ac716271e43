import re
from html.parser import HTMLParser

import pytest
from browser import check_in_browser

from dynprune.data.tasks import Query
from dynprune.evaluation.accuracy import Sample
from dynprune.evaluation.cells import Grid
from dynprune.evaluation.figures import layer_counts
from dynprune.evaluation.html_report import choose_examples, write_run_report
from dynprune.evaluation.run_results import AskedQuery

EVIL = "<script>alert('gotcha')</script><img src=x onerror=alert(1)> \ud800"


def query(number, text="Add them."):
    answers = ({"name": "add", "arguments": {"a": number}},)
    return AskedQuery.of(Query(f"q{number}", "simple", ({"role": "user", "content": text},), (), answers, ()))


def sample(number, right, layers=(), output="said"):
    return Sample(f"q{number}", tuple(layers), output, (), False, {"ast_match": float(right)})


@pytest.fixture
def report(tmp_path):
    """The report of a run whose queries, outputs and configuration are out for trouble."""
    layer_counts({"router-dpo": [2, 3]}, tmp_path / "layer_counts.png")
    samples = {"original": [sample(0, 1, output=EVIL)], "router-dpo": [sample(0, 0, (1, 4), EVIL)]}
    write_run_report(
        tmp_path / "report.html",
        f"quick {EVIL}",
        ["a model", EVIL],
        [
            Grid("Accuracy", ", 95% intervals.", ["Row", "AST match, %"], [["router-dpo", "43.0 [33.7, 52.8]"], [EVIL, "–"]]),
            Grid("Time", ".", ["Row", "Seconds"], [["original", "1.2"]]),
        ],
        [tmp_path / "layer_counts.png"],
        choose_examples([query(0, EVIL)], samples, "router-dpo", [], 6),
        {"cpu": EVIL},
        {"torch": "2"},
        f"name: {EVIL}",
    )
    return tmp_path / "report.html"


class Elements(HTMLParser):
    """Counts elements, and collects what they refer to."""

    def __init__(self, text):
        super().__init__()
        self.found, self.places, self.pruned = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.found.append(tag)
        self.places += [attributes[key] for key in ("src", "href", "action") if key in attributes]
        self.pruned += tag == "i" and "pruned" in attributes.get("class", "") and "title" in attributes


def test_nothing_that_a_model_says_becomes_markup(report):
    elements = Elements(report.read_text(encoding="utf-8"))
    assert "script" not in elements.found
    assert elements.found.count("img") == 1
    assert "onerror" not in re.sub(r"&lt;.*?&gt;", "", report.read_text(encoding="utf-8"))


def test_it_needs_no_other_file_and_no_network(report):
    elements = Elements(report.read_text(encoding="utf-8"))
    assert elements.places
    assert all(place.startswith(("data:image/png;base64,", "#")) for place in elements.places)


def test_a_strip_marks_the_pruned_layers(report):
    text = report.read_text(encoding="utf-8")
    assert Elements(text).pruned == 2
    assert text.count('title="layer 4, pruned"') == 1
    # Two answers of six layers each.
    assert len(re.findall(r'title="layer \d', text)) == 12


def test_an_interval_has_a_line_of_its_own(report):
    assert "<td>43.0<small>[33.7, 52.8]</small></td>" in report.read_text(encoding="utf-8")


def test_examples_are_of_all_kinds_and_the_most_pruned_first():
    right = {"original": [1, 0, 1, 0, 1, 1, 1], "router-dpo": [0, 1, 1, 0, 1, 1, 1]}
    layers = [(1,), (1,), (1,), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    samples = {
        "original": [sample(i, r) for i, r in enumerate(right["original"])],
        "router-dpo": [sample(i, r, layers[i]) for i, r in enumerate(right["router-dpo"])],
        "static-2": [sample(i, 1, (8, 9)) for i in range(7)],
    }
    examples = choose_examples([query(i) for i in range(7)], samples, "router-dpo", ["static-2", "router-dpo"], 30)
    assert [(example.kind, example.asked.id) for example in examples] == [
        ("Wrong unpruned, right under router-dpo", "q1"),
        ("Right unpruned, wrong under router-dpo", "q0"),
        ("Right under both", "q6"),
        ("Right under both", "q5"),
        ("Right under both", "q4"),
        ("Wrong under both", "q3"),
    ]
    assert [answer.row for answer in examples[0].answers] == ["original", "router-dpo", "static-2"]
    assert [answer.right for answer in examples[0].answers] == [False, True, True]
    assert examples[0].asked.reference == '[{"name": "add", "arguments": {"a": 1}}]'


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_it_without_an_error_and_within_its_width(report, width):
    check_in_browser(report, width)
