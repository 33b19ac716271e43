"""Direct preference optimisation of a router (Rafailov et al., 2023), with a frozen reference or without one.

−log σ(β·(log π(y_w) − log π(y_l))), and with ``reference: frozen`` minus the same difference under the initial router.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from dynprune.methods.base import Batch, check_above
from dynprune.methods.losses import PreferenceTerms, dpo_loss
from dynprune.methods.preference import PreferenceTraining
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies.base import Policy
from dynprune.router.router import Router


class DirectPreferenceOptimization(PreferenceTraining):
    """Trains a router by `dpo_loss`."""

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
            ValueError: If there is no such reference, or β is not above 0.
        """
        super().__init__(router, policy, optimizer, has_reference=reference == "frozen")
        if reference not in ("frozen", "none"):
            raise ValueError(f"method.module.reference={reference!r} is unknown; allowed: frozen, none")
        check_above("beta", beta, 0, example=0.1)
        self._beta = beta

    def preference_terms(self, outputs: RouterOutputs, batch: Batch) -> PreferenceTerms:
        """`dpo_loss` of the pairs of the batch."""
        log_probs = self.log_probs(outputs, batch)
        if self._reference is None:
            return dpo_loss(*log_probs, beta=self._beta)
        return dpo_loss(*log_probs, *self.log_probs(self.reference_outputs(batch), batch), beta=self._beta)
