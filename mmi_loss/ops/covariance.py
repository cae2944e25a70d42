"""Covariances and their standardisation: the covariance route, for at least as many samples as features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmi_loss.ops.autograd import closed_form

Coefficients = Sequence[Sequence[float]]


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


class _PooledScatters(torch.autograd.Function):
    """Scatters of the orthonormal Helmert contrasts of V centred views: u_0 = (x_1 + ... + x_V) / sqrt(V) gives
    *between*, u_j = (x_1 + ... + x_j - j x_{j+1}) / sqrt(j (j + 1)) for j >= 1 add up to *within*.

    dX_v = sum_j H_jv dU_j with dU_j = u_j (G + G^T) and H the contrasts' weights. The mean is a constant: moments
    about it are stationary in it.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, *views: Tensor) -> Tensor:
        centred = [view - mean for view in views]
        running, contrasts, norms = centred[0], [], [len(views)]
        for j, view in enumerate(centred[1:], start=1):
            contrasts.append(torch.sub(running, view, alpha=j))
            norms.append(j * (j + 1))
            running = running + view
        contrasts.insert(0, running)
        ctx.save_for_backward(*contrasts)
        ctx.norms = norms
        between, *within = ((u.mT @ u).div_(norm) for u, norm in zip(contrasts, norms, strict=True))
        return torch.stack([between, sum(within[1:], start=within[0])])

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        between, within = grad + grad.mT
        first, *others = ctx.saved_tensors
        total = first @ (between / ctx.norms[0])
        grads: list[Tensor] = []
        # A view is subtracted in one contrast and added in all after it: from the last to the first.
        for v in range(len(others), 0, -1):
            from_contrast = others[v - 1] @ (within / ctx.norms[v])
            grads.insert(0, torch.sub(total, from_contrast, alpha=v))
            total = total.add_(from_contrast)
        return None, total, *grads


def pooled_scatters(views: Sequence[Tensor], mean: Tensor) -> Tensor:
    """Between- and within-sample scatter, (2, ..., k, k), of V views (..., N, k) about their common ``mean``.

    Their sum is the scatter of all views. *Within* is formed from differences of views, so it is accurate even where
    the views nearly agree, and needs V - 1 products instead of V.
    """
    result: Tensor = _PooledScatters.apply(mean, *views)
    return result


class _SignalToNoise(torch.autograd.Function):
    """A_j = I + s M_j s / ridge, M_j = sum_i c_ji S_i, s = diag(v)^{-1/2}, v the diagonal of M_0 plus a floor.

    With w = s s^T / ridge and F_j = dL/dA_j symmetric, dL/dM_j = F_j w elementwise, and through the variances

        dL/ds_i = 2 sum_j (F_j (A_j - I))_ii / s_i,  ds_i = -s_i^3 dv_i / 2
        =>  dL/dv_i = -sum_j (F_j (A_j - I))_ii / v_i,

    which belongs to the diagonal of M_0.
    """

    @staticmethod
    def forward(ctx: Any, scatters: Tensor, floor: Tensor, coefficients: Coefficients, ridge: float) -> Tensor:
        moments = torch.stack([_combine(scatters, weights) for weights in coefficients])
        variance = moments[0].diagonal(dim1=-2, dim2=-1) + floor
        inverse_std = variance.rsqrt()
        weight = inverse_std[..., :, None] * (inverse_std[..., None, :] / ridge)
        moments *= weight
        ctx.save_for_backward(moments, weight, variance)
        ctx.coefficients = coefficients
        signal_to_noise = moments.clone()
        signal_to_noise.diagonal(dim1=-2, dim2=-1).add_(1)
        return signal_to_noise

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        moments, weight, variance = ctx.saved_tensors
        grad_variance = (grad * moments).sum((0, -1)).div_(variance)
        grad_moments = grad * weight
        grad_moments[0].diagonal(dim1=-2, dim2=-1).sub_(grad_variance)
        transposed = zip(*ctx.coefficients, strict=True)
        return torch.stack([_combine(grad_moments, weights) for weights in transposed]), None, None, None


def _combine(matrices: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted sum over the first dimension; zero weights cost nothing."""
    terms = [matrix * weight for matrix, weight in zip(matrices, weights, strict=True) if weight]
    return sum(terms[1:], start=terms[0])


def signal_to_noise(scatters: Tensor, floor: Tensor, coefficients: Coefficients, ridge: float) -> Tensor:
    """I + (standardised moments) / ridge for the moments that ``coefficients`` (m rows) combine from scatters.

    ``scatters`` (c, ..., k, k), symmetric and divided by the number of samples, to (m, ..., k, k). The first moment's
    diagonal, plus ``floor`` (..., k), is the variance that standardises all. The log det of the result is twice the
    capacity, in nats, of a Gaussian channel with noise ``ridge`` in units of feature variance.
    """
    result: Tensor = _SignalToNoise.apply(scatters, floor, coefficients, ridge)
    return result


def variance_floor(mean: Tensor) -> Tensor:
    """The variance that rounding alone gives a constant feature of this mean: below it there is no signal.

    Without it a collapsed embedding would be standardised to unit-variance rounding noise.
    """
    resolution = torch.finfo(mean.dtype)
    return (16 * resolution.eps * mean).square_().add_(resolution.tiny**0.75)
