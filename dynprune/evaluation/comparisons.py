"""Paired comparisons of rows that answered the same queries.

- Mean differences: BCa over queries. Where queries come in groups, such as those that call a common function, BCa
  with whole groups resampled as well (the cluster bootstrap): queries of one group succeed and fail together, so
  that intervals over single queries can be too narrow, and this one says by how much.
- Paired 0/1 scores: McNemar's exact test, a two-sided binomial test on the queries on which the rows disagree.
- Paired averages of 0/1 scores over seeds: the exact sign-flip test, which is McNemar's for a single seed.
- Several comparisons: Holm's step-down correction (Holm 1979).

Queries are the sample and seeds are a nuisance. A claim is about queries that nobody has asked yet, of which
the test split is a sample; the seeds of a router are a few runs of one recipe, and nobody is interested in them
for themselves. So scores are averaged over seeds for each query first, and queries alone are resampled: the
mean estimates the accuracy of a router trained once more, whichever its seed. Resampling pairs of query and seed
instead would count each query once a seed, as if the answers of one query under three seeds were three queries,
and make intervals up to √S too narrow. What differs between seeds is reported beside the interval, as their spread.

Axis suffixes: S = seeds, N = queries, C = groups of queries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from dynprune.evaluation.statistics import (
    CONFIDENCE,
    Interval,
    bca,
    is_binary,
    is_constant,
    mean_interval,
    paired_samples,
    ratio_of_means,
    resample,
)


@dataclass(frozen=True)
class PairedDifference:
    """What two rows' scores on the same queries say about each other.

    Attributes:
        difference: Mean of ``a - b`` over queries.
        wins: Queries on which ``a`` scores higher.
        losses: Queries on which ``b`` scores higher.
        p_value: McNemar's exact two-sided p for 0/1 scores (over seeds: that of the exact sign-flip test); ``None`` for
            other scores.
    """

    difference: Interval
    wins: int
    losses: int
    p_value: float | None


@dataclass(frozen=True)
class SeedSummary:
    """A score over several seeds of one method.

    Attributes:
        mean: Mean over seeds and queries, with its interval over queries.
        spread: Standard deviation (n - 1) of the seeds' own means; ``None`` for a single seed.
        seeds: Number of seeds.
    """

    mean: Interval
    spread: float | None
    seeds: int


@dataclass(frozen=True)
class Comparison:
    """One row of the table compared with another on the same queries.

    Attributes:
        row: Name of the row.
        baseline: Name of the row that it is compared with.
        score: Name of the score.
        n: Number of queries.
        difference: Mean of the row's score minus the baseline's, queries resampled.
        difference_by_group: The same with groups of queries resampled; ``None`` where there are no groups.
        wins: Queries on which the row scores higher.
        losses: Queries on which the baseline scores higher.
        p_value: McNemar's exact two-sided p for 0/1 scores (over seeds: that of the exact sign-flip test); ``None`` for
            other scores.
        p_holm: `p_value` corrected for all comparisons made together; ``None`` where that is ``None``.
    """

    row: str
    baseline: str
    score: str
    n: int
    difference: Interval
    difference_by_group: Interval | None
    wins: int
    losses: int
    p_value: float | None
    p_holm: float | None


def paired_difference(a: npt.ArrayLike, b: npt.ArrayLike, confidence: float = CONFIDENCE, seed: int = 0) -> PairedDifference:
    """Compares two rows' scores on the same queries.

    Args:
        a: One score per query.
        b: The other row's scores, in the same order of queries.
        confidence: Coverage of the difference's interval, between 0 and 1.
        seed: Seed of the bootstrap.

    Returns:
        The mean difference with its BCa interval over queries, and McNemar's exact p where all are 0/1.

    Raises:
        ValueError: The two have different lengths, or one is not a sample (see `mean_interval`).
    """
    sample_a, sample_b = paired_samples(a, b, confidence)
    wins, losses = int((sample_a > sample_b).sum()), int((sample_a < sample_b).sum())
    p_value = None
    if is_binary(sample_a) and is_binary(sample_b):
        # Only the discordant cells enter the exact test.
        p_value = float(mcnemar([[0, wins], [losses, 0]], exact=True).pvalue)
    return PairedDifference(bca(sample_a - sample_b, confidence, seed), wins, losses, p_value)


def over_seeds(scores_SN: npt.ArrayLike) -> SeedSummary:
    """Summarises one method's scores over its seeds (module docstring).

    Args:
        scores_SN: ``[S, N]``: by seed, one score per query, in the same order of queries; ``[N]`` is one seed.

    Returns:
        Mean with its interval over queries, and the spread between seeds.

    Raises:
        ValueError: The scores have another shape, or are no sample (see `mean_interval`).
    """
    by_seed = _by_seed(scores_SN)
    spread = float(by_seed.mean(axis=1).std(ddof=1)) if len(by_seed) > 1 else None
    return SeedSummary(mean_interval(by_seed.mean(axis=0)), spread, len(by_seed))


def paired_difference_over_seeds(
    a_SN: npt.ArrayLike, b_SN: npt.ArrayLike, confidence: float = CONFIDENCE, seed: int = 0
) -> PairedDifference:
    """Compares two rows on the same queries, each averaged over its seeds per query first.

    The unit of resampling is the query: queries are the sample, seeds are a nuisance (module docstring). Two rows
    may have different numbers of seeds, since seed 1 of the one has nothing to do with seed 1 of the other.

    Args:
        a_SN: ``[S, N]``: by seed, one score per query; ``[N]`` for a row without seeds.
        b_SN: The other row's, for the same queries in the same order.
        confidence: Coverage of the difference's interval, between 0 and 1.
        seed: Seed of the bootstrap.

    Returns:
        What `paired_difference` says about the averages. Where all scores are 0/1 but averages are not, p is that of
        the exact sign-flip test: the chance of a mean difference so far from 0 if for each query it were a coin's
        toss which row had which average. For averages of 0/1 that test is McNemar's.

    Raises:
        ValueError: See `paired_difference`.
    """
    a, b = _by_seed(a_SN), _by_seed(b_SN)
    result = paired_difference(a.mean(axis=0), b.mean(axis=0), confidence, seed)
    if result.p_value is None and is_binary(a) and is_binary(b):
        # Whole numbers, a sum of which is exact: differences of the averages in units of 1 / (S of a * S of b).
        units_N = (a.sum(axis=0) * len(b) - b.sum(axis=0) * len(a)).astype(np.int64)
        return replace(result, p_value=_sign_flip_p(units_N))
    return result


def grouped_difference(
    a_SN: npt.ArrayLike, b_SN: npt.ArrayLike, groups_N: npt.ArrayLike, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """Mean difference of two rows with an interval for which whole groups of queries are resampled.

    Args:
        a_SN: See `paired_difference_over_seeds`.
        b_SN: See `paired_difference_over_seeds`.
        groups_N: A label for each query; queries of one label are resampled together.
        confidence: Coverage, between 0 and 1.
        seed: Seed of the bootstrap.

    Returns:
        The mean over queries, which is that of `paired_difference_over_seeds`, with its BCa interval over groups.

    Raises:
        ValueError: See `paired_difference`.
    """
    a_N, b_N = paired_samples(_by_seed(a_SN).mean(axis=0), _by_seed(b_SN).mean(axis=0), confidence)
    _, group_N = np.unique(np.asarray(groups_N), return_inverse=True)
    total_C, count_C = (np.bincount(group_N, weights).astype(np.float64) for weights in (a_N - b_N, None))
    mean = float(total_C.sum() / count_C.sum())
    if is_constant(total_C - mean * count_C):
        return Interval(mean, mean, mean)
    return Interval(mean, *resample((total_C, count_C), ratio_of_means, "BCa", confidence, seed))


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p values of tests made together, by Holm's step-down method.

    Args:
        p_values: Uncorrected p values.

    Returns:
        The corrected p values in the same order: comparing them with a level α keeps the chance of any false
        rejection at or below α.
    """
    if not p_values:
        return []
    return [float(p) for p in multipletests(p_values, method="holm")[1]]


