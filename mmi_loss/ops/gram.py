"""Gram matrices of standardised features: the Gram route, for fewer samples than features.

log det(I_D + X^T X / ridge) = log det(I_N + X X^T / ridge), so no D x D matrix is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmi_loss.ops.autograd import closed_form
from mmi_loss.ops.covariance import add_variance_floor
from mmi_loss.ops.logdet import LogDet, weighted_sum

Block = tuple[int, int, int]


def helmert(size: int) -> list[list[float]]:
    """The orthonormal Helmert matrix: first row the (scaled) sum, the others contrasts. size=2: sum and difference."""
    rows = [[size**-0.5] * size]
    for j in range(1, size):
        norm = (j * (j + 1)) ** -0.5
        rows.append([norm] * j + [-j * norm] + [0.0] * (size - j - 1))
    return rows


def _contrasts(views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The standardised Helmert contrasts U (V N, D) of V views, u_j = sum_v H_jv (z_v - mean) / std, and 1 / std.

    H is orthonormal, so U U^T holds every second moment of the views; contrasts j >= 1 are free of the mean, and
    accurate even where the views nearly agree. Mean and variance of a feature are pooled over the views.
    """
    num_views, (n, dim) = len(views), views[0].shape
    mean = views[0].mean(0)
    for view in views[1:]:
        mean += view.mean(0)
    mean /= num_views
    rows = views[0].new_empty((num_views * n, dim))
    for j, weights in enumerate(helmert(num_views)):
        contrast = rows[j * n : (j + 1) * n]
        torch.mul(views[0], weights[0], out=contrast)
        for view, weight in zip(views[1:], weights[1:], strict=True):
            if weight:
                contrast.add_(view, alpha=weight)
    rows[:n].sub_(mean * num_views**0.5)
    variance = torch.linalg.vecdot(rows, rows, dim=0).div_(num_views * n)
    inverse_std = add_variance_floor(variance, mean).rsqrt_()
    return rows.mul_(inverse_std), inverse_std


