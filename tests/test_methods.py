"""The methods as LightningModules: what they validate by. Their equations are tested in test_losses."""

import functools

import pytest
import torch

from dynprune.methods.base import RouterTraining
from dynprune.methods.dpo import DirectPreferenceOptimization
from dynprune.methods.fbc import FilteredBehaviouralCloning
from dynprune.methods.orpo import OddsRatioPreferenceOptimization
from dynprune.router.encoder import TextEncoder
from dynprune.router.policies import ConditionalBernoulliPolicy
from dynprune.router.router import Router

L = 6
SETTINGS = {
    FilteredBehaviouralCloning: {"alpha": 1.0, "ratio_target": "middle", "layer_loss": "bce"},
    DirectPreferenceOptimization: {"beta": 0.1, "reference": "frozen"},
    OddsRatioPreferenceOptimization: {"variant": "paper", "weight": 0.1, "beta": 1.0},
}


def training(method: type[RouterTraining]) -> RouterTraining:
    torch.manual_seed(0)
    router = Router(TextEncoder("tiny:", revision=None, max_length=32, trainable=False), L, 16, -7.0, -3.0)
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    return method(router, ConditionalBernoulliPolicy(L), adam, **SETTINGS[method])


def pairs(module: RouterTraining) -> dict:
    winner_BL = torch.zeros(4, L, dtype=torch.bool)
    winner_BL[:, 1] = True
    loser_BL = torch.zeros(4, L, dtype=torch.bool)
    loser_BL[:, 2:] = True
    embedding_BE = torch.randn(4, module.router.encoder.size, generator=torch.Generator().manual_seed(0))
    return {"inputs": {"embedding_BE": embedding_BE}, "winner_mask_BL": winner_BL, "loser_mask_BL": loser_BL}


def learnt_from(module: RouterTraining, batch: dict) -> dict:
    if module.learns_from == "pairs":
        return batch
    return {"inputs": batch["inputs"], "mask_BL": batch["winner_mask_BL"]}


@pytest.mark.parametrize("method", SETTINGS)
def test_each_method_learns_to_prefer_the_winners(method):
    module = training(method)
    batch = pairs(module)
    own = learnt_from(module, batch)
    optimizer = module.configure_optimizers()
    for _ in range(300):
        loss, _ = module.training_loss(module.outputs(own), own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    outputs = module.outputs(batch)
    winners_B, losers_B = (module.policy.log_prob(outputs, batch[f"{side}_mask_BL"]) for side in ("winner", "loser"))
    assert (winners_B > losers_B).all()


@pytest.mark.parametrize("method", SETTINGS)
def test_a_method_is_validated_by_its_own_equation_on_data_of_its_own_kind(method, monkeypatch):
    module = training(method)
    batch = pairs(module)
    own = learnt_from(module, batch)
    logged = {}
    monkeypatch.setattr(module, "log", lambda name, value, **settings: logged.update({name: value.item()}))
    module.validation_step(batch, 0, 0)
    assert ("validation/loss" in logged) == (module.learns_from == "pairs")
    assert 0 <= logged["validation/rewards/accuracies"] <= 1
    module.validation_step(own, 0, 1)
    assert logged["validation/loss"] == pytest.approx(module.training_loss(module.outputs(own), own)[0].item())
