"""Runs read back from folders that the test writes, with figures that can be counted by hand."""

import csv
import json
import math
import re
import shutil

import numpy as np
import pytest
import yaml
from tiny import composed
from written_runs import write_run

from dynprune.evaluation.comparison_output import render_comparison, write_comparison
from dynprune.evaluation.parts import AdapterPart, ExplorationPart, RouterPart
from dynprune.evaluation.run_comparison import compare_runs
from dynprune.evaluation.run_results import failed, has_table_of, is_run, read_run, seal_report, write_failure, write_parts
from dynprune.stages.run import Run

UNENDED = "it left nothing to compare: it has not ended, or was killed"


def entries_of(comparison):
    return {(entry.setting, entry.row): entry for entry in comparison.entries}


def test_seeds_are_averaged_query_by_query_and_settings_are_tested_in_pairs(tmp_path):
    answers = {
        ("fbc", 1): [1, 1, 0, 0, 0, 0],
        ("fbc", 2): [1, 0, 0, 0, 0, 0],
        ("dpo", 1): [1, 1, 1, 1, 0, 0],
        ("dpo", 2): [1, 1, 1, 1, 1, 1],
    }
    runs = [
        write_run(
            tmp_path / f"{i}_{method}",
            ["experiment=tiny", f"method={method}", f"seed={seed}"],
            {"original": [1] * 6, f"router-{method}": right},
            speedup=0.1 * seed,
        )
        for i, ((method, seed), right) in enumerate(answers.items())
    ]
    comparison = compare_runs(runs)
    entries = entries_of(comparison)
    assert list(entries) == [("", "original"), ("method=fbc", "router-fbc"), ("method=dpo", "router-dpo")]
    fbc, dpo = entries["method=fbc", "router-fbc"], entries["method=dpo", "router-dpo"]
    assert (fbc.summary.seeds, dpo.summary.seeds) == (2, 2)
    assert fbc.summary.mean.mean == pytest.approx(3 / 12)
    assert dpo.summary.mean.mean == pytest.approx(10 / 12)
    # The seeds' means are 2/6 and 1/6, and 4/6 and 1.
    assert fbc.summary.spread == pytest.approx(np.std([2 / 6, 1 / 6], ddof=1))
    assert dpo.summary.spread == pytest.approx(np.std([4 / 6, 1], ddof=1))
    assert fbc.table_row.measured_speedup.median == pytest.approx(0.15)
    assert (fbc.table_row.measured_speedup.low, fbc.table_row.measured_speedup.high) == (0.1, 0.2)
    # The routers of two methods stand for each other.
    [test] = [c for c in comparison.comparisons if (c.row, c.baseline) == ("router-dpo", "router-fbc")]
    assert test.difference.mean == pytest.approx(7 / 12)
    # Queries 2 to 6 are better by 1/2, 1, 1, 1/2 and 1/2; of their 32 signs two give a sum as far from 0.
    assert (test.wins, test.losses) == (5, 0)
    assert test.p_value == pytest.approx(2 / 32)
    assert {(c.row, c.baseline) for c in comparison.comparisons if c.baseline == "original"} == {
        ("router-fbc", "original"),
        ("router-dpo", "original"),
    }


def test_a_row_that_says_the_same_under_all_settings_stands_there_once(tmp_path):
    runs = [
        write_run(
            tmp_path / f"{i}",
            ["method=dpo", f"method.module.beta={beta}", f"seed={seed}"],
            # The static set is one a seed, whatever the setting.
            {"original": [1, 1], "static-2": [seed, 0], "router-dpo": [0, beta > 1]},
            layers={"static-2": 2, "router-dpo": 2.4},
        )
        for i, (beta, seed) in enumerate([(0.5, 0), (0.5, 1), (2.0, 0), (2.0, 1)])
    ]
    comparison = compare_runs(runs)
    entries = entries_of(comparison)
    assert set(entries) == {("", "original"), ("", "static-2"), ("beta=0.5", "router-dpo"), ("beta=2.0", "router-dpo")}
    assert entries["", "static-2"].summary.seeds == 2
    # What has nothing to do with the seed is one row.
    assert entries["", "original"].summary.seeds == 1
    tested = {(c.row, c.baseline) for c in comparison.comparisons}
    assert ("router-dpo beta=2.0", "router-dpo beta=0.5") in tested
    assert ("router-dpo beta=2.0", "static-2") in tested


