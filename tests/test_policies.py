import functools
import itertools
import math
from typing import Any

import numpy as np
import ot
import pytest
import torch
from scipy import stats

from dynprune.router.budget import same_count
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies import (
    ConditionalBernoulliPolicy,
    GumbelPolicy,
    PlackettLucePolicy,
    Policy,
    SinkhornPolicy,
    ValuePolicy,
    build_policy,
)
from dynprune.router.ratio import CategoricalRatio, NormalRatio

# Log π is the sum of the ratio head's log P(k) and the policy's own log P(y | k).
OF_RATIO = [ConditionalBernoulliPolicy, PlackettLucePolicy, GumbelPolicy, SinkhornPolicy]
VALUE = functools.partial(ValuePolicy, min_reward=0.5)
NORMALISED = [ConditionalBernoulliPolicy, PlackettLucePolicy, GumbelPolicy, VALUE]
ALL = [*OF_RATIO, VALUE]


def outputs(
    batch: int,
    num_layers: int,
    scale: float = 1.5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    num_counts: int | None = None,
) -> RouterOutputs:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, num_layers, dtype=dtype, generator=generator)
    if num_counts is not None:
        return RouterOutputs(logits, CategoricalRatio(torch.randn(batch, num_counts, dtype=dtype, generator=generator)))
    mu = 0.1 + 0.8 * torch.rand(batch, dtype=dtype, generator=generator)
    return RouterOutputs(logits, NormalRatio(mu, torch.full((batch,), math.log(0.2), dtype=dtype)))


def all_masks(num_layers: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=num_layers)))


def one_row(heads: RouterOutputs, row: int, copies: int = 1) -> RouterOutputs:
    own = [head[row : row + 1].expand(copies, *head.shape[1:]) for head in vars(heads.ratio).values()]
    return RouterOutputs(heads.layer_logits_BL[row].repeat(copies, 1), type(heads.ratio)(*own))


def log_k(heads: RouterOutputs, row: int, n: int, k: int, k_max: int) -> float:
    if isinstance(heads.ratio, CategoricalRatio):
        logits = heads.ratio.logits_BK[row].tolist()
        return logits[k] - math.log(sum(map(math.exp, logits)))
    mu, sigma = heads.ratio.mu_B[row].item(), heads.ratio.log_sigma_B[row].exp().item()
    low = -math.inf if k == 0 else k / n
    high = math.inf if k == k_max else (k + 1) / n
    return math.log(stats.norm.cdf(high, mu, sigma) - stats.norm.cdf(low, mu, sigma))


def plackett_luce_by_orders(weights: np.ndarray, subset: tuple[int, ...]) -> float:
    total = 0.0
    for order in itertools.permutations(subset):
        left, probability = weights.sum(), 1.0
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        total += probability
    return math.log(total)


def plackett_luce_by_subsets(weights: np.ndarray, subset: tuple[int, ...]) -> float:
    # P(drawn so far = T) sums over the last one drawn, so 2^k terms stand for k! orders.
    probability: dict[frozenset[int], float] = {frozenset(): 1.0}
    for size in range(1, len(subset) + 1):
        for drawn in map(frozenset, itertools.combinations(subset, size)):
            left = {i: sum(w for j, w in enumerate(weights) if j == i or j not in drawn) for i in drawn}
            probability[drawn] = sum(probability[drawn - {i}] * weights[i] / left[i] for i in drawn)
    return math.log(probability[frozenset(subset)])


def conditional_bernoulli_by_subsets(logits: np.ndarray, subset: tuple[int, ...]) -> float:
    others = itertools.combinations(range(len(logits)), len(subset))
    total = sum(math.exp(logits[list(other)].sum()) for other in others)
    return float(logits[list(subset)].sum()) - math.log(total)


def sinkhorn_by_pot(logits: np.ndarray, subset: tuple[int, ...]) -> float:
    n, k = len(logits), len(subset)
    if k in (0, n):
        return 0.0
    scores = 1 / (1 + np.exp(-logits))
    cost = (scores[:, None] - np.sort(scores)[::-1][None, :]) ** 2
    uniform = np.full(n, 1 / n)
    plan = n * ot.bregman.sinkhorn_log(uniform, uniform, cost, reg=0.1, numItermax=2, stopThr=0, warn=False)
    p = plan[:, :k].sum(axis=1)
    pruned = np.isin(np.arange(n), subset)
    return float(np.log(np.where(pruned, p, 1 - p)).sum())


