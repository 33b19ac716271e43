"""The protocol of the main experiment, run once on a tiny random model: seeds, budgets, baselines, oracle, headline."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from tiny import manifests, run_tiny, samples_of, table_of

from dynprune.evaluation.headline import Headline

OPTIONS = (
    "+method@evaluation.routers.fbc=fbc",
    "+method@evaluation.routers.orpo=orpo",
    "evaluation.routers.fbc.min_score=-10",
    "evaluation.routers.fbc.epochs=2",
    "evaluation.routers.orpo.epochs=2",
    "evaluation.router_seeds=[0,1]",
    "evaluation.budgets=[0,0.25,0.5]",
    "evaluation.guarantee={loss:0.5,confidence:0.8}",
    "evaluation.static=[1,2,3]",
    "exploration.strategy.require_success=0.0",
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
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("main")
    run_tiny(folder, "main", *OPTIONS)
    return folder


@pytest.mark.slow
def test_every_seed_has_its_rows_and_the_first_one_is_timed(folder):
    rows = table_of(folder, "main")
    for method in ("fbc", "orpo"):
        for seed in (0, 1):
            for budget in ("", "@0", "@0.25", "@0.5"):
                row = rows[f"router-{method}-s{seed}{budget}"]
                assert (row["timed"] > 0) == (seed == 0)
    assert rows["static-2-ridge"]["timed"] == 0
    # A budget of 0.25 of 4 layers and the router's own layer: two are pruned, whatever the query.
    assert {len(s["pruned_layers"]) for s in samples_of(folder, "main", "router-fbc-s1@0.25")} == {2}


@pytest.mark.slow
def test_rows_that_prune_the_same_of_a_query_say_the_same(folder):
    said: dict[tuple, set] = {}
    for row, numbers in table_of(folder, "main").items():
        if row.endswith("-ridge") or numbers["lossless"] is not None:
            continue
        for sample in samples_of(folder, "main", row):
            said.setdefault((sample["id"], tuple(sample["pruned_layers"])), set()).add(sample["output"])
    assert all(len(outputs) == 1 for outputs in said.values())


@pytest.mark.slow
def test_the_headline_has_all_figures_that_the_rows_allow(folder):
    figures = json.loads((folder / "outputs/main/report/figures.json").read_text())
    assert list(figures) == [field.name for field in fields(Headline)]
    assert (figures["n_test"], figures["seeds"]) == (8, 2)
    # A random model answers nothing right: there is no accuracy to keep a share of, and no gap to close.
    assert figures["accuracy_kept_at_10"] is None
    assert figures["gap_closed"] is None
    assert figures["router_minus_static"]["mean"] == figures["preference_minus_fbc"]["mean"] == 0
    assert figures["context_aware_gain"] == 0
    rows = table_of(folder, "main")
    saved = rows["lossless-lookup"]["measured_speedup"]["median"]
    assert figures["lossless_speedup"] == pytest.approx(1 / (1 - saved))
    by_method = {}
    for manifest in manifests(folder, "router"):
        by_method.setdefault(manifest["config"]["method"]["name"], []).append(manifest["counts"]["preference_accuracy"])
    assert any(figures["preference_accuracy"] == pytest.approx(np.mean(values)) for values in by_method.values())


@pytest.mark.slow
def test_averages_over_seeds_are_compared_and_not_the_seeds(folder):
    table = json.loads((folder / "outputs/main/report/table.json").read_text())
    compared = {(c["row"], c["baseline"]) for c in table["comparisons"]}
    assert {
        ("router-orpo@0.25", "router-fbc@0.25"),
        ("router-fbc@0.25", "static-2"),
        ("static-2", "static-2-ridge"),
    } <= compared
    assert not [pair for pair in compared if "-s0" in str(pair) or "-s1" in str(pair) or "lossless" in str(pair)]
    # Of other sizes, or of other budgets, nothing is compared.
    assert not {("router-fbc@0.25", "static-1"), ("router-orpo@0.25", "router-fbc@0.5")} & compared
    assert table["seeds"]["router-fbc@0.25"]["seeds"] == 2
    assert all(c["difference_by_group"] is not None for c in table["comparisons"])


@pytest.mark.slow
def test_the_oracle_explores_for_the_score_of_the_table_and_wrong_queries_too(folder):
    explored = {m["config"]["score"]: m for m in manifests(folder, "explore")}
    assert explored["ast_match"]["data"]["queries"] == 8 != explored["json_match"]["data"]["queries"]
    assert explored["ast_match"]["config"]["strategy"]["require_success"] is None
    assert explored["json_match"]["config"]["strategy"]["require_success"] == 0


@pytest.mark.slow
def test_a_report_is_replaced_as_a_whole(folder):
    report = folder / "outputs/main/report"
    assert (report / "budget_curve.png").read_bytes().startswith(b"\x89PNG")
    run_tiny(folder, "main", "evaluation.pruned_layers=[1]", "evaluation.latency.queries=0")
    assert (report / "table.json").exists()
    assert not (report / "figures.json").exists()
    assert not (report / "budget_curve.png").exists()
    assert sorted(path.stem for path in (report / "samples").iterdir()) == ["fixed-1", "original"]


def test_a_headline_without_its_curves_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"evaluation\.headline=true needs .*evaluation\.baselines\.oracle\.sizes"):
        run_tiny(tmp_path, "main", "evaluation.headline=true")
    assert not (tmp_path / "outputs/artifacts").exists()
