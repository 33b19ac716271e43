"""The methods as LightningModules: what they validate by. Their equations are tested in test_losses."""

import functools
import math
import types

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from tiny import composed

from dynprune.methods.awr import AdvantageWeightedRegression
from dynprune.methods.base import RouterTraining
from dynprune.methods.dpo import DirectPreferenceOptimization
from dynprune.methods.fbc import FilteredBehaviouralCloning
from dynprune.methods.ipo import IdentityPreferenceOptimization
from dynprune.methods.kto import KahnemanTverskyOptimization
from dynprune.methods.orpo import OddsRatioPreferenceOptimization
from dynprune.methods.simpo import SimplePreferenceOptimization
from dynprune.methods.value import ValueRegression
from dynprune.router.encoder import TextEncoder
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies import ConditionalBernoulliPolicy, ValuePolicy, build_policy
from dynprune.router.ratio import NormalRatio
from dynprune.router.router import Router

L = 6
FBC = {
    "objective": "heads",
    "alpha": 1.0,
    "ratio_target": "middle",
    "layer_loss": "bce",
    "balance": "none",
    "balance_beta": 0.9,
    "balance_gamma": 2.0,
}
METHODS = {
    "fbc": (FilteredBehaviouralCloning, FBC),
    "fbc_focal": (FilteredBehaviouralCloning, FBC | {"balance": "focal"}),
    "fbc_likelihood": (FilteredBehaviouralCloning, FBC | {"objective": "likelihood"}),
    "dpo": (DirectPreferenceOptimization, {"beta": 0.1, "reference": "frozen"}),
    "dpo_without_reference": (DirectPreferenceOptimization, {"beta": 0.1, "reference": "none"}),
    "ipo": (IdentityPreferenceOptimization, {"tau": 0.1}),
    "orpo": (OddsRatioPreferenceOptimization, {"variant": "paper", "weight": 0.1, "beta": 1.0}),
    "simpo": (SimplePreferenceOptimization, {"beta": 10.0, "gamma": 1.0}),
    "kto": (KahnemanTverskyOptimization, {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
    "awr": (AdvantageWeightedRegression, {"beta": 0.2, "max_weight": 20.0, "depth_bonus": 0.1}),
    "value": (ValueRegression, {}),
}


def training(method: str, **changes) -> RouterTraining:
    torch.manual_seed(0)
    router = Router(TextEncoder("tiny:", revision=None, max_length=32, trainable=False), L, 16, -7.0, -3.0)
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    policy = ValuePolicy(L, min_reward=0.5) if method == "value" else ConditionalBernoulliPolicy(L)
    method_class, settings = METHODS[method]
    return method_class(router, policy, adam, **settings | changes)


def pairs(module: RouterTraining) -> dict:
    winner_BL = torch.zeros(4, L, dtype=torch.bool)
    winner_BL[:, 1] = True
    loser_BL = torch.zeros(4, L, dtype=torch.bool)
    loser_BL[:, 2:] = True
    embedding_BE = torch.randn(4, module.router.encoder.size, generator=torch.Generator().manual_seed(0))
    return {"inputs": {"embedding_BE": embedding_BE}, "winner_mask_BL": winner_BL, "loser_mask_BL": loser_BL}


def learnt_from(module: RouterTraining, batch: dict) -> dict:
    """The pairs as the method would see them in its stream: the winners are right and the losers are wrong."""
    if module.learns_from == "pairs":
        return batch
    rollouts = {
        "inputs": {"embedding_BE": batch["inputs"]["embedding_BE"].repeat(2, 1)},
        "mask_BL": torch.cat([batch["winner_mask_BL"], batch["loser_mask_BL"]]),
        "score_B": torch.tensor([1.0] * 4 + [0.0] * 4),
        "desirable_B": torch.tensor([True] * 4 + [False] * 4),
        "mean_score_B": torch.full((8,), 0.5),
        "mean_pruned_B": torch.full((8,), 2.5),
    }
    if module.learns_from == "successes":
        embedding_BE = rollouts.pop("inputs")["embedding_BE"]
        return {"inputs": {"embedding_BE": embedding_BE[:4]}} | {key: value[:4] for key, value in rollouts.items()}
    return rollouts


@pytest.mark.parametrize("method", METHODS)
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


def test_value_regression_prunes_no_deeper_than_the_rollouts_it_learned_from():
    module = training("value")
    module._trainer = types.SimpleNamespace(datamodule=types.SimpleNamespace(training=types.SimpleNamespace(deepest=4)))
    # Heads that promise much, whatever is pruned.
    promising = RouterOutputs(torch.full((1, L), 5.0), NormalRatio(torch.tensor([0.9]), torch.tensor([-5.0])))
    assert module.policy.mode(promising).sum() == L
    module.on_fit_start()
    assert module.policy.mode(promising).sum() == 4
    assert build_policy(module.policy.config()).mode(promising).sum() == 4


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto"])
def test_the_reference_is_the_router_as_it_was_given(method):
    module = training(method)
    batch = pairs(module)
    before = module.outputs(batch).layer_logits_BL.detach()
    with torch.no_grad():
        module.router.layers_score.bias.add_(torch.arange(L))
    reference = module.reference_outputs(batch).layer_logits_BL
    assert torch.equal(reference, before)
    assert not reference.requires_grad
    assert not torch.equal(module.outputs(batch).layer_logits_BL, before)
    assert not any(p.requires_grad for name, p in module.named_parameters() if "reference" in name)


def test_awr_weighs_by_the_reward_over_the_mean_of_the_query():
    module = training("awr", depth_bonus=0.6, beta=0.5, max_weight=100.0)
    own = learnt_from(module, pairs(module))
    _, logged = module.training_loss(module.outputs(own), own)
    # One layer and right against four and wrong, where the mean is 2.5 and 0.5: ±0.5 for the score, ∓0.15 for the depth.
    assert logged["advantage"].item() == pytest.approx(0.0, abs=1e-6)
    assert logged["weight"].item() == pytest.approx((math.exp(0.35 / 0.5) + math.exp(-0.35 / 0.5)) / 2)


def test_kto_takes_the_reference_point_from_configurations_of_other_rows():
    module = training("kto")
    own = learnt_from(module, pairs(module))
    with torch.no_grad():
        module.router.layers_score.bias[1:].add_(3.0)
    mismatched = own["mask_BL"][[7, 0, 1, 2, 3, 4, 5, 6]]
    now, before = module.outputs(own), module.reference_outputs(own)
    expected = max(0.0, (module.policy.log_prob(now, mismatched) - module.policy.log_prob(before, mismatched)).mean().item())
    _, logged = module.training_loss(now, own)
    assert expected > 0
    assert logged["reference_point"].item() == pytest.approx(0.1 * expected)
    one = {"inputs": {"embedding_BE": own["inputs"]["embedding_BE"][-1:]}} | {
        key: own[key][-1:] for key in own if key != "inputs"
    }
    assert module.training_loss(module.outputs(one), one)[1]["reference_point"] == 0


def test_effective_numbers_are_counted_over_all_of_the_training_data():
    module = training("fbc", balance="effective_number", balance_beta=0.9)
    plain = training("fbc")
    own = learnt_from(module, pairs(module))
    trainer = types.SimpleNamespace(
        datamodule=types.SimpleNamespace(training=types.SimpleNamespace(num_items=10, num_pruned=15))
    )
    module._trainer = trainer
    module.on_fit_start()
    # 15 layers of 10·6 are pruned; the rest is not.
    share = (1 - 0.9) / (1 - 0.9**15), (1 - 0.9) / (1 - 0.9**45)
    weights = [2 * one / sum(share) for one in share]
    logits, mask = module.outputs(own).layer_logits_BL, own["mask_BL"]
    bce = torch.where(mask, -logits.sigmoid().log(), -(1 - logits.sigmoid()).log())
    weighted = bce * torch.where(mask, weights[0], weights[1])
    _, logged = module.training_loss(module.outputs(own), own)
    assert logged["layer_loss"].item() == pytest.approx(weighted.mean().item(), rel=1e-5)
    assert plain.training_loss(plain.outputs(own), own)[1]["layer_loss"].item() == pytest.approx(bce.mean().item(), rel=1e-5)


CALIBRATED_LAYERS = {f"validation/calibration/{error}_layer_{layer}" for error in ("ece", "brier") for layer in range(L)}
CALIBRATED = {"validation/calibration/ece", "validation/calibration/brier"}


@pytest.mark.parametrize("method", METHODS)
def test_calibration_is_logged_where_a_method_predicts_probabilities(method, monkeypatch):
    module = training(method)
    batch = pairs(module)
    own = learnt_from(module, batch)
    logged = {}
    monkeypatch.setattr(module, "log", lambda *arguments, **settings: None)
    monkeypatch.setattr(module, "log_dict", lambda metrics: logged.update(metrics))
    for _ in range(2):
        module.validation_step(own, 0, 1)
    module.on_validation_epoch_end()
    names = {"fbc": CALIBRATED | CALIBRATED_LAYERS, "value": CALIBRATED}
    names |= {"fbc_focal": names["fbc"], "kto": names["fbc"]}
    assert set(logged) == names.get(method, set())
    outputs = module.outputs(own)
    if method == "kto":
        # The first four rows are the desirable ones.
        error = (outputs.layer_logits_BL.sigmoid() - own["mask_BL"].float())[:4] ** 2
        assert logged["validation/calibration/brier_layer_1"].item() == pytest.approx(error[:, 1].mean().item(), rel=1e-5)
        assert logged["validation/calibration/brier"].item() == pytest.approx(error.mean().item(), rel=1e-5)
    if method == "value":
        reward = module.policy.reward_logits(outputs, own["mask_BL"]).sigmoid()
        brier = ((reward - own["score_B"]) ** 2).mean()
        assert logged["validation/calibration/brier"].item() == pytest.approx(brier.item(), rel=1e-5)
    logged.clear()
    module.on_validation_epoch_end()
    assert not logged


@pytest.mark.parametrize(
    ("method", "changes", "sentence"),
    [
        ("fbc", {"objective": "mle"}, r"method\.module\.objective='mle'.*heads, likelihood"),
        ("fbc", {"balance": "smote"}, r"method\.module\.balance='smote'.*effective_number, focal"),
        ("fbc", {"balance": "focal", "layer_loss": "mse"}, r"balance=focal .*layer_loss=bce"),
        ("fbc", {"balance": "focal", "objective": "likelihood"}, r"balance=focal .*objective=heads"),
        ("fbc", {"balance_beta": 1.0}, r"method\.module\.balance_beta=1\.0.*below 1"),
        ("fbc", {"balance_gamma": -1.0}, r"method\.module\.balance_gamma=-1\.0.*at least 0"),
        ("fbc", {"ratio_target": "end"}, r"method\.module\.ratio_target='end'.*middle, edge"),
        ("orpo", {"variant": "code"}, r"method\.module\.variant='code'.*paper, thesis_code, thesis_readme"),
        ("dpo", {"beta": 0.0}, r"method\.module\.beta=0\.0.*above 0, for example 0\.1$"),
        ("kto", {"desirable_weight": 0.0}, r"method\.module\.desirable_weight=0\.0.*above 0, for example 1$"),
        ("kto", {"undesirable_weight": 0.0}, r"method\.module\.undesirable_weight=0\.0.*above 0, for example 1$"),
        ("ipo", {"tau": 0.0}, r"method\.module\.tau=0\.0.*above 0"),
        ("awr", {"beta": 0.0}, r"method\.module\.beta=0\.0.*above 0"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(method, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        training(method, **changes)


@pytest.mark.parametrize(
    ("method", "changes"),
    [("fbc", {"ratio_target": "edge"}), ("orpo", {"variant": "thesis_code"}), ("orpo", {"variant": "thesis_readme"})],
)
def test_every_setting_that_is_allowed_gives_a_loss_of_its_own(method, changes):
    losses = []
    for module in (training(method), training(method, **changes)):
        batch = learnt_from(module, pairs(module))
        losses.append(module.training_loss(module.outputs(batch), batch)[0].item())
    assert losses[0] != losses[1]


def test_the_focal_factor_counts_where_it_is_asked_for_alone():
    def loss(**changes) -> float:
        module = training("fbc", **changes)
        batch = learnt_from(module, pairs(module))
        return module.training_loss(module.outputs(batch), batch)[0].item()

    assert loss(balance_gamma=2.0) == loss(balance_gamma=5.0)
    assert loss(balance="focal", balance_gamma=2.0) != loss(balance="focal", balance_gamma=5.0)
    assert loss(balance="focal", balance_gamma=0.0) == pytest.approx(loss())


def test_the_spread_of_a_normal_ratio_is_trained_where_the_equation_has_it_alone():
    assert not training("fbc").router.ratio_log_std.weight.requires_grad
    assert training("fbc", objective="likelihood").router.ratio_log_std.weight.requires_grad


def test_value_regression_refuses_a_policy_that_does_not_search_the_reward():
    router = training("value").router
    with pytest.raises(ValueError, match=r"method\.policy\.name=conditional_bernoulli.*value"):
        ValueRegression(router, ConditionalBernoulliPolicy(L), torch.optim.Adam)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("dpo", {"beta": 0.0}),
        ("ipo", {"tau": 0.0}),
        ("simpo", {"beta": -1.0}),
        ("kto", {"beta": 0.0}),
        ("kto", {"undesirable_weight": 0.0}),
        ("awr", {"beta": -0.1}),
        ("awr", {"max_weight": 0.0}),
    ],
)
def test_a_scale_that_would_train_the_opposite_is_refused(method, change):
    [(key, value)] = change.items()
    settings = composed(f"method={method}").method
    network = Router(TextEncoder("tiny:", None, 32, False), 4)
    with pytest.raises(InstantiationException, match=rf"method\.module\.{key}={value} is not allowed"):
        instantiate(settings.module, router=network, policy=ConditionalBernoulliPolicy(4), optimizer=None, **change)


@pytest.mark.parametrize("method", ["dpo", "value"])
def test_a_checkpoint_holds_what_was_trained_and_nothing_else(method):
    module = training(method)
    whole = {name: value.clone() for name, value in module.state_dict().items()}
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    kept = set(checkpoint["state_dict"])
    assert kept
    assert not [name for name in kept if "encoder" in name or name.startswith("_reference")]
    other = training(method)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    other.load_state_dict(checkpoint["state_dict"], strict=False)
    assert all(torch.equal(value, whole[name]) for name, value in other.state_dict().items())
