"""How likely an SLM finds known answers under some configurations, by teacher forcing: one pass, no generation.

This is the dense reward of a configuration: it tells two configurations apart where a score of the output says 0 for both.

Shapes: B = batch, T = tokens, K = tokens kept for the loss, N = answer tokens of the batch, V = vocabulary, C = configurations,
Q = samples, d = hidden size, L = layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dynprune.slm.loading import SLM
from dynprune.slm.padding import left_padded
from dynprune.slm.prompt_states import tokens_at_once
from dynprune.slm.pruning import LayerPruner, configuration_mask, starting_at

IGNORED = -100
"""The label of what is no answer, as torch's cross-entropy has it."""

# Measured on a CPU: passes over 1024 tokens are a tenth faster, by the token, than over 256, and as fast as over 2048.
_TIMES_AT_ONCE = 4

# Prompt and answer of a sample, as tokens; the answer without a stop token.
Answered = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class AnswerScores:
    """What teacher forcing says of some answers, on the CPU.

    Attributes:
        nats_B: Summed negative log-likelihood of each answer's tokens and its stop token, in nats.
        tokens_B: How many tokens these are.
        right_B: Whether each of them is the most likely one given those before it: greedy decoding would give the answer.
    """

    nats_B: Tensor
    tokens_B: Tensor
    right_B: Tensor

    @property
    def nats_per_token_B(self) -> Tensor:
        """Mean negative log-likelihood, in nats a token."""
        return self.nats_B / self.tokens_B


class AnswerBatch:
    """Samples that are run again and again under other configurations."""

    def __init__(self, slm: SLM, samples: Sequence[Answered]) -> None:
        """Pads samples on the left; the labels are the answers, each with its stop token.

        Args:
            slm: The SLM.
            samples: B samples.
        """
        answers = [[*answer, slm.tokenizer.eos_token_id] for _, answer in samples]
        whole = [[*prompt, *answer] for (prompt, _), answer in zip(samples, answers, strict=True)]
        keep = max(map(len, answers))
        self._arguments = {
            **left_padded(whole, slm.tokenizer.pad_token_id, slm.device),
            "use_cache": False,
            "logits_to_keep": keep + 1,
        }
        self._labels_BK = torch.tensor([[IGNORED] * (keep - len(a)) + a for a in answers], device=slm.device)

    def answer_logits(self, slm: SLM) -> Tensor:
        """What the SLM says of each answer token and stop token under the configuration in force.

        Returns:
            logits_NV in float32, of all rows one after another; with gradients where the caller's mode has them.
        """
        return self._labelled(slm.model(**self._arguments).logits)

    @torch.inference_mode()
    def scores(self, slm: SLM, first: int, input_BTd: Tensor) -> AnswerScores:
        """Scores of the answers under the configuration in force, from the first layer that differs on.

        Args:
            slm: The SLM.
            first: The layers below are those of the pass that gave the input.
            input_BTd: What goes into that layer.
        """
        with starting_at(slm, first, input_BTd):
            return self._scores(slm.model(**self._arguments).logits)

    @torch.inference_mode()
    def run(self, slm: SLM, first: int = 0, input_BTd: Tensor | None = None) -> tuple[list[Tensor], AnswerScores]:
        """A pass under the configuration in force that keeps what goes into each layer.

        Args:
            slm: The SLM.
            first: The layers below are left out, see `scores`.
            input_BTd: What goes into the layer ``first``; ``None`` for layer 0, whose input the embedding gives.

        Returns:
            The inputs of the layers from ``first`` on, and the scores.
        """
        inputs: list[Tensor] = []
        handles = [
            layer.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
            for layer in slm.layers[first:]
        ]
        try:
            if input_BTd is None:
                assert first == 0, "layers can be left out only where the next one's input is known"
                logits_BKV = slm.model(**self._arguments).logits
            else:
                with starting_at(slm, first, input_BTd):
                    logits_BKV = slm.model(**self._arguments).logits
        finally:
            for handle in handles:
                handle.remove()
        return inputs, self._scores(logits_BKV)

    def _labelled(self, logits_BKV: Tensor) -> Tensor:
        # Selected before the cast: most positions have no label, and a row of logits is as long as the vocabulary.
        return logits_BKV[:, :-1][self._labels_BK != IGNORED].float()

    def _scores(self, logits_BKV: Tensor) -> AnswerScores:
        labelled_BK = self._labels_BK != IGNORED
        logits_NV, labels_N = self._labelled(logits_BKV), self._labels_BK[labelled_BK]
        nats_BK = torch.zeros(labelled_BK.shape, device=logits_NV.device)
        nats_BK[labelled_BK] = functional.cross_entropy(logits_NV, labels_N, reduction="none")
        wrong_BK = torch.zeros_like(labelled_BK)
        wrong_BK[labelled_BK] = logits_NV.argmax(dim=-1) != labels_N
        return AnswerScores(nats_BK.double().sum(dim=1).cpu(), labelled_BK.sum(dim=1).cpu(), ~wrong_BK.any(dim=1).cpu())