ORACLES: dict[type[Policy], Any] = {
    ConditionalBernoulliPolicy: conditional_bernoulli_by_subsets,
    PlackettLucePolicy: lambda logits, subset: plackett_luce_by_orders(np.exp(logits), subset),
    GumbelPolicy: lambda logits, subset: plackett_luce_by_orders(np.exp(logits), subset),
    SinkhornPolicy: sinkhorn_by_pot,
}


@pytest.mark.parametrize("num_counts", [None, 7])
@pytest.mark.parametrize("policy_class", OF_RATIO)
def test_log_prob_agrees_with_enumeration_for_every_configuration(policy_class: type[Policy], num_counts: int | None) -> None:
    heads, masks = outputs(2, 6, num_counts=num_counts), all_masks(6)
    for row in range(2):
        logits = heads.layer_logits_BL[row].numpy()
        found = policy_class(6).log_prob(one_row(heads, row, len(masks)), masks)
        expected = []
        for mask in masks:
            subset = tuple(mask.nonzero()[:, 0].tolist())
            of_subset = ORACLES[policy_class](logits, subset)
            expected.append(log_k(heads, row, 6, len(subset), 6) + of_subset)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("scale", "dtype", "atol"), [(1.0, torch.float32, 1e-5), (8.0, torch.float64, 1e-8)])
def test_the_clock_integral_gives_plackett_luce_for_each_k_of_eight_layers(
    scale: float, dtype: torch.dtype, atol: float
) -> None:
    heads, masks = outputs(1, 8, scale=scale, dtype=dtype), all_masks(8)
    weights = heads.layer_logits_BL[0].double().exp().numpy()
    found = PlackettLucePolicy(8).log_prob(one_row(heads, 0, 256), masks)
    for mask, log_prob in zip(masks, found, strict=True):
        subset = tuple(mask.nonzero()[:, 0].tolist())
        of_subset = log_prob.item() - log_k(heads, 0, 8, len(subset), 8)
        assert of_subset == pytest.approx(plackett_luce_by_subsets(weights, subset), abs=atol * max(1, scale**2))


@pytest.mark.parametrize("k", [1, 10, 29])
def test_the_clock_integral_holds_for_thirty_layers_even_where_the_worst_are_drawn(k: int) -> None:
    # Equal logits within and far below those outside: P is k!·Π(r/Θ) to first order in the tiny rates r.
    logits = torch.zeros(1, 30, dtype=torch.float64)
    logits[0, :k] = -25.0
    mask = torch.arange(30)[None, :] < k
    heads = RouterOutputs(logits, NormalRatio(torch.tensor([0.5]).double(), torch.tensor([-3.0]).double()))
    policy = PlackettLucePolicy(30)
    found = policy.log_prob(heads, mask) - policy.log_prob(RouterOutputs(torch.zeros_like(logits), heads.ratio), mask)
    uniform = -math.log(math.comb(30, k))
    expected = math.lgamma(k + 1) - k * (25 + math.log(30 - k))
    assert found.item() + uniform == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"k_max": 3}, {"prunable_layers": [1, 2, 5, 6], "k_max": 3}])
@pytest.mark.parametrize("categorical", [False, True])
@pytest.mark.parametrize("policy_class", NORMALISED)
def test_probabilities_sum_to_one(policy_class: type[Policy], categorical: bool, settings: dict[str, Any]) -> None:
    masks = all_masks(8)
    for dtype, atol in ((torch.float32, 2e-5), (torch.float64, 1e-6)):
        heads = outputs(3, 8, dtype=dtype, num_counts=settings.get("k_max", 8) + 1 if categorical else None)
        for row in range(3):
            log_p = policy_class(8, **settings).log_prob(one_row(heads, row, len(masks)), masks)
            assert log_p.logsumexp(dim=0).item() == pytest.approx(0, abs=atol)


