"""What searches share that are guided by the dense reward and confirmed by the score."""

import random
from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from dynprune.exploration.strategy import (
    ROOT,
    Configuration,
    Estimate,
    ExcludingSearch,
    Generate,
    Proposals,
    check_at_least,
    likeliest_of_each_size,
)

Estimates = Generator[Estimate, Sequence[float], None]


@dataclass(frozen=True, kw_only=True)
class GuidedSearch(ExcludingSearch):
    """Estimates many configurations, then generates the best few of each size, all of them together.

    Attributes:
        depth: Layers of the largest configurations.
        confirmed: Configurations of a size that are generated, those with the best estimates.
        max_configurations: Configurations generated for a query at most, no pruning included.
        max_estimates: Configurations estimated for a query at most, no pruning included.
    """

    depth: int = 10
    confirmed: int = 2
    max_configurations: int = 20
    max_estimates: int = 160

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: One of them is too small.
        """
        for key in ("depth", "confirmed", "max_configurations", "max_estimates"):
            check_at_least(key, getattr(self, key), 1)

    @abstractmethod
    def _estimate(self, nats: dict[Configuration, float], layers: Sequence[int], rng: random.Random) -> Estimates:
        """Ask for estimates and note them in `nats`, which holds that of no pruning."""

    def _search_below(self, score: float, layers: Sequence[int], rng: random.Random) -> Proposals:
        nats = dict(zip([ROOT], (yield Estimate((ROOT,))), strict=True))
        yield from self._estimate(nats, layers, rng)
        if best := likeliest_of_each_size(nats, self.confirmed, self.max_configurations - 1):
            yield Generate(best)
