"""Intervals written out: Wilson's, and BCa over every resample instead of some."""

import itertools
import math
from statistics import NormalDist

import numpy as np

Z = 1.959963984540054


def wilson_by_hand(successes, n, z=Z):
    p = successes / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return center - half, center + half


def bca_over_every_resample(sample, confidence=0.95):
    """BCa of the mean from its definition, with all n**n resamples in place of random ones."""
    n = len(sample)
    means = np.sort([np.mean(resample) for resample in itertools.product(sample, repeat=n)])
    normal, mean = NormalDist(), np.mean(sample)
    below = (np.mean(means < mean - 1e-12) + np.mean(means <= mean + 1e-12)) / 2
    bias = normal.inv_cdf(below)
    left_out = np.array([np.mean(np.delete(sample, i)) for i in range(n)])
    spread = left_out.mean() - left_out
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    bounds = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + normal.inv_cdf(tail)
        bounds.append(np.quantile(means, normal.cdf(bias + z / (1 - acceleration * z))))
    return bounds
