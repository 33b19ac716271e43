"""Static sets that nothing was searched for: random ones, and the deepest layers."""

import math
import random


def random_sets(num_layers: int, size: int, draws: int, seed: int) -> list[tuple[int, ...]]:
    """Draws sets of equal size, each as likely as any other, none twice.

    Args:
        num_layers: L, the SLM's decoder layers.
        size: Layers in a set.
        draws: How many sets.
        seed: Seed; the sets of one size do not depend on which other sizes are drawn.

    Raises:
        ValueError: If there are not so many sets.
    """
    if not 1 <= draws <= math.comb(num_layers, size):
        raise ValueError(
            f"evaluation.baselines.random.draws={draws} cannot be had: there are {math.comb(num_layers, size)} sets of {size} "
            f"of {num_layers} layers; allowed: 1 to that many"
        )
    rng = random.Random(f"{seed}-{size}")
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < draws:
        drawn[tuple(sorted(rng.sample(range(num_layers), size)))] = None
    return list(drawn)


def last_layers(num_layers: int, size: int) -> tuple[int, ...]:
    """The deepest layers but the last one, as in Gromov et al. 2024, whose simple rule begins at the penultimate layer.

    They never prune the last one, whose output the head reads: without it a model loses most at once.

    Args:
        num_layers: L, the SLM's decoder layers.
        size: How many layers.

    Raises:
        ValueError: If only the last layer is left to prune.
    """
    if size >= num_layers:
        raise ValueError(
            f"evaluation.baselines.last.sizes asks for {size} of {num_layers} layers, but the last one is never pruned; "
            f"allowed: 1 to {num_layers - 1}"
        )
    return tuple(range(num_layers - 1 - size, num_layers - 1))
