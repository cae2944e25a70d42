"""Gram matrices of standardised features: the Gram route, for fewer samples than features.

log det(I_D + X^T X / ridge) = log det(I_N + X X^T / ridge), so no D x D matrix is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmi_loss.ops.autograd import closed_form
from mmi_loss.ops.contrasts import contrasts, gradients_of_views, squared_norms
from mmi_loss.ops.covariance import add_variance_floor
from mmi_loss.ops.logdet import LogDet, weighted_sum

Block = tuple[int, int, int]


def _standardised(views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The orthonormal contrasts (V N, D) of V views in units of the features' standard deviations, and 1 / std (D).

    Orthonormal, so U U^T holds every second moment. Mean and variance of a feature are pooled over the views.
    """
    num_views, (n, dim) = len(views), views[0].shape
    rows, origin = contrasts(views)
    scales = _scales(num_views)
    variance = rows.new_zeros(dim)
    for row, scale in zip(rows.unbind(), scales, strict=True):
        variance.add_(column_dots(row, row), alpha=scale**2 / (num_views * n))
    inverse_std = add_variance_floor(variance, origin[0]).rsqrt_()
    for row, scale in zip(rows.unbind(), scales, strict=True):
        row.mul_(inverse_std * scale)
    return rows.view(num_views * n, dim), inverse_std


def _scales(num_views: int) -> list[float]:
    return [norm**-0.5 for norm in squared_norms(num_views)]


def _standardised_backward(grad_rows: Tensor, rows: Tensor, inverse_std: Tensor, num_views: int) -> list[Tensor]:
    """From dU to the views' gradients, in the memory of ``grad_rows``.

    With v_i = sum_n u_ni^2 / (N V) the pooled variance and U = U0 / sqrt(v), the chain rule through the variance gives
    dU0 = (dU - U t) / std, t_i = sum_n dU_ni U_ni / (N V). The mean enters u_0 alone, whose gradient is therefore
    centred. (For functions of the spectrum, as all that is taken here, it is centred already but for rounding; where
    the mean is far larger than the deviation, that rounding is the largest error.)
    """
    n = len(rows) // num_views
    shrink = column_dots(grad_rows, rows).div_(-num_views * n)
    grad_rows.addcmul_(rows, shrink)
    gradients = grad_rows.view(num_views, n, -1)
    scales = _scales(num_views)
    scales[0] /= num_views  # the mean passes 1 / V on to every view
    for gradient, scale in zip(gradients.unbind(), scales, strict=True):
        gradient.mul_(inverse_std * scale)
    shared = gradients[0]
    shared -= shared.mean(0)
    return gradients_of_views(gradients)


CHUNK = 128
"""Rows that the CPU works on at a time."""


def _is_chunked(x: Tensor) -> bool:
    """On a GPU every chunk would be a launch of its own, in a compiled graph a node."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def column_dots(x: Tensor, y: Tensor) -> Tensor:
    """sum_n x_ni y_ni of two (N, D) matrices; on the CPU in chunks, without a temporary of their size."""
    if not _is_chunked(x) or len(x) <= CHUNK:
        return torch.linalg.vecdot(x, y, dim=0)
    dots, products = x.new_zeros(x.shape[1]), x.new_empty((CHUNK, x.shape[1]))
    for x_rows, y_rows in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        dots += torch.mul(x_rows, y_rows, out=products[: len(x_rows)]).sum(0)
    return dots


def _symmetric_product(rows: Tensor, n: int) -> Tensor:
    """U U^T of contrasts of n rows each, by blocks: those below the diagonal mirrored instead of multiplied."""
    product = rows.new_empty((len(rows), len(rows)))
    size = CHUNK if _is_chunked(rows) else n
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        product[block, start:] = rows[block] @ rows[start:].mT
        product[start + size :, block] = product[block, start + size :].mT
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
        rows, inverse_std = _standardised(views)
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
        num_views = len(ctx.needs_input_grad) - 4
        n = len(rows) // num_views
        # The factors of F_j = w_j A_j^{-1} / 2 and of dU = 2 F U cancel.
        (total,), *others = ctx.log_det.gradients(ctx.weights, *state)
        total.div_(ctx.blocks[0][2] * n * ctx.ridge)
        for (start, stop, degrees), (gradient,) in zip(ctx.blocks[1:], others, strict=True):
            block = slice(start * n, stop * n)
            total[block, block].add_(gradient, alpha=1 / (degrees * n * ctx.ridge))
        total.mul_(grad)
        return *(None,) * 4, *_standardised_backward(total @ rows, rows, inverse_std, num_views)


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
        rows, inverse_std = _standardised([view])
        ctx.save_for_backward(rows, inverse_std)
        ctx.ridge = ridge
        return (rows @ rows.mT).div_(len(rows) * ridge)

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        rows, inverse_std = ctx.saved_tensors
        grad_rows = (grad + grad.mT).div_(len(rows) * ctx.ridge) @ rows
        return _standardised_backward(grad_rows, rows, inverse_std, 1)[0], None


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
