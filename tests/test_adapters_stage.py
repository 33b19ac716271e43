"""The stage ``adapters`` on a tiny random model: what the last layer's adapter learns, and what a sweep compares."""

import csv
import json

import pytest
from tiny import composed, dynprune

from dynprune.evaluation.run_results import read_run
from dynprune.stages.adapters import adapters, fit_adapters
from dynprune.stages.run import Run


def tiny(folder, *overrides: str) -> Run:
    paths = [f"paths.run={folder}/run", f"paths.artifacts={folder}/artifacts"]
    (folder / "run").mkdir(exist_ok=True)
    return Run(composed("experiment=tiny", "stage=adapters", *paths, *overrides))


@pytest.mark.parametrize("adapter", ["bottleneck", "ridge"])
def test_the_thesis_mistake_changes_the_last_layers_adapter_alone(tmp_path, adapter):
    found = {}
    for target in ("output", "final_norm"):
        run = tiny(tmp_path, f"adapter={adapter}", "adapter.bottleneck=8", f"adapter.last_target={target}")
        fit_adapters(run)
        part = read_run(tmp_path / "run").parts["adapters"]
        found[target] = (adapters(run).fingerprint, part.mse, part.relative_error)
    right, wrong = found["output"], found["final_norm"]
    assert right[0] != wrong[0]
    assert right[1][:-1] == pytest.approx(wrong[1][:-1])
    assert right[1][-1] != pytest.approx(wrong[1][-1], rel=0.01)


def test_adapters_made_before_there_was_a_choice_of_the_last_target_are_those_of_the_layers_output(tmp_path):
    made = json.loads((adapters(tiny(tmp_path)).folder / "manifest.json").read_text())["config"]["adapter"]
    assert "last_target" not in made
    made = json.loads((adapters(tiny(tmp_path, "adapter.last_target=final_norm")).folder / "manifest.json").read_text())
    assert made["config"]["adapter"]["last_target"] == "final_norm"


@pytest.mark.slow
def test_a_sweep_of_adapters_ends_with_their_errors_side_by_side(tmp_path):
    options = ("adapter.bottleneck=8", "hydra.sweep.dir=sweep")
    dynprune(tmp_path, "-m", "experiment=tiny", "stage=adapters", "adapter=identity,bottleneck,ridge", *options)
    text = (tmp_path / "sweep/comparison.md").read_text()
    assert "| Layer | adapter=bottleneck | adapter=ridge |" in text
    with (tmp_path / "sweep/comparison.csv").open() as file:
        assert [line["setting"] for line in csv.DictReader(file)] == ["adapter=bottleneck", "adapter=ridge"]
    assert (tmp_path / "sweep/layer_errors.png").exists()
    assert "data:image/png" in (tmp_path / "sweep/report.html").read_text()
