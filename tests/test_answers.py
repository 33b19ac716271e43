"""The answers that adapters are distilled from."""

import json
from functools import partial

import pytest
from tiny import composed

import dynprune.stages.answers as answers_stage
from dynprune.stages.answers import answers
from dynprune.stages.run import Run


def run_of(folder, *overrides: str) -> Run:
    return Run(composed("experiment=tiny", f"paths.run={folder}/run", f"paths.artifacts={folder}/artifacts", *overrides))


def test_answers_that_were_stopped_go_on_where_they_were(tmp_path, monkeypatch):
    generate_all, asked = answers_stage.generate_all, []

    def noted(slm, pruner, requests, batch_size, stop_at=None):
        asked.append(len(requests))
        for number, answer in enumerate(generate_all(slm, pruner, requests, batch_size)):
            if number == stop_at:
                raise KeyboardInterrupt
            yield answer

    options = ("adapter.max_samples=12", "hardware.batch_size=4")
    monkeypatch.setattr(answers_stage, "generate_all", noted)
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    answers(run_of(tmp_path / "whole", *options))
    with monkeypatch.context() as patch:
        patch.setattr(answers_stage, "generate_all", partial(noted, stop_at=7))
        with pytest.raises(KeyboardInterrupt):
            answers(run_of(tmp_path / "stopped", *options))
    answers(run_of(tmp_path / "stopped", *options))
    # Of the seven that were there, the three of a part that was not full are made again.
    assert asked == [12, 12, 8]
    places = [next((tmp_path / folder / "artifacts/answers").glob("*/answers.json")) for folder in ("whole", "stopped")]
    assert places[0].read_bytes() == places[1].read_bytes()
    assert len(json.loads(places[0].read_text())) == 12
    assert {path.name for path in places[1].parent.iterdir()} == {"answers.json", "manifest.json"}
