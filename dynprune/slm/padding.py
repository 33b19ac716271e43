"""Token sequences of different lengths as one batch.

Shapes: B = batch, T = tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def left_padded(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device, width: int | None = None
) -> dict[str, Tensor]:
    """Pads sequences on the left, so that all of them end in the last column.

    Args:
        sequences: B sequences of tokens.
        pad_id: The token that pads.
        device: Where the tensors go.
        width: T; the longest sequence's length where it is ``None``.

    Returns:
        ``input_ids``, ``attention_mask`` (1 at tokens) and ``position_ids`` (0 at each first token, and at padding), all
        (B, T), under the names that the models of transformers take.
    """
    width = max(map(len, sequences)) if width is None else width
    mask_BT = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device)
    return {
        "input_ids": torch.tensor([[pad_id] * (width - len(s)) + list(s) for s in sequences], device=device),
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(dim=1) - 1).clamp(min=0),
    }
