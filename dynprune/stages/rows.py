"""What a row of the table is."""

from dataclasses import dataclass

from dynprune.evaluation.latency import Chooser
from dynprune.slm.speculative import Drafting


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: Its name.
        choose: What gives the configuration for a query.
        origin: The fingerprint, or the layers, that the configurations come from.
        router_layers: What choosing costs, in layers of the SLM.
        curve: The method whose budget the row is, such as ``static``; ``None`` for a row of its own.
        seed: The seed of the router; ``None`` where nothing was trained.
        timed: Whether it is timed; of a router's seeds one is.
        drafting: How the SLM with that configuration drafts what the full SLM verifies; ``None`` where it answers itself.
    """

    name: str
    choose: Chooser
    origin: str
    router_layers: float = 0.0
    curve: str | None = None
    seed: int | None = None
    timed: bool = True
    drafting: Drafting | None = None

    @property
    def over_seeds(self) -> str:
        """Its name without the seed: what is compared are averages over seeds."""
        return self.name if self.seed is None else self.name.replace(f"-s{self.seed}", "", 1)


ORIGINAL = Row("original", lambda query: (), "[]")
"""The unpruned SLM."""
