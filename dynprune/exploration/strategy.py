"""What a search strategy is: a generator that proposes configurations for one query and receives their scores.

A strategy knows nothing of models. It yields a batch of configurations, is sent their scores in the same
order, and ends by returning. Whoever drives it may drive many at once, one for each query, and generate all
their batches together.
"""

import random
from collections.abc import Generator, Sequence
from typing import Protocol

# The pruned layers, in ascending order.
Configuration = tuple[int, ...]

Proposals = Generator[tuple[Configuration, ...], Sequence[float], None]


class Strategy(Protocol):
    """A way to search for good configurations."""

    def propose(self, num_layers: int, rng: random.Random) -> Proposals:
        """Start the search of one query.

        The first batch is ``((),)``, no pruning. No batch is empty, and no configuration is proposed twice.

        Args:
            num_layers: L, the SLM's decoder layers; configurations hold numbers in 0..L-1.
            rng: The only source of randomness, owned by this search.

        Returns:
            A generator of batches of configurations; send it the scores of the last batch.

        Raises:
            ValueError: The strategy's settings do not fit an SLM with that many layers. Raised by the call,
                before the generator is asked for anything.
        """


def check_at_least(key: str, value: float, least: float) -> None:
    """Refuse a setting that is too small.

    Args:
        key: The setting's name in ``exploration.strategy``.
        value: Its value.
        least: The smallest value that is allowed.

    Raises:
        ValueError: The value is smaller.
    """
    if value < least:
        raise ValueError(f"exploration.strategy.{key}={value} is too small; allowed: at least {least}")
