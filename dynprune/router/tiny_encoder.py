"""A tiny random sentence encoder that needs no file: for tests and dry runs of the whole pipeline.

Legend: B = batch, T = tokens.
"""

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

HIDDEN_SIZE = 32
MAX_POSITIONS = 2048
_PAD = 0


def tiny_model() -> BertModel:
    """Builds a two-layer BERT over bytes, with the same weights each time, as if they were downloaded."""
    config = BertConfig(
        vocab_size=1 + 256,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * HIDDEN_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        pad_token_id=_PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertModel(config, add_pooling_layer=False)


def tokenize_bytes(texts: list[str], max_length: int) -> dict[str, Tensor]:
    """Turns each byte into a token.

    Args:
        texts: B texts.
        max_length: Longer texts are cut here, in bytes.

    Returns:
        ``input_ids`` and ``attention_mask``, both BT, padded on the right to the longest text.
    """
    rows = [[1 + byte for byte in text.encode()[:max_length]] for text in texts]
    length = max(1, max(len(row) for row in rows))
    input_ids_BT = torch.tensor([row + [_PAD] * (length - len(row)) for row in rows])
    return {"input_ids": input_ids_BT, "attention_mask": (input_ids_BT != _PAD).long()}
