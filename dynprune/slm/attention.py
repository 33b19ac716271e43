"""Attention on a CPU: of a few new tokens folded, in training written out, else by torch's kernel, with shared keys in place.

Torch's kernel takes the query heads one after another, and each reads the keys and values that it shares with others anew; for
a single token in bfloat16 it also falls back to a slow product. Folded, the heads that share keys and values are as many tokens
of one head: one product for all of them, the same sums. In training in bfloat16, forward and backward, it takes longer than the
products and the softmax that it stands for, even where these are made for all pairs of tokens (1.5 to 2 times as long, measured
on 2 cores at 512 to 1536 tokens). Here they are made block by block of new tokens, without what no token of a block sees.

Shapes: B = batch, H = query heads, K = heads of keys and values, G = H / K, T = new tokens, S = all tokens, w = a head's width,
N = new tokens of a block, C = tokens that some token of the block sees.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Beyond that, heads have enough tokens of their own.
_FEW_TOKENS = 8
# New tokens that are written out together: with fewer, more pairs that are not seen are left out, and products are small.
_BLOCK = 256
# Written out, each layer keeps a weight for N C pairs of tokens and each head until it has gone backward: so many, at most.
_MOST_WEIGHTS = 1 << 25


def prepare_attention(device: torch.device) -> None:
    """Lets all models of transformers that attend by torch's kernels, ``sdpa``, do so by `folded_attention`.

    Torch takes cuDNN's kernel for nothing any more, in this process.

    Args:
        device: Where models lie from now on.
    """
    # Where keys and values serve several heads, transformers copies them for each of these, unless there is no mask: a GPU's
    # kernels need that, while the CPU's read them in place.
    os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] = "1" if device.type == "cpu" else "0"
    # Where T leaves 64 when divided by 128, its gradients of masked attention in half precision can be NaN on Hopper chips from
    # torch 2.11 on (pytorch issue 196678). Its outputs are right, but one kernel for training and use is one rounding for both.
    torch.backends.cuda.enable_cudnn_sdp(False)
    AttentionInterface.register("sdpa", folded_attention)


def folded_attention(
    module: nn.Module,
    query_BHTw: Tensor,
    key_BKSw: Tensor,
    value_BKSw: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' ``sdpa`` computes it, folded or written out where that pays.

    Args:
        module: The layer's attention; ``num_key_value_groups`` is its G.
        query_BHTw: Queries of the new tokens.
        key_BKSw: Keys of all tokens.
        value_BKSw: Their values.
        attention_mask: What each token sees, (B, 1, T, S); without one, T tokens see what comes before them.
        dropout: Probability that a weight is dropped.
        scaling: Factor of the scores, 1 / √w where it is not given.
        kwargs: What transformers' own function knows beside these.

    Returns:
        (B, T, H, w), and no weights.
    """
    batch, heads, tokens, width = query_BHTw.shape
    shared = key_BKSw.shape[1]
    groups = getattr(module, "num_key_value_groups", 1)
    plain = (
        query_BHTw.device.type == "cpu"
        and heads == shared * groups
        # A mask must be that of all heads.
        and (attention_mask is None or attention_mask.shape[1] == 1)
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
    )
    is_causal = kwargs.get("is_causal")
    if plain and dropout == 0 and _is_trained(module, query_BHTw, key_BKSw, value_BKSw, attention_mask, is_causal):
        # It may be the same for all new tokens.
        mask_B1TS = None if attention_mask is None else attention_mask.expand(-1, -1, tokens, -1)
        seen = _seen_by_block(mask_B1TS, tokens)
        if batch * heads * sum((block.stop - block.start) * len(seen_C) for block, seen_C in seen) <= _MOST_WEIGHTS:
            return _written_out(query_BHTw, key_BKSw, value_BKSw, mask_B1TS, seen, scaling), None
    # One token sees everything; of several, only a mask says what each of them sees.
    if not (plain and groups > 1 and tokens <= _FEW_TOKENS and (tokens == 1 or attention_mask is not None)):
        return sdpa_attention_forward(
            module, query_BHTw, key_BKSw, value_BKSw, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    out = functional.scaled_dot_product_attention(
        query_BHTw.reshape(batch, shared, groups * tokens, width),
        key_BKSw,
        value_BKSw,
        attn_mask=None if attention_mask is None else attention_mask.repeat(1, 1, groups, 1),
        dropout_p=dropout,
        scale=scaling,
    )
    return out.reshape(batch, heads, tokens, value_BKSw.shape[-1]).transpose(1, 2).contiguous(), None


def _is_trained(
    module: nn.Module,
    query_BHTw: Tensor,
    key_BKSw: Tensor,
    value_BKSw: Tensor,
    mask_B1TS: Tensor | None,
    is_causal: bool | None,
) -> bool:
    """Whether it goes backward in bfloat16, and all see what comes before them, or what a mask says."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return (
        query_BHTw.requires_grad
        and query_BHTw.dtype == key_BKSw.dtype == value_BKSw.dtype == torch.bfloat16
        and (mask_B1TS is not None or (causal and query_BHTw.shape[2] == key_BKSw.shape[2]))
    )


def _seen_by_block(mask_B1TS: Tensor | None, tokens: int) -> list[tuple[slice, Tensor]]:
    """Blocks of new tokens, and for each what some of its tokens sees in some row; without a mask, what comes before them."""
    blocks = [slice(start, min(start + _BLOCK, tokens)) for start in range(0, tokens, _BLOCK)]
    if mask_B1TS is None:
        return [(block, torch.arange(block.stop)) for block in blocks]
    return [(block, _is_seen(mask_B1TS[:, :, block]).flatten(0, -2).any(dim=0).nonzero().flatten()) for block in blocks]


def _is_seen(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min


def _written_out(
    query_BHTw: Tensor,
    key_BKSw: Tensor,
    value_BKSw: Tensor,
    mask_B1TS: Tensor | None,
    seen: Sequence[tuple[slice, Tensor]],
    scaling: float | None,
) -> Tensor:
    """Attention as products, for one block of new tokens after another; ``seen`` is that of `_seen_by_block`.

    Returns:
        (B, T, H, w).
    """
    shared, (tokens, width) = key_BKSw.shape[1], query_BHTw.shape[2:]
    query_BKGTw = (query_BHTw * (width**-0.5 if scaling is None else scaling)).unflatten(1, (shared, -1))
    outs_BKGNw = []
    # Autocast would take the softmax to float32, copy by copy; in bfloat16 it sums in float32 as well.
    with torch.autocast("cpu", enabled=False):
        for block, seen_C in seen:
            if mask_B1TS is None:
                mask_B1NC = (seen_C <= torch.arange(tokens)[block, None])[None, None]
            else:
                mask_B1NC = mask_B1TS[:, :, block].index_select(3, seen_C)
            query_BKGNw = query_BKGTw[:, :, :, block]
            scores = query_BKGNw.flatten(2, 3) @ key_BKSw.index_select(2, seen_C).transpose(2, 3)
            # In place: neither the product nor the sum needs the scores without the mask to go backward.
            scores_BKGNC = scores.unflatten(2, query_BKGNw.shape[2:4]).add_(_added(mask_B1NC, scores.dtype)[:, :, None])
            weights = scores_BKGNC.softmax(dim=-1).flatten(2, 3)
            outs_BKGNw.append((weights @ value_BKSw.index_select(2, seen_C)).unflatten(2, query_BKGNw.shape[2:4]))
    return torch.cat(outs_BKGNw, dim=3).flatten(1, 2).transpose(1, 2).contiguous()


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of any kind as one to add to scores of a dtype, whose lowest number stands for what is not seen."""
    return added_mask(mask, dtype) if mask.dtype == torch.bool else mask.clamp(min=torch.finfo(dtype).min).to(dtype)


def added_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores: 0 where something is seen, else the lowest number of the dtype.

    Not minus infinity, since a row that sees nothing, as padding may, would be no number then.

    Args:
        seen: True where a token of a row sees that of a column.
        dtype: The dtype of the scores.
    """
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
