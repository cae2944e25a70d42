"""Covariances and their standardisation: the covariance route, for at least as many samples as features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmi_loss.ops.autograd import closed_form
from mmi_loss.ops.contrasts import contrasts, gradients_of_views
from mmi_loss.ops.logdet import LogDet, weighted_sum

Coefficients = Sequence[Sequence[float]]
Reduce = Callable[[Tensor], Tensor]


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


class _PooledLoss(torch.autograd.Function):
    """L = 1/2 sum_j w_j log det A_j, averaged over slices, of V exchangeable views, with

        A_j = I + s M_j s / ridge,    M_j = sum_i c_ji U_i^T U_i / N,    s = diag(M_0 + floor)^{-1/2},

    where U_i are the :mod:`contrasts <mmi_loss.ops.contrasts>` of the views.

    Backward, with F_j = dL/dA_j = w_j A_j^{-1} / 2 symmetric and elementwise weights s s^T / ridge:

        dL/dM_j = F_j s s^T / ridge,  and through the variances v = diag(M_0) + floor, ds_i = -s_i^3 dv_i / 2,
        dL/dv_i = -sum_j (F_j (A_j - I))_ii / v_i,  on the diagonal of M_0;
        dU_i = U_i G_i,  G_i = 2 sum_j c_ji dL/dM_j / N,  and from contrasts back to views.

    The mean is a constant: moments about it are stationary in it.

    ``reduce`` sums a tensor over the processes that share the batch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        coefficients: Coefficients,
        weights: Sequence[float],
        ridge: float | Tensor,
        log_det: LogDet,
        reduce: Reduce | None,
        total: Tensor | None,
        mean: Tensor | None,
        *views: Tensor,
    ) -> tuple[Tensor, Tensor]:
        rows, origin = contrasts(views, mean)
        products = _products(rows.mT, rows)
        if reduce is not None:
            products = reduce(products)
        moments = _combine(products, coefficients, _count(rows, total))
        variance = add_variance_floor(moments[0].diagonal(dim1=-2, dim2=-1), origin.squeeze(-2))
        weight = _noise_weight(variance, ridge)
        moments.mul_(weight)
        matrices = moments.clone()
        matrices.diagonal(dim1=-2, dim2=-1).add_(1)
        log_dets, state = log_det.value([matrices], [0])
        loss = weighted_sum(log_dets, weights)
        ctx.save_for_backward(rows, moments, weight, variance, *state)
        ctx.coefficients, ctx.weights, ctx.log_det, ctx.reduce, ctx.total = (
            coefficients,
            weights,
            log_det,
            reduce,
            total,
        )
        ctx.mark_non_differentiable(log_dets)
        return loss, log_dets

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, moments, weight, variance, *state = ctx.saved_tensors
        (grad_moments,) = ctx.log_det.gradients(ctx.weights, *state)
        grad_moments.mul_(grad)
        grad_variance = (grad_moments * moments).sum((0, -1)).div_(variance)
        grad_moments.mul_(weight)
        grad_moments[0].diagonal(dim1=-2, dim2=-1).sub_(grad_variance)
        # The factors of F_j = w_j A_j^{-1} / 2 and of G_i = 2 sum_j c_ji dM_j cancel.
        transposed = [list(column) for column in zip(*ctx.coefficients, strict=True)]
        num_slices = variance.numel() // variance.shape[-1]
        grad_products = _combine(grad_moments, transposed, _count(rows, ctx.total) * num_slices)
        grad_products[0].div_(len(rows))
        if ctx.reduce is not None:
            grad_products = ctx.reduce(grad_products)
        return *(None,) * 7, *gradients_of_views(_products(rows, grad_products))


