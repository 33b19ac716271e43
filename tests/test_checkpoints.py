"""Trainings that are stopped: they go on with the next batch, or epoch, and end as undisturbed ones do."""

from pathlib import Path

import lightning
import pytest
import torch
from safetensors.torch import load_file
from tiny import composed
from torch.utils.data import DataLoader

from dynprune.adapters.context import ContextStream, ContextTraining
from dynprune.data.datamodule import ResumableLoader, StreamData
from dynprune.data.streams import PairStream
from dynprune.methods.base import RouterTraining
from dynprune.slm.adaptation import Adaptation, AnswerData
from dynprune.stages.adapt import adapt
from dynprune.stages.adapters import adapters
from dynprune.stages.checkpoints import (
    BestCheckpoint,
    StepCheckpoints,
    WholeCheckpoints,
    best_of,
    epoch_checkpoints,
    last_of,
)
from dynprune.stages.router import CURVE, router
from dynprune.stages.run import Run

# What is trained, by what, and where the weights are.
TRAININGS = {
    "context": (
        ContextTraining,
        adapters,
        "adapters.safetensors",
        (
            "adapter.bottleneck=8",
            "adapter.epochs=1",
            "adapter.max_samples=8",
            "adapter.context.epochs=2",
            "adapter.draw.max_layers=3",
            "adapter.context.batch_size=2",
            "adapter.context.micro_batch_size=1",
        ),
    ),
    "adapt": (
        Adaptation,
        adapt,
        "adapter_model.safetensors",
        (
            "adapt.epochs=2",
            "adapt.rank=2",
            "adapt.alpha=4",
            "adapt.batch_size=2",
            "adapt.micro_batch_size=1",
            "data.source.categories=[simple_python]",
            "data.source.max_chars=450",
            "evaluation.max_queries=1",
        ),
    ),
    # With an encoder that learns, and has dropout.
    "router": (
        RouterTraining,
        router,
        "router/router.safetensors",
        (
            "method.epochs=2",
            "method.batch_size=2",
            "method.optimizer.lr=0.01",
            "router.encoder.trainable=true",
        ),
    ),
}


class Stopped(Exception):
    """What stops a training, where Lightning does not look."""


def steps_of(training, monkeypatch, stop_at: int | None) -> list[tuple[int, int]]:
    """Notes the steps that are made from now on, by epoch and batch, and stops before one of them."""
    steps = []
    step = training.training_step

    def noted(module, batch, batch_idx):
        if len(steps) == stop_at:
            raise Stopped
        steps.append((module.current_epoch, batch_idx))
        return step(module, batch, batch_idx)

    monkeypatch.setattr(training, "training_step", noted)
    return steps


def run_of(name: str, folder: Path) -> Run:
    (folder / "run").mkdir(exist_ok=True, parents=True)
    paths = [f"paths.run={folder}/run", f"paths.artifacts={folder}/artifacts"]
    stage = name if name == "adapt" else "adapters"
    return Run(composed("experiment=tiny", f"stage={stage}", *paths, *TRAININGS[name][-1]))


