"""``report.html`` of a comparison, and of a stage that was run alone."""

import re
from dataclasses import replace
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


def two_methods(folder: Path, depths: tuple[int | None, int | None] = (6, 6)):
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
    assert [path.stem for path in pictures] == ["comparison", "layers_pruned", "layer_counts", "training_curves"]
    write_comparison_report(tmp_path / "report.html", "Comparison of runs", comparison, pictures)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_it_holds_the_figures_of_a_run_and_what_each_run_was_told(page):
    assert page.count("data:image/png;base64,") == 4
    assert re.search(r"jobs/1_dpo</td><td>1</td><td>method=dpo seed=1</td>", page)
    assert re.search(r"The configuration is that of [^<]*jobs/0_fbc\.<", page)
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


def test_examples_show_each_setting_before_further_rows_of_one(tmp_path):
    for number in range(3):
        rows = {
            "original": [1],
            "router-dpo": [number % 2],
            "router-dpo@0.2": [number % 2],
            **{f"static-{k}": [0] for k in (1, 2, 3)},
        }
        layers = {name: 1 + number + int(name[-1]) for name in rows if name.startswith("static")}
        write_run(tmp_path / f"{number}", [f"adapter={number}"], rows, layers=layers, num_layers=8)
    comparison = compare_runs([read_run(place) for place in sorted(tmp_path.iterdir())])
    [example] = contrasting_examples(comparison)
    assert [answer.row for answer in example.answers] == [
        *("original", "router-dpo adapter=0", "router-dpo adapter=1", "router-dpo adapter=2"),
        *("router-dpo@0.2 adapter=0", "router-dpo@0.2 adapter=1"),
    ]


def test_ids_that_stand_for_other_queries_in_other_runs_are_no_examples(tmp_path):
    two_methods(tmp_path)
    path = tmp_path / "1_dpo/report/queries.jsonl"
    path.write_text(path.read_text().replace("Add 1.", "Subtract 1."))
    comparison = compare_runs([read_run(place) for place in sorted(tmp_path.iterdir())])
    assert set(comparison.asked) == {"q0", "q2"}
    assert [example.asked.id for example in contrasting_examples(comparison)] == ["q0", "q2"]


def test_figures_of_layers_count_seeds_and_queries(tmp_path, monkeypatch):
    drawn = {}
    for name in ("layers_pruned", "layer_counts"):
        monkeypatch.setattr(
            f"dynprune.evaluation.comparison_output.{name}", lambda what, path, name=name: drawn.update({name: what})
        )
    for seed in range(2):
        rows = {"original": [1, 1], "router-dpo": [seed, 0], "random-1-1": [1 - seed, 0]}
        write_run(tmp_path / f"{seed}", [f"seed={seed}"], rows, layers={"router-dpo": 1 + seed, "random-1-1": 1}, num_layers=3)
    samples = tmp_path / "1/report/samples/random-1-1.jsonl"
    samples.write_text(samples.read_text().replace('"pruned_layers": [0]', '"pruned_layers": [2]'))
    write_figures(compare_runs([read_run(place) for place in sorted(tmp_path.iterdir())]), tmp_path)
    # One seed prunes layer 0, the other one 0 and 1, each for both queries.
    assert drawn["layers_pruned"] == {"router-dpo": [1.0, 0.5, 0.0], "random-1-1": [0.5, 0.0, 0.5]}
    # Another set for another seed is no choice.
    assert drawn["layer_counts"] == {"router-dpo": [1, 1, 2, 2]}


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


def test_a_run_of_an_earlier_version_takes_nothing_from_the_others(tmp_path):
    comparison = two_methods(tmp_path / "jobs", depths=(None, 6))
    assert "layers_pruned" in [path.stem for path in write_figures(comparison, tmp_path)]
    assert {answer.row for answer in contrasting_examples(comparison)[0].answers} == {"original", "static-2", "router-dpo"}