def compare(
    scores: Mapping[str, npt.ArrayLike],
    pairs: Sequence[tuple[str, str]],
    score: str,
    groups: npt.ArrayLike | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> list[Comparison]:
    """Compares pairs of rows on one score; all pairs together are one family for Holm's correction.

    Args:
        scores: The scores of each row, by its name; one per query, in the same order of queries, or ``[S, N]`` where
            there are seeds (see `paired_difference_over_seeds`).
        pairs: Names ``(row, baseline)`` to compare.
        score: Name of the score, kept in the result.
        groups: A label for each query, see `grouped_difference`; ``None`` for queries that have nothing in common.
        confidence: Coverage of the differences' intervals, between 0 and 1.
        seed: Seed of the bootstrap.

    Returns:
        One comparison a pair, in the order of `pairs`.

    Raises:
        ValueError: A pair names a row without scores, or two rows do not have the same number of scores.
    """
    for name in (name for pair in pairs for name in pair):
        if name not in scores:
            raise ValueError(f"There is no row {name!r} to compare; the rows are {', '.join(scores)}.")
    results = [paired_difference_over_seeds(scores[row], scores[baseline], confidence, seed) for row, baseline in pairs]
    tested = [i for i, result in enumerate(results) if result.p_value is not None]
    p_holm = dict(zip(tested, holm([p for r in results if (p := r.p_value) is not None]), strict=True))
    return [
        Comparison(
            row=row,
            baseline=baseline,
            score=score,
            n=np.shape(scores[row])[-1],
            difference=result.difference,
            difference_by_group=(
                None if groups is None else grouped_difference(scores[row], scores[baseline], groups, confidence, seed)
            ),
            wins=result.wins,
            losses=result.losses,
            p_value=result.p_value,
            p_holm=p_holm.get(i),
        )
        for i, ((row, baseline), result) in enumerate(zip(pairs, results, strict=True))
    ]


def _by_seed(scores: npt.ArrayLike) -> npt.NDArray[np.float64]:
    by_seed = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if by_seed.ndim != 2 or not by_seed.size:
        raise ValueError(
            f"Scores of several seeds have the shape [seeds, queries], both at least 1, not {list(by_seed.shape)}."
        )
    return by_seed


def _sign_flip_p(units_N: npt.NDArray[np.int64]) -> float:
    """Two-sided p of the sum of whole numbers under all 2^N choices of their signs, by its distribution, not by trying them."""
    reach = int(np.abs(units_N).sum())
    chance = np.zeros(2 * reach + 1)
    chance[reach] = 1.0
    for size in np.abs(units_N):
        chance = (np.roll(chance, size) + np.roll(chance, -size)) / 2
    sums = np.arange(-reach, reach + 1)
    return min(1.0, float(chance[np.abs(sums) >= abs(int(units_N.sum()))].sum()))
