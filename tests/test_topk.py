import itertools
import math

import numpy as np
import ot
import pytest
import torch
from mpmath import mp
from scipy import stats

from dynprune.router.logspace import log1mexp, log_inverse_cloglog
from dynprune.router.topk import (
    gumbel_like,
    log_esp,
    relaxed_top_k,
    sample_conditional_bernoulli,
    soft_permutation,
    top_k_mask,
)


def random_logits(*shape: int, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("x", [-1e-6, -1e-3, -0.5, -math.log(2), -0.7, -5.0, -50.0, -1000.0])
def test_log1mexp_is_accurate_and_has_finite_gradients(x: float) -> None:
    t = torch.tensor(x, requires_grad=True)
    value = log1mexp(t)
    value.backward()
    exact = mp.mpf(t.item())
    with mp.workdps(600):
        expected = float(mp.log1p(-mp.exp(exact)))
        slope = float(-1 / mp.expm1(-exact))
    assert value.item() == pytest.approx(expected, rel=1e-5, abs=1e-37)
    assert t.grad is not None
    assert t.grad.item() == pytest.approx(slope, rel=1e-4, abs=1e-37)


@pytest.mark.parametrize("x", [-500.0, -60.0, -20.5, -19.5, -3.0, 0.0, 2.0, 4.0])
def test_log_inverse_cloglog_is_accurate(x: float) -> None:
    with mp.workdps(600):
        expected = float(mp.log(-mp.expm1(-mp.exp(x))))
    found = log_inverse_cloglog(torch.tensor(x, dtype=torch.float64)).item()
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-30)


@pytest.mark.parametrize("x", [-1e4, -100.0, 5.5, 100.0, 1e4])
def test_log_inverse_cloglog_has_finite_gradients_far_out_in_float32(x: float) -> None:
    t = torch.tensor(x, requires_grad=True)
    log_inverse_cloglog(t).backward()
    assert t.grad is not None
    assert t.grad.item() == (1.0 if x < 0 else 0.0)


