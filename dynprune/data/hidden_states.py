"""The stream of hidden states that adapters learn from: computed batch by batch, never held whole.

Shapes: S = L + 1 states, N = tokens of a batch without padding, d = hidden size.
"""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from dynprune.slm.loading import SLM
from dynprune.slm.padding import left_padded


class HiddenStateStream(IterableDataset[Tensor]):
    """Yields what goes in and out of each decoder layer, for batches of token sequences.

    An item is ``states_SNd``: entry i is the input of layer i, entry i + 1 its output. They come from hooks on the layers
    themselves: the last of transformers' ``hidden_states`` is taken after the final norm, which no layer computes.
    """

    def __init__(
        self,
        slm: SLM,
        sequences: Sequence[Sequence[int]],
        batch_tokens: int,
        seed: int | None,
        skip_first: bool = False,
        after_norm: bool = False,
    ) -> None:
        """Binds the SLM to the sequences.

        Args:
            slm: The teacher.
            sequences: Token ids of whole samples, prompt and answer.
            batch_tokens: Tokens in a batch, at most, padding included; a longer sequence is a batch of its own.
            seed: Seed of the order of the batches, drawn anew each epoch; ``None`` keeps the order.
            skip_first: Whether to leave out the first token of each sequence.
            after_norm: Whether the last state is transformers' own, after the final norm, which is the thesis's mistake.
        """
        self._slm = slm
        self._batches = _batches(sequences, batch_tokens)
        self._seed = seed
        self._skip_first = skip_first
        self._after_norm = after_norm
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the batches."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        """Runs the teacher over the batches."""
        for position in self._order(self._epoch):
            yield self._states(self._batches[position])

    def batch(self, epoch: int, number: int) -> Tensor:
        """The states of a batch, by its epoch and its number in it."""
        return self._states(self.sequences(epoch, number))

    def sequences(self, epoch: int, number: int) -> list[Sequence[int]]:
        """The sequences of a batch, by its epoch and its number in it."""
        return self._batches[self._order(epoch)[number]]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self._batches)))
        if self._seed is not None:
            random.Random(f"{self._seed}-{epoch}").shuffle(order)
        return order

    @torch.no_grad()
    def _states(self, batch: list[Sequence[int]]) -> Tensor:
        arguments = left_padded(batch, self._slm.tokenizer.pad_token_id, self._slm.device)
        wanted_BT = arguments["position_ids"] > 0 if self._skip_first else arguments["attention_mask"].bool()
        states: list[Tensor] = []

        def keep_input(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            states.append(inputs[0][wanted_BT])

        def keep_output(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            states.append(output[wanted_BT])

        layers = self._slm.layers
        handles = [layer.register_forward_pre_hook(keep_input) for layer in layers[:1]]
        handles += [layer.register_forward_hook(keep_output) for layer in layers]
        try:
            output = self._slm.model(**arguments, use_cache=False, logits_to_keep=1, output_hidden_states=self._after_norm)
        finally:
            for handle in handles:
                handle.remove()
        if self._after_norm:
            states[-1] = output.hidden_states[-1][wanted_BT]
        return torch.stack(states)


def _batches(sequences: Sequence[Sequence[int]], batch_tokens: int) -> list[list[Sequence[int]]]:
    """Groups sequences of similar length."""
    batches: list[list[Sequence[int]]] = []
    for sequence in sorted(sequences, key=len):
        if batches and (len(batches[-1]) + 1) * len(sequence) <= batch_tokens:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return batches
