"""Rows of a table that are run together: what they say, and what is left of it when they are stopped."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import composed

import dynprune.stages.samples as samples_stage
from dynprune.slm.speculative import Drafting
from dynprune.stages.adapters import adapters, pruner_of
from dynprune.stages.report import drawn_rows
from dynprune.stages.rows import ORIGINAL, Row
from dynprune.stages.run import Run
from dynprune.stages.samples import Answers, run_rows

# Two rows choose alike for every other query, as routers do.
ROWS = [
    ORIGINAL,
    Row("fixed-1", lambda query: (2,), "[2]"),
    Row("fixed-2", lambda query: (0, 2), "[0, 2]"),
    Row("mixed", lambda query: (2, 0) if len(query.id) % 2 else (1,), "abc"),
]
CHANGED = Row("other", lambda query: (3,), "[3]")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rows")


def tiny_run(folder: Path, *overrides: str) -> Run:
    places = [f"paths.run={folder / 'run'}", f"paths.artifacts={folder}"]
    return Run(composed("experiment=tiny", "adapter=identity", "hardware.batch_size=3", *places, *overrides))


def asked_of(run: Run) -> list:
    return run.queries("test", 6, "evaluation.max_queries")


@pytest.fixture
def generated(monkeypatch) -> list:
    """What is generated: query and configuration, in order."""
    keys, original = [], samples_stage.run_queries

    def counted(*arguments):
        for sample in original(*arguments):
            keys.append((sample.id, sample.pruned_layers))
            yield sample

    monkeypatch.setattr(samples_stage, "run_queries", counted)
    return keys


def test_rows_together_say_what_transformers_generates_under_each_configuration_alone(artifacts, generated):
    run = tiny_run(artifacts, "adapter=bottleneck")
    queries = asked_of(run)
    said = run_rows(run, ROWS, Answers(run, queries))
    assert list(said) == [row.name for row in ROWS]
    assert len({sample.token_ids for samples in said.values() for sample in samples}) > len(queries)
    limit = run.max_new_tokens(queries)
    with pruner_of(run, adapters(run)) as pruner:
        for row in ROWS:
            for query, sample in zip(queries, said[row.name], strict=True):
                pruner.prune(sorted(row.choose(query)))
                ids = torch.tensor([run.tokens(query)[0]])
                out = run.slm.generate(
                    input_ids=ids, max_new_tokens=limit, do_sample=False, eos_token_id=list(run.slm.stop_ids)
                )
                new = out[0, ids.shape[1] :].tolist()
                stopped = new[-1] in run.slm.stop_ids
                assert sample.token_ids == tuple(new[:-1] if stopped else new)
                assert (sample.id, sample.truncated) == (query.id, not stopped)
                assert sample.pruned_layers == tuple(sorted(row.choose(query)))
    # No query twice under one configuration, whichever rows choose it.
    wanted = {(query.id, tuple(sorted(row.choose(query)))) for row in ROWS for query in queries}
    assert sorted(generated) == sorted(wanted)


def test_rows_that_are_there_are_read_and_what_they_said_is_not_generated_again(artifacts, generated):
    run = tiny_run(artifacts, "adapter=bottleneck")
    queries = asked_of(run)
    before = run_rows(run, ROWS, Answers(run, queries))
    generated.clear()
    like_mixed = Row("like-mixed", ROWS[3].choose, "def")
    said = run_rows(run, [*ROWS, CHANGED, like_mixed], Answers(run, queries))
    assert sorted(generated) == sorted((query.id, (3,)) for query in queries)
    assert {name: said[name] for name in before} == before
    assert said["like-mixed"] == said["mixed"]


def kept_in(folder: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Queries and configurations whose samples lie in the parts of a folder."""
    lines = [line for path in sorted(folder.glob("samples-*.jsonl")) for line in path.read_text().splitlines()]
    return [(record["id"], tuple(record["pruned_layers"])) for record in map(json.loads, lines)]


