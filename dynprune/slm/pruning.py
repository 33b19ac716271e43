"""Pruning the decoder layers of a running SLM: each row of a batch has its own configuration.

While a `LayerPruner` is active, each decoder layer runs on the rows that keep it only; the other rows go through the layer's
adapter (or pass unchanged without adapters). The model's modules, classes, parameters and hooks stay as they are: only
``forward`` is shadowed on the layer objects, and leaving the context removes that.

A layer stores keys and values of the rows that keep it and of no other. A layer that no row keeps stores a placeholder one
number wide, since the cache and the attention masks of transformers take the number of past tokens from particular layers,
layer 0 for most models: without it, pruning layer 0 would restart positions and masks silently.

Shapes: B = batch, L = layers, T = tokens, d = hidden size. A mask is True where a layer is pruned.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from transformers import Cache

from dynprune.slm.loading import SLM


class LayerAdapters(Protocol):
    """What stands in for pruned layers."""

    @property
    def num_layers(self) -> int:
        """Number of layers that it has stand-ins for."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that it takes."""
        ...

    def layer(self, index: int, hidden_BTd: Tensor, positions_BT: Tensor | None) -> Tensor:
        """Output of the stand-in of one layer; the tokens' positions in their texts are given where the SLM knows them."""
        ...


@dataclass(frozen=True)
class _Rows:
    """Which rows of the batch keep a layer and which go around it; ``None`` stands for all rows."""

    kept: Tensor | None
    pruned: Tensor | None


_ALL_KEEP = _Rows(kept=None, pruned=torch.empty(0, dtype=torch.long))
_ALL_PRUNE = _Rows(kept=torch.empty(0, dtype=torch.long), pruned=None)


class LayerPruner:
    """Context in which an SLM runs with pruned layers.

    Example:
        >>> with LayerPruner(slm, adapters) as pruner:
        ...     pruner.prune([2, 5, 8])
        ...     slm.generate(**inputs)

    ``prune`` takes one configuration for all rows, or a mask with a row for each row of the batch. The configuration must
    stay as it is while a cache is in use.
    """

    def __init__(self, slm: SLM, adapters: LayerAdapters | None = None) -> None:
        """Binds an SLM to its adapters; nothing changes until the context is entered.

        Args:
            slm: The SLM.
            adapters: Stand-ins for pruned layers; ``None`` lets hidden states pass unchanged.

        Raises:
            ValueError: If the adapters were made for another number of layers or another width.
        """
        if adapters is not None and (adapters.num_layers, adapters.hidden_size) != (
            slm.num_layers,
            slm.hidden_size,
        ):
            raise ValueError(
                f"the adapters were made for {adapters.num_layers} layers of width {adapters.hidden_size}, but "
                f"{slm.name} has {slm.num_layers} layers of width {slm.hidden_size}; "
                "train adapters for this model: dynprune stage=adapters model=…"
            )
        self._slm = slm
        self._adapters = adapters
        self._rows: list[_Rows] = [_ALL_KEEP] * slm.num_layers
        self._batch: int | None = None

    def __enter__(self) -> Self:
        """Puts the pruning in place."""
        for index, layer in enumerate(self._slm.layers):
            if "forward" in vars(layer):
                raise ValueError(
                    f"layer {index} of {self._slm.name} has a forward of its own already: another LayerPruner is active, or a "
                    "library patched the layer; leave that context first"
                )
        for index, layer in enumerate(self._slm.layers):
            layer.forward = self._pruned_forward(index, layer.forward)
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Gives the model back as it was."""
        for layer in self._slm.layers:
            del layer.forward

    def prune(self, configuration: Sequence[int] | Tensor) -> None:
        """Chooses the layers to prune from now on.

        Args:
            configuration: Numbers of the pruned layers, for all rows; or a mask_BL with a row for each row of the batch.

        Raises:
            ValueError: If a layer does not exist, or the mask has another number of columns than the SLM has layers.
        """
        num_layers = self._slm.num_layers
        if isinstance(configuration, Tensor) and configuration.dtype == torch.bool:
            if configuration.ndim != 2 or configuration.shape[1] != num_layers:
                raise ValueError(
                    f"a mask of shape {tuple(configuration.shape)} does not fit: {self._slm.name} needs (batch, {num_layers})"
                )
            self._batch = configuration.shape[0]
            self._rows = _rows_by_layer(configuration.cpu(), self._slm.device)
            return
        [mask_L] = configuration_mask(self._slm, [configuration]).tolist()
        self._batch = None
        self._rows = [_ALL_PRUNE if pruned else _ALL_KEEP for pruned in mask_L]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Lets other layers be pruned in between: afterwards the choice that was in force before is again."""
        before = self._rows, self._batch
        try:
            yield
        finally:
            self._rows, self._batch = before

    def _pruned_forward(self, index: int, base: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_BTd: Tensor, *args: Any, **kwargs: Any) -> Any:
            rows = self._rows[index]
            if rows.kept is None:
                return base(hidden_BTd, *args, **kwargs)
            batch = hidden_BTd.shape[0]
            if self._batch is not None and batch != self._batch:
                raise ValueError(
                    f"configurations were given for {self._batch} rows, but the batch has {batch}; give one for each row"
                )
            if rows.pruned is None:
                _write_placeholder(index, hidden_BTd, (*args, *kwargs.values()))
                return self._stand_in(index, hidden_BTd, kwargs.get("position_ids"))
            kept_BTd = base(
                hidden_BTd[rows.kept],
                *_select(args, rows.kept, batch),
                **_select(kwargs, rows.kept, batch),
            )
            if not isinstance(kept_BTd, Tensor):
                raise ValueError(
                    f"{self._slm.name} cannot be pruned: its decoder layers return a {type(kept_BTd).__name__}, not a tensor; "
                    "use a model whose layers return a tensor, for example a Llama, Qwen2, Qwen3, Mistral or Gemma 3"
                )
            out_BTd = torch.empty_like(hidden_BTd)
            out_BTd[rows.kept] = kept_BTd
            positions_BT = _select(kwargs.get("position_ids"), rows.pruned, batch)
            out_BTd[rows.pruned] = self._stand_in(index, hidden_BTd[rows.pruned], positions_BT)
            return out_BTd

        return forward

    def _stand_in(self, index: int, hidden_BTd: Tensor, positions_BT: Tensor | None) -> Tensor:
        return hidden_BTd if self._adapters is None else self._adapters.layer(index, hidden_BTd, positions_BT)


