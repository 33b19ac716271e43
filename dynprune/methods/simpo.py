"""Simple preference optimisation of a router (Meng et al., 2024).

−log σ(β·(log π(y_w) − log π(y_l)) / N − γ): no reference, but a margin that the winner must keep.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dynprune.methods.base import Batch, check_above
from dynprune.methods.losses import PreferenceTerms, simpo_loss
from dynprune.methods.preference import PreferenceTraining
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies.base import Policy
from dynprune.router.router import Router


class SimplePreferenceOptimization(PreferenceTraining):
    """Trains a router by `simpo_loss`."""

    def __init__(
        self,
        router: Router,
        policy: Policy,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        beta: float,
        gamma: float,
    ) -> None:
        """Sets the loss.

        Args:
            router: See `RouterTraining`.
            policy: See `RouterTraining`.
            optimizer: See `RouterTraining`.
            beta: β, the scale of the reward.
            gamma: γ, by how much the winner's reward shall exceed the loser's.

        Raises:
            ValueError: If β is not above 0.
        """
        super().__init__(router, policy, optimizer)
        check_above("beta", beta, 0, example=2)
        self._beta, self._gamma = beta, gamma

    def preference_terms(self, outputs: RouterOutputs, batch: Batch) -> PreferenceTerms:
        """`simpo_loss` of the pairs of the batch."""
        log_probs = self.log_probs(outputs, batch)
        return simpo_loss(*log_probs, num_layers=self.policy.num_prunable, beta=self._beta, gamma=self._gamma)