def test_sinkhorn_probabilities_miss_one_by_what_is_recorded(record_property: Any) -> None:
    masks, heads = all_masks(8), outputs(4, 8)
    for row, recorded in enumerate([-0.481, -0.549, -1.031, -0.717]):
        log_p = SinkhornPolicy(8).log_prob(one_row(heads, row, len(masks)), masks)
        record_property(f"sinkhorn_logsumexp_row_{row}", log_p.logsumexp(dim=0).item())
        # A product over layers also puts weight on subsets of other sizes than the k that P(k) speaks of: the
        # sum over all configurations of size k is the chance that independent inclusions number k.
        expected = 0.0
        for k in range(9):
            subsets = itertools.combinations(range(8), k)
            logits = heads.layer_logits_BL[row].numpy()
            chance = sum(math.exp(sinkhorn_by_pot(logits, subset)) for subset in subsets)
            assert 0 < k < 8 or chance == pytest.approx(1)
            expected += math.exp(log_k(heads, row, 8, k, 8)) * chance
        assert log_p.logsumexp(dim=0).item() == pytest.approx(math.log(expected), abs=1e-7)
        assert math.log(expected) == pytest.approx(recorded, abs=1e-3)


def test_sinkhorn_probabilities_come_closer_to_one_as_epsilon_falls() -> None:
    masks, heads = all_masks(8), outputs(1, 8)
    totals = [
        SinkhornPolicy(8, epsilon=epsilon, iterations=50).log_prob(one_row(heads, 0, len(masks)), masks).logsumexp(dim=0).item()
        for epsilon in (0.1, 0.01, 1e-4)
    ]
    assert totals == sorted(totals)
    assert totals[-1] > -0.15


@pytest.mark.parametrize("policy_class", ALL)
def test_impossible_configurations_have_log_prob_minus_infinity_and_no_gradient(
    policy_class: type[Policy],
) -> None:
    policy = policy_class(6, prunable_layers=[1, 2, 4, 5], k_max=2)
    masks = all_masks(6)
    possible = ~masks[:, 0] & ~masks[:, 3] & (masks.sum(dim=1) <= 2)
    heads = one_row(outputs(1, 6), 0, len(masks))
    heads.layer_logits_BL.requires_grad_()
    log_p = policy.log_prob(heads, masks)
    assert torch.equal(policy.allows(masks), possible)
    assert torch.equal(log_p.isfinite(), possible)
    assert (log_p[~possible] == -math.inf).all()
    (gradient,) = torch.autograd.grad(log_p[possible].sum(), heads.layer_logits_BL)
    assert gradient.isfinite().all()
    assert (gradient[~possible] == 0).all()


@pytest.mark.parametrize("policy_class", ALL)
def test_a_policy_on_some_layers_is_the_policy_of_an_slm_that_has_only_those(policy_class: type[Policy]) -> None:
    layers = [0, 2, 3, 6]
    heads = outputs(16, 7)
    small = RouterOutputs(heads.layer_logits_BL[:, layers], heads.ratio)
    masks = torch.zeros(16, 7, dtype=torch.bool)
    masks[:, layers] = all_masks(4)
    part, whole = policy_class(7, prunable_layers=layers, k_max=3), policy_class(4, k_max=3)
    torch.testing.assert_close(part.log_prob(heads, masks), whole.log_prob(small, all_masks(4)))
    assert torch.equal(part.mode(heads)[:, layers], whole.mode(small))
    drawn = part.sample(heads, torch.Generator().manual_seed(5))
    assert torch.equal(drawn[:, layers], whole.sample(small, torch.Generator().manual_seed(5)))
    assert not drawn[:, [1, 4, 5]].any()


def chi_square_p_value(masks: torch.Tensor, policy: Policy, heads: RouterOutputs) -> float:
    n, num_layers = masks.shape
    everything = all_masks(num_layers)
    weights = policy.log_prob(one_row(heads, 0, len(everything)), everything).exp().numpy()
    if isinstance(policy, SinkhornPolicy):
        # Sinkhorn renormalises within each k when it draws: P(k) times its share among the subsets of size k.
        size = everything.sum(dim=1).numpy()
        for k in range(num_layers + 1):
            of_size = weights[size == k].sum()
            weights[size == k] *= math.exp(log_k(heads, 0, num_layers, k, num_layers)) / of_size
    powers = 2 ** torch.arange(num_layers).flip(0)
    counts = np.bincount((masks.long() * powers).sum(dim=1).numpy(), minlength=2**num_layers)
    expected = n * weights
    likely = expected >= 5
    counts = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(expected[likely], expected[~likely].sum())
    assert expected.sum() == pytest.approx(n, rel=1e-5)
    return float(stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue)


