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


@pytest.mark.parametrize("method", SETTINGS)
def test_each_method_learns_to_prefer_the_winners_and_its_validation_loss_falls(method):
    module = training(method)
    batch = pairs(module)
    learnt_from = {**batch, "mask_BL": batch["winner_mask_BL"]} if module.learns_from == "rollouts" else batch
    optimizer = module.configure_optimizers()
    losses = [module.validation_loss(module.outputs(batch), batch).item()]
    for _ in range(300):
        loss, _ = module.training_loss(module.outputs(learnt_from), learnt_from)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses.append(module.validation_loss(module.outputs(batch), batch).item())
    assert losses[1] < losses[0]
    outputs = module.outputs(batch)
    winners_B, losers_B = (module.policy.log_prob(outputs, batch[f"{side}_mask_BL"]) for side in ("winner", "loser"))
    assert (winners_B > losers_B).all()


def test_cloning_is_validated_on_the_winners_alone():
    module = training(FilteredBehaviouralCloning)
    batch = pairs(module)
    outputs = module.outputs(batch)
    other = {**batch, "loser_mask_BL": ~batch["loser_mask_BL"]}
    assert module.validation_loss(outputs, batch) == module.validation_loss(outputs, other)
    assert module.validation_loss(outputs, batch) == module.training_loss(outputs, {"mask_BL": batch["winner_mask_BL"]})[0]