def test_seeds_within_a_run_are_seeds(tmp_path):
    rows = {"original": [1, 1], "router-dpo-s3": [1, 0], "router-dpo-s4": [1, 1], "router-dpo-s3@0.1": [0, 0]}
    entries = entries_of(compare_runs([write_run(tmp_path / "run", [], rows | {"router-dpo-s4@0.1": [0, 1]}, seeds=[3, 4])]))
    assert entries["", "router-dpo"].summary.mean.mean == pytest.approx(3 / 4)
    assert entries["", "router-dpo@0.1"].summary.mean.mean == pytest.approx(1 / 4)


def test_runs_that_were_typed_alike_are_told_apart_by_their_folders(tmp_path):
    runs = [
        write_run(tmp_path / name, ["seed=1"], {"original": [1], "router-dpo": [right]}) for name, right in [("a", 0), ("b", 1)]
    ]
    assert set(entries_of(compare_runs(runs))) == {("", "original"), ("a", "router-dpo"), ("b", "router-dpo")}


def test_rows_on_other_queries_are_not_tested_against_each_other(tmp_path):
    runs = [
        write_run(tmp_path / "short", ["evaluation.max_queries=2"], {"original": [1, 0], "router-dpo": [1, 1]}),
        write_run(tmp_path / "long", ["evaluation.max_queries=3"], {"original": [1, 0, 1], "router-dpo": [1, 1, 1]}),
    ]
    comparison = compare_runs(runs)
    assert len(comparison.entries) == 4
    # Each against its own table's alone.
    assert {(c.row, c.baseline) for c in comparison.comparisons} == {
        (f"router-dpo max_queries={n}", f"original max_queries={n}") for n in (2, 3)
    }


def test_a_failed_run_says_why_in_every_file(tmp_path, monkeypatch):
    good = write_run(tmp_path / "0_good", ["method=dpo"], {"original": [1, 0], "router-dpo": [1, 1]})
    bad, killed, listed = (tmp_path / name for name in ("1_bad", "2_killed", "3_listed"))
    jobs = ((bad, ["method=orpo", "seed=2"], "all"), (killed, ["method=kto"], "all"), (listed, [], "list"))
    for folder, overrides, stage in jobs:
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra/overrides.yaml").write_text(yaml.safe_dump(overrides))
        (folder / ".hydra/config.yaml").write_text(yaml.safe_dump({"stage": stage, "seed": 0}))
    monkeypatch.setattr("dynprune.evaluation.run_results.typed", lambda: ["method=orpo", "seed=2"])
    write_failure(bad, ValueError("router.k_max=99 is not possible\nmore"), seed=2)
    assert all(map(is_run, (bad, killed)))
    # What leaves nothing to compare is no failed run.
    assert not is_run(listed)
    comparison = compare_runs([good, read_run(bad), read_run(killed)])
    written = {path.name: path for path in write_comparison(comparison, tmp_path / "out")}
    assert set(written) == {"comparison.json", "comparison.csv", "comparison.md", "comparison.png", "layer_counts.png"}
    document = json.loads(written["comparison.json"].read_text())
    assert [(f["setting"], f["seed"], f["reason"]) for f in document["failed"]] == [
        ("method=orpo", "2", "router.k_max=99 is not possible"),
        ("method=kto", "0", UNENDED),
    ]
    assert "router.k_max=99 is not possible" in written["comparison.md"].read_text()
    lines = list(csv.DictReader(written["comparison.csv"].open()))
    assert [line["failed"] for line in lines] == ["", "", "router.k_max=99 is not possible", UNENDED]
    assert float(lines[1]["ast_match"]) == 1.0
    assert render_comparison(comparison).renderables


def test_a_crash_is_named_by_its_kind(tmp_path):
    write_failure(tmp_path, RuntimeError("CUDA out of memory"), seed=0)
    assert read_run(tmp_path).failure == "RuntimeError: CUDA out of memory"


def test_without_a_single_table_there_is_no_figure(tmp_path):
    write_failure(tmp_path / "0_bad", RuntimeError("no"), seed=0)
    written = write_comparison(compare_runs([read_run(tmp_path / "0_bad")]), tmp_path / "out")
    assert {path.name for path in written} == {"comparison.json", "comparison.csv", "comparison.md"}


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="no runs to compare; type stage=compare"):
        compare_runs([])