@pytest.mark.parametrize("num_counts", [None, 6])
@pytest.mark.parametrize("policy_class", ALL)
def test_samples_are_as_frequent_as_log_prob_says(policy_class: type[Policy], num_counts: int | None) -> None:
    heads, policy = outputs(1, 5, num_counts=num_counts), policy_class(5)
    masks = policy.sample(one_row(heads, 0, 40_000), torch.Generator().manual_seed(11))
    assert chi_square_p_value(masks, policy, heads) > 1e-3


@pytest.mark.parametrize("num_counts", [None, 6])
def test_straight_through_samples_are_hard_and_as_frequent_as_log_prob_says(num_counts: int | None) -> None:
    heads, policy = outputs(1, 5, num_counts=num_counts), GumbelPolicy(5)
    masks = policy.relaxed_sample(one_row(heads, 0, 40_000), 0.5, torch.Generator().manual_seed(2))
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert chi_square_p_value(masks, policy, heads) > 1e-3


def test_straight_through_samples_have_a_gradient_in_all_three_heads() -> None:
    heads = outputs(6, 8, dtype=torch.float32)
    for head in (heads.layer_logits_BL, heads.ratio.mu_B, heads.ratio.log_sigma_B):
        head.requires_grad_()
    policy = GumbelPolicy(8, prunable_layers=[1, 2, 3, 4, 5, 6])
    masks = policy.relaxed_sample(heads, 0.5, torch.Generator().manual_seed(0))
    cost = torch.arange(8.0) ** 2
    (masks * cost).sum().backward()
    logits_gradient = heads.layer_logits_BL.grad
    assert logits_gradient is not None
    assert logits_gradient.isfinite().all()
    assert (logits_gradient[:, [0, 7]] == 0).all()
    assert logits_gradient[:, 1:7].abs().sum() > 0
    assert heads.ratio.mu_B.grad is not None
    assert (heads.ratio.mu_B.grad > 0).any()
    assert heads.ratio.log_sigma_B.grad is not None
    assert (heads.ratio.log_sigma_B.grad != 0).any()


def test_straight_through_samples_have_a_gradient_in_the_logits_of_a_categorical() -> None:
    heads = outputs(6, 8, dtype=torch.float32, num_counts=9)
    heads.ratio.logits_BK.requires_grad_()
    masks = GumbelPolicy(8).relaxed_sample(heads, 0.5, torch.Generator().manual_seed(0))
    (masks * torch.arange(8.0) ** 2).sum().backward()
    gradient = heads.ratio.logits_BK.grad
    assert gradient.isfinite().all()
    # To prune more costs more: the largest k is the one to avoid, and its logit the one to lower.
    assert (gradient[:, -1] > 0).all()


def test_a_temperature_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature=0"):
        GumbelPolicy(4).relaxed_sample(outputs(1, 4), 0.0)


@pytest.mark.parametrize("num_counts", [None, 5])
@pytest.mark.parametrize("policy_class", OF_RATIO)
def test_the_mode_is_the_likeliest_configuration_of_the_likeliest_size(
    policy_class: type[Policy], num_counts: int | None
) -> None:
    heads, masks, policy = outputs(5, 6, num_counts=num_counts), all_masks(6), policy_class(6, k_max=4)
    modes = policy.mode(heads)
    for row in range(5):
        k = max(range(5), key=lambda k: log_k(heads, row, 6, k, 4))
        candidates = masks[masks.sum(dim=1) == k]
        log_p = policy.log_prob(one_row(heads, row, len(candidates)), candidates)
        assert torch.equal(modes[row], candidates[log_p.argmax()])


@pytest.mark.parametrize("settings", [{}, {"k_max": 3}, {"prunable_layers": [0, 2, 3, 5, 6]}])
def test_the_value_policy_is_the_gibbs_distribution_of_the_summed_logits(settings: dict[str, Any]) -> None:
    heads, masks, policy = outputs(2, 7), all_masks(7), ValuePolicy(7, **settings, min_reward=0.5)
    possible = policy.allows(masks).numpy()
    for row in range(2):
        energy = masks.numpy() @ heads.layer_logits_BL[row].numpy()
        expected = energy - math.log(np.exp(energy[possible]).sum())
        found = policy.log_prob(one_row(heads, row, len(masks)), masks).numpy()
        np.testing.assert_allclose(found[possible], expected[possible], atol=1e-10)
        assert (found[~possible] == -math.inf).all()


