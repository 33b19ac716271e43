"""Greedy generation of one row, a token a pass: what is timed, and what is streamed."""

from collections.abc import Iterator, Sequence

import torch

from dynprune.slm.cache import ReservingCache
from dynprune.slm.loading import SLM
from dynprune.slm.pruning import LayerPruner


@torch.inference_mode()
def decode_pruned(
    slm: SLM,
    pruner: LayerPruner,
    prompt: Sequence[int],
    configuration: Sequence[int],
    new_tokens: int,
    cache: ReservingCache,
) -> Iterator[torch.Tensor]:
    """Generates greedily under a configuration, a token a pass.

    Each pass prunes anew, so that other rows may run in between.

    Args:
        slm: The SLM.
        pruner: Its pruner, entered.
        prompt: The tokens to continue.
        configuration: The pruned layers.
        new_tokens: How many tokens to generate, at least 1.
        cache: An empty cache.

    Yields:
        Each token, (1, 1).
    """
    ids_1T, past = torch.tensor([list(prompt)], device=slm.device), 0
    for _ in range(new_tokens):
        pruner.prune(configuration)
        token_11 = _next_token(slm, ids_1T, past, cache)
        yield token_11
        ids_1T, past = token_11, past + ids_1T.shape[1]


def _next_token(slm: SLM, ids_1T: torch.Tensor, past: int, cache: ReservingCache) -> torch.Tensor:
    positions = torch.arange(past, past + ids_1T.shape[1], device=slm.device)[None]
    logits = slm.model(input_ids=ids_1T, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1].argmax(dim=-1, keepdim=True)
