"""Searching the static sets that every query shares: the baseline that per-query choice has to beat.

Greedy, as in SLEB and PuDDing: from no pruning on, add the layer whose pruning hurts the likelihood of the reference answers
least, under the adapters, by teacher forcing. The sets for all sizes come from one search, each the last one and a layer more.

Shapes: B = batch, T = tokens, K = tokens kept for the loss, V = vocabulary, d = hidden size.
"""

from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from dynprune.slm.loading import SLM
from dynprune.slm.pruning import LayerPruner, starting_at

_IGNORED = -100


def greedy_static_sets(
    slm: SLM,
    pruner: LayerPruner,
    samples: Sequence[tuple[Sequence[int], Sequence[int]]],
    largest: int,
    candidates: int | None,
    batch_size: int,
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Grows a static set layer by layer.

    Args:
        slm: The SLM.
        pruner: Its pruner with adapters, entered.
        samples: Prompt and reference answer of each sample, as tokens.
        largest: Size of the largest set.
        candidates: After the first layer, only so many are tried, those that hurt least alone; ``None`` tries all.
        batch_size: Samples in a batch.

    Yields:
        The best set of each size from 1 to ``largest`` with its mean negative log-likelihood, in nats a token.

    Raises:
        ValueError: If a set cannot have so many layers, there are too few candidates, or there are no samples.
    """
    if not 1 <= largest <= slm.num_layers:
        raise ValueError(
            f"evaluation.static asks for a set of {largest} layers, but {slm.name} has {slm.num_layers}; allowed: 1 to "
            f"{slm.num_layers}; for example evaluation.static=[2,3,5]"
        )
    if not samples:
        raise ValueError("the search for static sets needs samples of the train split; set evaluation.static_samples")
    batches = [_Batch.of(slm, samples[start : start + batch_size]) for start in range(0, len(samples), batch_size)]
    if candidates is not None and candidates < largest:
        raise ValueError(
            f"evaluation.static_candidates={candidates} is fewer than the {largest} layers of the largest static set; "
            f"allowed: at least {largest}, or null for all layers"
        )
    chosen: tuple[int, ...] = ()
    tried = list(range(slm.num_layers))
    for _ in range(largest):
        losses = dict.fromkeys((layer for layer in tried if layer not in chosen), 0.0)
        for batch in batches:
            pruner.prune(chosen)
            inputs = batch.layer_inputs(slm)
            for layer in losses:
                pruner.prune([*chosen, layer])
                losses[layer] += batch.loss(slm, layer, inputs[layer])
        tokens = sum(batch.num_targets for batch in batches)
        ranked = sorted(losses, key=lambda layer: losses[layer])
        if not chosen:
            tried = ranked[:candidates]
        best = ranked[0]
        chosen = tuple(sorted([*chosen, best]))
        yield chosen, losses[best] / tokens


class _Batch:
    """Samples that are run again and again with another layer pruned."""

    def __init__(self, ids_BT: Tensor, attention_BT: Tensor, labels_BK: Tensor) -> None:
        self._arguments = {
            "input_ids": ids_BT,
            "attention_mask": attention_BT,
            "position_ids": (attention_BT.cumsum(dim=1) - 1).clamp(min=0),
            "use_cache": False,
            "logits_to_keep": labels_BK.shape[1] + 1,
        }
        self._labels_BK = labels_BK
        self.num_targets = int((labels_BK != _IGNORED).sum())

    @classmethod
    def of(cls, slm: SLM, samples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Self:
        """Pads samples on the left; the labels are the answers, each with its stop token."""
        stop, pad = slm.tokenizer.eos_token_id, slm.tokenizer.pad_token_id
        answers = [[*answer, stop] for _, answer in samples]
        whole = [[*prompt, *answer] for (prompt, _), answer in zip(samples, answers, strict=True)]
        width, keep = max(map(len, whole)), max(map(len, answers))
        return cls(
            torch.tensor([[pad] * (width - len(s)) + s for s in whole], device=slm.device),
            torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in whole], device=slm.device),
            torch.tensor([[_IGNORED] * (keep - len(a)) + a for a in answers], device=slm.device),
        )

    @torch.inference_mode()
    def layer_inputs(self, slm: SLM) -> list[Tensor]:
        """What goes into each layer under the configuration in force."""
        inputs: list[Tensor] = []
        handles = [
            layer.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0])) for layer in slm.layers
        ]
        try:
            slm.model(**self._arguments)
        finally:
            for handle in handles:
                handle.remove()
        return inputs

    @torch.inference_mode()
    def loss(self, slm: SLM, first: int, input_BTd: Tensor) -> float:
        """Summed negative log-likelihood of the answers, in nats, from the first layer that differs on.

        Args:
            slm: The SLM.
            first: The layers below are those of the pass that gave the input.
            input_BTd: What goes into that layer.
        """
        with starting_at(slm, first, input_BTd):
            logits_BKV = slm.model(**self._arguments).logits[:, :-1]
        labelled_BK = self._labels_BK != _IGNORED
        # Selected before the cast: most positions have no label, and a row of logits is as long as the vocabulary.
        loss = functional.cross_entropy(logits_BKV[labelled_BK].float(), self._labels_BK[labelled_BK], reduction="sum")
        return loss.item()
