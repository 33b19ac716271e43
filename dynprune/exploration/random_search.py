"""Random search over configurations, after the thesis: some of each size, until a size fails.

For k = 1, 2, ... layers, n configurations are drawn; the search stops at the first k whose mean score is
below a threshold. The first and last layers are left alone: pruning them harms too much (the thesis excludes
0, 1 and 27 of 28). Unlike the thesis's code, the draws are distinct.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from dynprune.exploration.strategy import Configuration, Generate, LayerSearch, Proposals, check_at_least


@dataclass(frozen=True)
class RandomSearch(LayerSearch):
    """The thesis's random search.

    Attributes:
        configurations_per_size: n, configurations of each size; all there are where they are fewer.
        stop_below: The search stops at the first size whose mean score is below this.
        first_excluded: First layers that are never pruned.
        last_excluded: Last layers that are never pruned.
        max_configurations: Configurations tried on a query at most, no pruning included; ``None`` for no
            limit.
    """

    configurations_per_size: int = 5
    stop_below: float = 0.1
    first_excluded: int = 2
    last_excluded: int = 1
    max_configurations: int | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: One of them is too small.
        """
        check_at_least("configurations_per_size", self.configurations_per_size, 1)
        check_at_least("first_excluded", self.first_excluded, 0)
        check_at_least("last_excluded", self.last_excluded, 0)
        if self.max_configurations is not None:
            check_at_least("max_configurations", self.max_configurations, 1)

    def _layers(self, num_layers: int) -> range:
        layers = range(self.first_excluded, num_layers - self.last_excluded)
        if not layers:
            raise ValueError(
                f"exploration.strategy.first_excluded={self.first_excluded} and last_excluded="
                f"{self.last_excluded} leave none of the {num_layers} layers to prune; exclude fewer"
            )
        return layers

    def _search_below(self, score: float, layers: Sequence[int], rng: random.Random) -> Proposals:
        tried = 1
        for size in range(1, len(layers) + 1):
            count = self.configurations_per_size
            if self.max_configurations is not None:
                count = min(count, self.max_configurations - tried)
            if count == 0:
                return
            batch = _draw(layers, size, count, rng)
            tried += len(batch)
            scores = yield Generate(batch)
            if fmean(scores) < self.stop_below:
                return


def _draw(layers: Sequence[int], size: int, count: int, rng: random.Random) -> tuple[Configuration, ...]:
    """Draw distinct configurations of one size, uniformly: all of them where there are no more than `count`."""
    if math.comb(len(layers), size) <= count:
        return tuple(itertools.combinations(layers, size))
    # A dict keeps the order of the draws, which a set would tie to hashes.
    drawn: dict[Configuration, None] = {}
    while len(drawn) < count:
        drawn[tuple(sorted(rng.sample(layers, size)))] = None
    return tuple(drawn)
