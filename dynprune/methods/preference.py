"""What methods that learn from preference pairs share: log π of the winners and of the losers."""

from abc import abstractmethod

from torch import Tensor

from dynprune.methods.base import Batch, RouterTraining
from dynprune.methods.losses import PreferenceTerms
from dynprune.router.outputs import RouterOutputs


class PreferenceTraining(RouterTraining):
    """A method that names its equation in `preference_terms`."""

    learns_from = "pairs"

    @abstractmethod
    def preference_terms(self, outputs: RouterOutputs, batch: Batch) -> PreferenceTerms:
        """The loss of each pair of the batch, and what is logged beside it."""

    def training_loss(self, outputs: RouterOutputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of the loss over the pairs of the batch."""
        terms = self.preference_terms(outputs, batch)
        return terms.loss_B.mean(), terms.metrics()

    def log_probs(self, outputs: RouterOutputs, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns log π of the winners and of the losers."""
        return (
            self.policy.log_prob(outputs, batch["winner_mask_BL"]),
            self.policy.log_prob(outputs, batch["loser_mask_BL"]),
        )
