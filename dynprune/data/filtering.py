"""Which rollouts of a query are worth imitating: FBC clones no others, and to KTO they are the desirable ones."""

from collections.abc import Sequence

from dynprune.data.rollouts import Rollout


def keep_successful(rollouts: Sequence[Rollout], min_score: float, min_share_of_deepest: float) -> list[Rollout]:
    """Keep the rollouts that succeeded, and among those the ones that pruned nearly as much as any.

    Where only no pruning succeeded, it is kept: the router shall learn to leave that query alone.

    Args:
        rollouts: All rollouts of one query.
        min_score: Smallest score that is a success.
        min_share_of_deepest: Smallest number of pruned layers, as a share (0..1) of the most layers that were
            pruned successfully for this query.

    Returns:
        What is kept, in the order given.

    Raises:
        ValueError: The share is not between 0 and 1.
    """
    if not 0 <= min_share_of_deepest <= 1:
        raise ValueError(f"method.min_share_of_deepest={min_share_of_deepest} is no share; allowed: 0 to 1")
    successes = [rollout for rollout in rollouts if rollout.score >= min_score]
    deepest = max((len(rollout.pruned_layers) for rollout in successes), default=0)
    # 0.28 * 25 is 7.000000000000001, and seven of 25 layers are a share of 0.28 all the same.
    fewest = min_share_of_deepest * deepest - 1e-9
    return [rollout for rollout in successes if len(rollout.pruned_layers) >= fewest]
