"""The oracle: for each query the best of the configurations tried on it. No choice among what was tried can do better."""

import math
from collections.abc import Sequence

import numpy as np

from dynprune.data.rollouts import Rollout

# Sums of scores that differ by less are equal: they may have been added in another order.
_EQUAL = 1e-9


def oracle(rollouts: Sequence[Sequence[Rollout]], mean_layers: float) -> list[Rollout]:
    """Takes one rollout of each query such that the mean score is the highest that a budget allows.

    The budget is on the mean over queries, as a router's is: an easy query may pay for a hard one. That is a multiple-choice
    knapsack, solved exactly by dynamic programming over the total of pruned layers.

    Args:
        rollouts: For each query what was tried on it, at least one.
        mean_layers: Pruned layers, averaged over queries, at least; 0 for the best of all.

    Returns:
        A rollout for each query. Among choices of equal score it is one with the most layers.

    Raises:
        ValueError: If no choice prunes so many layers.
    """
    best_of_size: list[dict[int, Rollout]] = []
    for tried in rollouts:
        # The first of equals stays: `sorted` keeps the order, and later entries of a dict win.
        worst_first = sorted(reversed(tried), key=lambda rollout: rollout.score)
        best_of_size.append({len(rollout.pruned_layers): rollout for rollout in worst_first})
    deepest = sum(max(options) for options in best_of_size)
    fewest = math.ceil(mean_layers * len(rollouts) - _EQUAL)
    if fewest > deepest:
        raise ValueError(
            f"evaluation.baselines.oracle.sizes asks for {mean_layers:g} layers on average, but what was tried on the test "
            f"queries prunes {deepest / len(rollouts):g} at most; ask for less, add rows that prune more, such as "
            "evaluation.static=[2,4,8], or explore deeper, for example evaluation.baselines.oracle.explore=true "
            "exploration.max_configurations=40"
        )
    # score[t] is the highest sum of scores with t layers pruned in all, over the queries so far.
    score = np.full(deepest + 1, -np.inf)
    score[0] = 0.0
    sizes = []
    for options in best_of_size:
        longer, size = np.full(deepest + 1, -np.inf), np.zeros(deepest + 1, dtype=np.int64)
        for layers, rollout in options.items():
            reached = score[: deepest + 1 - layers] + rollout.score
            better = reached > longer[layers:]
            longer[layers:][better], size[layers:][better] = reached[better], layers
        score = longer
        sizes.append(size)
    enough = score[fewest:]
    total = fewest + int(np.flatnonzero(enough >= enough.max() - _EQUAL)[-1])
    chosen = []
    for options, size in zip(reversed(best_of_size), reversed(sizes), strict=True):
        layers = int(size[total])
        chosen.append(options[layers])
        total -= layers
    return chosen[::-1]