def pooled_loss(
    views: Sequence[Tensor],
    coefficients: Coefficients,
    weights: Sequence[float],
    ridge: float | Tensor,
    log_det: LogDet,
    reduce: Reduce | None = None,
    total: Tensor | None = None,
    mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss (a scalar, in nats) and the log-determinants (m, S) or (m,) it is made of, of V views (S, N, k) or (N, k).

    ``coefficients`` (m, V) combine the second moments of the V contrasts into m matrices; the first is the covariance
    that standardises all. ``weights`` (m) are those of the log-determinants in twice the loss. If processes share the
    batch, ``reduce`` sums over them, ``total`` is its number of samples, ``mean`` (S, 1, k) or (1, k) its mean.
    """
    loss, log_dets = _PooledLoss.apply(coefficients, weights, ridge, log_det, reduce, total, mean, *views)
    return loss, log_dets


class _SignalToNoise(torch.autograd.Function):
    """A = I + s M s / ridge, s = diag(v)^{-1/2}, v the diagonal of M plus a floor.

    With F = dL/dA symmetric, dL/dM = F s s^T / ridge elementwise, and through the variances as above,
    dL/dv_i = -(F (A - I))_ii / v_i on the diagonal.
    """

    @staticmethod
    def forward(ctx: Any, moments: Tensor, mean: Tensor, ridge: float | Tensor) -> Tensor:
        variance = add_variance_floor(moments.diagonal(dim1=-2, dim2=-1), mean)
        weight = _noise_weight(variance, ridge)
        moments = moments * weight
        ctx.save_for_backward(moments, weight, variance)
        signal_to_noise = moments.clone()
        signal_to_noise.diagonal(dim1=-2, dim2=-1).add_(1)
        return signal_to_noise

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        moments, weight, variance = ctx.saved_tensors
        grad_moments = grad * weight
        grad_moments.diagonal(dim1=-2, dim2=-1).sub_((grad * moments).sum(-1).div_(variance))
        return grad_moments, None, None


def signal_to_noise(moments: Tensor, mean: Tensor, ridge: float | Tensor) -> Tensor:
    """I + (standardised moments) / ridge, for symmetric second moments (..., k, k) about the ``mean`` (..., k).

    Their diagonal is the variance that standardises. The log det of the result is twice the
    capacity, in nats, of a Gaussian channel with noise ``ridge`` in units of feature variance.
    """
    result: Tensor = _SignalToNoise.apply(moments, mean, ridge)
    return result


def _noise_weight(variance: Tensor, ridge: float | Tensor) -> Tensor:
    """The matrix s s^T / ridge that standardises second moments and measures them in units of the noise."""
    inverse_std = variance.rsqrt()
    return inverse_std[..., :, None] * (inverse_std[..., None, :] / ridge)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Batched products of (V, ..., n, m) and (V, ..., m, k): ``matmul`` without its price of broadcasting."""
    if left.ndim == 3:
        return torch.bmm(left, right)
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])


def _count(rows: Tensor, total: Tensor | None) -> int | Tensor:
    """The samples that share the statistics. N is taken from a tensor at hand, in the backward as in the forward: as
    an argument it is, where batches differ, a symbol of the compiled graph around, which no Function can keep.
    """
    return rows.shape[-2] if total is None else total


def _combine(matrices: Tensor, coefficients: Coefficients, divisor: float | Tensor) -> Tensor:
    """Weighted sums over the first dimension, one per row of coefficients, divided; zero weights cost nothing."""
    scale = 1.0 if isinstance(divisor, Tensor) else 1 / divisor
    combined = matrices.new_empty((len(coefficients), *matrices.shape[1:]))
    parts = matrices.unbind()
    for out, row in zip(combined.unbind(), coefficients, strict=True):
        (first, weight), *others = [(m, c * scale) for m, c in zip(parts, row, strict=True) if c]
        torch.mul(first, weight, out=out)
        for matrix, weight in others:
            out.add_(matrix, alpha=weight)
    return combined.div_(divisor) if isinstance(divisor, Tensor) else combined


def add_variance_floor(variance: Tensor, mean: Tensor) -> Tensor:
    """The variance plus what rounding alone gives a constant feature of this mean; infinite where that is all there is.

    A constant feature, whose computed mean is off by a rounding, is then standardised to 0, with gradient 0. Its
    rounding noise over a tiny standard deviation would be a gradient larger than that of all other features.
    """
    resolution = torch.finfo(mean.dtype)
    floored = torch.addcmul(variance, mean, mean, value=(16 * resolution.eps) ** 2).add_(resolution.tiny**0.75)
    return floored.masked_fill_(floored >= 2 * variance, float("inf"))