@pytest.mark.parametrize("min_reward", [0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("settings", [{}, {"k_max": 3}, {"prunable_layers": [0, 2, 3, 5, 6], "k_max": 4}, {"deepest": 2}])
def test_the_value_policy_finds_the_deepest_configuration_that_is_predicted_to_be_good(
    settings: dict[str, Any], min_reward: float
) -> None:
    heads, masks, policy = outputs(40, 8), all_masks(8), ValuePolicy(8, **settings, min_reward=min_reward)
    # From queries that bear hardly any pruning to queries that bear nearly all.
    heads = RouterOutputs(heads.layer_logits_BL + torch.linspace(-3, 2, 40)[:, None], heads.ratio)
    candidates = masks[policy.allows(masks)].numpy()
    candidates = candidates[candidates.sum(axis=1) <= settings.get("deepest", 8)]
    modes = policy.mode(heads).numpy()
    sizes = []
    for row in range(40):
        mu = heads.ratio.mu_B[row].item()
        logit = math.log(mu / (1 - mu)) + candidates @ heads.layer_logits_BL[row].numpy()
        reward = 1 / (1 + np.exp(-logit))
        np.testing.assert_allclose(
            policy.reward_logits(one_row(heads, row, len(candidates)), torch.from_numpy(candidates)), logit, atol=1e-10
        )
        good = np.flatnonzero(reward >= min_reward)
        best = max(good, key=lambda i: (candidates[i].sum(), reward[i]), default=None)
        expected = np.zeros(8, dtype=bool) if best is None else candidates[best]
        assert (modes[row] == expected).all()
        sizes.append(expected.sum())
    assert len(set(sizes)) > 1


def test_a_mean_that_rounds_to_one_still_gives_a_finite_reward() -> None:
    ratio = NormalRatio(torch.tensor([0.0, 1.0], requires_grad=True), torch.full((2,), -5.0))
    heads = RouterOutputs(torch.zeros(2, 3), ratio)
    logits = ValuePolicy(3, min_reward=0.5).reward_logits(heads, torch.zeros(2, 3, dtype=torch.bool))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert ratio.mu_B.grad is not None
    assert ratio.mu_B.grad.isfinite().all()


@pytest.mark.parametrize("min_reward", [0.0, 1.0, -1.0])
def test_a_reward_that_every_or_no_prediction_reaches_is_refused_by_its_key(min_reward: float) -> None:
    with pytest.raises(ValueError, match=r"method\.policy\.min_reward="):
        ValuePolicy(8, min_reward=min_reward)


@pytest.mark.parametrize("policy_class", ALL)
def test_the_mode_under_a_budget_is_the_likeliest_configuration_of_its_size(policy_class: type[Policy]) -> None:
    heads, masks, policy = outputs(5, 6), all_masks(6), policy_class(6, k_max=4)
    candidates = masks[masks.sum(dim=1) == 3]
    for row, mode in enumerate(policy.mode(heads, same_count(3))):
        assert torch.equal(mode, candidates[policy.log_prob(one_row(heads, row, len(candidates)), candidates).argmax()])


@pytest.mark.parametrize("policy_class", ALL)
def test_gradients_of_log_prob_are_right(policy_class: type[Policy]) -> None:
    heads = outputs(4, 5)
    masks = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    inputs = tuple(head.clone().requires_grad_() for head in (heads.layer_logits_BL, heads.ratio.mu_B, heads.ratio.log_sigma_B))
    policy = policy_class(5)
    assert torch.autograd.gradcheck(lambda *h: policy.log_prob(RouterOutputs(h[0], NormalRatio(h[1], h[2])), masks), inputs)


@pytest.mark.parametrize("policy_class", ALL)
def test_a_row_alone_is_the_row_in_its_batch(policy_class: type[Policy]) -> None:
    heads = outputs(6, 9, dtype=torch.float32)
    policy = policy_class(9, k_max=7)
    masks = all_masks(9)[torch.tensor([0, 9, 100, 257, 300, 127])]
    together, modes = policy.log_prob(heads, masks), policy.mode(heads)
    for row in range(6):
        alone = policy.log_prob(one_row(heads, row), masks[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-6, atol=1e-6)
        assert torch.equal(policy.mode(one_row(heads, row))[0], modes[row])


@pytest.mark.parametrize("policy_class", ALL)
def test_extreme_heads_give_finite_values_and_gradients_in_float32(policy_class: type[Policy]) -> None:
    logits = torch.linspace(-60, 60, 30).repeat(31, 1).requires_grad_()
    heads = RouterOutputs(logits, NormalRatio(torch.full((31,), 0.01), torch.full((31,), -7.0)))
    masks = torch.arange(30)[None, :] < torch.arange(31)[:, None]
    # Anomaly detection also refuses a NaN that a later step would have multiplied away.
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        log_p = policy_class(30).log_prob(heads, masks)
        log_p.sum().backward()
    assert log_p.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("policy_class", ALL)
def test_half_precision_heads_are_computed_in_float32(policy_class: type[Policy]) -> None:
    heads = outputs(2, 6, dtype=torch.float32)
    half = RouterOutputs(
        heads.layer_logits_BL.bfloat16(), NormalRatio(heads.ratio.mu_B.bfloat16(), heads.ratio.log_sigma_B.bfloat16())
    )
    full = RouterOutputs(half.layer_logits_BL.float(), NormalRatio(half.ratio.mu_B.float(), half.ratio.log_sigma_B.float()))
    mask = all_masks(6)[[5, 40]]
    found = policy_class(6).log_prob(half, mask)
    assert found.dtype == torch.float32
    assert torch.equal(found, policy_class(6).log_prob(full, mask))


@pytest.mark.parametrize("policy_class", ALL)
def test_a_policy_with_one_layer_either_prunes_it_or_does_not(policy_class: type[Policy]) -> None:
    heads = outputs(1, 4)
    policy = policy_class(4, prunable_layers=[2])
    masks = torch.tensor([[False] * 4, [False, False, True, False]])
    p = policy.log_prob(one_row(heads, 0, 2), masks).exp()
    assert p.sum().item() == pytest.approx(1)
    assert policy.sample(one_row(heads, 0, 50))[:, [0, 1, 3]].sum() == 0


@pytest.mark.parametrize("layers", [[], [0, 8], [-1, 2], [3, 3]])
def test_wrong_prunable_layers_are_refused_by_their_key(layers: list[int]) -> None:
    with pytest.raises(ValueError, match=r"router\.prunable_layers.*allowed: .*\b0\.\.7"):
        ConditionalBernoulliPolicy(8, prunable_layers=layers)


@pytest.mark.parametrize("k_max", [0, -1, 4])
def test_a_wrong_k_max_is_refused_by_its_key(k_max: int) -> None:
    with pytest.raises(ValueError, match=rf"router\.k_max={k_max} .*allowed: 1\.\.3"):
        ConditionalBernoulliPolicy(8, prunable_layers=[1, 2, 3], k_max=k_max)


@pytest.mark.parametrize("setting", [{"epsilon": 0.0}, {"epsilon": -1.0}, {"iterations": 0}])
def test_wrong_sinkhorn_settings_are_refused_by_their_key(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"router\.sinkhorn\.{next(iter(setting))}="):
        SinkhornPolicy(8, **setting)


@pytest.mark.parametrize(
    "policy",
    [
        ConditionalBernoulliPolicy(9, [4, 1, 2], 2),
        PlackettLucePolicy(9, k_max=8),
        GumbelPolicy(9, [4, 1, 2]),
        SinkhornPolicy(9, None, 3, epsilon=0.02, iterations=7),
        ValuePolicy(9, [4, 1, 2], 2, min_reward=0.7, deepest=1),
    ],
)
def test_a_policy_is_rebuilt_from_its_config(policy: Policy) -> None:
    rebuilt = build_policy(policy.config())
    assert type(rebuilt) is type(policy)
    assert vars(rebuilt) == vars(policy)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router\.policy='best'.*sinkhorn"):
        build_policy({"name": "best", "num_layers": 4})
