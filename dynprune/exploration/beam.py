"""Beam search over configurations, guided by the dense reward and confirmed by the score.

At each depth the children of the beam, one more layer pruned, are estimated, and the best `width` of them are the next beam. A
set that several parents lead to is estimated once. In the end the best few of each size are generated, all of them together.
With a width and a depth that leave nothing out it estimates every subset.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dynprune.exploration.guided import Estimates, GuidedSearch
from dynprune.exploration.strategy import ROOT, Configuration, Estimate, check_at_least, children


@dataclass(frozen=True)
class BeamSearch(GuidedSearch):
    """Beam search by the likelihood of the reference answer.

    Attributes:
        width: Configurations of a size that are searched below.
        candidates: Children drawn at random below each of them; ``None`` takes all.
    """

    width: int = 3
    candidates: int | None = 6

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: One of them is too small.
        """
        super().__post_init__()
        check_at_least("width", self.width, 1)
        if self.candidates is not None:
            check_at_least("candidates", self.candidates, 1)

    def _estimate(self, nats: dict[Configuration, float], layers: Sequence[int], rng: random.Random) -> Estimates:
        beam = [ROOT]
        for _ in range(self.depth):
            drawn = self._children(beam, layers, rng)[: self.max_estimates - len(nats)]
            if not drawn:
                return
            nats.update(zip(drawn, (yield Estimate(drawn)), strict=True))
            beam = sorted(drawn, key=nats.__getitem__)[: self.width]

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
