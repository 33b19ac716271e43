"""A key-value cache that grows without copying what it holds.

transformers' own layers append by concatenation, so each new token copies the keys and values of all tokens before it: for a
small SLM on a CPU that takes as long as the computation. Here a layer reserves room ahead and writes into it.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

# Tokens reserved at a time: about the length of an answer.
_RESERVED = 64


class ReservingLayer(DynamicLayer):
    """One layer's keys and values (batch, heads, tokens, width), the front part of a larger buffer."""

    _key_buffer: Tensor | None = None
    _value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values.

        Args:
            key_states: New keys.
            value_states: New values.
            args: Not used.
            kwargs: Not used.

        Returns:
            All keys and values so far, as views of the buffers.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        assert self.keys is not None
        assert self.values is not None
        self._key_buffer, self.keys = _append(self._key_buffer, self.keys, key_states)
        self._value_buffer, self.values = _append(self._value_buffer, self.values, value_states)
        return self.keys, self.values


class ReservingCache(Cache):
    """A cache of `ReservingLayer`, one for each decoder layer, whatever the layer's kind of attention."""

    def __init__(self) -> None:
        """Starts empty."""
        super().__init__(layer_class_to_replicate=ReservingLayer)


def _append(buffer: Tensor | None, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Writes behind what is held, in the buffer if it still backs what is held and has room."""
    length = held.shape[2] + new.shape[2]
    # Whoever replaces a layer's keys, to drop rows for example, leaves the buffer behind.
    backed = buffer is not None and buffer.data_ptr() == held.data_ptr() and buffer.shape[0] == held.shape[0]
    if buffer is None or not backed or buffer.shape[2] < length:
        buffer = torch.empty(*new.shape[:2], length + _RESERVED, new.shape[3], dtype=new.dtype, device=new.device)
        buffer[:, :, : held.shape[2]] = held
    buffer[:, :, held.shape[2] : length] = new
    return buffer, buffer[:, :, :length]
