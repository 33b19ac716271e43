"""What an exploration tried, and what came of it, by the number of pruned layers."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import mean, pstdev

from dynprune.data.rollouts import Likelihood, Rollout


@dataclass(frozen=True)
class SizeStatistics:
    """What is known of the configurations of one size.

    Attributes:
        pruned_layers: k, the size.
        generated: Configurations that were generated, over all queries.
        estimated: Configurations that were estimated, over all queries.
        success: Share of the generated ones that succeeded; ``None`` where there are none.
        nats_per_token: Mean dense reward of the estimated ones; ``None`` where there are none.
        oracle: Share of the queries for which a configuration of this size or larger succeeded.
    """

    pruned_layers: int
    generated: int
    estimated: int
    success: float | None
    nats_per_token: float | None
    oracle: float


@dataclass(frozen=True)
class ExplorationStatistics:
    """What is known of an exploration.

    Attributes:
        queries: Queries explored.
        distinct_configurations: Different configurations that were generated or estimated, over all queries.
        generated: Generations spent.
        estimated: Estimates spent.
        success: Share of the generated configurations with pruned layers that succeeded.
        pruned_layers: Mean number of layers that these prune.
        pruned_layers_deviation: Standard deviation of that number, over all of them.
        score_variance: Variance of the scores of a query's rollouts, mean over queries.
        deepest_success: Most layers pruned with success, mean over the queries that have a success.
        by_size: From no pruning to the largest size that was tried.

    Means of nothing are ``None``.
    """

    queries: int
    distinct_configurations: int
    generated: int
    estimated: int
    success: float | None
    pruned_layers: float | None
    pruned_layers_deviation: float | None
    score_variance: float | None
    deepest_success: float | None
    by_size: tuple[SizeStatistics, ...]


def exploration_statistics(
    rollouts: Iterable[Rollout], likelihoods: Iterable[Likelihood], min_score: float
) -> ExplorationStatistics:
    """Count what was tried.

    Args:
        rollouts: All rollouts of some queries.
        likelihoods: All dense rewards of these queries, those of the rollouts too.
        min_score: Smallest score that is a success.
    """
    configurations: set[tuple[int, ...]] = set()
    generated: Counter[int] = Counter()
    succeeded: Counter[int] = Counter()
    estimated: Counter[int] = Counter()
    nats: defaultdict[int, float] = defaultdict(float)
    # Size of the largest success of each query; below no pruning where there is none.
    deepest: dict[str, int] = {}
    # Of each query, the number of its rollouts, the sum of their scores, and that of the squares.
    sums: defaultdict[str, tuple[int, float, float]] = defaultdict(lambda: (0, 0.0, 0.0))
    for rollout in rollouts:
        size = len(rollout.pruned_layers)
        configurations.add(rollout.pruned_layers)
        generated[size] += 1
        success = rollout.score >= min_score
        succeeded[size] += success
        deepest[rollout.id] = max(deepest.get(rollout.id, -1), size if success else -1)
        count, total, squares = sums[rollout.id]
        sums[rollout.id] = (count + 1, total + rollout.score, squares + rollout.score**2)
    for likelihood in likelihoods:
        size = len(likelihood.pruned_layers)
        configurations.add(likelihood.pruned_layers)
        estimated[size] += 1
        nats[size] += likelihood.nats_per_token
        deepest.setdefault(likelihood.id, -1)
    by_size = tuple(
        SizeStatistics(
            pruned_layers=size,
            generated=generated[size],
            estimated=estimated[size],
            success=succeeded[size] / generated[size] if generated[size] else None,
            nats_per_token=nats[size] / estimated[size] if estimated[size] else None,
            oracle=sum(largest >= size for largest in deepest.values()) / len(deepest),
        )
        for size in range(1 + max((*generated, *estimated), default=-1))
    )
    sizes = [size for size, count in generated.items() if size for _ in range(count)]
    variances = [max(0.0, squares / count - (total / count) ** 2) for count, total, squares in sums.values()]
    successes = [size for size in deepest.values() if size >= 0]
    return ExplorationStatistics(
        queries=len(deepest),
        distinct_configurations=len(configurations),
        generated=generated.total(),
        estimated=estimated.total(),
        success=sum(count for size, count in succeeded.items() if size) / len(sizes) if sizes else None,
        pruned_layers=mean(sizes) if sizes else None,
        pruned_layers_deviation=pstdev(sizes) if sizes else None,
        score_variance=mean(variances) if variances else None,
        deepest_success=mean(successes) if successes else None,
        by_size=by_size,
    )


def statistics_lines(statistics: ExplorationStatistics) -> Iterator[str]:
    """A small table for the log.

    Args:
        statistics: The statistics.

    Yields:
        Its lines: a summary, the heads of the columns, and a line for each size.
    """
    yield (
        f"{statistics.queries} queries, {statistics.distinct_configurations} distinct configurations, "
        f"{statistics.generated} generated, {statistics.estimated} estimated"
    )
    if statistics.success is not None and statistics.deepest_success is not None:
        yield (
            f"with pruned layers {statistics.success:.0%} succeeded, {statistics.pruned_layers:.1f} ± "
            f"{statistics.pruned_layers_deviation:.1f} layers; deepest success of a query {statistics.deepest_success:.1f} "
            f"layers; variance of the scores within a query {statistics.score_variance:.3f}"
        )
    yield " k  generated  succeeded  estimated  nats/token  oracle at k or more"
    for size in statistics.by_size:
        success = "-" if size.success is None else f"{size.success:.0%}"
        nats = "-" if size.nats_per_token is None else f"{size.nats_per_token:.3f}"
        yield (f"{size.pruned_layers:2}  {size.generated:9}  {success:>9}  {size.estimated:9}  {nats:>10}  {size.oracle:19.0%}")
