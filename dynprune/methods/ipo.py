"""Identity preference optimisation of a router (Azar et al., 2023).

(Δ − 1/(2τ))², with Δ = (log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l)). The margin has an aim, so that it does
not grow without end where a preference is always the same, as ours are.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dynprune.methods.base import Batch, check_above
from dynprune.methods.losses import PreferenceTerms, ipo_loss
from dynprune.methods.preference import PreferenceTraining
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies.base import Policy
from dynprune.router.router import Router


class IdentityPreferenceOptimization(PreferenceTraining):
    """Trains a router by `ipo_loss`; the reference is the router as it is given, frozen."""

    def __init__(
        self, router: Router, policy: Policy, optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer], tau: float
    ) -> None:
        """Sets the loss.

        Args:
            router: See `RouterTraining`.
            policy: See `RouterTraining`.
            optimizer: See `RouterTraining`.
            tau: τ, above 0; the margin aims at 1/(2τ) nats.

        Raises:
            ValueError: If τ is not above 0.
        """
        super().__init__(router, policy, optimizer, has_reference=True)
        check_above("tau", tau, 0, example=0.1)
        self._tau = tau

    def preference_terms(self, outputs: RouterOutputs, batch: Batch) -> PreferenceTerms:
        """`ipo_loss` of the pairs of the batch."""
        reference = self.log_probs(self.reference_outputs(batch), batch)
        return ipo_loss(*self.log_probs(outputs, batch), *reference, tau=self._tau)