# Adapters and deltas go the same way; one of them will do where minutes count.
@pytest.mark.parametrize(
    ("name", "waiting"),
    [
        pytest.param("context", 1, marks=pytest.mark.stages),
        pytest.param("adapt", 1, marks=pytest.mark.slow),
        pytest.param("router", 0, marks=pytest.mark.stages),
    ],
)
def test_a_training_that_is_stopped_goes_on_with_the_next_batch(tmp_path, monkeypatch, name, waiting):
    training, stage, weights, _ = TRAININGS[name]
    monkeypatch.setattr(StepCheckpoints, "seconds", 0.0)
    with monkeypatch.context() as patch:
        undisturbed = steps_of(training, patch, None)
        whole = load_file(stage(run_of(name, tmp_path / "whole")).folder / weights)
    in_epoch = len(undisturbed) // 2
    assert in_epoch > 4
    made = []
    # In the midst of the first epoch, with a gradient that waits for another one's; at its end; in the second one.
    for stop_at in (3, in_epoch - 3 + waiting, 1):
        with monkeypatch.context() as patch:
            made.append(steps_of(training, patch, stop_at))
            with pytest.raises(Stopped):
                stage(run_of(name, tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        made.append(steps_of(training, patch, None))
        stopped = stage(run_of(name, tmp_path / "stopped")).folder
    # A batch whose gradient waited for that of the next one is seen again, no other one.
    assert made == [
        undisturbed[:3],
        undisturbed[3 - waiting : in_epoch],
        undisturbed[in_epoch : in_epoch + 1],
        undisturbed[in_epoch + 1 - waiting :],
    ]
    assert load_file(stopped / weights).keys() == whole.keys()
    assert all(torch.equal(value, whole[key]) for key, value in load_file(stopped / weights).items())
    assert not list(stopped.rglob("step.ckpt"))
    if name == "router":
        curves = [next(tmp_path.glob(f"{run}/artifacts/router/*/{CURVE}")).read_text() for run in ("whole", "stopped")]
        assert curves[0] == curves[1]
        assert curves[0].count("\n") == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_that_is_stopped_between_two_epochs_goes_on_from_there_and_from_each_later_one(tmp_path, monkeypatch, name):
    training, stage, weights, options = TRAININGS[name]
    monkeypatch.setitem(TRAININGS, name, (training, stage, weights, tuple(o.replace("epochs=2", "epochs=4") for o in options)))
    with monkeypatch.context() as patch:
        undisturbed = steps_of(training, patch, None)
        whole = load_file(stage(run_of(name, tmp_path / "whole")).folder / weights)
    in_epoch = len(undisturbed) // 4
    data = AnswerData if name == "adapt" else StreamData
    loader = data.train_dataloader

    def stopped(self):
        # Adapters are fitted one by one first, through the same module.
        if self.trainer.current_epoch == 1 and (name == "adapt" or isinstance(self.training, ContextStream | PairStream)):
            raise Stopped
        return loader(self)

    with monkeypatch.context() as patch:
        patch.setattr(StepCheckpoints, "seconds", 0.0)
        patch.setattr(data, "train_dataloader", stopped)
        with pytest.raises(Stopped):
            stage(run_of(name, tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        again = steps_of(training, patch, 2 * in_epoch)
        with pytest.raises(Stopped):
            stage(run_of(name, tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        rest = steps_of(training, patch, None)
        folder = stage(run_of(name, tmp_path / "stopped")).folder
    # From the step's checkpoint on, the last batch or two of epoch 0; and then from the end of the last epoch that has ended.
    assert again[0] in undisturbed[in_epoch - 2 : in_epoch]
    assert rest == undisturbed[in_epoch * ((undisturbed.index(again[-1]) + 1) // in_epoch) :]
    assert all(torch.equal(value, whole[key]) for key, value in load_file(folder / weights).items())
    assert not list(folder.rglob("*-v1.ckpt"))


class Worsening(lightning.LightningModule):
    """Its first epoch is the best one."""

    def __init__(self, stop_in: int | None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.stop_in = stop_in

    def training_step(self, batch, batch_idx):
        if self.current_epoch == self.stop_in:
            raise Stopped
        return -self.weight

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.weight)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self):
        return DataLoader(range(1))

    def val_dataloader(self):
        return DataLoader(range(1))


def fit(folder: Path, stop_in: int | None) -> tuple[BestCheckpoint, lightning.Trainer]:
    best = BestCheckpoint(folder, "loss")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callbacks = [best, epoch_checkpoints(folder)]
    trainer = lightning.Trainer(max_epochs=4, callbacks=callbacks, plugins=[WholeCheckpoints()], **quiet)
    trainer.fit(Worsening(stop_in), ckpt_path=last_of(folder))
    return best, trainer


@pytest.mark.parametrize("moved", [False, True])
def test_a_training_goes_on_after_its_last_epoch_and_not_after_its_best_one(tmp_path, moved):
    first, second = tmp_path / "first", tmp_path / ("second" if moved else "first")
    with pytest.raises(Stopped):
        fit(first, 3)
    assert {path.name for path in first.iterdir()} == {"epoch=0-step=1.ckpt", "last.ckpt"}
    first.rename(second)
    best, trainer = fit(second, 1)
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 4
    assert Path(best.best_model_path) == second / "epoch=0-step=1.ckpt"
    found = best_of(best)
    assert (found["epoch"], found["state_dict"]["weight"].item(), float(best.best_model_score)) == (0, 1.0, 1.0)
    # Once it has ended, it goes on to nothing.
    fit(second, 3)
    assert {path.name for path in second.iterdir()} == {"epoch=0-step=1.ckpt", "last.ckpt"}


def test_a_loader_goes_on_after_what_it_gave_out():
    loader = ResumableLoader(range(10), batch_size=3)
    batches = iter(loader)
    given = [next(batches).tolist(), next(batches).tolist()]
    again = ResumableLoader(range(10), batch_size=3)
    again.load_state_dict(loader.state_dict())
    assert given == [[0, 1, 2], [3, 4, 5]]
    assert [batch.tolist() for batch in again] == [[6, 7, 8], [9]]
    # An epoch later it begins at the beginning.
    assert len(list(again)) == 4
    assert again.state_dict() == {"given": 4}
