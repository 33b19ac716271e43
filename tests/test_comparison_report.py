"""``report.html`` of a comparison, and of a stage that was run alone."""

import re
from pathlib import Path

import pytest
from browser import check_in_browser
from tiny import run_tiny
from written_runs import write_run

from dynprune.evaluation.comparison_output import write_figures
from dynprune.evaluation.html_report import contrasting_examples, write_comparison_report
from dynprune.evaluation.run_comparison import compare_runs
from dynprune.evaluation.run_results import read_run, write_parts
from dynprune.evaluation.training_curves import TrainingCurve

CURVE = TrainingCurve([0, 1], [2.0, 1.0], [2.5, 1.5], [0.5, 0.75])


def two_methods(folder: Path, depths=(6, 6)):
    """Two jobs of a sweep: both right on the first query, one of them on the second, neither on the third."""
    for number, (method, right) in enumerate({"fbc": [1, 0, 0], "dpo": [1, 1, 0]}.items()):
        place = folder / f"{number}_{method}"
        rows = {"original": [1, 0, 0], "static-2": [0, 0, 0], f"router-{method}": right}
        layers = {"static-2": 2, f"router-{method}": 3}
        write_run(place, [f"method={method}", "seed=1"], rows, layers=layers, num_layers=depths[number])
        write_parts(place / "report", 1, {}, {method: [CURVE]})
    return compare_runs([read_run(place) for place in sorted(folder.iterdir())])


@pytest.fixture
def page(tmp_path):
    comparison = two_methods(tmp_path / "jobs")
    pictures = write_figures(comparison, tmp_path)
    assert [path.stem for path in pictures] == ["comparison", "layers_pruned", "training_curves"]
    write_comparison_report(tmp_path / "report.html", "Comparison of runs", comparison, pictures)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_it_holds_the_figures_of_a_run_and_what_each_run_was_told(page):
    assert page.count("data:image/png;base64,") == 3
    assert re.search(r"jobs/1_dpo</td><td>1</td><td>method=dpo seed=1</td>", page)
    assert "jobs/0_fbc; those of other runs differ" in page
    assert "router_seeds: []" in page


def test_examples_are_those_on_which_settings_differ_most(tmp_path):
    examples = contrasting_examples(two_methods(tmp_path))
    assert [(example.asked.id, example.kind) for example in examples] == [
        ("q1", "1 of 4 right"),
        ("q0", "3 of 4 right"),
        ("q2", "0 of 4 right"),
    ]
    said = {answer.row: (answer.right, list(answer.pruned_layers), answer.num_layers) for answer in examples[0].answers}
    assert said["original"] == (False, [], 6)
    assert said["router-dpo"] == (True, [0, 1, 2], 6)
    assert said["static-2"] == (False, [0, 1], 6)


def test_it_shows_strips_and_what_was_asked_without_markup(page):
    # Three queries, four answers to each, six layers.
    assert len(re.findall(r'title="layer \d', page)) == 72
    assert page.count('title="layer 2, pruned"') == 6
    assert "&lt;b&gt;Now&lt;/b&gt;" in page
    assert "<b>Now" not in page
    assert "&#34;name&#34;: &#34;add&#34;" in page


def test_slms_of_different_depth_have_no_strips_in_common(tmp_path):
    comparison = two_methods(tmp_path / "jobs", depths=(6, 8))
    assert "layers_pruned" not in [path.stem for path in write_figures(comparison, tmp_path)]
    assert {answer.num_layers for answer in contrasting_examples(comparison)[0].answers} == {6, 8}


def test_tables_of_an_earlier_version_are_compared_without_what_they_do_not_say(tmp_path):
    folders = [tmp_path / f"jobs/{number}" for number in range(2)]
    for number, folder in enumerate(folders):
        write_run(folder, [f"seed={number}"], {"original": [1], "router-dpo": [0]}, layers={"router-dpo": 1})
    comparison = compare_runs([read_run(folder) for folder in folders])
    assert contrasting_examples(comparison) == []
    assert [path.stem for path in write_figures(comparison, tmp_path)] == ["comparison"]


def test_curves_are_named_by_their_setting_where_a_method_has_several(tmp_path):
    for number, (method, rate) in enumerate([("dpo", 1), ("dpo", 2), ("fbc", 1)]):
        write_run(tmp_path / f"{number}", [f"method={method}", f"lr={rate}"], {"original": [1]})
        write_parts(tmp_path / f"{number}/report", 0, {}, {method: [CURVE]})
    write_run(tmp_path / "3", ["method=fbc", "lr=1", "seed=2"], {"original": [1]})
    write_parts(tmp_path / "3/report", 2, {}, {"fbc": [CURVE]})
    curves = compare_runs([read_run(place) for place in sorted(tmp_path.iterdir())]).curves
    assert {name: len(of_seeds) for name, of_seeds in curves.items()} == {
        "dpo method=dpo, lr=1": 1,
        "dpo method=dpo, lr=2": 1,
        "fbc": 2,
    }
    assert curves["fbc"][1] == CURVE


def test_a_stage_that_is_run_alone_leaves_a_report(tmp_path):
    run_tiny(tmp_path, "alone", "stage=router", "name=alone", "adapter=identity")
    text = (tmp_path / "outputs/alone/report.html").read_text(encoding="utf-8")
    assert "Routers on held-out queries" in text
    assert text.count("data:image/png;base64,") == 1
    assert "max_configurations: 6" in text
    assert (tmp_path / "outputs/alone/training_curves.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_it_without_an_error_and_within_its_width(page, tmp_path, width):
    check_in_browser(tmp_path / "report.html", width)
