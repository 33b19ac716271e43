"""What a search strategy is: a generator that proposes configurations for one query and receives what they are worth.

A strategy knows nothing of models. It yields a proposal, is sent a number for each of its configurations in the same order, and
ends by returning. There are two kinds of proposals: `Generate` asks for the score of what the SLM generates, `Estimate` for the
dense reward, which one pass over the reference answer gives. Whoever drives a strategy may drive many at once, one for each
query, and generate all their configurations together.
"""

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

# The pruned layers, in ascending order.
Configuration = tuple[int, ...]
ROOT: Configuration = ()
"""No pruning."""


@dataclass(frozen=True)
class Generate:
    """Asks for scores of the SLM's outputs; more is better.

    Attributes:
        configurations: The configurations to generate under, at least one.
    """

    configurations: tuple[Configuration, ...]


@dataclass(frozen=True)
class Estimate:
    """Asks for dense rewards: the reference answer's negative log-likelihood in nats a token; less is better.

    Attributes:
        configurations: The configurations, at least one.
    """

    configurations: tuple[Configuration, ...]


Proposal = Generate | Estimate
Proposals = Generator[Proposal, Sequence[float], None]


class Strategy(Protocol):
    """A way to search for good configurations."""

    def propose(self, num_layers: int, rng: random.Random) -> Proposals:
        """Start the search of one query.

        The first proposal is ``Generate(((),))``, no pruning. No configuration is generated twice or estimated twice; one that
        was estimated may be generated later.

        Args:
            num_layers: L, the SLM's decoder layers; configurations hold numbers in 0..L-1.
            rng: The only source of randomness, owned by this search.

        Returns:
            A generator of proposals; send it the numbers that the last one asked for.

        Raises:
            ValueError: The strategy's settings do not fit an SLM with that many layers. Raised by the call,
                before the generator is asked for anything.
        """


@dataclass(frozen=True, kw_only=True)
class LayerSearch(ABC):
    """The frame of a search: no pruning is scored first, and where that is good enough, configurations below it are tried.

    Attributes:
        require_success: Smallest score without pruning that makes a query worth searching; below it, no pruning is all that is
            tried. ``None`` searches every query. The thesis kept only queries that the unpruned SLM answers right.
    """

    require_success: float | None = None

    def propose(self, num_layers: int, rng: random.Random) -> Proposals:
        """Start the search of one query; see `Strategy.propose`.

        Args:
            num_layers: L, the SLM's decoder layers.
            rng: Draws the configurations.

        Raises:
            ValueError: The excluded layers leave none to prune, or one of them does not exist.
        """
        return self._search(self._layers(num_layers), rng)

    @abstractmethod
    def _layers(self, num_layers: int) -> Sequence[int]:
        """The layers that may be pruned, at least one."""

    @abstractmethod
    def _search_below(self, score: float, layers: Sequence[int], rng: random.Random) -> Proposals:
        """Search configurations that prune something, given the score without pruning."""

    def _search(self, layers: Sequence[int], rng: random.Random) -> Proposals:
        (score,) = yield Generate((ROOT,))
        if self.require_success is None or score >= self.require_success:
            yield from self._search_below(score, layers, rng)


@dataclass(frozen=True, kw_only=True)
class ExcludingSearch(LayerSearch):
    """A search that leaves out layers by their numbers.

    Attributes:
        excluded_layers: Layers that are never pruned.
    """

    excluded_layers: Sequence[int] = ()

    def _layers(self, num_layers: int) -> list[int]:
        return layers_to_prune(num_layers, self.excluded_layers)


def estimating_all(proposals: Proposals) -> Proposals:
    """A search that, at its end, also estimates whatever it generated without an estimate, all as one proposal.

    Args:
        proposals: The search.
    """
    generated: list[Configuration] = []
    estimated: set[Configuration] = set()
    proposal = next(proposals, None)
    while proposal is not None:
        if isinstance(proposal, Generate):
            generated += proposal.configurations
        else:
            estimated.update(proposal.configurations)
        numbers = yield proposal
        try:
            proposal = proposals.send(numbers)
        except StopIteration:
            proposal = None
    if left := tuple(configuration for configuration in generated if configuration not in estimated):
        yield Estimate(left)


def layers_to_prune(num_layers: int, excluded: Sequence[int]) -> list[int]:
    """The layers that a search may prune.

    Args:
        num_layers: L, the SLM's decoder layers.
        excluded: Layers that are never pruned, the setting ``excluded_layers``.

    Raises:
        ValueError: There is no such layer to exclude, or no layer is left.
    """
    if unknown := [layer for layer in excluded if layer not in range(num_layers)]:
        raise ValueError(
            f"exploration.strategy.excluded_layers names {unknown}, which the SLM does not have; allowed: 0 to {num_layers - 1}"
        )
    layers = [layer for layer in range(num_layers) if layer not in excluded]
    if not layers:
        raise ValueError(f"exploration.strategy.excluded_layers leaves none of the {num_layers} layers to prune; exclude fewer")
    return layers


def children(configuration: Configuration, layers: Sequence[int]) -> Iterator[Configuration]:
    """The configurations that prune one layer more.

    Args:
        configuration: The configuration.
        layers: Layers that may be pruned.
    """
    return (tuple(sorted((*configuration, layer))) for layer in layers if layer not in configuration)


def likeliest_of_each_size(nats: Mapping[Configuration, float], per_size: int, limit: int) -> tuple[Configuration, ...]:
    """Choose what is worth generating: the best of each size, then the second best of each, and so on.

    Args:
        nats: Dense rewards of configurations, less is better.
        per_size: Configurations of a size, at most.
        limit: Configurations in all, at most.

    Returns:
        The chosen ones without no pruning, in the order of choice.
    """
    by_size = sorted(filter(None, nats), key=lambda configuration: (len(configuration), nats[configuration]))
    ranks = [list(group)[:per_size] for _, group in itertools.groupby(by_size, key=len)]
    chosen = (configuration for rank in itertools.zip_longest(*ranks) for configuration in rank if configuration is not None)
    return tuple(itertools.islice(chosen, limit))


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
