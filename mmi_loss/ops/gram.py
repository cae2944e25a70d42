"""The Gram route, for fewer samples than features: log det(I_D + X^T X / noise) = log det(I_N + X X^T / noise), so no
D x D matrix is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_loss.objectives import Objective
from mmi_loss.ops.autograd import closed_form
from mmi_loss.ops.covariance import LogDet, contrasts, gradients_of_views, inverse_std, side_by_side, weighted_sum

CHUNK = 128
"""Rows that the CPU works on at a time."""


def _is_chunked(x: Tensor) -> bool:
    """On a GPU every chunk would be a launch of its own, in a compiled graph a node."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and len(x) > CHUNK


def column_dots(x: Tensor, y: Tensor) -> Tensor:
    """sum_n x_ni y_ni of two (N, D) matrices; on the CPU in chunks, without a temporary of their size."""
    if not _is_chunked(x):
        return torch.linalg.vecdot(x, y, dim=0)
    dots, products = x.new_zeros(x.shape[1]), x.new_empty((CHUNK, x.shape[1]))
    for x_rows, y_rows in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        dots += torch.mul(x_rows, y_rows, out=products[: len(x_rows)]).sum(0)
    return dots


def _symmetric_product(rows: Tensor) -> Tensor:
    """U U^T; on the CPU by blocks, those below the diagonal mirrored instead of multiplied."""
    if not _is_chunked(rows):
        return rows @ rows.mT
    product = rows.new_empty((len(rows), len(rows)))
    for start in range(0, len(rows), CHUNK):
        block = slice(start, start + CHUNK)
        product[block, start:] = rows[block] @ rows[start:].mT
        product[start + CHUNK :, block] = product[block, start + CHUNK :].mT
    return product


class _GramLoss(torch.autograd.Function):
    """L = 1/2 sum_j w_j log det A_j on all features. With the parts U_i of the views and n = 1 / (std V sqrt(N noise)),

        A_j = I + K_j V / V_j,    K = (n U) (n U)^T.

    Pooled views: U stacks the V contrasts, K_j is the block of the V_j that the moment takes. Views side by side
    (V = 1): K_j is the sum of the Gram matrices of j's views, n U restricted to their features.

    Backward, with F_j = dL/dA_j = w_j A_j^-1 / 2: dR = 2 (sum_j F_j V / V_j, each in its place) R for R = n U, and through
    the variance sum u^2 / (V^2 N) over all rows,

        dU = n (dR - R t noise),    t = sum_rows dR R.

    The mean enters the shared contrast alone, whose gradient is therefore centred. (For functions of the spectrum, as
    all that is taken here, it is centred already but for rounding; where the mean is far larger than the deviation,
    that rounding is the largest error.)
    """

    @staticmethod
    def forward(
        ctx: Any, objective: Objective, noise: float | Tensor, log_det: LogDet, is_computed: bool, *views: Tensor
    ) -> tuple[Tensor, Tensor]:
        samples, widths = views[0].shape[0], [z.shape[-1] for z in views]
        parts = contrasts(views) if objective.is_pooled else side_by_side(views)
        num_parts, _, dim = parts.shape
        rows = parts.view(num_parts * samples, dim)
        location = None
        if is_computed:
            location = views[0][0] if objective.is_pooled else torch.cat([z[0] for z in views])
        weight = num_parts**2 * samples
        n = inverse_std(column_dots(rows, rows).div_(weight), location).mul_((weight * noise) ** -0.5)
        rows = torch.mul(rows, n, out=None if torch.compiler.is_compiling() else rows)
        groups, null_dims = [], []
        if objective.is_pooled:
            products = _symmetric_product(rows)
            for moment in objective.moments:
                block, degrees = _rows_of(moment, num_parts, samples)
                groups.append(_identity_plus(products[block, block], num_parts / degrees))
                null_dims.append(dim - degrees * samples)
        else:
            grams = [_symmetric_product(columns) for columns in rows.split(widths, dim=-1)]
            for first, last in objective.moments:
                groups.append(_identity_plus(sum(grams[first:last][1:], grams[first:last][0]), 1.0))
                null_dims.append(sum(widths[first:last]) - samples)
        # The factors of F_j = w_j A_j^-1 / 2 and of 2 F_j R cancel.
        log_dets, factors = log_det(groups, null_dims, objective.weights)
        loss = weighted_sum(log_dets, objective.weights)
        if objective.is_pooled:
            total = _in_their_blocks(factors, objective, num_parts, samples)
        else:
            total = _sums_by_view(factors, objective)
        # Where the loss is NaN, so is every gradient.
        ctx.save_for_backward(rows, torch.add(n, loss, alpha=0), total)
        ctx.is_pooled, ctx.noise, ctx.widths = objective.is_pooled, noise, widths
        ctx.mark_non_differentiable(log_dets)
        return loss, log_dets

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, n, total = ctx.saved_tensors
        if ctx.is_pooled:
            grad_rows = total @ rows
        else:
            columns = zip(total, rows.split(ctx.widths, dim=-1), strict=True)
            grad_rows = torch.cat([factor @ column for factor, column in columns], dim=-1)
        shrink = column_dots(grad_rows, rows).mul_(ctx.noise)
        grad_rows = grad_rows.addcmul_(rows, shrink, value=-1).mul_(n * grad)
        num_parts = len(ctx.widths) if ctx.is_pooled else 1
        shared, *others = grad_rows.view(num_parts, -1, rows.shape[-1]).unbind()
        shared = torch.sub(shared, shared.mean(0), out=None if torch.compiler.is_compiling() else shared)
        if ctx.is_pooled:
            return *(None,) * 4, *gradients_of_views([shared, *others])
        return *(None,) * 4, *shared.split(ctx.widths, dim=-1)


