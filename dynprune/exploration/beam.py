"""Beam search over configurations, guided by the dense reward and confirmed by the score.

At each depth the children of the beam, one more layer pruned, are estimated, and the best `width` of them are the next beam. A
set that several parents lead to is estimated once. In the end the best few of each size are generated, all of them together.
With a width and a depth that leave nothing out it estimates every subset.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dynprune.exploration.strategy import (
    Configuration,
    Estimate,
    Generate,
    Proposals,
    check_at_least,
    children,
    layers_to_prune,
    likeliest_of_each_size,
)


@dataclass(frozen=True)
class BeamSearch:
    """Beam search by the likelihood of the reference answer.

    Attributes:
        width: Configurations of a size that are searched below.
        depth: Layers of the largest configurations.
        candidates: Children drawn at random below each of them; ``None`` takes all.
        confirmed: Configurations of a size that are generated, those with the best estimates.
        max_configurations: Configurations generated for a query at most, no pruning included.
        max_estimates: Configurations estimated for a query at most, no pruning included.
        excluded_layers: Layers that are never pruned.
        require_success: Smallest score without pruning that makes a query worth searching; below it, no
            pruning is all that is tried. ``None`` searches every query.
    """

    width: int = 3
    depth: int = 10
    candidates: int | None = 6
    confirmed: int = 2
    max_configurations: int = 20
    max_estimates: int = 160
    excluded_layers: Sequence[int] = ()
    require_success: float | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: One of them is too small.
        """
        for key in ("width", "depth", "confirmed", "max_configurations", "max_estimates"):
            check_at_least(key, getattr(self, key), 1)
        if self.candidates is not None:
            check_at_least("candidates", self.candidates, 1)

    def propose(self, num_layers: int, rng: random.Random) -> Proposals:
        """Start the search of one query; see `Strategy.propose`.

        Args:
            num_layers: L, the SLM's decoder layers.
            rng: Draws the children.

        Raises:
            ValueError: There is no such layer to exclude, or no layer is left.
        """
        return self._search(layers_to_prune(num_layers, self.excluded_layers), rng)

    def _search(self, layers: Sequence[int], rng: random.Random) -> Proposals:
        root: Configuration = ()
        (score,) = yield Generate((root,))
        if self.require_success is not None and score < self.require_success:
            return
        nats = dict(zip([root], (yield Estimate((root,))), strict=True))
        beam = [root]
        for _ in range(self.depth):
            drawn = self._children(beam, layers, rng)[: self.max_estimates - len(nats)]
            if not drawn:
                break
            nats.update(zip(drawn, (yield Estimate(drawn)), strict=True))
            beam = sorted(drawn, key=nats.__getitem__)[: self.width]
        if best := likeliest_of_each_size(nats, self.confirmed, self.max_configurations - 1):
            yield Generate(best)

    def _children(self, beam: Sequence[Configuration], layers: Sequence[int], rng: random.Random) -> tuple[Configuration, ...]:
        """Children of the beam, those of its best member first; none twice."""
        # A dict keeps the order, which a set would tie to hashes.
        drawn: dict[Configuration, None] = {}
        for parent in beam:
            new = [child for child in children(parent, layers) if child not in drawn]
            if self.candidates is not None:
                new = rng.sample(new, min(self.candidates, len(new)))
            drawn.update(dict.fromkeys(new))
        return tuple(drawn)
