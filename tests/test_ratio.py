import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from mpmath import mp
from scipy import stats

from dynprune.router.ratio import CategoricalRatio, NormalRatio

L = 28


def exact_log_pmf(mu: torch.Tensor, log_sigma: torch.Tensor, num_layers: int, k_max: int) -> np.ndarray:
    """The Normal's bucket masses with 60 digits, from the very numbers that the tensors hold."""
    rows = []
    with mp.workdps(60):
        for m, s in zip(mu.tolist(), log_sigma.tolist(), strict=True):
            edges = [(mp.mpf(k) / num_layers - m) / mp.exp(s) for k in range(1, k_max + 1)]
            rows.append([float(mp.log(mass)) for mass in exact_masses(edges)])
    return np.array(rows)


def exact_masses(edges: list[Any]) -> list[Any]:
    def tail(z: Any) -> Any:
        return mp.erfc(z / mp.sqrt(2)) / 2

    inner = [tail(a) - tail(b) if a > 0 else tail(-b) - tail(-a) for a, b in itertools.pairwise(edges)]
    return [tail(-edges[0]), *inner, tail(edges[-1])]


def masses(mu: float, sigma: float, num_layers: int, k_max: int) -> np.ndarray:
    cdf = stats.norm.cdf(np.arange(1, k_max + 1) / num_layers, mu, sigma)
    return np.diff(np.concatenate([[0.0], cdf, [1.0]]))


@pytest.mark.parametrize("k_max", [1, 5, L])
@pytest.mark.parametrize("log_sigma", [-7.0, -5.0, -3.0])
def test_log_pmf_is_the_mass_of_each_bucket(log_sigma: float, k_max: int) -> None:
    mu = torch.tensor([1e-4, 0.1, 4 / L, 0.5, 0.83, 0.9999], dtype=torch.float64)
    log_sigmas = torch.full_like(mu, log_sigma)
    expected = exact_log_pmf(mu, log_sigmas, L, k_max)
    np.testing.assert_allclose(NormalRatio(mu, log_sigmas).log_pmf(L, k_max), expected, rtol=1e-9, atol=1e-9)


def test_buckets_hundreds_of_sigmas_away_are_exact_and_have_finite_gradients_in_float32() -> None:
    mu = torch.tensor([0.02, 0.5, 0.97], requires_grad=True)
    log_sigma = torch.tensor([-7.0, -7.0, -7.0], requires_grad=True)
    log_p = NormalRatio(mu, log_sigma).log_pmf(L, L)
    expected = exact_log_pmf(mu, log_sigma, L, L)
    assert expected.min() < -(40**2) / 2
    np.testing.assert_allclose(log_p.detach(), expected, rtol=1e-6)
    for bucket in range(L + 1):
        gradients = torch.autograd.grad(log_p[:, bucket].sum(), (mu, log_sigma), retain_graph=True)
        assert all(gradient.isfinite().all() for gradient in gradients), bucket
    # The far bucket pulls mu towards it with the force (distance to its near edge) / sigma².
    (force,) = torch.autograd.grad(log_p[0, 20], mu)
    assert force[0].item() == pytest.approx((20 / L - 0.02) / math.exp(-14), rel=1e-3)


