"""The losses that train a router, as pure functions of log-probabilities and heads, in float32.

FBC: filtered behavioural cloning, the thesis. DPO: Rafailov et al., 2023, arXiv 2305.18290. ORPO: Hong et
al., 2024, arXiv 2403.07691. IPO: Azar et al., 2023, arXiv 2310.12036. SimPO: Meng et al., 2024, arXiv
2405.14734. KTO: Ethayarajh et al., 2024, arXiv 2402.01306. AWR: Peng et al., 2019, arXiv 1910.00177. Write w
for the winner and l for the loser of a pair, and log π for log π(y|x), the log-probability of the whole
configuration (`Policy.log_prob`). Rows whose configuration is impossible under the policy (log π = −inf)
must be left out by the caller.

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


@dataclass(frozen=True)
class KtoTerms:
    """KTO's loss of each rollout, and what is logged beside it; all but the loss without gradient.

    Attributes:
        loss_B: What to minimise.
        reward_B: Implicit reward β·(log π − log π_ref).
        reference_point: β·z0, the reward that counts as neither gain nor loss.
        desirable_B: Whether the rollout is desirable.
    """

    loss_B: Tensor
    reward_B: Tensor
    reference_point: Tensor
    desirable_B: Tensor

    def metrics(self) -> dict[str, Tensor]:
        """Returns the batch means; a kind of rollout that the batch lacks has none."""
        rewards = {"rewards/chosen": self.reward_B[self.desirable_B], "rewards/rejected": self.reward_B[~self.desirable_B]}
        means = {name: reward_B.mean() for name, reward_B in rewards.items() if len(reward_B)}
        return means | {"reference_point": self.reference_point}


@dataclass(frozen=True)
class AwrTerms:
    """AWR's loss of each rollout, and its weight.

    Attributes:
        loss_B: What to minimise.
        weight_B: Weight of the rollout's log-likelihood, without gradient.
    """

    loss_B: Tensor
    weight_B: Tensor


def effective_number_weights(num_pruned: int, num_kept: int, beta: float) -> tuple[float, float]:
    """Weights of two classes by their effective numbers of samples, Cui et al., 2019, arXiv 1901.05555.

    w_c ∝ (1 − β) / (1 − β^n_c), scaled so that the two sum to 2. β = 0 gives equal weights, β → 1 weights in inverse proportion
    to the numbers. A class without a sample counts as having one.

    Args:
        num_pruned: Decisions to prune a layer, over all rollouts and layers.
        num_kept: Decisions not to.
        beta: β, from 0 to below 1; 0.999 and 0.9999 are usual.

    Returns:
        The weight of a layer that is pruned, and that of one that is not.
    """
    pruned, kept = ((1 - beta) / (1 - beta ** max(number, 1)) for number in (num_pruned, num_kept))
    return 2 * pruned / (pruned + kept), 2 * kept / (pruned + kept)


def fbc_loss(
    ratio: Ratio,
    layer_logits_BN: Tensor,
    mask_BN: Tensor,
    *,
    alpha: float,
    ratio_target: RatioTarget = "middle",
    layer_loss: LayerLoss = "bce",
    class_weights: tuple[float, float] = (1.0, 1.0),
    focal_gamma: float = 0.0,
) -> FbcTerms:
    """Filtered behavioural cloning, on rollouts that passed the filter.

    (mu − target)² + alpha·Σ_i loss(score_i, mask_i) / N, with k pruned layers and target (k + ½)/N
    (``middle``, the centre of the bucket that yields k) or k/N (``edge``, the thesis). The loss of a layer is
    BCE (the thesis's text) or the squared error (its code, with alpha 0.01). Log sigma is not trained. A categorical
    ratio has no mu to aim: its term is the negative log-likelihood −log P(k|x).

    Few layers are pruned and many are kept, so BCE can be balanced: a weight for each of the two, and the focal
    factor (1 − p)^γ of Lin et al., 2017, arXiv 1708.02002, equation 4, with p the score's probability of what the
    rollout did, which leaves the decisions to learn from that are still wrong.

    Args:
        ratio: The distribution over k.
        layer_logits_BN: Layer scores before the sigmoid, of the layers that may be pruned
            (`Policy.restrict`).
        mask_BN: Their part of the configuration, True where a layer is pruned.
        alpha: Weight of the layers' term.
        ratio_target: Where in the bucket of k to aim a Normal.
        layer_loss: Loss of a layer.
        class_weights: Weight of the BCE of a layer that is pruned, and of one that is not.
        focal_gamma: γ of the BCE's focal factor, at least 0; 0 for none.
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
        # log (1 − p): as a power of 1 − p itself, the factor of a γ below 1 would have no finite slope at p = 1.
        log_doubt_BN = F.logsigmoid(torch.where(mask_BN > 0, -layer_logits_BN, layer_logits_BN))
        pruned_weight, kept_weight = class_weights
        loss_BN = loss_BN * (focal_gamma * log_doubt_BN).exp() * (pruned_weight * mask_BN + kept_weight * (1 - mask_BN))
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


def ipo_loss(logp_w_B: Tensor, logp_l_B: Tensor, ref_logp_w_B: Tensor, ref_logp_l_B: Tensor, *, tau: float) -> PreferenceTerms:
    """Identity preference optimisation, Azar et al., 2023.

    (Δ − 1/(2τ))², Δ = (log π_w − log π_ref,w) − (log π_l − log π_ref,l). Rewards are τ·(log π − log π_ref), so that the margin
    aims at ½. A configuration is one action here, so log π is not averaged over anything, as it is over tokens in TRL.

    Args:
        logp_w_B: log π of the winners.
        logp_l_B: log π of the losers.
        ref_logp_w_B: log π of the winners under the reference.
        ref_logp_l_B: log π of the losers under the reference.
        tau: τ, above 0, the weight of the divergence from the reference.
    """
    logp_w_B, logp_l_B = logp_w_B.float(), logp_l_B.float()
    ratio_w_B, ratio_l_B = logp_w_B - ref_logp_w_B.float(), logp_l_B - ref_logp_l_B.float()
    loss_B = (ratio_w_B - ratio_l_B - 1 / (2 * tau)) ** 2
    return _terms(loss_B, tau * ratio_w_B, tau * ratio_l_B, logp_w_B, logp_l_B)


def simpo_loss(logp_w_B: Tensor, logp_l_B: Tensor, *, num_layers: int, beta: float, gamma: float) -> PreferenceTerms:
    """Simple preference optimisation, Meng et al., 2024, equation 6.

    −log σ(β·(log π_w − log π_l) / N − γ). Rewards are β·log π / N. The length that normalises is N, the number of decisions,
    for the winner and the loser alike, as in `orpo_loss`: not the number of pruned layers, by which a deep configuration would
    win for its size alone.

    Args:
        logp_w_B: log π of the winners.
        logp_l_B: log π of the losers.
        num_layers: N.
        beta: β, the scale of the rewards.
        gamma: γ, the margin between them, at least 0.
    """
    logp_w_B, logp_l_B = logp_w_B.float(), logp_l_B.float()
    reward_w_B, reward_l_B = beta * logp_w_B / num_layers, beta * logp_l_B / num_layers
    return _terms(-F.logsigmoid(reward_w_B - reward_l_B - gamma), reward_w_B, reward_l_B, logp_w_B, logp_l_B)


def kto_loss(
    logp_B: Tensor,
    ref_logp_B: Tensor,
    mismatched_logratio_B: Tensor,
    desirable_B: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KtoTerms:
    """Kahneman-Tversky optimisation, Ethayarajh et al., 2024.

    With r = log π − log π_ref: λ_D·(1 − σ(β·(r − z0))) for a desirable rollout, λ_U·(1 − σ(β·(z0 − r))) for any other.
    z0 stands for KL(π ‖ π_ref). As in TRL it is the mean of log π − log π_ref over configurations of other queries, at least 0,
    without gradient.

    Args:
        logp_B: log π of the rollouts.
        ref_logp_B: log π of the rollouts under the reference.
        mismatched_logratio_B: log π − log π_ref of each query's configuration borrowed from another query.
        desirable_B: Which rollouts are desirable.
        beta: β, how far the policy may move from the reference.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.
    """
    logratio_B = logp_B.float() - ref_logp_B.float()
    reference_point = mismatched_logratio_B.detach().float().mean().clamp(min=0)
    gain_B = beta * (logratio_B - reference_point)
    weight_B = torch.where(desirable_B, desirable_weight, undesirable_weight)
    return KtoTerms(
        # 1 − σ(x) = σ(−x), without cancellation.
        loss_B=weight_B * torch.where(desirable_B, -gain_B, gain_B).sigmoid(),
        reward_B=beta * logratio_B.detach(),
        reference_point=beta * reference_point,
        desirable_B=desirable_B,
    )


def awr_loss(logp_B: Tensor, advantage_B: Tensor, *, beta: float, max_weight: float) -> AwrTerms:
    """Advantage-weighted regression, Peng et al., 2019, with the weights cut off.

    −min(exp(A/β), max_weight)·log π.

    Args:
        logp_B: log π of the rollouts.
        advantage_B: A, the rollout's reward less the mean reward of its query.
        beta: β, above 0, in units of the reward.
        max_weight: The largest weight; 20 in the authors' code.
    """
    weight_B = (advantage_B.detach().float() / beta).exp().clamp(max=max_weight)
    return AwrTerms(loss_B=-weight_B * logp_B.float(), weight_B=weight_B)


def value_loss(reward_logit_B: Tensor, score_B: Tensor) -> Tensor:
    """Cross-entropy of predicted rewards and scores, a proper score for shares between 0 and 1 too.

    Args:
        reward_logit_B: Predicted rewards before the sigmoid.
        score_B: Scores, 0 to 1.

    Returns:
        loss_B.

    Raises:
        ValueError: If a score is outside of 0 to 1.
    """
    if ((score_B < 0) | (score_B > 1)).any():
        raise ValueError(
            "value regression predicts scores from 0 to 1, and the rollouts have others; allowed as exploration.score: "
            "json_match, ast_match or another score in that range"
        )
    return F.binary_cross_entropy_with_logits(reward_logit_B.float(), score_B.float(), reduction="none")


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
