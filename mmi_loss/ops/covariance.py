"""Covariances and their standardisation: the covariance route, for at least as many samples as features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmi_loss.ops.autograd import closed_form


class _Scatter(torch.autograd.Function):
    """S = X^T X. With dS symmetric, <G, dS> = <X (G + G^T), dX>: one product where autograd of ``x.mT @ x``
    would take two.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.mT @ x

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x @ (grad + grad.mT)


def scatter(x: Tensor) -> Tensor:
    """(..., N, k) to the matrix of second moments times N, (..., k, k)."""
    result: Tensor = _Scatter.apply(x)
    return result


class _CrossScatter(torch.autograd.Function):
    """S = X^T Y: <G, dS> = <Y G^T, dX> + <X G, dY>."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x.mT @ y

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return y @ grad.mT, x @ grad


def cross_scatter(x: Tensor, y: Tensor) -> Tensor:
    """(..., N, k) and (..., N, l) to their cross moments times N, (..., k, l)."""
    result: Tensor = _CrossScatter.apply(x, y)
    return result


class _SignalToNoise(torch.autograd.Function):
    """A = I + s M s / ridge with s = diag(v)^{-1/2}, for a stack of M sharing the feature variances v.

    Written out, A_ij = delta_ij + M_ij s_i s_j / ridge. With F = dL/dA symmetric:

        dL/dM = s F s / ridge
        dL/ds_i = 2 (F (A - I))_ii / s_i,  ds_i = -s_i^3 dv_i / 2   =>   dL/dv_i = -(F (A - I))_ii / v_i.
    """

    @staticmethod
    def forward(ctx: Any, moments: Tensor, variance: Tensor, ridge: float) -> Tensor:
        inverse_std = variance.rsqrt()
        weight = inverse_std[..., :, None] * (inverse_std[..., None, :] / ridge)
        matrices = moments * weight
        ctx.save_for_backward(matrices, weight, variance)
        signal_to_noise = matrices.clone()
        signal_to_noise.diagonal(dim1=-2, dim2=-1).add_(1)
        return signal_to_noise

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        matrices, weight, variance = ctx.saved_tensors
        grad_variance = torch.einsum("m...ij,m...ij->...i", grad, matrices) / variance
        return grad * weight, -grad_variance, None


def signal_to_noise(moments: Tensor, variance: Tensor, ridge: float) -> Tensor:
    """I + (moments of the standardised features) / ridge.

    ``moments`` (m, ..., k, k), symmetric; ``variance`` (..., k). Its log det is the capacity, twice in nats, of a
    Gaussian channel whose noise is ``ridge`` in units of feature variance: log det(R + ridge I) - k log ridge.
    """
    result: Tensor = _SignalToNoise.apply(moments, variance, ridge)
    return result


def variance_floor(mean: Tensor) -> Tensor:
    """The variance that rounding alone gives a constant feature of this mean: below it there is no signal.

    Without it a collapsed embedding would be standardised to unit-variance rounding noise.
    """
    resolution = torch.finfo(mean.dtype)
    return (16 * resolution.eps * mean).square_().add_(resolution.tiny**0.75)


def pooled_scatters(views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Between- and within-sample scatter, (..., k, k) each, of V centred views (..., N, k).

    The views are rotated by the orthonormal Helmert contrasts: (x_1 + ... + x_V) / sqrt(V), whose scatter is
    *between*, and (x_1 + ... + x_j - j x_{j+1}) / sqrt(j (j + 1)), whose scatters add up to *within*. Their sum
    is the scatter of all views. *Within* is formed from differences of views, so it is accurate even where the
    views nearly agree, and needs V - 1 products instead of V.
    """
    running, within = views[0], []
    for j, view in enumerate(views[1:], start=1):
        within.append(scatter(torch.sub(running, view, alpha=j)) / (j * (j + 1)))
        running = running + view
    return scatter(running) / len(views), sum(within[1:], start=within[0])
