"""The covariance route, for at least as many samples as features; and what every route shares: the parts that views are
turned into, the scale that standardises a feature, the exact log-determinant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mmi_loss.objectives import Objective
from mmi_loss.ops.autograd import closed_form

Groups = Sequence[Tensor]
Weights = Sequence[float]


class Shared(NamedTuple):
    """What is known of a batch that several processes share."""

    samples: Tensor
    """Their number, a scalar; NaN where it is too small, or the processes disagree on what they compute."""
    means: list[Tensor]
    """Of each view over all of them, (S, 1, k), without gradient."""
    reduce: Callable[[Tensor], Tensor]
    """The sum over the processes, without gradient."""


def contrasts(views: Sequence[Tensor], mean: Tensor | None = None) -> Tensor:
    """The contrasts (V, ..., N, k) of V views (..., N, k): what they share, their sum less V times the ``mean``
    (..., 1, k), by default that of the samples; and how they differ, for i = 1 .. V - 1,

        u_i = c_i [x_{i+1} - (x_1 + ... + x_i) / i],    c_i = sqrt(V i / (i + 1)).

    They are orthonormal combinations of the views (Helmert's) times sqrt(V), a factor that makes the weights of a pair 1.
    Those that differ are free of the mean, and accurate even where the views nearly agree.
    """
    # In eager mode results go to their places in memory. In a traced graph, writes into a part of a tensor would pin the
    # batch size, and the compiler places results by itself.
    buffer, out = None, [None] * len(views)
    if not torch.compiler.is_compiling():
        buffer = views[0].new_empty((len(views), *views[0].shape))
        out = buffer.unbind()
    # Relative to any one sample, features keep their digits where the mean is far larger than the deviation.
    total = torch.sub(views[0], views[0].narrow(-2, 0, 1) if mean is None else mean, out=out[0])
    difference, rows = total, [total]
    for i in range(1, len(views)):
        previous = difference
        difference = torch.sub(views[i], views[i - 1], out=out[i])
        if i > 1:
            difference = torch.add(difference, previous, alpha=1 - 1 / i, out=out[i])
        total = torch.add(difference, total, alpha=1 + 1 / i, out=out[0])
        rows.append(difference)
    if len(views) > 2:  # for a pair c is 1
        rows[1:] = [torch.mul(row, contrast_norm(i + 1, len(views)), out=out[i + 1]) for i, row in enumerate(rows[1:])]
    if mean is None:
        total = torch.sub(total, total.sum(-2, keepdim=True), alpha=1 / total.shape[-2], out=out[0])
    rows[0] = total
    return torch.stack(rows) if buffer is None else buffer


def contrast_norm(i: int, num_views: int) -> float:
    """The weight c_i of a contrast."""
    return math.sqrt(num_views * i / (i + 1))


def gradients_of_views(gradients: Sequence[Tensor]) -> list[Tensor]:
    """From the gradients of the contrasts (..., N, k) to those of the views; in eager mode in their memory.

    The mean that was subtracted counts as a constant: moments about it are stationary in it.
    """
    num_views = len(gradients)
    parts = list(gradients)
    is_eager = not torch.compiler.is_compiling()
    # A view is added in one contrast and subtracted in all after it: from the last to the first.
    total = parts[0]
    for i in range(num_views - 1, 0, -1):
        c = contrast_norm(i, num_views)
        total = torch.sub(total, parts[i], alpha=c / i, out=parts[0] if is_eager else None)
        parts[i] = torch.add(total, parts[i], alpha=c + c / i, out=parts[i] if is_eager else None)
    parts[0] = total
    return parts


def side_by_side(views: Sequence[Tensor], means: Sequence[Tensor] | None = None) -> Tensor:
    """The centred views' features beside one another, (1, ..., N, sum of k)."""
    if means is not None:
        return torch.cat([z - mean for z, mean in zip(views, means, strict=True)], dim=-1)[None]
    rows = torch.cat([z - z[..., :1, :] for z in views], dim=-1)
    return (rows - rows.mean(-2, keepdim=True))[None]


ROUNDINGS = 2
"""Roundings, in units of the mean, by which the samples of a constant feature may differ once it was computed."""


def smallest_variance(dtype: torch.dtype) -> float:
    """Below it a variance loses digits to underflow: tiny^(3/4), a standard deviation of 5e-15 in float32."""
    return torch.finfo(dtype).tiny ** 0.75


def relative_resolution(dtype: torch.dtype) -> float:
    """What is smaller than this share of a computed feature's mean is rounding alone."""
    return ROUNDINGS * torch.finfo(dtype).eps


def inverse_std(variance: Tensor, mean: Tensor | None = None) -> Tensor:
    """1 / sqrt(variance), or 0 for a constant feature, which so takes no part in loss or gradient.

    The rounding noise of a constant feature, over its tiny deviation, would be a gradient larger than all others'.
    Features as they were given are constant only if they are exactly: their variance is that of differences between
    samples. For features that were computed, pass their ``mean`` (or any one sample): rounding is relative to it.

    An infinite variance, the overflow of a square, gives NaN, where 0 would hide it.
    """
    info = torch.finfo(variance.dtype)
    floor: float | Tensor = info.tiny**0.75
    if mean is not None:
        floor = (mean * (ROUNDINGS * info.eps)).square() + floor
    return (variance.sqrt() / variance).masked_fill(variance <= floor, 0.0)


class LogDet(Protocol):
    """Log-determinants of groups of SPD matrices (g, ..., n, n), with their derivatives in closed form."""

    def __call__(self, groups: Groups, null_dims: Sequence[int], weights: Weights) -> tuple[Tensor, list[Tensor]]:
        """Log dets (sum of g, ...) in nats, each with ``null_dims`` more eigenvalues equal to 1; and the gradient of the
        sum of weights times log dets with respect to each group, symmetric: new tensors.
        """


class Cholesky(LogDet):
    """Exact, by one factorisation each. d log det A = tr(A^-1 dA).

    Where the factorisation fails, the log-determinant is NaN, where a GradScaler looks: checking on the host would
    synchronise, and both LAPACK and cuSOLVER leave finite numbers.
    """

    def __call__(self, groups: Groups, null_dims: Sequence[int], weights: Weights) -> tuple[Tensor, list[Tensor]]:
        log_dets, inverses = [], []
        for matrices in groups:
            factor, info = torch.linalg.cholesky_ex(matrices)
            log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).mul_(2)
            log_dets.append(log_det.masked_fill_(info != 0, float("nan")))
            if factor.device.type == "cpu":
                inverses.append(torch.cholesky_inverse(factor))
            else:  # its check would make the host wait
                identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
                inverse_factor = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
                inverses.append(inverse_factor.mT @ inverse_factor)
        return torch.cat(log_dets) if len(log_dets) > 1 else log_dets[0], weighted(inverses, weights)