def stop_rows(run: Run, queries: list, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stops the rows with some of their samples on the disk; returns the folder."""
    counted = samples_stage.run_queries

    def stopped(*arguments):
        for number, sample in enumerate(counted(*arguments)):
            if sum(len(one.configurations) for one in arguments[2]) > len(queries) and number == 7:
                raise KeyboardInterrupt
            yield sample

    with monkeypatch.context() as patch:
        patch.setattr(samples_stage, "run_queries", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_rows(run, ROWS, Answers(run, queries))
    [folder] = (run.store.root / "generate").glob("*.partial")
    return folder


def test_what_is_generated_after_a_stop_stands_beside_what_was_there(tmp_path, generated, monkeypatch):
    run = tiny_run(tmp_path)
    queries = asked_of(run)
    folder = stop_rows(run, queries, monkeypatch)
    before = kept_in(folder)
    generated.clear()
    run_rows(run, ROWS, Answers(run, queries))
    assert generated
    assert sorted(kept_in(folder.with_suffix(""))) == sorted([*before, *generated])


def test_rows_that_are_stopped_go_on_where_they_were(tmp_path, generated, monkeypatch):
    run = tiny_run(tmp_path)
    queries = asked_of(run)
    kept = kept_in(stop_rows(run, queries, monkeypatch))
    first = list(generated)
    # Of what had come, no more is lost than a batch.
    assert len(first) - len(queries) - len(kept) <= 3
    assert kept

    # Whichever rows the table has when it goes on.
    generated.clear()
    run_rows(run, [*ROWS[:2], CHANGED, ROWS[3]], Answers(run, queries))
    assert not set(generated) & set(kept)
    assert (queries[0].id, (3,)) in generated
    said = run_rows(run, ROWS, Answers(run, queries))
    assert len(set(generated)) == len(generated)
    assert not set(generated) & set(kept)
    undisturbed = tiny_run(tmp_path / "undisturbed")
    assert said == run_rows(undisturbed, ROWS, Answers(undisturbed, queries))


def test_a_stop_between_two_rows_loses_nothing(tmp_path, generated, monkeypatch):
    run = tiny_run(tmp_path)
    queries = asked_of(run)
    written, write = [], samples_stage.write_samples

    def stopped(samples, target):
        if target.name == "samples.jsonl":
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(target)
        write(samples, target)

    monkeypatch.setattr(samples_stage, "write_samples", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_rows(run, ROWS, Answers(run, queries))
    monkeypatch.setattr(samples_stage, "write_samples", write)
    generated.clear()
    said = run_rows(run, ROWS, Answers(run, queries))
    assert generated == []
    assert [sample.pruned_layers for sample in said["fixed-2"]] == [(0, 2)] * len(queries)


def test_mistakes_are_said_before_anything_is_left_behind(tmp_path):
    for override, layers, sentence in (
        ("hardware.batch_size=0", 2, r"hardware\.batch_size=0 leaves no row"),
        ("hardware.shared_gib=-1", 2, r"hardware\.shared_gib=-1 is negative"),
        ("hardware.batch_size=1", 40, "has layers 0 to 3, but"),
    ):
        run = tiny_run(tmp_path, override)
        row = Row("wrong", lambda query, layers=layers: (layers,), f"[{layers}]")
        with pytest.raises(ValueError, match=sentence):
            run_rows(run, [row], Answers(run, asked_of(run)))
    assert not (tmp_path / "generate").exists()


@pytest.mark.slow
def test_two_processes_say_what_one_says(tmp_path, monkeypatch, caplog):
    said = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run = tiny_run(folder, f"hardware.processes={processes}", "model.dtype=float32")
        monkeypatch.setattr(samples_stage, "_SAMPLES_A_PROCESS", 2)
        with caplog.at_level("INFO"):
            said.append(run_rows(run, ROWS, Answers(run, asked_of(run))))
        assert ("sharing the work out to 2 processes" in caplog.text) == (processes == 2)
    assert said[0] == said[1]


def test_the_figure_of_accuracy_has_one_of_a_routers_seeds_and_each_of_its_points_once():
    seeds = [Row(f"router-dpo-s{seed}", ORIGINAL.choose, f"abc{seed}", seed=seed, timed=seed == 0) for seed in range(2)]
    budget = replace(seeds[0], name="router-dpo-s0@0.1", origin="abc0 k=3")
    safe = [replace(budget, name="router-dpo-s0@safe"), replace(ORIGINAL, name="router-fbc-s0@safe", seed=0)]
    others = [
        replace(ORIGINAL, name="lossless-lookup", drafting=Drafting(True, 8, 0.5)),
        replace(ROWS[1], name="static-1-mse", timed=False),
    ]
    rows = [*ROWS, *seeds, budget, *safe, *others]
    left_out = {seeds[1].name, *(row.name for row in safe)}
    assert drawn_rows(rows) == [row.name for row in rows if row.name not in left_out]
