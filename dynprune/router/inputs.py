"""What a router reads in training: embeddings computed once where the encoder is frozen, tokens where it is trained."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynprune.router.router import Router


class RouterInputs:
    """The router's view of a fixed set of queries."""

    def __init__(self, router: Router, texts: Mapping[str, str], batch_size: int = 64) -> None:
        """Embeds the queries if that can be done once and for all.

        Args:
            router: The router.
            texts: Each query's id and rendered text.
            batch_size: Texts embedded together.
        """
        self._router = router
        self._texts = texts
        self._embedding_of: dict[str, Tensor] = {}
        if not router.encoder.trainable:
            ids = list(texts)
            for start in range(0, len(ids), batch_size):
                chunk = ids[start : start + batch_size]
                features = router.encoder.tokenize([texts[id_] for id_ in chunk])
                with torch.no_grad():
                    self._embedding_of |= dict(zip(chunk, router.encode(features), strict=True))

    def __call__(self, ids: Sequence[str]) -> dict[str, Tensor]:
        """The inputs for some queries, as `RouterTraining.outputs` takes them."""
        if self._embedding_of:
            return {"embedding_BE": torch.stack([self._embedding_of[id_] for id_ in ids])}
        return self._router.encoder.tokenize([self._texts[id_] for id_ in ids])