def configuration_mask(slm: SLM, configurations: Sequence[Sequence[int] | Tensor]) -> Tensor:
    """The mask of some configurations.

    Args:
        slm: The SLM.
        configurations: Numbers of the pruned layers of each.

    Returns:
        mask_BL, True where a layer is pruned.

    Raises:
        ValueError: If a layer does not exist.
    """
    num_layers = slm.num_layers
    mask_BL = torch.zeros(len(configurations), num_layers, dtype=torch.bool)
    for row, configuration in enumerate(configurations):
        layers = [int(layer) for layer in configuration]
        unknown = sorted({layer for layer in layers if not 0 <= layer < num_layers})
        if unknown:
            raise ValueError(
                f"{slm.name} has layers 0 to {num_layers - 1}, but {unknown} are to be pruned; "
                f"for example [0, {num_layers - 1}]"
            )
        mask_BL[row, layers] = True
    return mask_BL


def cache_bytes(cache: Cache) -> int:
    """Size of the keys and values that a cache holds, in bytes."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in _key_value_layers(cache))


def _key_value_layers(cache: Cache) -> list[Any]:
    # transformers types the layers of a cache as a union whose members do not all have keys; those of a DynamicCache do.
    return list(cache.layers)


@contextmanager
def starting_at(slm: SLM, first: int, input_BTd: Tensor) -> Iterator[None]:
    """Leaves out the layers below one whose input is known already, for passes that start with an empty cache or none.

    Configurations that differ only from some layer on share everything below it. Enter it inside a `LayerPruner`. Layers
    that are left out put nothing into the cache.

    Args:
        slm: The SLM.
        first: The first layer to run, 0..L; with L only what follows the layers is run.
        input_BTd: What goes into it.
    """
    shadowed = [(layer, layer.forward) for layer in slm.layers[:first]]

    def known(hidden_BTd: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input_BTd

    for layer, _ in shadowed:
        layer.forward = known
    try:
        yield
    finally:
        for layer, forward in shadowed:
            layer.forward = forward


class _Reached(Exception):
    """A pass has come as far as it should."""


@contextmanager
def stopping_before(slm: SLM, layer: int) -> Iterator[list[Tensor]]:
    """Ends the pass that is run inside as soon as it reaches a layer, and the block with it.

    Args:
        slm: The SLM.
        layer: The layer that is not run any more, 0..L − 1.

    Yields:
        A list that will hold what would go into that layer.
    """
    reached: list[Tensor] = []

    def stop(module: object, arguments: tuple[Tensor, ...]) -> None:
        reached.append(arguments[0])
        raise _Reached

    handle = slm.layers[layer].register_forward_pre_hook(stop)
    try:
        yield reached
    except _Reached:
        pass
    finally:
        handle.remove()


def _rows_by_layer(pruned_BL: Tensor, device: torch.device) -> list[_Rows]:
    batch = len(pruned_BL)
    # For each layer the rows that keep it, then the others: one transfer for all layers, since each waits for a GPU.
    rows_LB = pruned_BL.T.argsort(dim=1, stable=True).to(device)
    by_layer = []
    for kept, rows_B in zip((~pruned_BL).sum(dim=0).tolist(), rows_LB, strict=True):
        if kept == batch:
            by_layer.append(_ALL_KEEP)
        elif kept == 0:
            by_layer.append(_ALL_PRUNE)
        else:
            by_layer.append(_Rows(kept=rows_B[:kept], pruned=rows_B[kept:]))
    return by_layer


def _write_placeholder(index: int, hidden_BTd: Tensor, arguments: Sequence[Any]) -> None:
    """Keeps the length of a pruned layer's cache in step with that of the others."""
    for cache in arguments:
        if isinstance(cache, Cache):
            length = hidden_BTd.new_zeros(hidden_BTd.shape[0], 1, hidden_BTd.shape[1], 1)
            cache.update(length, length, index)


def _select(value: Any, rows: Tensor, batch: int) -> Any:
    """Takes some rows of every batched tensor in the arguments of a layer."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 1 and value.shape[0] == batch else value
    if isinstance(value, tuple | list):
        return type(value)(_select(item, rows, batch) for item in value)
    if isinstance(value, dict):
        return {key: _select(item, rows, batch) for key, item in value.items()}
    return value
