"""How many layers to prune: P(k|x), the router's Normal over the ratio made discrete, or a free categorical over k.

Legend: B = batch, K = k_max + 1 counts, E = k_max edges between their buckets.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dynprune.router.logspace import log1mexp


class Ratio(ABC):
    """A distribution over k for each of B queries."""

    @abstractmethod
    def log_pmf(self, num_layers: int, k_max: int) -> Tensor:
        """Returns log P(k|x) for k = 0..k_max.

        Args:
            num_layers: L, the number of layers that may be pruned.
            k_max: The largest number of pruned layers, 1..L.

        Returns:
            log_p_BK in float32 at least; its exponentials sum to 1 in each row.
        """

    @abstractmethod
    def sample_count(self, num_layers: int, k_max: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws a real number whose floor is k ~ P(k|x) and whose gradient reaches the head.

        Args:
            num_layers: L, the number of layers that may be pruned.
            k_max: The largest number of pruned layers, 1..L.
            generator: Source of randomness on the head's device; torch's default one if None.

        Returns:
            count_B in 0..k_max, in layers.
        """


@dataclass(frozen=True)
class NormalRatio(Ratio):
    """The thesis's: r ~ N(mu, sigma) and k = ⌊r·L⌋, clipped to 0..k_max.

    So P(k|x) is the Normal's mass on [k/L, (k+1)/L), with the mass below 1/L in bucket 0 and the mass above k_max/L in bucket
    k_max. It is a probability mass, never a density.

    Attributes:
        mu_B: Mean of the share of layers to prune, in (0, 1).
        log_sigma_B: Logarithm of its standard deviation.
    """

    mu_B: Tensor
    log_sigma_B: Tensor

    def log_pmf(self, num_layers: int, k_max: int) -> Tensor:
        """See `Ratio.log_pmf`; finite and with finite gradients however far a bucket is from mu."""
        # torch derives log_ndtr through a difference of z²/2: in float32, 1000 sigma out, the gradient is 4% wrong.
        edges_E = torch.arange(1, k_max + 1, dtype=torch.float64, device=self.mu_B.device) / num_layers
        z_BE = (edges_E - self.mu_B.double()[:, None]) * torch.exp(-self.log_sigma_B.double())[:, None]
        first_B1 = torch.special.log_ndtr(z_BE[:, :1])
        last_B1 = torch.special.log_ndtr(-z_BE[:, -1:])
        inner_BE = _log_mass_between(z_BE[:, :-1], z_BE[:, 1:])
        return torch.cat([first_B1, inner_BE, last_B1], dim=1).to(at_least_float32(self.mu_B).dtype)

    def sample_count(self, num_layers: int, k_max: int, generator: torch.Generator | None = None) -> Tensor:
        """See `Ratio.sample_count`: r·L clipped to 0..k_max, differentiable where it is not clipped."""
        mu_B, log_sigma_B = at_least_float32(self.mu_B), at_least_float32(self.log_sigma_B)
        noise_B = torch.randn(mu_B.shape, dtype=mu_B.dtype, device=mu_B.device, generator=generator)
        return ((mu_B + log_sigma_B.exp() * noise_B) * num_layers).clamp(0, k_max)


@dataclass(frozen=True)
class CategoricalRatio(Ratio):
    """A logit of its own for each k: it can have two modes, and can doubt where a Normal of small sigma cannot.

    Attributes:
        logits_BK: Logits of k = 0..k_max.
    """

    logits_BK: Tensor

    def log_pmf(self, num_layers: int, k_max: int) -> Tensor:
        """See `Ratio.log_pmf`."""
        assert self.logits_BK.shape[1] == k_max + 1, "the head was built for another k_max"
        return at_least_float32(self.logits_BK).log_softmax(dim=1)

    def sample_count(self, num_layers: int, k_max: int, generator: torch.Generator | None = None) -> Tensor:
        """See `Ratio.sample_count`: k itself, with the gradient of the mean of k."""
        p_BK = self.log_pmf(num_layers, k_max).exp()
        k_B = p_BK.detach().multinomial(1, generator=generator)[:, 0]
        mean_B = p_BK @ torch.arange(k_max + 1, dtype=p_BK.dtype, device=p_BK.device)
        return k_B + (mean_B - mean_B.detach())


def at_least_float32(values: Tensor) -> Tensor:
    """Returns half-precision values as float32, all others as they are."""
    return values if values.dtype == torch.float64 else values.float()


def _log_mass_between(low: Tensor, high: Tensor) -> Tensor:
    """Returns log(Φ(high) − Φ(low)) for low < high."""
    # In the right tail both Φ round to 1; mirrored into the left tail, their logarithms keep their digits.
    is_right = low + high > 0
    log_low = torch.special.log_ndtr(torch.where(is_right, -high, low))
    log_high = torch.special.log_ndtr(torch.where(is_right, -low, high))
    return log_high + log1mexp(log_low - log_high)
