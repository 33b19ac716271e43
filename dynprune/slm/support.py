"""Which models can be pruned layer by layer: what a layer must be like is looked at while a few tokens pass through.

Pruning replaces what a layer does to the hidden states. That is the whole of it where layers run one after another, each on
what the one before gave, and keep keys and values of their own. It is not where a layer has a recurrent state that its
replacement would have to carry on, where layers share keys and values, or where states go around layers. And rows of different
lengths must run in one batch, padded on the left, each token seeing those before it.

Axis suffixes: B = batch, T = tokens, V = vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dynprune.slm.layers import decoder_layers
from dynprune.slm.padding import left_padded

_TOKENS = 3
# What the generation's own cache can stand in for.
_KINDS = (DynamicLayer, DynamicSlidingWindowLayer)
# Of logits, as a share of the largest: what rounding explains, in float32 and in half precision.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1


def refusal(model: PreTrainedModel) -> str | None:
    """Says why a model cannot be pruned.

    Args:
        model: A causal LM.

    Returns:
        What is in the way, to stand behind "it cannot be pruned: "; ``None`` where nothing is.
    """
    try:
        layers = decoder_layers(model)
    except ValueError as error:
        return str(error)
    passed: list[tuple[int, Any, Any]] = []
    handles = [
        layer.register_forward_hook(
            lambda module, arguments, output, index=index: passed.append((index, arguments[:1], output))
        )
        for index, layer in enumerate(layers)
    ]
    try:
        cache = _run(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"it does not run with a cache of keys and values ({_said(error)})"
    finally:
        for handle in handles:
            handle.remove()
    if reason := _order(passed, len(layers)) or _states(passed, model) or _keys(cache, len(layers)):
        return reason
    try:
        return _rows(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"it does not run on rows of different lengths ({_said(error)})"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}"


@torch.no_grad()
def _run(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(**left_padded([_tokens(model)], 0, model.device), cache=cache, use_cache=True)
    return cache


def _tokens(model: PreTrainedModel) -> list[int]:
    # Beyond the special ones, which some models treat apart.
    size = model.config.get_text_config().vocab_size
    return [(size // 2 + number) % size for number in range(_TOKENS)]


@torch.no_grad()
def _rows(model: PreTrainedModel) -> str | None:
    """Whether a row says in a batch, padded, what it says alone, whatever comes after a token."""
    *begun, last = _tokens(model)
    alone_TV = _logits(model, [[*begun, last]])[0]
    begun_TV = _logits(model, [begun])[0]
    share = _TOLERANCE if model.dtype == torch.float32 else _HALF_TOLERANCE
    tolerance = share * float(alone_TV.abs().max())
    if float((alone_TV[:-1] - begun_TV).abs().max()) > tolerance:
        return "a token sees those after it, so it is no causal model"
    longer = [last, *begun, last, *begun, last]
    padded_TV = _logits(model, [longer, [*begun, last]])[1]
    if float((padded_TV[-_TOKENS:] - alone_TV).abs().max()) > tolerance:
        return "a row that is padded on the left, in a batch with a longer one, does not say what it says alone"
    return None


def _logits(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    logits_BTV: Tensor = model(**left_padded(rows, 0, model.device), use_cache=False).logits
    return logits_BTV.float()


def _order(passed: list[tuple[int, Any, Any]], num_layers: int) -> str | None:
    order = [index for index, _, _ in passed]
    if order != list(range(num_layers)):
        return f"its layers do not run once each, one after another, but in the order {order}"
    return None


def _states(passed: list[tuple[int, Any, Any]], model: PreTrainedModel) -> str | None:
    width = model.config.get_text_config().hidden_size
    before: Tensor | None = None
    for index, arguments, output in passed:
        if not isinstance(output, Tensor):
            return f"its decoder layers return a {type(output).__name__}, not a tensor"
        if not arguments or not isinstance(arguments[0], Tensor):
            return "its decoder layers do not take the hidden states as their first argument"
        if tuple(arguments[0].shape) != (1, _TOKENS, width) or tuple(output.shape) != (1, _TOKENS, width):
            return f"its hidden states are no (batch, tokens, width), but {tuple(arguments[0].shape)}"
        if before is not None and not torch.equal(before, arguments[0]):
            return f"what goes into layer {index} is not what layer {index - 1} gives: states go around layers"
        before = output
    return None


def _keys(cache: DynamicCache, num_layers: int) -> str | None:
    held: list[Any] = [*cache.layers, *[None] * num_layers]
    for index, layer in enumerate(held[:num_layers]):
        if isinstance(layer, DynamicLayer) and type(layer) not in _KINDS:
            return f"layer {index} keeps more than keys and values: it has a {type(layer).__name__}"
        if type(layer) not in _KINDS or layer.keys is None or layer.keys.ndim != 4:
            return f"layer {index} keeps no keys and values of its own: it has a recurrent state, or shares another layer's"
        if layer.keys.shape[2] != _TOKENS:
            return f"layer {index} keeps {layer.keys.shape[2]} keys for {_TOKENS} tokens"
    return None
