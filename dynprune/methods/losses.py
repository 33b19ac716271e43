"""The losses that train a router, as pure functions of log-probabilities and heads, in float32.

FBC: filtered behavioural cloning, the thesis. DPO: Rafailov et al., 2023, arXiv 2305.18290. ORPO: Hong et
al., 2024, arXiv 2403.07691. Write w for the winner and l for the loser of a pair, and log π for log π(y|x),
the log-probability of the whole configuration (`Policy.log_prob`). Rows whose configuration is impossible
under the policy (log π = −inf) must be left out by the caller.

Legend: B = batch, N = layers that may be pruned.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dynprune.router.logspace import log1mexp
from dynprune.router.ratio import CategoricalRatio, NormalRatio, Ratio

RatioTarget = Literal["middle", "edge"]
LayerLoss = Literal["bce", "mse"]
OrpoVariant = Literal["paper", "thesis_code", "thesis_readme"]


@dataclass(frozen=True)
class FbcTerms:
    """FBC's loss of each row, and its two parts.

    Attributes:
        loss_B: What to minimise: ratio_loss_B + alpha·layer_loss_B.
        ratio_loss_B: Squared error of mu, or −log P(k|x) of a categorical ratio, without gradient.
        layer_loss_B: Mean loss over the layers, before alpha, without gradient.
    """

    loss_B: Tensor
    ratio_loss_B: Tensor
    layer_loss_B: Tensor


@dataclass(frozen=True)
class PreferenceTerms:
    """A preference loss of each pair, and what is logged beside it; all but the loss without gradient.

    Attributes:
        loss_B: What to minimise.
        chosen_reward_B: Implicit reward of the winner, each loss's docstring says which.
        rejected_reward_B: Implicit reward of the loser.
        chosen_logp_B: log π of the winner.
        rejected_logp_B: log π of the loser.
    """

    loss_B: Tensor
    chosen_reward_B: Tensor
    rejected_reward_B: Tensor
    chosen_logp_B: Tensor
    rejected_logp_B: Tensor

    def metrics(self) -> dict[str, Tensor]:
        """Returns the batch means under the names that TRL's users know."""
        return {
            "rewards/chosen": self.chosen_reward_B.mean(),
            "rewards/rejected": self.rejected_reward_B.mean(),
            "rewards/accuracies": (self.chosen_reward_B > self.rejected_reward_B).float().mean(),
            "rewards/margins": (self.chosen_reward_B - self.rejected_reward_B).mean(),
            "logps/chosen": self.chosen_logp_B.mean(),
            "logps/rejected": self.rejected_logp_B.mean(),
        }


def fbc_loss(
    ratio: Ratio,
    layer_logits_BN: Tensor,
    mask_BN: Tensor,
    *,
    alpha: float,
    ratio_target: RatioTarget = "middle",
    layer_loss: LayerLoss = "bce",
) -> FbcTerms:
    """Filtered behavioural cloning, on rollouts that passed the filter.

    (mu − target)² + alpha·Σ_i loss(score_i, mask_i) / N, with k pruned layers and target (k + ½)/N
    (``middle``, the centre of the bucket that yields k) or k/N (``edge``, the thesis). The loss of a layer is
    BCE (the thesis's text) or the squared error (its code, with alpha 0.01). Log sigma is not trained. A categorical
    ratio has no mu to aim: its term is the negative log-likelihood −log P(k|x).

    Args:
        ratio: The distribution over k.
        layer_logits_BN: Layer scores before the sigmoid, of the layers that may be pruned
            (`Policy.restrict`).
        mask_BN: Their part of the configuration, True where a layer is pruned.
        alpha: Weight of the layers' term.
        ratio_target: Where in the bucket of k to aim a Normal.
        layer_loss: Loss of a layer.
    """
    k_B = mask_BN.sum(dim=1)
    layer_logits_BN, mask_BN = layer_logits_BN.float(), mask_BN.float()
    if isinstance(ratio, CategoricalRatio):
        ratio_loss_B = F.cross_entropy(ratio.logits_BK.float(), k_B, reduction="none")
    else:
        assert isinstance(ratio, NormalRatio)
        offset = 0.5 if ratio_target == "middle" else 0.0
        ratio_loss_B = (ratio.mu_B.float() - (k_B + offset) / mask_BN.shape[1]) ** 2
    if layer_loss == "bce":
        loss_BN = F.binary_cross_entropy_with_logits(layer_logits_BN, mask_BN, reduction="none")
    else:
        loss_BN = (layer_logits_BN.sigmoid() - mask_BN) ** 2
    layer_loss_B = loss_BN.mean(dim=1)
    return FbcTerms(
        loss_B=ratio_loss_B + alpha * layer_loss_B,
        ratio_loss_B=ratio_loss_B.detach(),
        layer_loss_B=layer_loss_B.detach(),
    )


