"""A method: the winner of a pair shall be likelier than the loser by a margin, max(0, margin − (log π(y_w) − log π(y_l)))."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dynprune.methods.base import Batch
from dynprune.methods.losses import PreferenceTerms
from dynprune.methods.preference import PreferenceTraining
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies import Policy
from dynprune.router.router import Router


class Hinge(PreferenceTraining):
    """Trains a router by the hinge loss."""

    def __init__(
        self, router: Router, policy: Policy, optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer], margin: float
    ) -> None:
        super().__init__(router, policy, optimizer)
        self._margin = margin

    def preference_terms(self, outputs: RouterOutputs, batch: Batch) -> PreferenceTerms:
        winner_B, loser_B = self.log_probs(outputs, batch)
        loss_B = (self._margin - (winner_B - loser_B)).clamp(min=0)
        said = (winner_B.detach(), loser_B.detach())
        return PreferenceTerms(loss_B, *said, *said)
