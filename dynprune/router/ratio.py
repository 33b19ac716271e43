"""How many layers to prune: P(k|x), the router's Normal over the ratio made discrete.

The ratio is r ~ N(mu, sigma) and k = ⌊r·L⌋, clipped to 0..k_max. So P(k|x) is the Normal's mass on [k/L,
(k+1)/L), with the mass below 1/L in bucket 0 and the mass above k_max/L in bucket k_max. It is a probability
mass, never a density. L is the number of layers that may be pruned.

Legend: B = batch, K = k_max + 1 buckets, E = k_max edges between them.
"""

import torch
from torch import Tensor

from dynprune.router.logspace import log1mexp


def log_pmf(mu_B: Tensor, log_sigma_B: Tensor, num_layers: int, k_max: int) -> Tensor:
    """Returns log P(k|x) for k = 0..k_max, finite and with finite gradients however far a bucket is from mu.

    Args:
        mu_B: Means of the ratio.
        log_sigma_B: Logarithms of its standard deviation.
        num_layers: L, the number of layers that may be pruned.
        k_max: The largest number of pruned layers, 1..L.

    Returns:
        log_p_BK in the dtype of `mu_B`; its exponentials sum to 1 in each row.
    """
    # torch derives log_ndtr through a difference of z²/2: in float32, 1000 sigma out, the gradient is 4% wrong.
    edges_E = torch.arange(1, k_max + 1, dtype=torch.float64, device=mu_B.device) / num_layers
    z_BE = (edges_E - mu_B.double()[:, None]) * torch.exp(-log_sigma_B.double())[:, None]
    first_B1 = torch.special.log_ndtr(z_BE[:, :1])
    last_B1 = torch.special.log_ndtr(-z_BE[:, -1:])
    inner_BE = _log_mass_between(z_BE[:, :-1], z_BE[:, 1:])
    return torch.cat([first_B1, inner_BE, last_B1], dim=1).to(mu_B.dtype)


def sample_k(
    mu_B: Tensor, log_sigma_B: Tensor, num_layers: int, k_max: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draws k = ⌊r·L⌋ clipped to 0..k_max, with r ~ N(mu, sigma).

    Args:
        mu_B: Means of the ratio.
        log_sigma_B: Logarithms of its standard deviation.
        num_layers: L, the number of layers that may be pruned.
        k_max: The largest number of pruned layers, 1..L.
        generator: Source of randomness on the device of `mu_B`; torch's default one if None.

    Returns:
        k_B, int64.
    """
    return sample_count(mu_B, log_sigma_B, num_layers, k_max, generator).floor().long()


def sample_count(
    mu_B: Tensor, log_sigma_B: Tensor, num_layers: int, k_max: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draws r·L clipped to 0..k_max, whose floor is k; differentiable where it is not clipped.

    Args:
        mu_B: Means of the ratio.
        log_sigma_B: Logarithms of its standard deviation.
        num_layers: L, the number of layers that may be pruned.
        k_max: The largest number of pruned layers, 1..L.
        generator: Source of randomness on the device of `mu_B`; torch's default one if None.

    Returns:
        count_B, in layers.
    """
    noise_B = torch.randn(mu_B.shape, dtype=mu_B.dtype, device=mu_B.device, generator=generator)
    return ((mu_B + log_sigma_B.exp() * noise_B) * num_layers).clamp(0, k_max)


def mode_k(mu_B: Tensor, log_sigma_B: Tensor, num_layers: int, k_max: int) -> Tensor:
    """Returns the k of the heaviest bucket, the smaller one of two equals.

    Args:
        mu_B: Means of the ratio.
        log_sigma_B: Logarithms of its standard deviation.
        num_layers: L, the number of layers that may be pruned.
        k_max: The largest number of pruned layers, 1..L.

    Returns:
        k_B, int64.
    """
    return log_pmf(mu_B, log_sigma_B, num_layers, k_max).argmax(dim=1)


def _log_mass_between(low: Tensor, high: Tensor) -> Tensor:
    """Returns log(Φ(high) − Φ(low)) for low < high."""
    # In the right tail both Φ round to 1; mirrored into the left tail, their logarithms keep their digits.
    is_right = low + high > 0
    log_low = torch.special.log_ndtr(torch.where(is_right, -high, low))
    log_high = torch.special.log_ndtr(torch.where(is_right, -low, high))
    return log_high + log1mexp(log_low - log_high)
