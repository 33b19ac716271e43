"""Distilling the adapters of all layers at once from the stream of hidden states.

Each adapter learns to give its layer's output for its layer's input. The layers' parameters are disjoint, so the sum of their
losses trains each one as if it were alone, in one pass of the teacher for all of them.

Shapes: L = layers, S = L + 1 states, N = tokens, d = hidden size.
"""

from collections.abc import Callable, Iterable

import lightning
import torch
from torch import Tensor

from dynprune.adapters.stack import AdapterStack

LOSSES = ("relative", "mse")


def mse_loss(outputs_LNd: Tensor, targets_LNd: Tensor) -> Tensor:
    """Mean squared error, summed over layers: the thesis's loss."""
    return (outputs_LNd - targets_LNd).square().mean(dim=(1, 2)).sum()


def relative_loss(outputs_LNd: Tensor, targets_LNd: Tensor) -> Tensor:
    """Squared error over the target's squared norm, token by token; mean over tokens, summed over layers.

    Every token counts the same. In the plain mean the few tokens with massive activations (norms a thousand times the
    others', mostly the first token of the text) outweigh all others together.
    """
    error_LN = (outputs_LNd - targets_LNd).square().sum(dim=2)
    return (error_LN / targets_LNd.square().sum(dim=2).clamp(min=1e-6)).mean(dim=1).sum()


class Distillation(lightning.LightningModule):
    """Trains a stack of adapters on hidden states of the teacher."""

    def __init__(
        self,
        adapters: AdapterStack,
        loss: str,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    ) -> None:
        """Binds adapters to their loss and optimiser.

        Args:
            adapters: The adapters to train, in float32.
            loss: ``relative`` or ``mse``.
            optimizer: Makes the optimiser for the parameters.

        Raises:
            ValueError: If there is no such loss.
        """
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"adapter.loss={loss!r} is unknown; allowed: {', '.join(LOSSES)}")
        self.adapters = adapters
        self._loss = relative_loss if loss == "relative" else mse_loss
        self._optimizer = optimizer
        # Sums over the validation stream: squared error, squared change by the layer, tokens.
        self._sums_3L = torch.zeros(3, adapters.num_layers, dtype=torch.float64)

    def training_step(self, states_SNd: Tensor, batch_idx: int) -> Tensor:
        """Loss of all adapters on one batch of states."""
        states_SNd = states_SNd.float()
        loss = self._loss(self.adapters(states_SNd[:-1]), states_SNd[1:])
        self.log("train/loss", loss / self.adapters.num_layers, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forgets the sums of the last validation."""
        self._sums_3L = torch.zeros_like(self._sums_3L)

    def validation_step(self, states_SNd: Tensor, batch_idx: int) -> None:
        """Adds one batch to the sums."""
        inputs_LNd, targets_LNd = states_SNd[:-1].float(), states_SNd[1:].float()
        error_L = (self.adapters(inputs_LNd) - targets_LNd).square().sum(dim=(1, 2))
        change_L = (targets_LNd - inputs_LNd).square().sum(dim=(1, 2))
        count_L = torch.full_like(error_L, inputs_LNd[0].numel())
        self._sums_3L += torch.stack([error_L, change_L, count_L]).to(self._sums_3L)

    def on_validation_epoch_end(self) -> None:
        """Logs both errors of each layer, and their means."""
        self.log("validation/relative_error", self.relative_error_L.mean().float(), prog_bar=True)
        for layer, (mse, relative) in enumerate(zip(self.mse_L.tolist(), self.relative_error_L.tolist(), strict=True)):
            self.log(f"validation/mse/layer_{layer:02d}", mse)
            self.log(f"validation/relative_error/layer_{layer:02d}", relative)

    @property
    def mse_L(self) -> Tensor:
        """Mean squared error of each layer over the last validation."""
        return self._sums_3L[0] / self._sums_3L[2]

    @property
    def relative_error_L(self) -> Tensor:
        """Squared error of each layer as a share of what the layer changes; the identity scores 1."""
        return self._sums_3L[0] / self._sums_3L[1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser of the config, over the adapters."""
        return self._optimizer(self.adapters.parameters())