def similar_samples(slm: SLM, samples: Sequence[Answered]) -> list[list[int]]:
    """Batches of samples of similar length, since padding costs what tokens cost.

    They are some times as large as a search's, which keeps them small to share more: here nothing is shared between samples.

    Args:
        slm: The SLM.
        samples: The samples.

    Returns:
        The samples' positions, batch by batch.
    """
    lengths = [len(prompt) + len(answer) + 1 for prompt, answer in samples]
    limit = _TIMES_AT_ONCE * tokens_at_once(slm)
    batches: list[list[int]] = []
    for position in sorted(range(len(samples)), key=lambda position: lengths[position]):
        # The longest so far, so all of the batch are padded to it.
        if not batches or (len(batches[-1]) + 1) * lengths[position] > limit:
            batches.append([])
        batches[-1].append(position)
    return batches


def score_configurations(
    slm: SLM,
    pruner: LayerPruner,
    samples: Sequence[Answered],
    configurations: Sequence[Sequence[int]],
) -> Iterator[tuple[list[int], list[AnswerScores]]]:
    """Scores every configuration on every sample, in the batches of `similar_samples`.

    Configurations are run in the order of their lowest layers, and each starts at the first layer in which it differs from
    the one before.

    Args:
        slm: The SLM.
        pruner: Its pruner with adapters, entered.
        samples: Q samples.
        configurations: C configurations, pruned layers in ascending order.

    Yields:
        The positions of some samples, and for each of the C configurations, in the order given, the scores of these samples.
    """
    order = sorted(range(len(configurations)), key=lambda c: tuple(configurations[c]))
    for positions in similar_samples(slm, samples):
        batch = AnswerBatch(slm, [samples[position] for position in positions])
        scores: dict[int, AnswerScores] = {}
        inputs: list[Tensor] = []
        before: Sequence[int] = ()
        for c in order:
            pruner.prune(configurations[c])
            first = _first_difference(before, configurations[c], slm.num_layers - 1) if inputs else 0
            deeper, scores[c] = batch.run(slm, first, inputs[first] if inputs else None)
            inputs[first:] = deeper
            before = configurations[c]
        yield positions, [scores[c] for c in range(len(configurations))]


def estimate_configurations(
    slm: SLM, pruner: LayerPruner, sample: Answered, configurations: Sequence[Sequence[int]]
) -> list[float]:
    """Dense rewards of configurations on one sample, as rows of batches with a configuration for each row.

    What a layer makes of the sample depends on the layers below it that are pruned, so the configurations form a tree, and they
    are run in its order: each batch starts at the first layer in which one of its rows differs from the row before the batch.
    On a CPU a row of some hundred tokens is a batch, and each branch of the tree is run once.

    Args:
        slm: The SLM.
        pruner: Its pruner with adapters, entered; what it prunes is the same afterwards.
        sample: Prompt and reference answer.
        configurations: C configurations, pruned layers in ascending order.

    Returns:
        Nats a token of the answer and its stop token under each of the C configurations.
    """
    mask_CL = configuration_mask(slm, configurations)
    order = sorted(range(len(configurations)), key=lambda c: mask_CL[c].tolist())
    rows_at_once = max(1, tokens_at_once(slm) // sum(map(len, sample)))
    nats: dict[int, float] = {}
    # What goes into each layer for the last row that was run.
    inputs: list[Tensor] = []
    before: Sequence[int] = ()
    with pruner.restored():
        for start in range(0, len(order), rows_at_once):
            rows = order[start : start + rows_at_once]
            first = min(_first_difference(before, configurations[c], slm.num_layers - 1) for c in rows) if inputs else 0
            pruner.prune(mask_CL[rows])
            batch = AnswerBatch(slm, [sample] * len(rows))
            deeper, scores = batch.run(slm, first, inputs[first].expand(len(rows), -1, -1) if inputs else None)
            nats.update(zip(rows, scores.nats_per_token_B.tolist(), strict=True))
            # Copied: a view would keep the rows of the whole batch.
            inputs[first:] = [input_BTd[-1:].clone() for input_BTd in deeper]
            before = configurations[rows[-1]]
    return [nats[c] for c in range(len(configurations))]


def _first_difference(one: Sequence[int], other: Sequence[int], last: int) -> int:
    """The first layer that only one of two configurations prunes; ``last`` where they are alike."""
    return min(set(one) ^ set(other), default=last)