def test_gradients_are_right_near_and_far() -> None:
    mu = torch.tensor([0.1, 0.31, 0.93], dtype=torch.float64, requires_grad=True)
    log_sigma = torch.tensor([-3.0, -5.0, -6.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, s: NormalRatio(m, s).log_pmf(L, 20), (mu, log_sigma), eps=1e-7, rtol=1e-4)


@pytest.mark.parametrize("k_max", [1, 3, 8])
def test_masses_sum_to_one(k_max: int) -> None:
    mu, log_sigma = torch.rand(64), torch.empty(64).uniform_(-7, -3)
    total = NormalRatio(mu, log_sigma).log_pmf(8, k_max).logsumexp(dim=1)
    torch.testing.assert_close(total, torch.zeros(64), atol=2e-6, rtol=0)


def test_tails_are_folded_into_the_first_and_the_last_bucket() -> None:
    p = NormalRatio(torch.tensor([0.3]), torch.tensor([math.log(0.2)])).log_pmf(8, 3).exp()[0]
    assert p[0].item() == pytest.approx(stats.norm.cdf(1 / 8, 0.3, 0.2), rel=1e-5)
    assert p[3].item() == pytest.approx(stats.norm.sf(3 / 8, 0.3, 0.2), rel=1e-5)


@pytest.mark.parametrize(("mu", "sigma", "k_max"), [(0.3, 0.2, 8), (0.3, 0.2, 3), (0.55, 0.05, 8)])
def test_sampled_k_follow_the_masses(mu: float, sigma: float, k_max: int) -> None:
    n = 20_000
    generator = torch.Generator().manual_seed(3)
    k = NormalRatio(torch.full((n,), mu), torch.full((n,), math.log(sigma))).sample_count(8, k_max, generator).floor().long()
    expected = n * masses(mu, sigma, 8, k_max)
    counts = np.bincount(k.numpy(), minlength=k_max + 1)
    likely = expected > 5
    assert counts[~likely].sum() <= 10 + 3 * expected[~likely].sum()
    scale = counts[likely].sum() / expected[likely].sum()
    assert stats.chisquare(counts[likely], expected[likely] * scale).pvalue > 1e-3


def test_sampled_k_never_leaves_the_allowed_range() -> None:
    mu = torch.tensor([0.0, 0.02, 0.98, 1.0]).repeat(500)
    k = NormalRatio(mu, torch.zeros_like(mu)).sample_count(8, 5, torch.Generator().manual_seed(0)).floor()
    assert k.min() == 0
    assert k.max() == 5


def test_a_sampled_count_carries_the_gradient_of_the_ratio_in_layers() -> None:
    mu = torch.tensor([0.5, 0.001], requires_grad=True)
    log_sigma = torch.tensor([-7.0, -7.0], requires_grad=True)
    count = NormalRatio(mu - torch.tensor([0.0, 1.0]), log_sigma).sample_count(8, 8, torch.Generator().manual_seed(0))
    count.sum().backward()
    assert mu.grad is not None
    assert mu.grad.tolist() == [8.0, 0.0]  # the second one is clipped at 0


def test_the_mode_is_the_heaviest_bucket() -> None:
    mu, sigma = np.linspace(0.013, 0.987, 37), 0.07
    expected = [int(masses(m, sigma, L, 20).argmax()) for m in mu]
    found = NormalRatio(torch.tensor(mu), torch.full((37,), math.log(sigma), dtype=torch.float64)).log_pmf(L, 20).argmax(dim=1)
    assert found.tolist() == expected


def test_a_target_in_the_middle_of_a_bucket_gives_that_bucket() -> None:
    mu = (torch.arange(L) + 0.5) / L
    assert NormalRatio(mu, torch.full((L,), -5.0)).log_pmf(L, L).argmax(dim=1).tolist() == list(range(L))


def test_a_categorical_is_the_softmax_of_its_logits_and_samples_follow_it() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(CategoricalRatio(logits).log_pmf(8, 4).exp(), p, rtol=1e-12)
    many = CategoricalRatio(logits[:1].expand(20_000, 5)).sample_count(8, 4, torch.Generator().manual_seed(1))
    counts = np.bincount(many.floor().long().numpy(), minlength=5)
    assert stats.chisquare(counts, 20_000 * p[0]).pvalue > 1e-3


def test_a_sampled_count_of_a_categorical_has_the_gradient_of_the_mean_count() -> None:
    logits = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    count = CategoricalRatio(logits).sample_count(8, 3, torch.Generator().manual_seed(0))
    assert count.item() in {0.0, 1.0, 2.0, 3.0}
    (found,) = torch.autograd.grad(count.sum(), logits)

    def mean(values: np.ndarray) -> float:
        return float((np.exp(values) * np.arange(4)).sum() / np.exp(values).sum())

    base, step = logits.detach().numpy()[0], 1e-6
    differences = [(mean(base + step * unit) - mean(base - step * unit)) / (2 * step) for unit in np.eye(4)]
    np.testing.assert_allclose(found[0], differences, rtol=1e-6)


def test_half_precision_heads_give_float32() -> None:
    assert CategoricalRatio(torch.zeros(1, 3).bfloat16()).log_pmf(8, 2).dtype == torch.float32
    assert NormalRatio(torch.zeros(1).bfloat16(), torch.zeros(1).bfloat16()).log_pmf(8, 2).dtype == torch.float32
