"""No input at all: every query gets the same embedding, and so the same configuration.

What a router gains over this one is what it sees of the query.

Legend: B = batch.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynprune.data.tasks import Query
from dynprune.router.encoder import Encoder


class ConstantEncoder(Encoder):
    """Embeds every query as the number 0: what the heads make of their biases is the whole router."""

    inputs: ClassVar[str] = "none"
    name = "no input"
    trainable = False

    @property
    def size(self) -> int:
        """One."""
        return 1

    def arguments(self) -> dict[str, Any]:
        """None."""
        return {}

    def render(self, query: Query) -> str:
        """Nothing."""
        return ""

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Returns ``zero_B1``."""
        return {"zero_B1": torch.zeros(len(texts), 1)}

    def forward(self, zero_B1: Tensor) -> Tensor:
        """Returns embedding_B1."""
        return zero_B1
