"""Intervals of per-query scores.

- Shares (all values 0 or 1): the Wilson score interval (Wilson 1927), which keeps its coverage at 0, at 1
  and for small n.
- Means of other scores: the bias-corrected and accelerated bootstrap (BCa, Efron 1987).
- Medians: the percentile bootstrap, since BCa's jackknife acceleration is not consistent for a median.
- Ratios of two means over the same queries: BCa of the ratio, both means resampled together.

Every function is deterministic: the bootstrap draws from a generator with a fixed seed.

Where all values are the same, n = 1 included, each resample is the sample itself and the bootstrap has
nothing to say. The interval then collapses onto the estimate; its width of 0 is a limit of the method, not
evidence of certainty. (Shares are not concerned: Wilson's interval has a width there.)

Axis suffixes: N = queries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap
from statsmodels.stats.proportion import proportion_confint

CONFIDENCE = 0.95
_RESAMPLES = 9999
_BATCH = 500  # Resamples drawn at once: bounds the memory at _BATCH * n numbers.
_NOTHING = 1e-12  # Stands for a denominator that is not above 0, and keeps the ratio finite.


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval, all three in the unit of the values."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class MedianInterval:
    """A median with its confidence interval, all three in the unit of the values."""

    median: float
    low: float
    high: float


def mean_interval(values: npt.ArrayLike, confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
    """Mean with its interval: Wilson's for 0/1 values, else BCa.

    Args:
        values: One value per query.
        confidence: Coverage, between 0 and 1.
        seed: Seed of the bootstrap; no effect on 0/1 values.

    Returns:
        The interval; for constant values that are not 0/1 it collapses onto the mean (module docstring).

    Raises:
        ValueError: There are no values, one is not finite, or `confidence` is not between 0 and 1.
    """
    sample = _sample(values, confidence)
    if is_binary(sample):
        low, high = proportion_confint(int(sample.sum()), sample.size, alpha=1 - confidence, method="wilson")
        return Interval(float(sample.mean()), float(low), float(high))
    return bca(sample, confidence, seed)


def median_interval(values: npt.ArrayLike, confidence: float = CONFIDENCE, seed: int = 0) -> MedianInterval:
    """Median with its percentile-bootstrap interval, for speedups and times.

    Args:
        values: One value per query.
        confidence: Coverage, between 0 and 1.
        seed: Seed of the bootstrap.

    Returns:
        The interval; for constant values it collapses onto the median (module docstring).

    Raises:
        ValueError: There are no values, one is not finite, or `confidence` is not between 0 and 1.
    """
    sample = _sample(values, confidence)
    low, high = _bootstrap(sample, "median", confidence, seed)
    return MedianInterval(float(np.median(sample)), low, high)


def ratio_interval(
    numerator: npt.ArrayLike, denominator: npt.ArrayLike, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval | None:
    """Ratio of two means over the same queries, with its BCa interval over queries.

    Args:
        numerator: One value per query.
        denominator: The values to divide by, in the same order of queries.
        confidence: Coverage, between 0 and 1.
        seed: Seed of the bootstrap.

    Returns:
        The ratio of the means (not the mean of ratios); ``None`` unless the denominator's mean is above 0 with
        this confidence, that is if its own BCa interval reaches 0: what is divided by nothing, or by noise, has no
        ratio, and its confidence set is the whole line (Fieller 1954). A resample whose denominator is not above 0
        counts as a ratio beyond every bound, on its numerator's side.

    Raises:
        ValueError: The two have different lengths, or one is not a sample (see `mean_interval`).
    """
    above_N, below_N = paired_samples(numerator, denominator, confidence)
    if bca(below_N, confidence, seed).low <= 0:
        return None
    ratio = float(above_N.mean() / below_N.mean())
    if is_constant(above_N - ratio * below_N):
        return Interval(ratio, ratio, ratio)
    low, high = resample((above_N, below_N), ratio_of_means, "BCa", confidence, seed)
    return Interval(ratio, low, high)


def bca(sample: npt.NDArray[np.float64], confidence: float, seed: int) -> Interval:
    """The mean of a sample with its BCa interval."""
    low, high = _bootstrap(sample, "mean", confidence, seed)
    return Interval(float(sample.mean()), low, high)


def _bootstrap(
    sample: npt.NDArray[np.float64], statistic: Literal["mean", "median"], confidence: float, seed: int
) -> tuple[float, float]:
    function, method = (np.mean, "BCa") if statistic == "mean" else (np.median, "percentile")
    if is_constant(sample):
        return float(function(sample)), float(function(sample))
    return resample((sample,), function, method, confidence, seed)


def resample(
    samples: tuple[npt.NDArray[np.float64], ...], function: Callable[..., Any], method: str, confidence: float, seed: int
) -> tuple[float, float]:
    """Bounds of a statistic of one sample, or of several that are resampled together, by a method of scipy's bootstrap."""
    result = bootstrap(
        samples,
        function,
        confidence_level=confidence,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        method=method,
        paired=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def ratio_of_means(above: npt.NDArray[np.float64], below: npt.NDArray[np.float64], axis: int = -1) -> npt.NDArray[np.float64]:
    """The ratio of two means, beyond every bound where the lower one is not above 0."""
    return np.asarray(above.mean(axis=axis) / np.maximum(below.mean(axis=axis), _NOTHING))


def is_constant(sample: npt.NDArray[np.float64]) -> bool:
    """Whether all values are the same but for rounding."""
    # Differences such as 0.3 - 0.2 and 0.4 - 0.3 are equal but for rounding, which is no spread to resample.
    return bool(np.ptp(sample) <= 1e-12 * max(1.0, float(np.abs(sample).max())))


def paired_samples(
    a: npt.ArrayLike, b: npt.ArrayLike, confidence: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Two samples of the same queries, checked."""
    sample_a, sample_b = _sample(a, confidence), _sample(b, confidence)
    if sample_a.size != sample_b.size:
        raise ValueError(
            f"A paired comparison needs two scores for each query, but one row has {sample_a.size} scores "
            f"and the other {sample_b.size}; evaluate both rows on the same queries."
        )
    return sample_a, sample_b


def _sample(values: npt.ArrayLike, confidence: float) -> npt.NDArray[np.float64]:
    sample = np.asarray(values, dtype=np.float64).ravel()
    if not 0 < confidence < 1:
        raise ValueError(f"The confidence of an interval lies between 0 and 1 (0.95 by default), not {confidence}.")
    if not sample.size:
        raise ValueError("An interval needs the value of at least one query, but the sample is empty.")
    if not np.isfinite(sample).all():
        index = int(np.flatnonzero(~np.isfinite(sample))[0])
        raise ValueError(f"An interval needs finite values, but the value of query {index} is {sample[index]}.")
    return sample


def is_binary(sample: npt.NDArray[np.float64]) -> bool:
    """Whether all values are 0 or 1."""
    return bool(np.isin(sample, (0.0, 1.0)).all())
