"""What all methods that train a router share: the forward pass, the validation on preference pairs, the optimiser.

A method is one file with a subclass that says which data it learns from and names its equation in `training_loss`.

Shapes: B = batch, L = layers.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import lightning
import torch
from torch import Tensor

from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies.base import Policy
from dynprune.router.router import Router

Batch = Mapping[str, Any]


class RouterTraining(lightning.LightningModule):
    """A router in training.

    A batch holds ``inputs`` (embeddings of the queries, or their tokens where the encoder is trained) and the masks
    ``mask_BL`` (rollouts) or ``winner_mask_BL`` and ``loser_mask_BL`` (preference pairs), True where a layer is pruned.

    Attributes:
        learns_from: The stream that the method trains on.
        router: The router.
        policy: The distribution over configurations that the router's outputs define.
    """

    learns_from: ClassVar[Literal["rollouts", "pairs"]]

    def __init__(self, router: Router, policy: Policy, optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]) -> None:
        """Binds a router to its policy and optimiser.

        Args:
            router: The router to train.
            policy: Its policy.
            optimizer: Makes the optimiser for the parameters.
        """
        super().__init__()
        self.router = router
        self.policy = policy
        self._optimizer = optimizer

    @abstractmethod
    def training_loss(self, outputs: RouterOutputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The method's equation.

        Args:
            outputs: The router's outputs for the batch.
            batch: The batch.

        Returns:
            The mean loss, and what to log beside it.
        """

    def outputs(self, batch: Batch) -> RouterOutputs:
        """The router's outputs for the queries of a batch."""
        inputs = batch["inputs"]
        return self.router(inputs["embedding_BE"] if "embedding_BE" in inputs else self.router.encode(inputs))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss, metrics = self.training_loss(self.outputs(batch), batch)
        self.log("train/loss", loss, prog_bar=True)
        # The names that the field uses: rewards/chosen, logps/rejected and so on, as in TRL.
        self.log_dict(metrics)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The method's loss on held-out data of its own kind, and on pairs how often the winner is the likelier one.

        Checkpoints are chosen by the loss. The other figure is the same for every method, so that methods can be compared,
        but it is no guide: heads that were never trained prune half of the layers, and more pruning often wins a pair.
        """
        outputs = self.outputs(batch)
        if ("mask_BL" in batch) == (self.learns_from == "rollouts"):
            loss, _ = self.training_loss(outputs, batch)
            self._log_validation("loss", loss, len(outputs.layer_logits_BL))
        if "winner_mask_BL" in batch:
            margin_B = self.policy.log_prob(outputs, batch["winner_mask_BL"]) - self.policy.log_prob(
                outputs, batch["loser_mask_BL"]
            )
            # Two impossible configurations give inf - inf: the policy does not tell them apart.
            preferred_B = margin_B.nan_to_num(nan=0.0) > 0
            self._log_validation("rewards/accuracies", preferred_B.float().mean(), len(preferred_B))

    def _log_validation(self, name: str, value: Tensor, size: int) -> None:
        # The loaders of rollouts and of pairs log under different names already.
        self.log(f"validation/{name}", value, prog_bar=True, batch_size=size, sync_dist=True, add_dataloader_idx=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser of the config, over what is trained."""
        return self._optimizer([p for p in self.router.parameters() if p.requires_grad])
