"""Budgets at inference: monotone, optimal and met, against brute force over every choice of k."""

import itertools

import numpy as np
import pytest
import torch

from dynprune.router.budget import bonus_for_mean, likeliest, same_count, with_bonus
from dynprune.router.ratio import CategoricalRatio, NormalRatio

Q, K = 4, 5


def log_p(seed: int, queries: int = Q, normal: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if normal:
        mu = torch.rand(queries, generator=generator)
        return NormalRatio(mu, torch.full((queries,), -3.0)).log_pmf(K + 3, K - 1)
    return CategoricalRatio(2 * torch.randn(queries, K, generator=generator)).log_pmf(K + 3, K - 1)


def counts(bonus: float, log_p_QK: torch.Tensor) -> list[int]:
    """argmax by hand, the smaller k of two equals."""
    values = log_p_QK.double().numpy() + bonus * np.arange(log_p_QK.shape[1])
    return [max(range(len(row)), key=lambda k: (row[k], -k)) for row in values]


@pytest.mark.parametrize("normal", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_every_querys_count_never_falls_as_the_bonus_grows(seed: int, normal: bool) -> None:
    log_p_QK = log_p(seed, normal=normal)
    limit = float(log_p_QK.max() - log_p_QK.min()) + 1
    before = [0] * Q
    for bonus in np.linspace(-limit, limit, 2001):
        found = with_bonus(float(bonus))(log_p_QK).tolist()
        assert found == counts(float(bonus), log_p_QK)
        assert all(a <= b for a, b in zip(before, found, strict=True))
        before = found
    assert before == [K - 1] * Q


@pytest.mark.parametrize("seed", range(5))
def test_no_other_choice_of_counts_that_prunes_as_much_in_total_is_likelier(seed: int) -> None:
    log_p_QK = log_p(seed).double()
    for bonus in (-1.3, -0.2, 0.0, 0.7, 2.5):
        chosen = with_bonus(bonus)(log_p_QK).tolist()
        likelihood = sum(log_p_QK[q, k].item() for q, k in enumerate(chosen))
        for other in itertools.product(range(K), repeat=Q):
            if sum(other) == sum(chosen):
                assert sum(log_p_QK[q, k].item() for q, k in enumerate(other)) <= likelihood + 1e-12


@pytest.mark.parametrize("normal", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_bonus_for_a_mean_is_the_cheapest_that_reaches_it(seed: int, normal: bool) -> None:
    log_p_QK = log_p(seed, queries=7, normal=normal).double()
    # Each query can change its k only where two of its values are equal.
    edges = sorted(((row[j] - row[k]) / (k - j)).item() for row in log_p_QK for j, k in itertools.combinations(range(K), 2))
    between = [edges[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(edges)), edges[-1] + 1]
    means = sorted({np.mean(counts(bonus, log_p_QK)) for bonus in between})
    for wanted in np.linspace(0, K - 1, 23):
        found = np.mean(counts(bonus_for_mean(log_p_QK, float(wanted)), log_p_QK))
        assert found == min(mean for mean in means if mean >= wanted - 1e-9)


def test_the_bonus_keeps_away_from_the_edge_at_which_queries_tip() -> None:
    log_p_QK = log_p(0).double()[:1].expand(50, K)
    bonus = bonus_for_mean(log_p_QK, 2.0)
    noise = 1e-6 * torch.randn(50, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert len(set(with_bonus(bonus)(log_p_QK + noise).tolist())) == 1


def test_without_a_budget_the_likeliest_count_is_taken_and_with_one_for_all_the_same() -> None:
    log_p_QK = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]]).log()
    assert likeliest(log_p_QK).tolist() == [1, 0]
    assert same_count(2)(log_p_QK).tolist() == [2, 2]
