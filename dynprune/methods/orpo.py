"""Odds-ratio preference optimisation of a router (Hong et al., 2024), and the thesis's two versions of it.

``paper``: NLL(y_w) + λ·odds term; ``thesis_code``: odds term + λ·FBC's MSE terms; ``thesis_readme``: DPO's term − log π(y_w).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dynprune.methods.base import Batch
from dynprune.methods.losses import OrpoVariant, PreferenceTerms, fbc_loss, orpo_loss
from dynprune.methods.preference import PreferenceTraining
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies.base import Policy
from dynprune.router.router import Router


class OddsRatioPreferenceOptimization(PreferenceTraining):
    """Trains a router by `orpo_loss`."""

    def __init__(
        self,
        router: Router,
        policy: Policy,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        variant: OrpoVariant,
        weight: float,
        beta: float,
    ) -> None:
        """Sets the loss.

        Args:
            router: See `RouterTraining`.
            policy: See `RouterTraining`.
            optimizer: See `RouterTraining`.
            variant: ``paper``, ``thesis_code`` or ``thesis_readme``.
            weight: λ, the weight of the smaller term.
            beta: β of ``thesis_readme``.

        Raises:
            ValueError: If there is no such variant.
        """
        super().__init__(router, policy, optimizer)
        if variant not in ("paper", "thesis_code", "thesis_readme"):
            raise ValueError(f"method.module.variant={variant!r} is unknown; allowed: paper, thesis_code, thesis_readme")
        self._variant, self._weight, self._beta = variant, weight, beta

    def preference_terms(self, outputs: RouterOutputs, batch: Batch) -> PreferenceTerms:
        """`orpo_loss` of the pairs of the batch."""
        supervised_B = None
        if self._variant == "thesis_code":
            supervised_B = fbc_loss(
                outputs.ratio,
                self.policy.restrict(outputs.layer_logits_BL),
                self.policy.restrict(batch["winner_mask_BL"]),
                alpha=0.01,
                ratio_target="edge",
                layer_loss="mse",
            ).loss_B
        return orpo_loss(
            *self.log_probs(outputs, batch),
            num_layers=self.policy.num_prunable,
            variant=self._variant,
            weight=self._weight,
            beta=self._beta,
            sft_w_B=supervised_B,
        )
