"""Context-aware adapters: all of them trained together, through the frozen SLM, under random configurations.

A local fit teaches each adapter its own layer on the states of the full SLM. Under a configuration it gets other states, those
that the adapters below it made, and the errors add up. Here each row of a batch prunes layers of its own, drawn anew each time,
and the loss is what counts in the end: KL(full SLM ‖ pruned SLM) on the tokens of the answer.

Shapes: B = batch, L = layers, N = answer tokens of a batch, V = vocabulary.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional
from torch.utils.data import IterableDataset
from transformers import get_cosine_schedule_with_warmup

from dynprune.adapters.stack import AdapterStack
from dynprune.slm.likelihood import AnswerBatch, Answered
from dynprune.slm.loading import SLM
from dynprune.slm.pruning import LayerPruner, configuration_mask


def answer_kl(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher ‖ student), in nats.

    Args:
        teacher_NV: The full SLM's logits.
        student_NV: The pruned SLM's logits.
    """
    return functional.kl_div(
        student_NV.log_softmax(dim=-1), teacher_NV.log_softmax(dim=-1), reduction="batchmean", log_target=True
    )


def draw_configuration(weights: Sequence[float], smallest: int, largest: int, rng: random.Random) -> tuple[int, ...]:
    """Draws a random configuration: its size uniformly, then its layers one after another by their weights.

    Args:
        weights: How often each of the L layers is drawn, relative to the others; a layer of weight 0 never is.
        smallest: Least number of layers.
        largest: Largest number of layers.
        rng: Where the choice comes from.

    Raises:
        ValueError: If fewer layers have a weight than may be drawn.
    """
    drawable = sum(weight > 0 for weight in weights)
    if not 1 <= smallest <= largest <= drawable:
        raise ValueError(
            f"adapter.draw takes {smallest} to {largest} of {drawable} layers; allowed: 1 <= adapter.draw.min_layers <= "
            f"adapter.draw.max_layers <= {drawable}"
        )
    # Exponential clocks of rate w ring in the order of drawing by weight without replacement.
    clocks = [(rng.expovariate(weight), layer) for layer, weight in enumerate(weights) if weight > 0]
    return tuple(sorted(layer for _, layer in sorted(clocks)[: rng.randint(smallest, largest)]))


class ContextBatch(NamedTuple):
    """Samples, and for each the layers to prune."""

    samples: list[Answered]
    configurations: list[tuple[int, ...]]


class ContextStream(IterableDataset[ContextBatch]):
    """Yields samples of similar length, each with a configuration drawn anew in each epoch."""

    def __init__(
        self,
        samples: Sequence[Answered],
        draw: Callable[[random.Random], tuple[int, ...]],
        batch_size: int,
        seed: int,
    ) -> None:
        """Binds the samples.

        Args:
            samples: Prompts with the full SLM's answers.
            draw: Draws a configuration, for example `draw_configuration` with its weights and sizes.
            batch_size: Samples in a batch.
            seed: Seed of the order and of the configurations.
        """
        self._samples = samples
        self._draw = draw
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses what is drawn."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return -(-len(self._samples) // self._batch_size)

    def __iter__(self) -> Iterator[ContextBatch]:
        """Draws the batches of the epoch."""
        rng = random.Random(f"{self._seed}-{self._epoch}")
        # Shuffled, then sorted: samples of one length come together with others each epoch.
        order = sorted(rng.sample(self._samples, len(self._samples)), key=lambda sample: sum(map(len, sample)))
        batches = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]
        for samples in rng.sample(batches, len(batches)):
            yield ContextBatch(samples, [self._draw(rng) for _ in samples])


class ContextTraining(lightning.LightningModule):
    """Trains a stack of adapters through the frozen SLM."""

    def __init__(
        self,
        slm: SLM,
        pruner: LayerPruner,
        adapters: AdapterStack,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        warmup_share: float,
    ) -> None:
        """Binds the adapters.

        Args:
            slm: The SLM; it stays as it is.
            pruner: Its pruner with these adapters, entered.
            adapters: The adapters to train, in float32.
            optimizer: Makes the optimiser for the parameters.
            warmup_share: Share of the steps with a rising rate, in 0..1; it falls along a cosine after that.
        """
        super().__init__()
        self.adapters = adapters
        self._slm, self._pruner = slm, pruner
        self._optimizer, self._warmup_share = optimizer, warmup_share

    def training_step(self, batch: ContextBatch, batch_idx: int) -> Tensor:
        """KL of one batch, in nats a token."""
        loss = self._kl(batch)
        self.log("train/kl", loss, prog_bar=True, batch_size=len(batch.samples))
        return loss

    def validation_step(self, batch: ContextBatch, batch_idx: int) -> None:
        """KL of one held-out batch, in nats a token."""
        self.log("validation/kl", self._kl(batch), prog_bar=True, batch_size=len(batch.samples))

    def _kl(self, batch: ContextBatch) -> Tensor:
        answers = AnswerBatch(self._slm, batch.samples)
        with torch.no_grad():
            self._pruner.prune(())
            teacher_NV = answers.answer_logits(self._slm)
        self._pruner.prune(configuration_mask(self._slm, batch.configurations))
        return answer_kl(teacher_NV, answers.answer_logits(self._slm))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimiser of the config, warm-up and cosine by step."""
        optimizer = self._optimizer(self.adapters.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, int(steps * self._warmup_share), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
