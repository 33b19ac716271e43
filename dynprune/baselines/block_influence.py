"""ShortGPT's block influence: how much a layer turns the hidden states that go through it.

    BI_i = 1 − E_t [ cos(h_{i,t}, h_{i+1,t}) ]        (Men et al. 2024, equation 1)

Shapes: S = L + 1 states, L = layers, N = tokens of a batch, d = hidden size.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional


def summed_cosines(states_SNd: Tensor) -> Tensor:
    """How alike the states are before and after each layer.

    Args:
        states_SNd: Those of a batch in the unpruned SLM, as `HiddenStateStream` gives them: entry i is the input of layer i,
            entry i + 1 its output.

    Returns:
        cosine_L, each the sum over N tokens, in float64.
    """
    wide_SNd = states_SNd.double()
    return functional.cosine_similarity(wide_SNd[:-1], wide_SNd[1:], dim=-1).sum(dim=1).cpu()


def block_influence(cosines: Iterable[tuple[Tensor, int]]) -> Tensor:
    """The influence of each layer.

    Args:
        cosines: Of each batch, `summed_cosines` and N.

    Returns:
        influence_L, 0..2: 0 for a layer that changes no direction. ShortGPT prunes the layers with the lowest.
    """
    total_L, tokens = torch.zeros(()), 0
    for cosine_L, number in cosines:
        total_L = total_L + cosine_L
        tokens += number
    assert tokens, "the influence of a layer is a mean over tokens"
    return 1 - total_L / tokens


def least_influential(influence_L: Tensor, size: int) -> tuple[int, ...]:
    """The layers with the lowest influence.

    Args:
        influence_L: From `block_influence`.
        size: How many layers.
    """
    return tuple(sorted(influence_L.argsort(stable=True)[:size].tolist()))
