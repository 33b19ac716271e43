import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import expit

from dynprune.methods.losses import (
    OrpoVariant,
    PreferenceTerms,
    RatioTarget,
    awr_loss,
    dpo_loss,
    effective_number_weights,
    fbc_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    simpo_loss,
    value_loss,
)
from dynprune.router.encoder import TextEncoder
from dynprune.router.policies import ConditionalBernoulliPolicy, ValuePolicy
from dynprune.router.ratio import CategoricalRatio, NormalRatio
from dynprune.router.router import Router

L = 10


def normal(mu: torch.Tensor) -> NormalRatio:
    return NormalRatio(mu, torch.full_like(mu, -4.0))


def log_probs(seed: int = 0, batch: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [-12 * torch.rand(batch, generator=generator) - 0.01 for _ in range(4)]


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x)


@pytest.mark.parametrize(("ratio_target", "target"), [("middle", 0.25), ("edge", 0.2)])
def test_fbc_ratio_term_aims_at_the_middle_or_at_the_edge_of_the_bucket(ratio_target: RatioTarget, target: float) -> None:
    mask = torch.zeros(1, L, dtype=torch.bool)
    mask[0, [1, 4]] = True
    terms = fbc_loss(normal(torch.tensor([0.6])), torch.zeros(1, L), mask, alpha=0.0, ratio_target=ratio_target)
    assert terms.loss_B.item() == pytest.approx((0.6 - target) ** 2)


def test_fbc_by_hand_with_bce_and_with_mse() -> None:
    logits = torch.tensor([[math.log(3.0), -math.log(4.0)]])  # scores 3/4 and 1/5
    mask = torch.tensor([[True, False]])
    bce = fbc_loss(normal(torch.tensor([0.5])), logits, mask, alpha=0.3, layer_loss="bce")
    mse = fbc_loss(normal(torch.tensor([0.5])), logits, mask, alpha=0.3, layer_loss="mse", ratio_target="edge")
    assert bce.layer_loss_B.item() == pytest.approx(-(math.log(0.75) + math.log(0.8)) / 2)
    assert bce.ratio_loss_B.item() == pytest.approx(0.25**2)
    assert bce.loss_B.item() == pytest.approx(0.25**2 - 0.3 * (math.log(0.75) + math.log(0.8)) / 2)
    assert mse.loss_B.item() == pytest.approx(0.3 * (0.25**2 + 0.2**2) / 2)


def test_fbc_of_a_categorical_ratio_is_its_negative_log_likelihood_of_k_by_hand() -> None:
    ratio = CategoricalRatio(torch.tensor([[0.0, math.log(2.0), math.log(5.0)]]))  # 1/8, 2/8 and 5/8
    mask = torch.tensor([[True, False]])
    terms = fbc_loss(ratio, torch.tensor([[math.log(3.0), -math.log(4.0)]]), mask, alpha=0.3)
    assert terms.ratio_loss_B.item() == pytest.approx(math.log(4))
    assert terms.loss_B.item() == pytest.approx(math.log(4) - 0.3 * (math.log(0.75) + math.log(0.8)) / 2)


