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
from mmi_loss.ops.covariance import (
    Floor,
    LogDet,
    contrasts,
    gradients_of_views,
    inverse_std,
    noise_of,
    side_by_side,
    weighted_sum,
)

CHUNK = 128  # rows that the CPU works on at a time


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
    """The loss of :class:`mmi_loss.ops.covariance.CovarianceLoss` on all features (N, D), with R = n U and

        A_j = I + K_j V / V_j,    K = R R^T.

    Pooled views: R stacks the V contrasts, K_j is the block of the V_j that the moment takes. Views side by side: K_j
    is the sum of the Gram matrices of j's views, R restricted to their features. Backward: dR = 2 (sum_j F_j V / V_j,
    each in its place) R, and through the variance sum u^2 / (V^2 N) over all rows,

        dU = n (dR - R t noise),    t = sum_rows dR R.

    The mean enters the shared contrast alone, whose gradient is therefore centred. (It is already but for rounding,
    which is the largest error where the mean is far larger than the deviation.)
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        objective, floor, log_det, is_computed, *views = arguments  # see CovarianceLoss
        samples, widths = views[0].shape[0], [z.shape[-1] for z in views]
        parts = contrasts(views) if objective.is_pooled else side_by_side(views)
        num_parts, _, dim = parts.shape
        rows, weight = parts.view(num_parts * samples, dim), num_parts**2 * samples
        location = None
        if is_computed:
            location = views[0][0] if objective.is_pooled else torch.cat([z[0] for z in views])
        squares = torch.stack([column_dots(part, part) for part in parts])
        n = inverse_std(squares.sum(0).div_(weight), location)
        noise = noise_of(floor, squares, n, samples)
        n = n.mul_((weight * noise) ** -0.5)
        rows = torch.mul(rows, n, out=None if torch.compiler.is_compiling() else rows)
        # The range of samples or of views that a moment takes, and its degrees of freedom.
        count = num_parts if objective.is_pooled else len(views)
        ranges = [range(first, count if last is None else last) for first, last in objective.moments]
        if objective.is_pooled:
            blocks = [slice(r.start * samples, r.stop * samples) for r in ranges]
            product = _symmetric_product(rows)
            grams = [product[block, block] * (num_parts / len(r)) for block, r in zip(blocks, ranges, strict=True)]
            null_dims = [dim - len(r) * samples for r in ranges]
        else:
            of_views = torch.stack([_symmetric_product(columns) for columns in rows.split(widths, dim=-1)])
            grams = [of_views[r.start : r.stop].sum(0) for r in ranges]
            null_dims = [sum(widths[r.start : r.stop]) - samples for r in ranges]
        identities = [torch.eye(len(gram), dtype=gram.dtype, device=gram.device) for gram in grams]
        groups = [(gram + identity)[None] for gram, identity in zip(grams, identities, strict=True)]
        # The factors of F_j = w_j A_j^-1 / 2 and of 2 F_j R cancel.
        log_dets, factors = log_det(groups, null_dims, objective.weights)
        loss = weighted_sum(log_dets, objective.weights)
        if objective.is_pooled:
            margins = [(b.start, num_parts * samples - b.stop) * 2 for b in blocks]
            placed = [F.pad(f * (num_parts / len(r)), m) for (f,), r, m in zip(factors, ranges, margins, strict=True)]
            total = torch.stack(placed).sum(0)
        else:
            chosen = [[f for (f,), r in zip(factors, ranges, strict=True) if view in r] for view in range(len(views))]
            total = torch.stack([torch.stack(of_view).sum(0) for of_view in chosen])
        # Where the loss is NaN, so is every gradient.
        ctx.save_for_backward(rows, torch.add(n, loss, alpha=0), total, noise)
        ctx.num_parts, ctx.widths = num_parts, None if objective.is_pooled else widths
        ctx.mark_non_differentiable(log_dets, noise)
        return loss, log_dets, noise

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        rows, n, total, noise = ctx.saved_tensors
        if ctx.widths is None:
            grad_rows = total @ rows
        else:
            columns = zip(total, rows.split(ctx.widths, dim=-1), strict=True)
            grad_rows = torch.cat([factor @ column for factor, column in columns], dim=-1)
        shrink = column_dots(grad_rows, rows).mul_(noise)
        grad_rows = grad_rows.addcmul_(rows, shrink, value=-1).mul_(n * grad)
        shared, *others = grad_rows.view(ctx.num_parts, -1, rows.shape[-1]).unbind()
        shared = torch.sub(shared, shared.mean(0), out=None if torch.compiler.is_compiling() else shared)
        of_views = shared.split(ctx.widths, dim=-1) if ctx.widths else gradients_of_views([shared, *others])
        return *(None,) * 4, *of_views


def gram_loss(
    objective: Objective, floor: Floor, log_det: LogDet, views: Sequence[Tensor], is_computed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (a scalar, in nats), the constant log-determinants (m, S) it is made of, and the noise, of views (N, k), or
    (S, N, k): then the mean over slices, one after another. Arguments as for
    :class:`mmi_loss.ops.covariance.CovarianceLoss`.
    """
    slices = [views] if views[0].ndim == 2 else zip(*views, strict=True)
    of_slices = [_GramLoss.apply(objective, floor, log_det, is_computed, *z) for z in slices]
    losses, log_dets, noises = zip(*of_slices, strict=True)
    return torch.stack(losses).mean(), torch.stack(log_dets, dim=1), torch.stack(noises)