def dpo_loss(
    logp_w_B: Tensor,
    logp_l_B: Tensor,
    ref_logp_w_B: Tensor | None = None,
    ref_logp_l_B: Tensor | None = None,
    *,
    beta: float,
) -> PreferenceTerms:
    """Direct preference optimisation, Rafailov et al., 2023, equation 7.

    −log σ(β·((log π_w − log π_ref,w) − (log π_l − log π_ref,l))). Without a reference its terms are dropped,
    which is the thesis's loss (with β = 1 in its code). Rewards are β·(log π − log π_ref).

    Args:
        logp_w_B: log π of the winners.
        logp_l_B: log π of the losers.
        ref_logp_w_B: log π of the winners under the reference, or None for no reference.
        ref_logp_l_B: log π of the losers under the reference; given if and only if the winners' are.
        beta: β, how far the policy may move from the reference; 0.1 is usual.
    """
    assert (ref_logp_w_B is None) == (ref_logp_l_B is None), "a reference needs both log-probabilities"
    logp_w_B, logp_l_B = logp_w_B.float(), logp_l_B.float()
    reward_w_B = beta * (logp_w_B if ref_logp_w_B is None else logp_w_B - ref_logp_w_B.float())
    reward_l_B = beta * (logp_l_B if ref_logp_l_B is None else logp_l_B - ref_logp_l_B.float())
    loss_B = -F.logsigmoid(reward_w_B - reward_l_B)
    return _terms(loss_B, reward_w_B, reward_l_B, logp_w_B, logp_l_B)


def orpo_loss(
    logp_w_B: Tensor,
    logp_l_B: Tensor,
    *,
    num_layers: int,
    variant: OrpoVariant = "paper",
    weight: float = 0.1,
    beta: float = 1.0,
    sft_w_B: Tensor | None = None,
) -> PreferenceTerms:
    """Odds-ratio preference optimisation, Hong et al., 2024, equations 3 to 7, and the thesis's variants.

    With ℓ = log π / N, the length-normalised log-likelihood of their equation 3, log-odds(ℓ) = ℓ − log(1 −
    exp ℓ) and OR = −log σ(log-odds(ℓ_w) − log-odds(ℓ_l)):

    - ``paper``: −ℓ_w + weight·OR. The weight is their λ. Rewards are weight·ℓ, as in TRL.
    - ``thesis_code``: OR + weight·sft_w, where sft_w is `fbc_loss` of the winners with ``edge`` and ``mse``.
      Rewards are ℓ.
    - ``thesis_readme``: −log σ(β·(log π_w − log π_l)) − log π_w. Rewards are β·log π.

    Args:
        logp_w_B: log π of the winners.
        logp_l_B: log π of the losers.
        num_layers: N, the number of decisions that log π is a sum over.
        variant: Which of the three.
        weight: Weight of the smaller term; not used by ``thesis_readme``.
        beta: β of ``thesis_readme``.
        sft_w_B: Supervised loss of the winners; needed by ``thesis_code`` alone.
    """
    logp_w_B, logp_l_B = logp_w_B.float(), logp_l_B.float()
    if variant == "thesis_readme":
        preference = dpo_loss(logp_w_B, logp_l_B, beta=beta)
        loss_B = preference.loss_B - logp_w_B
        return _terms(loss_B, beta * logp_w_B, beta * logp_l_B, logp_w_B, logp_l_B)
    mean_w_B, mean_l_B = _below_zero(logp_w_B / num_layers), _below_zero(logp_l_B / num_layers)
    log_odds_ratio_B = (mean_w_B - mean_l_B) - (log1mexp(mean_w_B) - log1mexp(mean_l_B))
    odds_loss_B = -F.logsigmoid(log_odds_ratio_B)
    if variant == "paper":
        loss_B = -logp_w_B / num_layers + weight * odds_loss_B
        return _terms(loss_B, weight * mean_w_B, weight * mean_l_B, logp_w_B, logp_l_B)
    assert sft_w_B is not None, "thesis_code needs the supervised loss of the winners"
    return _terms(odds_loss_B + weight * sft_w_B.float(), mean_w_B, mean_l_B, logp_w_B, logp_l_B)


def _below_zero(log_p: Tensor) -> Tensor:
    """Keeps log p one unit of resolution below 0, where the log-odds and their gradient are still finite."""
    return log_p.clamp(max=-torch.finfo(log_p.dtype).eps)


def _terms(loss_B: Tensor, reward_w_B: Tensor, reward_l_B: Tensor, logp_w_B: Tensor, logp_l_B: Tensor) -> PreferenceTerms:
    return PreferenceTerms(
        loss_B=loss_B,
        chosen_reward_B=reward_w_B.detach(),
        rejected_reward_B=reward_l_B.detach(),
        chosen_logp_B=logp_w_B.detach(),
        rejected_logp_B=logp_l_B.detach(),
    )