def test_long_names_are_drawn(tmp_path):
    long = "x" * 150
    for number in range(2):
        rows = {"original": [1], "router-dpo": [number]}
        write_run(tmp_path / f"{number}", [f"path={long}{number}"], rows, layers={"router-dpo": 2}, num_layers=4)
        write_parts(tmp_path / f"{number}/report", 0, {}, {"dpo": [replace(CURVE, validation_loss=[number, 1.0])]})
    comparison = compare_runs([read_run(place) for place in sorted(tmp_path.iterdir())])
    for path in write_figures(comparison, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_tables_of_an_earlier_version_are_compared_without_what_they_do_not_say(tmp_path):
    folders = [tmp_path / f"jobs/{number}" for number in range(2)]
    for number, folder in enumerate(folders):
        write_run(folder, [f"seed={number}"], {"original": [1], "router-dpo": [0]}, layers={"router-dpo": 1})
    comparison = compare_runs([read_run(folder) for folder in folders])
    assert contrasting_examples(comparison) == []
    assert [path.stem for path in write_figures(comparison, tmp_path)] == ["comparison", "layer_counts"]


def test_curves_are_named_by_their_setting_where_a_method_has_several(tmp_path):
    for number, (method, rate) in enumerate([("dpo", 1), ("dpo", 2), ("fbc", 1)]):
        write_run(tmp_path / f"{number}", [f"method={method}", f"lr={rate}"], {"original": [1]})
        write_parts(tmp_path / f"{number}/report", 0, {}, {method: [of_rate(rate)]})
    for number, rate in enumerate((3, 1), start=3):
        write_run(tmp_path / f"{number}", ["method=fbc", "lr=1", f"seed={number}"], {"original": [1]})
        # The last one has the router of the first.
        write_parts(tmp_path / f"{number}/report", number, {}, {"fbc": [of_rate(rate)]})
    curves = compare_runs([read_run(place) for place in sorted(tmp_path.iterdir())]).curves
    assert {name: len(of_seeds) for name, of_seeds in curves.items()} == {
        "dpo method=dpo, lr=1": 1,
        "dpo method=dpo, lr=2": 1,
        "fbc": 2,
    }
    assert curves["fbc"] == [of_rate(1), of_rate(3)]


def of_rate(rate: int) -> TrainingCurve:
    return replace(CURVE, training_loss=[float(rate), 0.0])


def test_routers_that_no_setting_concerns_are_shown_once(tmp_path):
    for number in range(2):
        write_run(tmp_path / f"{number}", [f"latency={number}"], {"original": [1], "router-dpo": [number]})
        write_parts(tmp_path / f"{number}/report", 0, {}, {"dpo": [CURVE]})
    assert compare_runs([read_run(place) for place in sorted(tmp_path.iterdir())]).curves == {"dpo": [CURVE]}


@pytest.mark.stages
def test_stages_that_are_run_alone_leave_a_report(tmp_path):
    place = tmp_path / "outputs/alone"
    for stage, heading, figures in (
        ("router", "Routers on held-out queries", ["training_curves.png"]),
        ("explore", "Exploration", []),
        ("adapters", "Adapters", ["layer_errors.png"]),
    ):
        adapter = ("adapter=identity",) if stage != "adapters" else ("adapter=ridge", "adapter.bottleneck=4")
        run_tiny(tmp_path, "alone", f"stage={stage}", "name=alone", *adapter)
        text = (place / "report.html").read_text(encoding="utf-8")
        assert f"<h2>{heading}</h2>" in text
        assert "max_configurations: 6" in text
        assert "Versions: python" in text
        assert str(tmp_path) not in text
        # Those of the stage before are gone.
        assert [path.name for path in place.glob("*.png")] == figures
        assert text.count("data:image/png;base64,") == len(figures)
    run_tiny(tmp_path, "alone", "stage=adapters", "name=alone", "adapter=identity")
    assert not [*place.glob("*.png"), *place.glob("*.html")]


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_it_without_an_error_and_within_its_width(page, tmp_path, width):
    check_in_browser(tmp_path / "report.html", width)