def test_a_broken_table_is_named(tmp_path):
    write_run(tmp_path / "run", [], {"original": [1]})
    (tmp_path / "run/report/table.json").write_text('{"rows": []')
    with pytest.raises(ValueError, match=r"report/table.json is broken .* run it again"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("name", ["table.json", "samples/original.jsonl", "queries.jsonl", "parts.json"])
def test_a_report_that_is_not_what_was_written_is_refused_and_made_anew(tmp_path, name):
    report = tmp_path / "run/report"
    write_run(tmp_path / "run", [], {"original": [1]}, num_layers=4)
    write_parts(report, 0, {"adapters": AdapterPart((1.0,), (0.1,))})
    seal_report(report)
    config = json.loads((report / "table.json").read_text())["config"]
    moved = shutil.copytree(tmp_path / "run", tmp_path / "moved")
    assert read_run(moved).rows
    assert has_table_of(moved, config, {}, {"queries": "their hash"})
    # A digit of a figure, which leaves the file readable.
    text = (report / name).read_text()
    place = re.search(r"[0-8]", text).start()
    (report / name).write_text(f"{text[:place]}{int(text[place]) + 1}{text[place + 1 :]}")
    with pytest.raises(ValueError, match=rf"{name} is not what was written.*rm -r {report}\) and run the same command again"):
        read_run(tmp_path / "run")
    assert not has_table_of(tmp_path / "run", config, {}, {"queries": "their hash"})


def test_a_table_is_that_of_a_configuration_wherever_it_was_run(tmp_path):
    write_run(tmp_path / "run", [], {"original": [1]})
    config = {"seed": 0, "name": "other", "evaluation": {"router_seeds": []}, "method": "x", "paths": {"run": "elsewhere"}}
    inputs = {"queries": "their hash"}
    assert has_table_of(tmp_path / "run", config, {}, inputs)
    assert not has_table_of(tmp_path / "run", config | {"method": "y"}, {}, inputs)
    assert not has_table_of(tmp_path / "run", config, {"mine": "other code"}, inputs)
    assert not has_table_of(tmp_path / "run", config, {}, {"queries": "those of a file that changed"})
    assert not has_table_of(tmp_path, config, {}, inputs)
    write_failure(tmp_path / "run", ValueError("later"), seed=0)
    assert not has_table_of(tmp_path / "run", config, {}, inputs)
    assert failed(tmp_path / "run")
    written = (tmp_path / "run/failure.json").stat().st_mtime
    assert failed(tmp_path / "run", since=written)
    assert not failed(tmp_path / "run", since=written + 1)


def test_intervals_are_those_of_the_averages(tmp_path):
    run = write_run(tmp_path / "run", [], {"original": [1, 1, 0, 0], "router-dpo": [1, 0, 0, 0]})
    interval = entries_of(compare_runs([run]))["", "router-dpo"].table_row.scores["ast_match"]
    # Wilson's interval of 1 in 4, by its formula.
    z, n, p = 1.959963984540054, 4, 0.25
    center, half = (p + z * z / 2 / n) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    assert (interval.low, interval.high) == (pytest.approx(center - half), pytest.approx(center + half))


def test_routers_that_were_trained_alone_are_compared_by_their_order_of_held_out_pairs(tmp_path, monkeypatch):
    found = {("1e-3", 1): (0.5, 0.6), ("1e-3", 2): (0.7, 0.7), ("1e-4", 1): (0.4, 0.8)}
    for number, ((rate, seed), (loss, order)) in enumerate(found.items()):
        overrides = [f"method.optimizer.lr={rate}", f"seed={seed}"]
        monkeypatch.setattr("dynprune.evaluation.run_results.typed", lambda overrides=overrides: overrides)
        write_parts(tmp_path / f"{number}_job", seed, {"router": RouterPart(loss, order, 3)})
    comparison = compare_runs([read_run(folder) for folder in sorted(tmp_path.iterdir())])
    best, other = comparison.routers
    assert (best.setting, best.seeds, best.mean, best.spread) == ("lr=1e-4", 1, RouterPart(0.4, 0.8, 3), None)
    assert (other.setting, other.seeds) == ("lr=1e-3", 2)
    assert (other.mean.validation_loss, other.mean.preference_accuracy) == (pytest.approx(0.6), pytest.approx(0.65))
    assert other.spread.preference_accuracy == pytest.approx(np.std([0.6, 0.7], ddof=1))
    assert comparison.failures == []
    written = {path.suffix: path for path in write_comparison(comparison, tmp_path / "out")}
    assert "| lr=1e-3 | 2 | 65.0 ± 7.1 | 0.600 ± 0.141 |" in written[".md"].read_text()
    assert json.loads(written[".json"].read_text())["routers"][0]["setting"] == "lr=1e-4"
    assert [line["setting"] for line in csv.DictReader(written[".csv"].open())] == ["lr=1e-4", "lr=1e-3"]
    assert render_comparison(comparison).renderables


def test_adapters_and_explorations_of_several_runs_are_averaged_over_seeds(tmp_path, monkeypatch):
    found = [("ridge", 1, (1.0, 5.0)), ("ridge", 2, (3.0, 7.0)), ("mse", 1, (0.5, 80.0))]
    for number, (fit, seed, mse) in enumerate(found):
        monkeypatch.setattr("dynprune.evaluation.run_results.typed", lambda fit=fit, seed=seed: [f"fit={fit}", f"seed={seed}"])
        parts = {
            "adapters": AdapterPart(mse, (0.1, 0.3)),
            "exploration": ExplorationPart(4, 10 * seed, 7, 0.5, 2.5, 1.0, None, 3.0),
        }
        write_parts(tmp_path / f"{number}_job", seed, parts)
    comparison = compare_runs([read_run(folder) for folder in sorted(tmp_path.iterdir())])
    ridge, mse = comparison.adapters
    assert (ridge.setting, ridge.seeds, ridge.mean.mse) == ("fit=ridge", 2, (2.0, 6.0))
    assert ridge.spread.mse == pytest.approx((math.sqrt(2), math.sqrt(2)))
    assert (mse.setting, mse.mean, mse.spread) == ("fit=mse", AdapterPart((0.5, 80.0), (0.1, 0.3)), None)
    assert [entry.mean.rollouts for entry in comparison.explorations] == [15, 10]
    written = {path.name: path for path in write_comparison(comparison, tmp_path / "out")}
    text = written["comparison.md"].read_text()
    assert "| fit=ridge | 2 | 0.200 | 4 | 6 | 1, 0 |" in text
    assert "| 1 | 6 | 80 |" in text
    # What was not measured, here for want of rollouts, is no figure.
    assert "| fit=ridge | 2 | 4 | 15 | 50.0 ± 0.0 | 2.5 ± 0.0 | 3.0 ± 0.0 | – |" in text
    assert json.loads(written["comparison.json"].read_text())["explorations"][1]["score_variance"] is None
    assert written["layer_errors.png"].read_bytes().startswith(b"\x89PNG")
    assert render_comparison(comparison).renderables


def test_parts_that_all_runs_with_a_table_share_are_no_part_of_the_comparison(tmp_path):
    for number, method in enumerate(("fbc", "dpo")):
        write_run(tmp_path / f"{number}_{method}", [f"method={method}"], {"original": [1, 0], "router": [1, number]})
        write_parts(tmp_path / f"{number}_{method}/report", 0, {"adapters": AdapterPart((1.0,), (0.1,))})
        # What another stage of the same folder came to is not the table's.
        write_parts(tmp_path / f"{number}_{method}", 0, {"adapters": AdapterPart((7.0 + number,), (0.1,))})
    runs = [read_run(folder) for folder in sorted(tmp_path.iterdir())]
    assert [run.parts["adapters"].mse for run in runs] == [(1.0,), (1.0,)]
    assert compare_runs(runs).adapters == []
    write_parts(tmp_path / "1_dpo/report", 0, {"adapters": AdapterPart((2.0,), (0.1,))})
    runs = [read_run(folder) for folder in sorted(tmp_path.iterdir())]
    assert [entry.mean.mse for entry in compare_runs(runs).adapters] == [(1.0,), (2.0,)]


def test_what_settings_share_is_shared_though_a_seed_is_missing(tmp_path):
    jobs = [("fbc", 1), ("fbc", 2), ("dpo", 1)]
    runs = [
        write_run(
            tmp_path / f"{i}",
            [f"method={method}", f"seed={seed}"],
            {"original": [1, 0], "static-2": [seed - 1, 0], f"router-{method}": [1, 1]},
            layers={"static-2": 2, f"router-{method}": 2},
        )
        for i, (method, seed) in enumerate(jobs)
    ]
    comparison = compare_runs(runs)
    entries = entries_of(comparison)
    assert {("", "original"), ("", "static-2")} <= set(entries)
    # Of the setting that has more seeds.
    assert entries["", "static-2"].summary.seeds == 2
    tested = {(c.row, c.baseline) for c in comparison.comparisons}
    assert {("router-dpo", "original"), ("router-dpo", "static-2"), ("router-fbc", "original")} <= tested


def test_a_run_for_which_nothing_was_typed_is_a_setting_of_its_own(tmp_path):
    runs = [
        write_run(tmp_path / "a", [], {"original": [1, 0], "router-dpo": [1, 1]}),
        write_run(tmp_path / "b", ["model=other"], {"original": [1, 1, 1], "router-dpo": [0, 1, 1]}),
    ]
    comparison = compare_runs(runs)
    assert set(entries_of(comparison)) == {
        (setting, row) for setting in ("default", "model=other") for row in ("original", "router-dpo")
    }
    # Each against the unpruned SLM of its own table.
    assert {(c.row, c.baseline) for c in comparison.comparisons} == {
        ("router-dpo default", "original default"),
        ("router-dpo model=other", "original model=other"),
    }


def test_a_sweep_that_was_run_twice_is_told_apart_by_the_sweeps_folders(tmp_path):
    runs = [
        write_run(tmp_path / sweep / f"0_seed={seed}", [f"seed={seed}"], {"original": [1], "router-dpo": [right]})
        for sweep, seed, right in (("A", 1, 0), ("B", 1, 1))
    ]
    assert {setting for setting, row in entries_of(compare_runs(runs)) if row == "router-dpo"} == {"A/0_seed=1", "B/0_seed=1"}


def test_rows_that_say_the_same_but_prune_or_draft_otherwise_are_not_shared(tmp_path):
    runs = [
        write_run(
            tmp_path / f"{i}",
            [f"x={i}"],
            {"original": [1], "router-dpo": [0], "lossless": [1]},
            layers={"router-dpo": i + 1},
            lossless=("lossless",),
            speedup=0.1 + 0.3 * i,
        )
        for i in range(2)
    ]
    entries = entries_of(compare_runs(runs))
    assert set(entries) == {("", "original")} | {(f"x={i}", row) for i in range(2) for row in ("router-dpo", "lossless")}
    assert [entries[f"x={i}", "lossless"].table_row.measured_speedup.median for i in range(2)] == [0.1, 0.4]


def test_within_one_run_each_two_routers_are_tested_once(tmp_path):
    rows = {"original": [1, 0], "router-a": [1, 1], "router-b": [0, 1], "router-c": [0, 0], "router-a@0.1": [1, 1]}
    tested = {(c.row, c.baseline) for c in compare_runs([write_run(tmp_path / "run", [], rows)]).comparisons}
    routers = {frozenset(pair) for pair in tested if "original" not in pair}
    assert len(routers) == len([pair for pair in tested if "original" not in pair]) == 3


def test_a_seed_that_was_not_typed_is_that_of_the_configuration(tmp_path):
    typed = {"a": [], "b": ["seed=0"]}
    runs = [write_run(tmp_path / name, typed[name], {"original": [1], "router-dpo": [name == "a"]}) for name in typed]
    # The same seed twice: two settings, not two seeds.
    assert set(entries_of(compare_runs(runs))) == {("", "original"), ("a", "router-dpo"), ("b", "router-dpo")}


def test_runs_that_differ_by_more_than_their_seeds_are_named(tmp_path):
    runs = [write_run(tmp_path / f"{i}", [f"seed={i}"], {"original": [1] * (i + 1)}) for i in range(2)]
    with pytest.raises(ValueError, match=r"differ by their seeds alone, but original answered other queries"):
        compare_runs(runs)


def test_a_data_file_that_changes_is_another_input(tmp_path):
    def record(number: int, value: int) -> dict:
        tool = {"name": f"f{number}", "description": "", "parameters": {"n": {"type": "int", "description": ""}}}
        call = {"name": f"f{number}", "arguments": {"n": value}}
        return {"id": number, "query": f"f of {value}", "tools": json.dumps([tool]), "answers": json.dumps([call])}

    def inputs(last: int) -> dict:
        path = tmp_path / "q.jsonl"
        path.write_text("\n".join(json.dumps(record(number, 1 if number < 7 else last)) for number in range(8)))
        places = [f"paths.run={tmp_path}/run", f"paths.artifacts={tmp_path}/artifacts"]
        return Run(composed("experiment=tiny", "data=jsonl", f"data.source.path={path}", *places)).inputs

    assert inputs(1) == inputs(1)
    assert inputs(1) != inputs(2)


def test_a_folder_that_is_named_is_an_input(tmp_path):
    def inputs() -> dict:
        places = [f"paths.run={tmp_path}/run", f"paths.artifacts={tmp_path}/artifacts"]
        return Run(composed("experiment=tiny", f"router.folder={tmp_path}/mine", *places)).inputs

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/router.json").write_text("{}")
    before = inputs()
    assert inputs() == before
    (tmp_path / "mine/router.json").write_text("{ }")
    assert inputs() != before