def test_fbc_has_its_minimum_where_the_mode_prunes_the_rollouts_layers() -> None:
    mask = torch.tensor([[False, True, True, False, False, True]])
    logits = torch.zeros(1, 6, requires_grad=True)
    mu = torch.full((1,), 0.1, requires_grad=True)
    optimizer = torch.optim.SGD([mu, logits], lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        fbc_loss(normal(mu), logits, mask, alpha=1.0).loss_B.sum().backward()
        optimizer.step()
    assert mu.item() == pytest.approx(3.5 / 6, abs=1e-3)
    assert torch.equal(logits > 0, mask)


def test_dpo_with_the_reference_equal_to_the_policy_is_ln_2() -> None:
    logp_w, logp_l, *_ = log_probs()
    terms = dpo_loss(logp_w, logp_l, logp_w.clone(), logp_l.clone(), beta=0.1)
    torch.testing.assert_close(terms.loss_B, torch.full_like(logp_w, math.log(2)))
    assert terms.metrics()["rewards/margins"].item() == 0
    assert terms.metrics()["rewards/accuracies"].item() == 0


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_dpo_is_trls_sigmoid_loss(beta: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = (t.double().numpy() for t in log_probs())
    logits = (chosen - rejected) - (ref_chosen - ref_rejected)
    terms = dpo_loss(*log_probs(), beta=beta)
    np.testing.assert_allclose(terms.loss_B, -log_sigmoid(beta * logits), rtol=1e-5, atol=1e-6)
    metrics = terms.metrics()
    chosen_rewards, rejected_rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    expected = {
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/accuracies": (chosen_rewards > rejected_rewards).mean(),
        "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_dpo_without_a_reference_compares_the_policys_own_log_probabilities() -> None:
    terms = dpo_loss(torch.tensor([-2.0]), torch.tensor([-5.0]), beta=0.5)
    assert terms.loss_B.item() == pytest.approx(math.log(1 + math.exp(-1.5)))


def trl_ipo(
    chosen: np.ndarray, rejected: np.ndarray, ref_chosen: np.ndarray, ref_rejected: np.ndarray, beta: float
) -> np.ndarray:
    return ((chosen - rejected) - (ref_chosen - ref_rejected) - 1 / (2 * beta)) ** 2


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_ipo_is_trls_loss(tau: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = (t.double().numpy() for t in log_probs())
    terms = ipo_loss(*log_probs(), tau=tau)
    np.testing.assert_allclose(terms.loss_B, trl_ipo(chosen, rejected, ref_chosen, ref_rejected, tau), rtol=1e-4)
    np.testing.assert_allclose(terms.chosen_reward_B, tau * (chosen - ref_chosen), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(terms.rejected_reward_B, tau * (rejected - ref_rejected), rtol=1e-4, atol=1e-6)


def test_ipo_is_least_where_the_margin_over_the_reference_is_half_of_one_over_tau() -> None:
    logp_w, zero = torch.tensor([-1.0], requires_grad=True), torch.zeros(1)
    # The margin is −1 + 6 = 5 = 1/(2·0.1), and beyond it the loss rises again.
    at_the_aim = ipo_loss(logp_w, zero - 6, zero, zero, tau=0.1)
    beyond = ipo_loss(logp_w, zero - 7, zero, zero, tau=0.1)
    assert at_the_aim.loss_B.item() == 0
    assert beyond.loss_B.item() == pytest.approx(1)
    beyond.loss_B.sum().backward()
    assert logp_w.grad is not None
    assert logp_w.grad.item() == pytest.approx(2)


def trl_simpo(chosen_mean: np.ndarray, rejected_mean: np.ndarray, beta: float, gamma: float) -> np.ndarray:
    gamma_logratios = gamma / beta
    return -log_sigmoid(beta * (chosen_mean - rejected_mean - gamma_logratios))


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (10.0, 3.0)])
def test_simpo_is_trls_loss_on_mean_log_probabilities(beta: float, gamma: float) -> None:
    logp_w, logp_l, *_ = log_probs()
    terms = simpo_loss(logp_w, logp_l, num_layers=L, beta=beta, gamma=gamma)
    chosen, rejected = logp_w.double().numpy() / L, logp_l.double().numpy() / L
    np.testing.assert_allclose(terms.loss_B, trl_simpo(chosen, rejected, beta, gamma), rtol=1e-5)
    np.testing.assert_allclose(terms.chosen_reward_B, beta * chosen, rtol=1e-5)
    np.testing.assert_allclose(terms.rejected_reward_B, beta * rejected, rtol=1e-5)


def test_simpo_wants_the_margin() -> None:
    # Rewards 2·(−1) and 2·(−2) differ by γ: the odds are even.
    terms = simpo_loss(torch.tensor([-10.0]), torch.tensor([-20.0]), num_layers=10, beta=2.0, gamma=2.0)
    assert terms.loss_B.item() == pytest.approx(math.log(2))


def trl_kto(
    logps: np.ndarray, ref_logps: np.ndarray, kl: float, desirable: np.ndarray, beta: float, weights: tuple[float, float]
) -> np.ndarray:
    logratios = logps - ref_logps
    chosen = 1 - expit(beta * (logratios - kl))
    rejected = 1 - expit(beta * (kl - logratios))
    return np.where(desirable, weights[0] * chosen, weights[1] * rejected)


@pytest.mark.parametrize("sign", [1, -1])
def test_kto_is_trls_loss_with_the_reference_point_clamped_at_zero(sign: int) -> None:
    logp, ref_logp, mismatched, _ = log_probs()
    desirable = torch.arange(16) % 3 == 0
    kl = max(0.0, float((-sign * mismatched).double().mean()))
    assert (kl > 0) == (sign == 1)
    terms = kto_loss(logp, ref_logp, -sign * mismatched, desirable, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    expected = trl_kto(logp.double().numpy(), ref_logp.double().numpy(), kl, desirable.numpy(), 0.3, (1.5, 0.5))
    np.testing.assert_allclose(terms.loss_B, expected, rtol=1e-5)
    rewards = 0.3 * (logp - ref_logp).double().numpy()
    metrics = terms.metrics()
    assert metrics["rewards/chosen"].item() == pytest.approx(rewards[desirable.numpy()].mean(), rel=1e-5)
    assert metrics["rewards/rejected"].item() == pytest.approx(rewards[~desirable.numpy()].mean(), rel=1e-5)
    assert metrics["reference_point"].item() == pytest.approx(0.3 * kl, rel=1e-5)


def test_kto_has_no_gradient_through_the_reference_point_and_logs_no_mean_of_nothing() -> None:
    mismatched = torch.tensor([1.0, 3.0], requires_grad=True)
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    terms = kto_loss(logp, logp.detach() - 1, mismatched, torch.tensor([True, True]), beta=0.1)
    terms.loss_B.sum().backward()
    assert mismatched.grad is None
    assert set(terms.metrics()) == {"rewards/chosen", "reference_point"}


def test_awr_weighs_the_log_likelihood_by_the_exponential_of_the_advantage_up_to_a_limit() -> None:
    logp = torch.tensor([-2.0, -2.0, -2.0], requires_grad=True)
    advantage = torch.tensor([-0.5, 0.0, 2.0], requires_grad=True)
    terms = awr_loss(logp, advantage, beta=0.5, max_weight=20.0)
    weights = [math.exp(-1), 1.0, 20.0]
    assert terms.weight_B.tolist() == pytest.approx(weights)
    assert terms.loss_B.tolist() == pytest.approx([2 * weight for weight in weights])
    terms.loss_B.sum().backward()
    assert advantage.grad is None
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([-weight for weight in weights])


def test_value_by_hand_for_successes_failures_and_shares() -> None:
    logits, scores = torch.full((3,), math.log(4.0)), torch.tensor([1.0, 0.0, 0.5])  # predicted 4/5
    expected = [-math.log(0.8), -math.log(0.2), -0.5 * math.log(0.8) - 0.5 * math.log(0.2)]
    assert value_loss(logits, scores).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("score", [-5.0, 10.0])
def test_value_refuses_scores_that_are_no_shares(score: float) -> None:
    with pytest.raises(ValueError, match=r"exploration\.score"):
        value_loss(torch.zeros(2), torch.tensor([0.5, score]))


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999])
@pytest.mark.parametrize("counts", [(30, 970), (5000, 200), (1, 1)])
def test_effective_number_weights_are_those_of_the_authors_code(beta: float, counts: tuple[int, int]) -> None:
    effective_num = 1.0 - np.power(beta, counts)
    weights = (1.0 - beta) / np.array(effective_num)
    weights = weights / np.sum(weights) * 2
    assert effective_number_weights(*counts, beta) == pytest.approx(tuple(weights))


def test_effective_number_weights_reach_from_equal_to_inverse_to_the_numbers() -> None:
    assert effective_number_weights(30, 970, 0.0) == (1.0, 1.0)
    pruned, kept = effective_number_weights(30, 970, 1 - 1e-12)
    assert pruned / kept == pytest.approx(970 / 30, rel=1e-3)
    assert all(math.isfinite(weight) for weight in effective_number_weights(0, 970, 0.999))


def focal(logits: np.ndarray, mask: np.ndarray, gamma: float) -> np.ndarray:
    p_t = np.where(mask, expit(logits), 1 - expit(logits))
    return -((1 - p_t) ** gamma) * np.log(p_t)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_fbc_with_focal_factor_and_class_weights_is_the_papers_loss(gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, L, generator=generator)
    mask = torch.rand(4, L, generator=generator) < 0.3
    terms = fbc_loss(normal(torch.zeros(4)), logits, mask, alpha=1.0, class_weights=(1.5, 0.5), focal_gamma=gamma)
    weighted = focal(logits.double().numpy(), mask.numpy(), gamma) * np.where(mask.numpy(), 1.5, 0.5)
    np.testing.assert_allclose(terms.layer_loss_B, weighted.mean(axis=1), rtol=1e-5)


def test_the_focal_factor_has_finite_slopes_where_a_score_is_certain() -> None:
    logits = torch.tensor([[200.0, -200.0, 200.0, -200.0]], requires_grad=True)
    mask = torch.tensor([[True, False, False, True]])
    fbc_loss(normal(torch.zeros(1)), logits, mask, alpha=1.0, focal_gamma=0.5).loss_B.sum().backward()
    assert logits.grad is not None
    # Right ones teach nothing; wrong ones, at full weight, what BCE teaches.
    np.testing.assert_allclose(logits.grad, [[0.0, 0.0, 0.25, -0.25]], atol=1e-6)


def numerical_slope(loss: Callable[[np.ndarray], np.ndarray], at: np.ndarray) -> np.ndarray:
    return (loss(at + 1e-6) - loss(at - 1e-6)) / 2e-6


def test_gradients_are_the_finite_differences_of_the_published_formulas() -> None:
    tensors = log_probs(seed=3)
    chosen, rejected, ref_chosen, ref_rejected = (t.double().numpy() for t in tensors)
    logp = tensors[0].clone().requires_grad_()
    desirable = torch.arange(16) % 2 == 0
    kl = float((ref_chosen - ref_rejected).mean().clip(min=0))
    pruned = torch.ones(16, 1, dtype=torch.bool)
    cases = {
        "ipo": (ipo_loss(logp, *tensors[1:], tau=0.2).loss_B, lambda x: trl_ipo(x, rejected, ref_chosen, ref_rejected, 0.2)),
        "simpo": (
            simpo_loss(logp, tensors[1], num_layers=L, beta=4.0, gamma=1.0).loss_B,
            lambda x: trl_simpo(x / L, rejected / L, 4.0, 1.0),
        ),
        "kto": (
            kto_loss(logp, tensors[2], tensors[2] - tensors[3], desirable, beta=0.3).loss_B,
            lambda x: trl_kto(x, ref_chosen, kl, desirable.numpy(), 0.3, (1.0, 1.0)),
        ),
        "value": (
            value_loss(logp + 6, tensors[1].sigmoid()),
            lambda x: -expit(rejected) * log_sigmoid(x + 6) - (1 - expit(rejected)) * log_sigmoid(-x - 6),
        ),
        "focal": (
            fbc_loss(normal(torch.zeros(16)), logp[:, None] + 6, pruned, alpha=1.0, focal_gamma=2.0).loss_B,
            lambda x: focal(x + 6, np.ones(16, dtype=bool), 2.0),
        ),
    }
    for name, (loss_B, published) in cases.items():
        (slope,) = torch.autograd.grad(loss_B.sum(), logp, retain_graph=True)
        np.testing.assert_allclose(slope, numerical_slope(published, chosen), rtol=1e-3, atol=1e-5, err_msg=name)


def trl_odds_term(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    log_odds = (chosen - rejected) - (np.log1p(-np.exp(chosen)) - np.log1p(-np.exp(rejected)))
    return log_sigmoid(log_odds)


def test_orpo_paper_is_trls_loss_on_mean_log_probabilities() -> None:
    logp_w, logp_l, *_ = log_probs()
    terms = orpo_loss(logp_w, logp_l, num_layers=L, variant="paper", weight=0.1)
    chosen, rejected = logp_w.double().numpy() / L, logp_l.double().numpy() / L
    expected = -chosen - 0.1 * trl_odds_term(chosen, rejected)
    np.testing.assert_allclose(terms.loss_B, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(terms.chosen_reward_B, 0.1 * chosen, rtol=1e-5)
    np.testing.assert_allclose(terms.rejected_reward_B, 0.1 * rejected, rtol=1e-5)


def test_orpo_by_hand() -> None:
    # Probabilities 1/2 and 1/5 have odds 1 and 1/4, so the odds ratio is 4 and σ(ln 4) = 4/5.
    logp_w, logp_l = L * torch.tensor([math.log(0.5)]), L * torch.tensor([math.log(0.2)])
    paper = orpo_loss(logp_w, logp_l, num_layers=L, weight=0.1)
    code = orpo_loss(logp_w, logp_l, num_layers=L, variant="thesis_code", weight=0.1, sft_w_B=torch.tensor([3.0]))
    assert paper.loss_B.item() == pytest.approx(math.log(2) + 0.1 * math.log(5 / 4), rel=1e-5)
    assert code.loss_B.item() == pytest.approx(math.log(5 / 4) + 0.1 * 3.0, rel=1e-5)
    assert code.chosen_reward_B.item() == pytest.approx(math.log(0.5), rel=1e-5)


def test_orpo_thesis_readme_is_the_pairwise_term_and_the_winners_log_probability() -> None:
    logp_w, logp_l, *_ = log_probs()
    terms = orpo_loss(logp_w, logp_l, num_layers=L, variant="thesis_readme", beta=0.5)
    chosen, rejected = logp_w.double().numpy(), logp_l.double().numpy()
    expected = -np.log(expit(0.5 * (chosen - rejected))) - chosen
    np.testing.assert_allclose(terms.loss_B, expected, rtol=1e-5)
    np.testing.assert_allclose(terms.chosen_reward_B, 0.5 * chosen, rtol=1e-5)
    np.testing.assert_allclose(terms.rejected_reward_B, 0.5 * rejected, rtol=1e-5)


@pytest.mark.parametrize("variant", ["paper", "thesis_code", "thesis_readme"])
@pytest.mark.parametrize(("chosen", "rejected"), [(0.0, -3.0), (-3.0, 0.0), (0.0, 0.0), (-1e-30, -1e-7), (-2000.0, -1.0)])
def test_orpo_and_its_gradients_are_finite_at_the_ends_of_the_range(
    variant: OrpoVariant, chosen: float, rejected: float
) -> None:
    logp_w = torch.tensor([chosen], requires_grad=True)
    logp_l = torch.tensor([rejected], requires_grad=True)
    terms = orpo_loss(logp_w, logp_l, num_layers=L, variant=variant, sft_w_B=torch.zeros(1))
    terms.loss_B.sum().backward()
    assert terms.loss_B.isfinite().all()
    assert logp_w.grad is not None
    assert logp_w.grad.isfinite().all()
    assert logp_l.grad is not None
    assert logp_l.grad.isfinite().all()


def test_without_length_normalisation_the_odds_term_would_be_reference_free_dpo() -> None:
    logp_w, logp_l = torch.tensor([-15.0]), torch.tensor([-18.0])
    pairwise = dpo_loss(logp_w, logp_l, beta=1.0).loss_B.item()
    odds = {
        n: orpo_loss(logp_w, logp_l, num_layers=n, variant="thesis_code", sft_w_B=torch.zeros(1)).loss_B.item() for n in (1, L)
    }
    assert odds[1] == pytest.approx(pairwise, rel=1e-4)
    assert odds[L] > 5 * pairwise


def test_losses_are_computed_in_float32_from_half_precision() -> None:
    logp = torch.tensor([-3.0]).bfloat16()
    assert dpo_loss(logp, logp, logp, logp, beta=0.1).loss_B.dtype == torch.float32
    assert orpo_loss(logp, logp, num_layers=L).loss_B.dtype == torch.float32
    assert ipo_loss(logp, logp, logp, logp, tau=0.1).loss_B.dtype == torch.float32
    assert simpo_loss(logp, logp, num_layers=L, beta=2.0, gamma=1.0).loss_B.dtype == torch.float32
    assert kto_loss(logp, logp, logp, torch.tensor([True]), beta=0.1).loss_B.dtype == torch.float32
    assert awr_loss(logp, logp, beta=0.2, max_weight=20.0).loss_B.dtype == torch.float32
    heads = normal(torch.tensor([0.5]).bfloat16()), torch.zeros(1, 4).bfloat16()
    assert fbc_loss(*heads, torch.zeros(1, 4, dtype=torch.bool), alpha=1.0).loss_B.dtype == torch.float32


def test_what_is_logged_carries_no_gradient() -> None:
    logp_w, logp_l = (t.requires_grad_() for t in log_probs()[:2])
    terms = orpo_loss(logp_w, logp_l, num_layers=L)
    assert terms.loss_B.requires_grad
    assert not any(value.requires_grad for value in terms.metrics().values())


def preference_loss(name: str, router: Router, features: dict[str, torch.Tensor]) -> torch.Tensor:
    policy = ConditionalBernoulliPolicy(6)
    heads = router(router.encode(features))
    winners = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 1]], dtype=torch.bool)
    losers = torch.tensor([[0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    fbc = fbc_loss(heads.ratio, heads.layer_logits_BL, winners, alpha=0.5, ratio_target="edge", layer_loss="mse")
    if name == "fbc":
        return fbc.loss_B
    logp_w, logp_l = policy.log_prob(heads, winners), policy.log_prob(heads, losers)
    if name == "fbc_likelihood":
        return -logp_w
    if name == "kto":
        return kto_loss(logp_w, logp_w.detach(), logp_l - logp_l.detach(), torch.tensor([True, False, True]), beta=0.1).loss_B
    if name == "awr":
        return awr_loss(logp_w, torch.tensor([0.5, -0.5, 0.0]), beta=0.2, max_weight=20.0).loss_B
    if name == "value":
        reward_logits = ValuePolicy(6, min_reward=0.5).reward_logits(heads, winners)
        return value_loss(reward_logits, torch.tensor([1.0, 0.0, 1.0]))
    if name == "dpo":
        terms: PreferenceTerms = dpo_loss(logp_w, logp_l, logp_w.detach(), logp_l.detach(), beta=0.1)
    elif name == "ipo":
        terms = ipo_loss(logp_w, logp_l, logp_w.detach(), logp_l.detach(), tau=0.1)
    elif name == "simpo":
        terms = simpo_loss(logp_w, logp_l, num_layers=6, beta=10.0, gamma=1.0)
    else:
        terms = orpo_loss(logp_w, logp_l, num_layers=6, variant=name, sft_w_B=fbc.loss_B)  # type: ignore[arg-type]
    return terms.loss_B


@pytest.mark.parametrize(
    "name",
    ["fbc", "fbc_likelihood", "dpo", "paper", "thesis_code", "thesis_readme", "ipo", "simpo", "kto", "awr", "value"],
)
def test_one_step_of_each_loss_changes_every_parameter_of_the_router(name: str) -> None:
    torch.manual_seed(0)
    encoder = TextEncoder("tiny:", revision=None, max_length=64, trainable=True)
    router = Router(encoder, num_layers=6, head_hidden_dim=16)
    before = {key: value.clone() for key, value in router.named_parameters()}
    features = encoder.tokenize(["weather in Paris", "add 2 and 3", "book a table for four tonight"])
    preference_loss(name, router, features).mean().backward()
    torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.0).step()
    still = {key for key, value in router.named_parameters() if torch.equal(value, before[key])}
    # FBC is a regression of mu, and the predicted reward has no sigma either.
    assert still == ({"ratio_log_std.weight", "ratio_log_std.bias"} if name in ("fbc", "value") else set())
