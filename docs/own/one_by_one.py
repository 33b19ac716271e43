"""A search: add the layer that hurts least until the score falls, judged by the likelihood of the reference answer."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dynprune.exploration.strategy import ROOT, Estimate, ExcludingSearch, Generate, Proposals, children


@dataclass(frozen=True, kw_only=True)
class OneByOne(ExcludingSearch):
    """Greedy search.

    Attributes:
        max_layers: Layers pruned, at most.
    """

    max_layers: int = 6

    def _search_below(self, score: float, layers: Sequence[int], rng: random.Random) -> Proposals:
        best = ROOT
        while len(best) < min(self.max_layers, len(layers)):
            larger = tuple(children(best, layers))
            nats = yield Estimate(larger)
            best = min(zip(nats, larger, strict=True))[1]
            (found,) = yield Generate((best,))
            if found < score:
                return
