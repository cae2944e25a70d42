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

    ``order`` takes the truncated series in place of the exact logarithm, about one scale for all matrices: ``1 / beta``
    times the largest of their fourth-power norms.
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
    spectra = [_one_plus_spectrum(moment / ridge) for moment in moments]
    if order is None:
        return torch.stack([spectrum.log().sum(-1) for spectrum in spectra])
    norms = torch.stack([spectrum.pow(4).sum(-1).pow(0.25) for spectrum in spectra])
    scale = norms.amax(0)[..., None] / beta
    return torch.stack([(scale.log() + _series(spectrum / scale - 1, order)).sum(-1) for spectrum in spectra])


def _standardise(views: Sequence[Tensor]) -> list[Tensor]:
    """Zero mean and unit population variance per feature, over the samples of all views together."""
    pooled = torch.cat(list(views), dim=1)
    mean = pooled.mean(1, keepdim=True)
    resolution = torch.finfo(pooled.dtype)
    # A feature that varies less than its mean is rounded is constant.
    floor = (16 * resolution.eps * mean.detach()) ** 2 + resolution.tiny**0.75
    variance = (pooled - mean).square().mean(1, keepdim=True)
    is_constant = variance <= floor
    std = torch.sqrt(variance + floor)
    return [((z - mean) / std).masked_fill(is_constant, 0.0) for z in views]


def _covariance(x: Tensor) -> Tensor:
    return x.mT @ x / x.shape[1]


def _one_plus_spectrum(signal_to_noise: Tensor) -> Tensor:
    identity = torch.eye(signal_to_noise.shape[-1], dtype=signal_to_noise.dtype, device=signal_to_noise.device)
    return torch.linalg.eigvalsh(identity + signal_to_noise)


def _series(x: Tensor, order: int) -> Tensor:
    """The series of log(1 + x)."""
    return torch.stack([(-1) ** (m + 1) / m * x**m for m in range(1, order + 1)]).sum(0)