def _rows_of(moment: tuple[int, int | None], num_parts: int, samples: int) -> tuple[slice, int]:
    """The rows of the contrasts that a moment takes, and how many they are."""
    degrees = range(num_parts)[slice(*moment)]
    return slice(degrees.start * samples, degrees.stop * samples), len(degrees)


def _in_their_blocks(factors: Sequence[Tensor], objective: Objective, num_parts: int, samples: int) -> Tensor:
    """sum_j F_j V / V_j (V N, V N), each in the block of its contrasts."""
    padded = []
    for (factor,), moment in zip(factors, objective.moments, strict=True):
        block, degrees = _rows_of(moment, num_parts, samples)
        before, after = block.start, num_parts * samples - block.stop
        padded.append(F.pad(factor * (num_parts / degrees), (before, after, before, after)))
    return torch.stack(padded).sum(0)


def _sums_by_view(factors: Sequence[Tensor], objective: Objective) -> Tensor:
    """sum_j F_j (V, N, N) over the moments that take a view, for both views."""
    sums = []
    for view in range(2):
        chosen = [
            f for (f,), (first, last) in zip(factors, objective.moments, strict=True) if view in range(2)[first:last]
        ]
        sums.append(torch.stack(chosen).sum(0))
    return torch.stack(sums)


def _identity_plus(matrix: Tensor, scale: float) -> Tensor:
    """I + scale * matrix, as a group of one."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.add(identity, matrix, alpha=scale)[None]


def gram_loss(
    objective: Objective, noise: float | Tensor, log_det: LogDet, views: Sequence[Tensor], is_computed: bool
) -> tuple[Tensor, Tensor]:
    """Loss (a scalar, in nats) and the constant log-determinants (m, S) it is made of, of views (N, k), or (S, N, k): then
    the mean over slices, one after another. Arguments as for :class:`mmi_loss.ops.covariance.CovarianceLoss`.
    """
    slices = [views] if views[0].ndim == 2 else zip(*views, strict=True)
    losses, log_dets = zip(*[_GramLoss.apply(objective, noise, log_det, is_computed, *z) for z in slices], strict=True)
    return torch.stack(losses).mean(), torch.stack(log_dets, dim=1)
