"""The stage ``adapters`` on a tiny random model: what the last layer's adapter learns, and what a sweep compares."""

import csv
import json
from pathlib import Path

import lightning
import pytest
import torch
from tiny import composed, dynprune

from dynprune.adapters.checkpoint import load_adapters
from dynprune.adapters.distillation import Distillation
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
def test_a_checkpoint_that_was_damaged_is_left_out_and_the_training_starts_over(tmp_path, monkeypatch, caplog):
    (tmp_path / "whole").mkdir()
    typed = ("adapter=bottleneck", "adapter.bottleneck=8", "adapter.epochs=3")
    whole = load_adapters(adapters(tiny(tmp_path / "whole", *typed)).folder).state_dict()
    starts = []
    fit = lightning.Trainer.fit

    def stopped(trainer: lightning.Trainer, module: Distillation, data: object, ckpt_path: Path | None) -> None:
        starts.append(ckpt_path)
        if len(starts) < 3:
            trainer.fit_loop.max_epochs = len(starts)
        fit(trainer, module, data, ckpt_path=ckpt_path)
        if len(starts) < 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(lightning.Trainer, "fit", stopped)
    for damaged in (False, True):
        with pytest.raises(KeyboardInterrupt):
            adapters(tiny(tmp_path, *typed))
        [checkpoint] = tmp_path.glob("artifacts/adapters/*.partial/checkpoints/last.ckpt")
        if damaged:
            content = bytearray(checkpoint.read_bytes())
            content[len(content) // 2] ^= 1
            checkpoint.write_bytes(content)
    made = load_adapters(adapters(tiny(tmp_path, *typed)).folder).state_dict()
    assert [start is None for start in starts] == [True, False, True]
    assert "last.ckpt is not what was written; it is removed, and made anew" in caplog.text
    assert made.keys() == whole.keys()
    assert all(torch.equal(made[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_a_best_checkpoint_that_was_damaged_after_the_last_epoch_is_said_and_the_next_attempt_trains_anew(
    tmp_path, monkeypatch
):
    small = ("adapter.epochs=1", "adapter.max_samples=8")
    typed = ("adapter.bottleneck=8", "adapter.context.epochs=2", "adapter.draw.max_layers=3", *small)
    validate = lightning.Trainer.validate

    def stopped(trainer: lightning.Trainer, module: lightning.LightningModule, data: object, verbose: bool) -> object:
        # The errors are measured once the training together has ended.
        if isinstance(module, Distillation) and list(tmp_path.glob("artifacts/context/*.partial")):
            raise KeyboardInterrupt
        return validate(trainer, module, data, verbose=verbose)

    with monkeypatch.context() as patch:
        patch.setattr(lightning.Trainer, "validate", stopped)
        with pytest.raises(KeyboardInterrupt):
            adapters(tiny(tmp_path, *typed))
    [best] = tmp_path.glob("artifacts/context/*.partial/checkpoints/epoch*.ckpt")
    best.write_bytes(best.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"without its best checkpoint, .* type the same command again, which trains anew"):
        adapters(tiny(tmp_path, *typed))
    (tmp_path / "whole").mkdir()
    made, whole = (load_adapters(adapters(tiny(folder, *typed)).folder) for folder in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(one, other) for one, other in zip(made.parameters(), whole.parameters(), strict=True))


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
