"""Plain torch, no custom backward, nothing fused: the oracle of every test and the naive form of every benchmark.

It shares no code with ``ops``: features are standardised explicitly, the joint covariance of the pooled estimators
is built from the doubled batch, and determinants are products of eigenvalues.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def log_dets(
    views: Sequence[Tensor], objective: str, ridge: float, order: int | None = None, beta: float = 1.0
) -> Tensor:
    """Log det(I + M_j / ridge) of every second-moment matrix M_j of an objective, (m, S), from views (S, N, k).

    ``order`` takes the truncated series with rescaling ``beta`` in place of the exact logarithm.
    """
    if objective == "joint":
        x_a, x_b = (_standardise([z])[0] for z in views)
        moments = [_covariance(x_a), _covariance(x_b), _covariance(torch.cat([x_a, x_b], -1))]
    elif objective == "exchangeable":
        x_a, x_b = _standardise(views)
        total = _covariance(torch.cat([x_a, x_b], 1))
        cross = (x_a.mT @ x_b + x_b.mT @ x_a) / (2 * x_a.shape[1])
        moments = [total, total + cross, total - cross]
    else:
        stacked = torch.stack(_standardise(views))
        deviations = stacked - stacked.mean(0)
        num_views, _, n, _ = stacked.shape
        total = torch.einsum("vsni,vsnj->sij", stacked, stacked) / (num_views * n)
        within = torch.einsum("vsni,vsnj->sij", deviations, deviations) / ((num_views - 1) * n)
        moments = [total, within]
    return torch.stack([_log_det(moment / ridge, order, beta) for moment in moments])


def _standardise(views: Sequence[Tensor]) -> list[Tensor]:
    """Zero mean and unit population variance per feature, over the samples of all views together."""
    pooled = torch.cat(list(views), dim=1)
    mean = pooled.mean(1, keepdim=True)
    resolution = torch.finfo(pooled.dtype)
    # A feature that varies less than its mean is rounded is constant.
    floor = (16 * resolution.eps * mean.detach()) ** 2 + resolution.tiny**0.75
    variance = (pooled - mean).square().mean(1, keepdim=True)
    return [(z - mean) / torch.sqrt(variance + floor) for z in views]


def _covariance(x: Tensor) -> Tensor:
    return x.mT @ x / x.shape[1]


def _log_det(signal_to_noise: Tensor, order: int | None, beta: float) -> Tensor:
    identity = torch.eye(signal_to_noise.shape[-1], dtype=signal_to_noise.dtype, device=signal_to_noise.device)
    eigenvalues = torch.linalg.eigvalsh(identity + signal_to_noise)
    if order is None:
        return eigenvalues.log().sum(-1)
    scale = eigenvalues.pow(4).sum(-1, keepdim=True).pow(0.25) / beta
    x = eigenvalues / scale - 1
    series = sum((-1) ** (m + 1) / m * x**m for m in range(1, order + 1))
    return (scale.log() + series).sum(-1)
