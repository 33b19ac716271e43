"""A key-value cache that grows without copying what it holds.

transformers' own layers append by concatenation, so each new token copies the keys and values of all tokens before it: for a
small SLM on a CPU that takes as long as the computation. Here a layer reserves room ahead and writes into it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

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

    @classmethod
    def of_rows(cls, keys: Sequence[Tensor], values: Sequence[Tensor], length: int) -> Self:
        """A layer filled with the keys and values of rows of different lengths, zeros on their left.

        Args:
            keys: For each row (heads, tokens, width).
            values: The same.
            length: Tokens of the layer, at least as many as the longest row has.
        """
        layer = cls()
        layer.lazy_initialization(keys[0], values[0])
        layer._key_buffer, layer._value_buffer = _stacked(keys, length), _stacked(values, length)
        layer.keys, layer.values = layer._key_buffer[:, :, :length], layer._value_buffer[:, :, :length]
        return layer

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


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of one row in one layer, (heads, tokens, width) each."""

    keys: Tensor
    values: Tensor


class ReservingCache(Cache):
    """A cache of `ReservingLayer`, one for each decoder layer, whatever the layer's kind of attention."""

    def __init__(self) -> None:
        """Starts empty."""
        super().__init__(layer_class_to_replicate=ReservingLayer)


def cache_of_rows(rows: Sequence[Sequence[KeyValues | None]], length: int, dtype: torch.dtype, device: torch.device) -> Cache:
    """A cache filled with rows of different lengths, zeros on their left.

    Args:
        rows: For each row its keys and values by layer, ``None`` in layers that do not have the row.
        length: Tokens of the cache, at least as many as the longest row has.
        dtype: The dtype of layers that have no row.
        device: Their device.

    Returns:
        A layer for each layer of the rows; one that no row has holds a placeholder of that length, one number wide.
    """
    layers: list[Any] = []
    for of_layer in zip(*rows, strict=True):
        held = [row for row in of_layer if row is not None]
        if not held:
            nothing = torch.zeros(1, length, 1, dtype=dtype, device=device)
            held = [KeyValues(nothing, nothing)] * len(rows)
        layers.append(ReservingLayer.of_rows([row.keys for row in held], [row.values for row in held], length))
    return Cache(layers=layers)


def keys_and_values(cache: Cache, layer: int, row: int, slots: slice | Tensor) -> KeyValues:
    """What one layer of a cache holds of one row.

    Args:
        cache: The cache.
        layer: The layer's number.
        row: The row's number among those that the layer has.
        slots: The slots to take: a slice, of which views are taken, or numbers on the cache's device.
    """
    held: Any = cache.layers[layer]
    return KeyValues(held.keys[row][:, slots], held.values[row][:, slots])


def _stacked(rows: Sequence[Tensor], length: int) -> Tensor:
    heads, _, width = rows[0].shape
    buffer = rows[0].new_empty(len(rows), heads, length + _RESERVED, width)
    for place, row in zip(buffer, rows, strict=True):
        start = length - row.shape[1]
        # Nothing looks at these slots, but what is multiplied by 0 must be a number.
        place[:, :start] = 0
        place[:, start:length] = row
    return buffer


def _append(buffer: Tensor | None, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Writes behind what is held, in the buffer if it still backs what is held and has room."""
    length = held.shape[2] + new.shape[2]
    # Whoever replaces a layer's keys, to drop rows for example, leaves the buffer behind.
    backed = buffer is not None and buffer.data_ptr() == held.data_ptr() and buffer.shape[0] == held.shape[0]
    if buffer is None or not backed or buffer.shape[2] < length:
        buffer = held.new_empty(*held.shape[:2], length + _RESERVED, held.shape[3])
        buffer[:, :, : held.shape[2]] = held
    # A layer that is pruned for a while writes placeholders one number wide behind what it holds.
    buffer[:, :, held.shape[2] : length] = new
    return buffer, buffer[:, :, :length]