def _contrasts_backward(
    grad_rows: Tensor, rows: Tensor, inverse_std: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """From dU to the views' gradients; ``grad_rows`` is overwritten.

    With v_i = sum_n u_ni^2 / (N V) the pooled variance and U = U0 / sqrt(v), the chain rule through the variance gives
    dU0 = (dU - U t) / std, t_i = sum_n dU_ni U_ni / (N V). Then dz_v = sum_j H_jv du0_j. The mean enters u_0 alone,
    whose gradient is therefore centred. (For functions of the spectrum, as all that is taken here, it is centred
    already but for rounding; where the mean is far larger than the deviation, that rounding is the largest error.)
    """
    num_views = len(needed)
    n = len(rows) // num_views
    shrink = torch.linalg.vecdot(grad_rows, rows, dim=0).div_(-num_views * n)
    grad_rows.addcmul_(rows, shrink).mul_(inverse_std)
    grad_rows[:n] -= grad_rows[:n].mean(0)
    if num_views == 1:
        return [grad_rows]
    contrasts = grad_rows.split(n)
    grads: list[Tensor | None] = []
    for v, is_needed in enumerate(needed):
        weights = [row[v] for row in helmert(num_views)]
        grad_view = contrasts[0] * weights[0] if is_needed else None
        for contrast, weight in zip(contrasts[1:], weights[1:], strict=True):
            if weight and grad_view is not None:
                grad_view.add_(contrast, alpha=weight)
        grads.append(grad_view)
    return grads


def _symmetric_product(rows: Tensor, n: int) -> Tensor:
    """U U^T by blocks of n rows, those below the diagonal mirrored instead of multiplied."""
    product = rows.new_empty((len(rows), len(rows)))
    for start in range(0, len(rows), n):
        block = slice(start, start + n)
        product[block, start:] = rows[block] @ rows[start:].mT
        product[start + n :, block] = product[block, start + n :].mT
    return product


class _PooledLoss(torch.autograd.Function):
    """L = 1/2 sum_j w_j log det A_j of V exchangeable views on all features, with

        A_j = I + c_j K_jj,   K = U U^T,

    K_jj the diagonal block of the contrasts that the j-th moment is made of: all, those that the views share, or those
    in which they differ. Backward, with F_j = dL/dA_j = w_j A_j^{-1} / 2: dU = 2 (sum_j c_j F_j, each in its block) U.
    """

    @staticmethod
    def forward(
        ctx: Any, blocks: Sequence[Block], weights: Sequence[float], ridge: float, log_det: LogDet, *views: Tensor
    ) -> tuple[Tensor, Tensor]:
        n, dim = views[0].shape
        rows, inverse_std = _contrasts(views)
        products = _symmetric_product(rows, n)
        groups = []
        for start, stop, degrees in blocks:
            block = slice(start * n, stop * n)
            matrix = products[block, block] / (degrees * n * ridge)
            matrix.diagonal().add_(1)
            groups.append(matrix[None])
        log_dets, state = log_det.value(groups, [dim - matrices.shape[-1] for matrices in groups])
        loss = weighted_sum(log_dets, weights)
        ctx.save_for_backward(rows, inverse_std, *state)
        ctx.blocks, ctx.weights, ctx.ridge, ctx.log_det = blocks, weights, ridge, log_det
        ctx.mark_non_differentiable(log_dets)
        return loss, log_dets

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, inverse_std, *state = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        n = len(rows) // len(needed)
        # The factors of F_j = w_j A_j^{-1} / 2 and of dU = 2 F U cancel.
        (total,), *others = ctx.log_det.gradients(ctx.weights, *state)
        total.div_(ctx.blocks[0][2] * n * ctx.ridge)
        for (start, stop, degrees), (gradient,) in zip(ctx.blocks[1:], others, strict=True):
            block = slice(start * n, stop * n)
            total[block, block].add_(gradient, alpha=1 / (degrees * n * ctx.ridge))
        total.mul_(grad)
        grad_rows = total @ rows
        return *(None,) * 4, *_contrasts_backward(grad_rows, rows, inverse_std, needed)


def pooled_loss(
    views: Sequence[Tensor], blocks: Sequence[Block], weights: Sequence[float], ridge: float, log_det: LogDet
) -> tuple[Tensor, Tensor]:
    """Loss (a scalar, in nats) and the log-determinants (m,) it is made of, of V views (N, D).

    ``blocks`` are (first contrast, last contrast + 1, degrees of freedom per sample) of each moment; the first is the
    covariance and holds all contrasts. ``weights`` (m) are those of the log-determinants in twice the loss.
    """
    loss, log_dets = _PooledLoss.apply(blocks, weights, ridge, log_det, *views)
    return loss, log_dets


class _StandardisedGram(torch.autograd.Function):
    """K = X X^T / (N ridge) of one standardised view X: dX = (G + G^T) X / (N ridge)."""

    @staticmethod
    def forward(ctx: Any, view: Tensor, ridge: float) -> Tensor:
        rows, inverse_std = _contrasts([view])
        ctx.save_for_backward(rows, inverse_std)
        ctx.ridge = ridge
        return (rows @ rows.mT).div_(len(rows) * ridge)

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        rows, inverse_std = ctx.saved_tensors
        grad_rows = (grad + grad.mT).div_(len(rows) * ctx.ridge) @ rows
        return _contrasts_backward(grad_rows, rows, inverse_std, [True])[0], None


def standardised_gram(view: Tensor, ridge: float) -> Tensor:
    """The Gram matrix (N, N), per sample and in units of the noise, of the standardised features of one view (N, D)."""
    result: Tensor = _StandardisedGram.apply(view, ridge)
    return result


class _IdentityPlus(torch.autograd.Function):
    """I + K, in one pass."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        result = matrix.clone()
        result.diagonal(dim1=-2, dim2=-1).add_(1)
        return result

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def identity_plus(matrix: Tensor) -> Tensor:
    """I + matrix for (..., n, n)."""
    result: Tensor = _IdentityPlus.apply(matrix)
    return result
