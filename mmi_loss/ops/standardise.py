"""The scale that standardises a feature, and which features are constant: the one place where either is decided."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = 2
"""Roundings, in units of the mean, by which the samples of a constant feature may differ once it has been projected."""


def smallest_variance(dtype: torch.dtype) -> float:
    """Below it a variance loses digits to underflow: tiny^(3/4), a standard deviation of 5e-15 in float32."""
    return torch.finfo(dtype).tiny ** 0.75


def relative_resolution(dtype: torch.dtype) -> float:
    """What is smaller than this share of a projected feature's mean is rounding alone."""
    return ROUNDINGS * torch.finfo(dtype).eps


def inverse_std(variance: Tensor, mean: Tensor | None = None) -> Tensor:
    """1 / sqrt(variance), or 0 for a constant feature, which so takes no part in loss or gradient.

    The rounding noise of a constant feature, over its tiny deviation, would be a gradient larger than all others.
    Features as they were given are constant only if they are exactly: ``variance`` is that of differences between
    samples. For features that were computed, pass their ``mean`` (or any one sample): rounding is relative to it.

    An infinite variance, the overflow of a square, gives NaN, where 0 would hide it.
    """
    floor = smallest_variance(variance.dtype)
    scale = variance.sqrt() / variance
    if mean is None:
        return scale.masked_fill(variance <= floor, 0.0)
    resolution = relative_resolution(variance.dtype)
    return scale.masked_fill(variance <= (mean * resolution).square() + floor, 0.0)
