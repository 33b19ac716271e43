"""The protocol of the main experiment, run once on a tiny random model: seeds, budgets, baselines, oracle, headline."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from dynprune.app import run_stage
from dynprune.evaluation.headline import Headline
from dynprune.paths import conf_dir


def dynprune(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dynprune", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )


OPTIONS = (
    "experiment=tiny",
    "name=main",
    "+method@evaluation.routers.fbc=fbc",
    "+method@evaluation.routers.orpo=orpo",
    "evaluation.routers.fbc.min_score=-10",
    "evaluation.routers.fbc.epochs=2",
    "evaluation.routers.orpo.epochs=2",
    "evaluation.router_seeds=[0,1]",
    "evaluation.budgets=[0,0.25,0.5]",
    "evaluation.static=[1,2,3]",
    "evaluation.baselines.oracle.sizes=[0,1,2]",
    "evaluation.baselines.random.sizes=[1,2]",
    "+adapter@evaluation.adapter_ablation.adapters.ridge=ridge",
    "evaluation.adapter_ablation.sizes=[2]",
    "evaluation.adapter_ablation.adapters.ridge.bottleneck=8",
    "evaluation.adapter_ablation.adapters.ridge.max_samples=12",
    "evaluation.adapter_ablation.adapters.ridge.correct_by=null",
    "+base@evaluation.lossless.lookup=lossless",
    "evaluation.headline=true",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("main")
    result = dynprune(folder, *OPTIONS)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder / "outputs/main/report"


def rows_of(report: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((report / "table.json").read_text())["rows"]}


def samples_of(report: Path, row: str) -> list[dict]:
    return [json.loads(line) for line in (report / f"samples/{row}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_seed_has_its_rows_and_the_first_one_is_timed(report):
    rows = rows_of(report)
    for method in ("fbc", "orpo"):
        for seed in (0, 1):
            for budget in ("", "@0", "@0.25", "@0.5"):
                row = rows[f"router-{method}-s{seed}{budget}"]
                assert (row["timed"] > 0) == (seed == 0)
    assert rows["static-2-ridge"]["timed"] == 0
    # A budget of 0.25 of 4 layers and the router's own layer: two are pruned, whatever the query.
    assert {len(s["pruned_layers"]) for s in samples_of(report, "router-fbc-s1@0.25")} == {2}


@pytest.mark.slow
def test_rows_that_prune_the_same_of_a_query_say_the_same(report):
    said: dict[tuple, set] = {}
    for row, numbers in rows_of(report).items():
        if row.endswith("-ridge") or numbers["lossless"] is not None:
            continue
        for sample in samples_of(report, row):
            said.setdefault((sample["id"], tuple(sample["pruned_layers"])), set()).add(sample["output"])
    assert all(len(outputs) == 1 for outputs in said.values())


@pytest.mark.slow
def test_the_headline_has_all_figures_that_the_rows_allow(report):
    figures = json.loads((report / "figures.json").read_text())
    assert list(figures) == [field.name for field in fields(Headline)]
    assert (figures["n_test"], figures["seeds"]) == (8, 2)
    # A random model answers nothing right: there is no accuracy to keep a share of, and no gap to close.
    assert figures["accuracy_kept_at_10"] is None
    assert figures["gap_closed"] is None
    assert figures["router_minus_static"]["mean"] == figures["preference_minus_fbc"]["mean"] == 0
    assert figures["context_aware_gain"] == 0
    rows = rows_of(report)
    saved = rows["lossless-lookup"]["measured_speedup"]["median"]
    assert figures["lossless_speedup"] == pytest.approx(1 / (1 - saved))
    manifests = [json.loads(path.read_text()) for path in (report.parents[1] / "artifacts/router").glob("*/manifest.json")]
    by_method = {}
    for manifest in manifests:
        by_method.setdefault(manifest["config"]["method"]["name"], []).append(manifest["counts"]["preference_accuracy"])
    assert any(figures["preference_accuracy"] == pytest.approx(np.mean(values)) for values in by_method.values())


@pytest.mark.slow
def test_the_curves_are_drawn(report):
    assert (report / "budget_curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_headline_without_its_curves_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=["experiment=tiny", "paths.run=outputs/run", "evaluation.headline=true"])
    with pytest.raises(ValueError, match=r"evaluation\.headline=true needs .*evaluation\.baselines\.oracle\.sizes"):
        run_stage(config, multirun=False)
    assert not Path("outputs/artifacts").exists()
