"""A loss that is no number ends the training, and the sentence says where, on what, and what is left."""

import re
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import run_tiny
from torch.utils.data import DataLoader

from dynprune.data.bfcl import load_bfcl
from dynprune.stages.finite_loss import FiniteLoss


class Breaking(lightning.LightningModule):
    """Its loss is what it is told to be."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.losses = losses

    def training_step(self, batch, batch_idx):
        return self.weight * self.losses[self.global_step]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(module: Breaking, folder: Path, batches: list) -> None:
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FiniteLoss("router-mine"), ModelCheckpoint(folder / "checkpoints", save_last=True)],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_step_queries_and_the_last_good_weights_are_named_and_the_weights_stay_good(bad, tmp_path):
    module = Breaking([1.0, 1.0, 1.0, bad])
    batches = [{"ids": ["q1", "q2", "q1"]}, {"ids": [f"r{number}" for number in range(10)]}]
    with pytest.raises(ValueError, match=f"router-mine: the loss is {bad} at step 3 \\(batch 1 of epoch 1, of") as refused:
        train(module, tmp_path, batches)
    assert "of the queries r0, r1, r2, r3, r4, r5, r6, r7, …);" in str(refused.value)
    [kept] = re.findall(r"the last good weights are in (\S+?);", str(refused.value))
    # Of the first epoch: two steps of 0.1 each.
    assert torch.load(kept, weights_only=True)["state_dict"]["weight"].item() == pytest.approx(0.8)
    assert module.weight.item() == pytest.approx(0.7)


def test_a_batch_without_ids_in_the_first_epoch_is_named_by_its_place(tmp_path):
    with pytest.raises(ValueError, match=r"at step 0 \(batch 0 of epoch 0\); no epoch has left its weights"):
        train(Breaking([float("nan")]), tmp_path, [torch.zeros(1)])


def test_good_losses_are_left_alone(tmp_path):
    module = Breaking([1.0, -1.0, 1.0])
    train(module, tmp_path, [torch.zeros(1)])
    assert module.weight.item() == pytest.approx(0.9)


def test_a_router_whose_training_runs_away_is_no_router(tmp_path):
    with pytest.raises(ValueError, match=r"^router-dpo: the loss is (nan|-?inf) at step \d+ .*of the queries ") as refused:
        run_tiny(tmp_path, "away", "stage=router", "method.optimizer.lr=1e25", "exploration.max_queries=3", "method.epochs=5")
    named = set(re.findall(r"of the queries ([^…);]+)", str(refused.value))[0].split(", "))
    assert named <= {query.id for query in load_bfcl()}
    assert [place.suffix for place in tmp_path.glob("outputs/artifacts/router/*/")] == [".partial"]


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("adapters", ("adapter.fit=distil", "adapter.epochs=3", "adapter.optimizer.lr=1e30")),
        ("context", ("adapter.context.epochs=3", "adapter.context.optimizer.lr=1e30", "adapter.draw.max_layers=3")),
    ],
)
def test_adapters_whose_training_runs_away_name_queries_of_the_batch(name, typed, tmp_path):
    with pytest.raises(ValueError, match=rf"^{name}: the loss is (nan|-?inf) at step \d+ ") as refused:
        run_tiny(tmp_path, "away", "stage=adapters", *typed)
    named = set(re.findall(r"of the queries ([^…);]+)", str(refused.value))[0].split(", "))
    assert named <= {query.id for query in load_bfcl()}
    # Of a batch, not of all twelve samples.
    assert 1 <= len(named) <= 4
