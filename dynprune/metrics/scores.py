"""The scores by the names that configs and tables use, and their means as torchmetrics for logging."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from dynprune.data.tasks import Query
from dynprune.metrics.ast_match import ast_match
from dynprune.metrics.function_calls import (
    PARTIAL_MATCH_RANGE,
    exact_match,
    json_match,
    name_match,
    parse_rate,
    partial_match,
    partial_match_normalized,
    ratio_function_calls,
)

Score = Callable[[str, Query], float]

SCORES: dict[str, Score] = {
    "json_match": json_match,
    "ast_match": ast_match,
    "name_match": name_match,
    "parse_rate": parse_rate,
    "exact_match": exact_match,
    "ratio_function_calls": ratio_function_calls,
    "partial_match": partial_match,
    "partial_match_normalized": partial_match_normalized,
}
"""Each takes an output and its query; values lie in [0, 1], `partial_match` in [-5, 10]; more is better. A plugin may
add its own, with values in [0, 1]."""


def get_score(name: str, key: str) -> Score:
    """Finds a score.

    Args:
        name: A key of `SCORES`.
        key: The configuration key that names it, for the error message.

    Raises:
        ValueError: If there is no such score.
    """
    if name not in SCORES:
        raise ValueError(f"{key}={name!r} is unknown; allowed: {', '.join(SCORES)}")
    return SCORES[name]


def all_scores(output: str, query: Query) -> dict[str, float]:
    """Every score of an output, by name."""
    return {name: score(output, query) for name, score in SCORES.items()}


def perfect_score(name: str) -> float:
    """What a score gives a perfect answer.

    Args:
        name: A key of `SCORES`.
    """
    return PARTIAL_MATCH_RANGE[1] if name == "partial_match" else 1.0


class MeanScore(Metric):
    """The mean of one score over all queries, of all processes."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, name: str) -> None:
        """Starts at no query.

        Args:
            name: A key of `SCORES`.

        Raises:
            ValueError: If there is no such score.
        """
        super().__init__()
        self.score = get_score(name, "name")
        # Sums, not means: processes may have different numbers of queries.
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outputs: Sequence[str], queries: Sequence[Query]) -> None:
        """Adds outputs, each with its query.

        Args:
            outputs: What the SLM said.
            queries: As many queries.
        """
        self.total += sum(self.score(output, query) for output, query in zip(outputs, queries, strict=True))
        self.count += len(queries)

    def compute(self) -> Tensor:
        """The mean, a scalar; NaN before the first query."""
        return self.total / self.count


def mean_scores(names: Iterable[str] | None = None) -> MetricCollection:
    """Collects the means of several scores, to be updated together.

    Args:
        names: Keys of `SCORES`; all of them by default.

    Raises:
        ValueError: If there is no such score.
    """
    # Compute groups merge metrics whose states agree after the first batch, as those of two scores easily do.
    return MetricCollection({name: MeanScore(name) for name in (SCORES if names is None else names)}, compute_groups=False)
