"""Direct preference optimisation of a router (Rafailov et al., 2023), with a frozen reference or without one.

−log σ(β·(log π(y_w) − log π(y_l))), and with ``reference: frozen`` minus the same difference under the initial router.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from dynprune.methods.base import Batch, RouterTraining
from dynprune.methods.losses import dpo_loss
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies.base import Policy
from dynprune.router.router import Router


class DirectPreferenceOptimization(RouterTraining):
    """Trains a router by `dpo_loss`."""

    learns_from = "pairs"

    def __init__(
        self,
        router: Router,
        policy: Policy,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        beta: float,
        reference: Literal["frozen", "none"],
    ) -> None:
        """Sets the loss.

        Args:
            router: See `RouterTraining`.
            policy: See `RouterTraining`.
            optimizer: See `RouterTraining`.
            beta: β, how far the policy may move from the reference.
            reference: ``frozen`` for the router as it is given, ``none`` for the thesis's loss.

        Raises:
            ValueError: If there is no such reference.
        """
        super().__init__(router, policy, optimizer)
        if reference not in ("frozen", "none"):
            raise ValueError(f"method.module.reference={reference!r} is unknown; allowed: frozen, none")
        self._beta = beta
        self._reference = copy.deepcopy(router).requires_grad_(False).eval() if reference == "frozen" else None

    def training_loss(self, outputs: RouterOutputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of `dpo_loss` over the pairs of the batch."""
        winners_BL, losers_BL = batch["winner_mask_BL"], batch["loser_mask_BL"]
        reference_w_B = reference_l_B = None
        if self._reference is not None:
            with torch.no_grad():
                inputs = batch["inputs"]
                reference = self._reference(
                    inputs["embedding_BE"] if "embedding_BE" in inputs else self._reference.encode(inputs)
                )
                reference_w_B = self.policy.log_prob(reference, winners_BL)
                reference_l_B = self.policy.log_prob(reference, losers_BL)
        terms = dpo_loss(
            self.policy.log_prob(outputs, winners_BL),
            self.policy.log_prob(outputs, losers_BL),
            reference_w_B,
            reference_l_B,
            beta=self._beta,
        )
        return terms.loss_B.mean(), terms.metrics()
