"""What the router's encoder makes of queries before any training: what baselines choose by.

Axis suffixes: Q = queries, E = embedding size.
"""

from collections.abc import Sequence
from typing import Any

import torch

from dynprune.baselines.by_embedding import Array
from dynprune.data.prompts import render_router_input
from dynprune.data.tasks import Query
from dynprune.router.encoder import TextEncoder
from dynprune.stages.run import Run, content_digest, once_a_run

_EMBEDDED_TOGETHER = 64


@once_a_run
def encoder_of(run: Run) -> TextEncoder:
    """The encoder of the router's configuration, as it comes."""
    return TextEncoder(**run.encoder_settings).to(run.slm.device).eval()


def embedding_identity(run: Run) -> dict[str, Any]:
    """What identifies embeddings in an artifact, beside their queries."""
    return {"encoder": run.encoder_identity, "encoder_content": content_digest(run.config.router.encoder.name_or_path)}


@torch.inference_mode()
def embeddings(run: Run, queries: Sequence[Query]) -> Array:
    """The queries' embeddings, embedding_QE in float64."""
    encoder = encoder_of(run)
    chunks = []
    for start in range(0, len(queries), _EMBEDDED_TOGETHER):
        features = encoder.tokenize([render_router_input(query) for query in queries[start : start + _EMBEDDED_TOGETHER]])
        chunks.append(encoder(**{name: tensor.to(run.slm.device) for name, tensor in features.items()}).double().cpu())
    return torch.cat(chunks).numpy()
