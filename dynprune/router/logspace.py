"""Logarithms of differences that neither cancel nor produce NaN gradients."""

import math

import torch
from torch import Tensor

_LOG_2 = math.log(2.0)


def log1mexp(x: Tensor) -> Tensor:
    """Returns log(1 − exp(x)) for x < 0, accurate at both ends (Mächler, 2012).

    Args:
        x: Logarithms of probabilities below 1, of any shape.
    """
    is_near_zero = x > -_LOG_2
    near = torch.log(-torch.expm1(x))
    # Near zero this branch would be log 0: `where` drops its value, but zero times its infinite slope is NaN.
    far = torch.log1p(-torch.exp(torch.where(is_near_zero, -_LOG_2, x)))
    return torch.where(is_near_zero, near, far)


def log_inverse_cloglog(x: Tensor) -> Tensor:
    """Returns log(1 − exp(−exp(x))) for any x: a clock of rate exp(x) has rung by time 1.

    Args:
        x: Logarithms of rates, of any shape.
    """
    is_small = x < -20.0
    # Above 5 the rest, exp(−exp(5)) = 4e-65, is below float64's resolution; exp(x) itself would overflow.
    rate = torch.exp(torch.where(is_small, 0.0, x).clamp(max=5.0))
    return torch.where(is_small, x, log1mexp(-rate))
