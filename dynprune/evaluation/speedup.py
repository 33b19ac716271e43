"""The two speedups of a table: the thesis's count of layers, and the clock.

Both are shares of the full SLM's cost: 0.2 says that 20% is saved, a negative value that the pruned SLM is
slower.

Axis suffixes: N = queries.
"""

import numpy as np
import numpy.typing as npt

from dynprune.evaluation.statistics import CONFIDENCE, MedianInterval, median_interval


def nominal_speedup(mean_pruned_layers: float, router_cost_layers: float, num_layers: int) -> float:
    """The thesis's figure: (mean pruned layers - router cost in layers) / L.

    Args:
        mean_pruned_layers: Number of pruned layers, averaged over queries; 0 to L.
        router_cost_layers: What the router costs, in layers of the SLM: 1 in the thesis, 0 for a row without
            a router.
        num_layers: L, the number of decoder layers of the SLM.

    Returns:
        The share of layers saved. It ignores the embedding, the output head, the adapters and all overheads.

    Raises:
        ValueError: A count is out of range.
    """
    if num_layers < 1:
        raise ValueError(f"An SLM has at least one decoder layer, but num_layers is {num_layers}.")
    if not 0 <= mean_pruned_layers <= num_layers:
        raise ValueError(
            f"The mean number of pruned layers is {mean_pruned_layers}, but an SLM of {num_layers} layers "
            f"allows 0 to {num_layers}."
        )
    if router_cost_layers < 0:
        raise ValueError(f"The router's cost in layers is {router_cost_layers}, but a cost is 0 or more.")
    return (mean_pruned_layers - router_cost_layers) / num_layers


def measured_speedup(
    this_seconds: npt.ArrayLike,
    full_seconds: npt.ArrayLike,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> MedianInterval:
    """Median over queries of 1 - time / time of the full SLM, paired by query.

    Pairing removes the queries' own lengths, which vary far more than the speedup. The median rather than the
    mean, since one interruption by another process makes a single ratio arbitrarily large.

    Args:
        this_seconds: Time of each query with this row's pruning, the router's time included.
        full_seconds: Time of the same queries, in the same order, with the full SLM, on the same machine
            in the same run.
        confidence: Coverage of the interval, between 0 and 1.
        seed: Seed of the bootstrap.

    Returns:
        The median speedup with its percentile-bootstrap interval over queries.

    Raises:
        ValueError: The two do not pair up, or a time is not a positive number.
    """
    this_N, full_N = (np.asarray(seconds, dtype=np.float64).ravel() for seconds in (this_seconds, full_seconds))
    if this_N.size != full_N.size:
        raise ValueError(
            f"A measured speedup pairs the times of the same queries, but there are {this_N.size} times with "
            f"pruning and {full_N.size} without; time both on the same queries."
        )
    for name, seconds_N in (("with pruning", this_N), ("without pruning", full_N)):
        wrong = np.flatnonzero(~(np.isfinite(seconds_N) & (seconds_N > 0)))
        if wrong.size:
            raise ValueError(f"A time is a positive number of seconds, but query {wrong[0]} {name} took {seconds_N[wrong[0]]}.")
    return median_interval(1 - this_N / full_N, confidence, seed)
