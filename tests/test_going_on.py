"""Stages that keep what they have measured file by file: stopped after each one, they go on and measure nothing twice."""

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny import composed

import dynprune.stages.adapters as adapters_stage
import dynprune.stages.baselines as baselines_stage
import dynprune.stages.evaluate as evaluate_stage
import dynprune.stages.samples as samples_stage
import dynprune.stages.searched_sets as searched_sets
from dynprune import atomic
from dynprune.atomic import replacing
from dynprune.stages.adapters import adapters, harm
from dynprune.stages.baselines import baseline_rows
from dynprune.stages.checkpoints import StepCheckpoints
from dynprune.stages.evaluate import evaluate
from dynprune.stages.run import Run

pytestmark = pytest.mark.stages

BASELINES = "evaluation.baselines.static_accuracy={sizes:[1,2,3],finalists:2,max_queries:3}"
INFLUENCE = "evaluation.baselines.block_influence={sizes:[1],batch_tokens:400}"
STAGES = {
    "harm": (adapters_stage, lambda run: harm(run, adapters(run)), "harm*.json", "harm.json"),
    "static": (searched_sets, searched_sets.static_sets, "sets.json", "sets.json"),
    "static_accuracy": (searched_sets, searched_sets.accurate_sets, "sets.json", "sets.json"),
    "block_influence": (baselines_stage, lambda run: list(baseline_rows(run)), "cosines*.json", "influence.json"),
}


def run_of(folder: Path, *overrides: str) -> Run:
    places = [f"paths.run={folder}/run", f"paths.artifacts={folder}/artifacts"]
    return Run(
        composed("experiment=tiny", "adapter=ridge", "adapter.bottleneck=4", "evaluation.max_queries=3", *places, *overrides)
    )


@pytest.fixture
def stopped(monkeypatch):
    """Patches a stage so that it stops after each file that it keeps; returns what it kept, by name."""

    def patch(stage, pattern: str) -> Counter[str]:
        kept: Counter[str] = Counter()

        class Stopping:
            def __init__(self, path: Path):
                self.path, self.inside = path, replacing(path)

            def __enter__(self) -> Path:
                return self.inside.__enter__()

            def __exit__(self, *error: object) -> None:
                self.inside.__exit__(*error)
                if self.path.match(pattern):
                    kept[self.path.name] += 1
                    raise KeyboardInterrupt

        for module in (atomic, stage):
            monkeypatch.setattr(module, "replacing", Stopping)
        return kept

    return patch


def until_done(build) -> int:
    """How often it was stopped."""
    for attempt in range(50):
        try:
            build()
        except KeyboardInterrupt:
            continue
        return attempt
    raise AssertionError("it never ends")


@pytest.mark.parametrize("name", STAGES)
def test_what_is_measured_is_kept(tmp_path, monkeypatch, stopped, name):
    monkeypatch.setattr("dynprune.slm.likelihood.tokens_at_once", lambda slm: 100)
    stage, build, pattern, target = STAGES[name]
    typed = [BASELINES, INFLUENCE, "evaluation.static=[1,2,3]"]
    build(run_of(tmp_path / "whole", *typed))
    stops = stopped(stage, pattern)
    number = until_done(lambda: build(run_of(tmp_path / "stopped", *typed)))
    assert number > 2
    assert number == stops.total()
    # One file grows by a set each time; the others are written once each.
    assert set(stops.values()) == ({3} if target == "sets.json" else {1})
    places = [next((tmp_path / folder / "artifacts" / name).glob(f"*/{target}")) for folder in ("whole", "stopped")]
    assert places[0].read_bytes() == places[1].read_bytes()
    assert {path.name for path in places[1].parent.iterdir()} == {target, "manifest.json"}


def test_moments_of_adapters_in_closed_form_are_added_up_once(tmp_path, monkeypatch, stopped):
    monkeypatch.setattr(StepCheckpoints, "seconds", 0.0)
    typed = ["adapter.batch_tokens=400", "adapter.sink=true"]
    whole = adapters(run_of(tmp_path / "whole", *typed)).folder
    stops = stopped(adapters_stage, "moments.safetensors")
    number = until_done(lambda: adapters(run_of(tmp_path / "stopped", *typed)))
    assert number == stops.total() > 2
    [found] = (tmp_path / "stopped/artifacts/adapters").glob("*/adapters.safetensors")
    assert found.read_bytes() == (whole / "adapters.safetensors").read_bytes()
    assert not (found.parent / "moments.safetensors").exists()


def test_queries_that_are_timed_are_timed_once(tmp_path, stopped):
    typed = ["evaluation.pruned_layers=[1]", "evaluation.latency.queries=3"]
    stops = stopped(evaluate_stage, "timings*.jsonl")
    assert until_done(lambda: evaluate(run_of(tmp_path, *typed))) == 4
    assert set(stops.values()) == {1}
    [path] = (tmp_path / "artifacts/latency").glob("*/timings.jsonl")
    timed = Counter((line["id"], line["row"]) for line in map(json.loads, path.read_text().splitlines()))
    assert len({id for id, _ in timed}) == 3
    assert {row for _, row in timed} == {"original", "fixed-1"}
    assert set(timed.values()) == {1}
    assert len(timed) == 6


def test_what_a_lossless_row_has_said_is_kept(tmp_path, stopped):
    typed = ["evaluation.pruned_layers=[1]", "evaluation.latency.queries=0", "+base@evaluation.lossless.lookup=lossless"]
    whole = evaluate(run_of(tmp_path / "whole", *typed)).samples["lossless-lookup"]
    stops = stopped(samples_stage, "evaluate/*/samples-*.jsonl")
    again = run_of(tmp_path / "stopped", *typed)
    assert until_done(lambda: evaluate(again)) == 3
    assert set(stops.values()) == {1}
    assert evaluate(again).samples["lossless-lookup"] == whole
    assert not list((tmp_path / "stopped/artifacts/evaluate").glob("*/samples-*.jsonl"))