def test_top_k_takes_each_rows_own_k_and_breaks_ties_by_position() -> None:
    values = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [4.0, 1.0, 2.0, 3.0]])
    found = top_k_mask(values, torch.tensor([2, 3, 0]))
    assert found.int().tolist() == [[0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_soft_permutation_is_pots_sinkhorn_after_as_many_iterations(epsilon: float, iterations: int) -> None:
    scores = random_logits(3, 9).sigmoid()
    found = soft_permutation(scores, epsilon, iterations).exp()
    for row, plan in zip(scores.numpy(), found.numpy(), strict=True):
        cost = (row[:, None] - np.sort(row)[::-1][None, :]) ** 2
        uniform = np.full(9, 1 / 9)
        expected = ot.bregman.sinkhorn_log(uniform, uniform, cost, reg=epsilon, numItermax=iterations, stopThr=0, warn=False)
        np.testing.assert_allclose(plan, 9 * expected, rtol=1e-9, atol=1e-12)


def test_soft_permutation_converges_to_pots_doubly_stochastic_plan() -> None:
    scores = random_logits(1, 12).sigmoid()
    plan = soft_permutation(scores, 0.05, 3000).exp()[0].numpy()
    cost = (scores.numpy()[0][:, None] - np.sort(scores.numpy()[0])[::-1][None, :]) ** 2
    uniform = np.full(12, 1 / 12)
    expected = 12 * ot.bregman.sinkhorn_log(uniform, uniform, cost, reg=0.05, numItermax=100_000, stopThr=1e-12)
    np.testing.assert_allclose(plan, expected, atol=1e-7)
    np.testing.assert_allclose(plan.sum(axis=0), 1, atol=1e-7)


@pytest.mark.parametrize("k_max", [0, 1, 4, 7])
def test_log_esp_gives_the_coefficients_of_the_product_of_linear_factors(k_max: int) -> None:
    logits = random_logits(5, 7)
    found = log_esp(logits, k_max).exp().numpy()
    assert found.shape == (5, k_max + 1)
    for row, e in zip(logits.exp().numpy(), found, strict=True):
        np.testing.assert_allclose(e, np.poly(-row)[: k_max + 1], rtol=1e-10)


def test_log_esp_neither_overflows_nor_loses_digits_in_float32() -> None:
    logits = random_logits(1, 30, scale=40.0, dtype=torch.float32)
    e = [mp.mpf(1)] + [mp.mpf(0)] * 30
    with mp.workdps(60):
        for logit in logits[0].tolist():
            e = [e[0]] + [e[k] + e[k - 1] * mp.exp(logit) for k in range(1, 31)]
        expected = [float(mp.log(value)) for value in e]
    np.testing.assert_allclose(log_esp(logits, 30)[0], expected, rtol=1e-5, atol=1e-3)


def test_gradients_of_log_esp_are_right() -> None:
    assert torch.autograd.gradcheck(lambda x: log_esp(x, 5), random_logits(2, 6).requires_grad_())


@pytest.mark.parametrize("k", [1, 3, 5])
def test_conditional_bernoulli_samples_follow_the_weights_of_the_subsets(k: int) -> None:
    n, size = 30_000, 6
    logits = random_logits(1, size, scale=0.8)
    masks = sample_conditional_bernoulli(logits.expand(n, size), torch.full((n,), k), torch.Generator().manual_seed(1))
    codes = (masks.long() << torch.arange(size)).sum(dim=1).numpy()
    subsets = list(itertools.combinations(range(size), k))
    weights = np.array([math.exp(sum(logits[0, i].item() for i in subset)) for subset in subsets])
    counts = np.array([(codes == sum(1 << i for i in subset)).sum() for subset in subsets])
    assert counts.sum() == n
    assert stats.chisquare(counts, n * weights / weights.sum()).pvalue > 1e-3


def test_conditional_bernoulli_samples_have_exactly_k_even_with_extreme_logits() -> None:
    logits = random_logits(400, 30, scale=60.0, dtype=torch.float32)
    k = torch.arange(400) % 31
    masks = sample_conditional_bernoulli(logits, k, torch.Generator().manual_seed(0))
    assert torch.equal(masks.sum(dim=1), k)


def test_gumbel_noise_has_the_gumbel_distribution() -> None:
    noise = gumbel_like(torch.empty(4000), torch.Generator().manual_seed(0))
    assert stats.kstest(noise.numpy(), stats.gumbel_r.cdf).pvalue > 1e-3


def test_relaxed_top_k_is_the_chain_of_softmaxes() -> None:
    keys, temperature = random_logits(1, 6), 0.7
    alpha, expected = keys[0].numpy().copy(), np.zeros(6)
    for _ in range(3):
        p = np.exp(alpha / temperature) / np.exp(alpha / temperature).sum()
        expected += p
        alpha = alpha + np.log(1 - p)
    found = relaxed_top_k(keys, torch.tensor([3.0], dtype=torch.float64), temperature, k_max=5)
    np.testing.assert_allclose(found[0], expected, rtol=1e-9)


def test_relaxed_top_k_takes_the_count_even_between_integers() -> None:
    count = torch.tensor([0.0, 0.3, 2.6, 4.0], dtype=torch.float64)
    soft = relaxed_top_k(random_logits(4, 6), count, 0.5, k_max=4)
    torch.testing.assert_close(soft.sum(dim=1), count)
    assert (soft >= 0).all()


def test_relaxed_top_k_becomes_hard_as_the_temperature_falls() -> None:
    keys, k = random_logits(8, 10, dtype=torch.float32), torch.arange(8) % 5
    soft = relaxed_top_k(keys, k.float(), 1e-4, k_max=4)
    torch.testing.assert_close(soft, top_k_mask(keys, k).float(), atol=1e-4, rtol=0)


def test_gradients_of_relaxed_top_k_are_right_and_finite_when_it_is_hard() -> None:
    keys = random_logits(3, 5).requires_grad_()
    count = torch.tensor([0.4, 1.7, 2.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, c: relaxed_top_k(x, c, 0.6, 3), (keys, count))
    hard = (40 * random_logits(3, 5, dtype=torch.float32)).requires_grad_()
    weight = torch.arange(5.0)
    (relaxed_top_k(hard, torch.tensor([1.0, 2.0, 3.0]), 0.05, 3) * weight).sum().backward()
    assert hard.grad is not None
    assert hard.grad.isfinite().all()