def weighted(groups: list[Tensor], weights: Weights) -> list[Tensor]:
    """The matrices of all groups times their weights; in eager mode in place."""
    remaining = iter(weights)
    if torch.compiler.is_compiling():
        return [torch.stack([matrix * next(remaining) for matrix in group.unbind()]) for group in groups]
    for group in groups:
        for matrix in group.unbind():
            weight = next(remaining)
            if weight != 1:
                matrix.mul_(weight)
    return groups


class CovarianceLoss(torch.autograd.Function):
    """Loss (a scalar, in nats) and the constant log-determinants (m, S) it is made of, of views (S, N, k), or (N, k).

    ``noise`` is in units of feature variance: one number, or (K,), one for every feature of views side by side.
    ``is_computed``: features were not given as they are, but projected. ``shared``: of a batch that processes share.

    L = 1/2 sum_j w_j log det A_j, averaged over slices, with

        A_j = I + n n^T * M_j,    n = 1 / (std V sqrt(N noise)),    M_j = V / V_j sum_{i in j} P_i,    P_i = U_i^T U_i,

    ``*`` elementwise and U_i the parts. Pooled views have V parts, their contrasts, which are sqrt(V) times orthonormal;
    j ranges over the objective's ranges of V_j of them, and the variance is that of all, sum_i diag(P_i) / (V^2 N).
    Other views are one part, side by side (V = 1), and A_j is the block of j's views.

    Backward, with F_j = dL/dA_j = w_j A_j^-1 / 2 symmetric:

        dP_i = V sum_{j with i} (F_j * n n^T) / V_j  -  diag(n^2 noise sum_j (F_j (A_j - I))_dd),

    the second term through the variances: ds = -s^3 dvar / 2 for s = 1 / std, so dvar_d = -s^2 sum_j (F_j (A_j - I))_dd;
    dU_i = 2 U_i dP_i; and from parts back to views. The means are constants: moments about them are stationary in them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        objective: Objective,
        noise: float | Tensor,
        log_det: LogDet,
        shared: Shared | None,
        is_computed: bool,
        *views: Tensor,
    ) -> tuple[Tensor, Tensor]:
        means = None if shared is None else shared.means
        if objective.is_pooled:
            mean = None if means is None else sum(means[1:], means[0]) / len(views)
            rows = contrasts(views, mean)
            location = views[:1] if mean is None else [mean]
        else:
            rows = side_by_side(views, means)
            location = views if means is None else means
        parts, samples, dim = len(rows), rows.shape[-2], rows.shape[-1]
        slices = 1 if rows.ndim == 3 else rows.shape[1]
        flat = rows.view(parts * slices, samples, dim)
        products = torch.bmm(flat.mT, flat).view(parts, slices, dim, dim)
        count: int | Tensor = samples
        if shared is not None:
            products, count = shared.reduce(products), shared.samples
        variance = products.diagonal(dim1=-2, dim2=-1).sum(0).div_(parts**2 * count)
        size = None
        if is_computed or shared is not None:
            size = location[0].select(-2, 0)
            if len(location) > 1:
                size = torch.cat([size, location[1].select(-2, 0)], dim=-1)
        n = inverse_std(variance, size).mul_((parts**2 * count * noise) ** -0.5)
        coefficients = [[1.0]]
        if objective.is_pooled:
            coefficients = []
            for first, last in objective.moments:
                row, degrees = [0.0] * parts, len(range(parts)[first:last])
                row[first:last] = [parts / degrees] * degrees
                coefficients.append(row)
        signal = _combine(products, coefficients).mul_(n.unsqueeze(-1) * n.unsqueeze(-2))
        matrices = signal.clone()
        matrices.diagonal(dim1=-2, dim2=-1).add_(1)
        if objective.is_pooled:
            log_dets, (factor,) = log_det([matrices], [0], objective.weights)
        else:
            log_dets, factor = _of_blocks(matrices, log_det, objective, [z.shape[-1] for z in views])
        loss = weighted_sum(log_dets, objective.weights)

        # The factors of F_j = w_j A_j^-1 / 2 and of dU_i = 2 U_i dP_i cancel. The loss is the mean over slices; where it
        # is NaN, so is every gradient.
        scaled = torch.add(n if slices == 1 else n / slices, loss, alpha=0)
        through_variance = (factor * signal).sum((0, -1)).mul_(scaled).mul_(n).mul_(noise)
        factor.mul_(scaled.unsqueeze(-1) * n.unsqueeze(-2))
        grad_products = _combine(factor, list(zip(*coefficients, strict=True)))
        grad_products.diagonal(dim1=-2, dim2=-1).sub_(through_variance)
        ctx.save_for_backward(rows, grad_products)
        ctx.is_pooled, ctx.shared, ctx.widths = objective.is_pooled, shared, []
        for z in views:
            ctx.widths.append(z.shape[-1])
        ctx.mark_non_differentiable(log_dets)
        return loss, log_dets

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, grad_products = ctx.saved_tensors
        grad_products = grad_products * grad
        if ctx.shared is not None:
            grad_products = ctx.shared.reduce(grad_products)
        samples, dim = rows.shape[-2:]
        grad_products = grad_products.flatten(0, 1)
        grad_rows = torch.bmm(rows.view(len(grad_products), samples, dim), grad_products).view(rows.shape).unbind()
        if ctx.is_pooled:
            return *(None,) * 5, *gradients_of_views(grad_rows)
        return *(None,) * 5, *grad_rows[0].split(ctx.widths, dim=-1)


def _combine(matrices: Tensor, coefficients: Sequence[Sequence[float]]) -> Tensor:
    """Weighted sums over the first dimension, one for each row of coefficients; zero weights cost nothing."""
    parts = matrices.unbind()
    combined = matrices.new_empty((len(coefficients), *matrices.shape[1:]))
    for out, row in zip(combined.unbind(), coefficients, strict=True):
        is_first = True
        for matrix, weight in zip(parts, row, strict=True):
            if is_first and weight:
                torch.mul(matrix, weight, out=out)
                is_first = False
            elif weight:
                out.add_(matrix, alpha=weight)
    return combined


def _of_blocks(matrices: Tensor, log_det: LogDet, objective: Objective, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log dets (m, S) of the blocks of a joint matrix (1, S, K, K) that the moments take, and the sum of their gradients,
    each in its place.
    """
    ranges = [(sum(widths[:first]), sum(widths[:last])) for first, last in objective.moments]
    blocks = [matrices[..., start:stop, start:stop] for start, stop in ranges]
    log_dets, gradients = log_det(blocks, [0] * len(blocks), objective.weights)
    total = torch.zeros_like(matrices)
    for (start, stop), gradient in zip(ranges, gradients, strict=True):
        total[..., start:stop, start:stop] += gradient
    return log_dets, total


def weighted_sum(log_dets: Tensor, weights: Weights) -> Tensor:
    """Half the weighted sum over the first dimension, mean over the other: log-determinants (m, S) to the loss."""
    scale = 0.5 / log_dets[0].numel()
    total = log_dets[0] * (weights[0] * scale)
    for j in range(1, len(weights)):
        total = total.add(log_dets[j], alpha=weights[j] * scale)
    return total.sum()
