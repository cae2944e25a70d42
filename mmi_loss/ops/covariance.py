"""The covariance route, for at least as many samples as features; and what every route shares: the parts that views are
turned into, the scale that standardises a feature, the exact log-determinant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mmi_loss.objectives import Objective, Weights
from mmi_loss.ops.autograd import closed_form

if TYPE_CHECKING:
    from mmi_loss.options import Options

LogDet = Callable[[Sequence[Tensor], Sequence[int], Weights], tuple[Tensor, list[Tensor]]]
"""From groups of SPD matrices (g, ..., n, n), and how many more eigenvalues of 1 the matrices of each have: the log
dets (sum of g, ...) in nats, and the gradient of their weighted sum with respect to each group, symmetric: new tensors.
"""

Floor = tuple[Any, Any]
"""Two numbers or tensors: :func:`noise_floor`."""
DIRECTIONS, FINEST = 64, 4  # of the noise floor


class Shared(NamedTuple):
    """What is known of a batch that several processes share, without gradient."""

    samples: Tensor  # their number; NaN where it is too small, or the processes disagree on what they compute
    means: Sequence[Tensor]  # of each view over all of them, (S, 1, k) or (1, k)
    reduce: Callable[[Tensor], Tensor]  # the sum over the processes


def contrasts(views: Sequence[Tensor], mean: Tensor | None = None) -> Tensor:
    """The contrasts (V, ..., N, k) of V views (..., N, k), Helmert's orthonormal combinations times sqrt(V): what they
    share, their sum less V times the ``mean`` (..., 1, k), by default that of the samples; and how they differ,

        u_i = c_i [x_{i+1} - (x_1 + ... + x_i) / i],    c_i = sqrt(V i / (i + 1)),    i = 1 .. V - 1.
    """
    num_views, buffer = len(views), None
    out: Sequence[Tensor | None] = [None] * num_views
    if not torch.compiler.is_compiling():
        # In a traced graph, writes into a part of a tensor would pin the batch size; the compiler places them.
        buffer = views[0].new_empty((num_views, *views[0].shape))
        out = buffer.unbind()
    # Relative to any one sample, features keep their digits where the mean is far larger than the deviation.
    shared = torch.sub(views[0], views[0].narrow(-2, 0, 1) if mean is None else mean, out=out[0])
    rows = [shared]
    for i in range(1, num_views):
        row = torch.sub(views[i], views[i - 1], out=out[i])
        if i > 1:
            row = torch.add(row, rows[-1], alpha=1 - 1 / i, out=out[i])
        shared = torch.add(row, shared, alpha=1 + 1 / i, out=out[0])
        rows.append(row)
    for i in range(1, num_views if num_views > 2 else 0):  # for a pair c is 1
        rows[i] = torch.mul(rows[i], math.sqrt(num_views * i / (i + 1)), out=out[i])
    if mean is None:
        shared = torch.sub(shared, shared.sum(-2, keepdim=True), alpha=1 / shared.shape[-2], out=out[0])
    return torch.stack([shared, *rows[1:]]) if buffer is None else buffer


def gradients_of_views(gradients: Sequence[Tensor]) -> list[Tensor]:
    """From the gradients of the contrasts (..., N, k) to those of the views; in eager mode in their memory."""
    views, out = list(gradients), [None] * len(gradients) if torch.compiler.is_compiling() else gradients
    # A view is added in one contrast and subtracted in all after it: from the last to the first.
    for i in range(len(views) - 1, 0, -1):
        c = math.sqrt(len(views) * i / (i + 1))
        views[0] = torch.sub(views[0], views[i], alpha=c / i, out=out[0])
        views[i] = torch.add(views[0], views[i], alpha=c + c / i, out=out[i])
    return views


def side_by_side(views: Sequence[Tensor], means: Sequence[Tensor] | None = None) -> Tensor:
    """The centred views' features beside one another, (1, ..., N, sum of k)."""
    origins = [z.narrow(-2, 0, 1) for z in views] if means is None else means
    rows = torch.cat([z - origin for z, origin in zip(views, origins, strict=True)], dim=-1)[None]
    return rows - rows.mean(-2, keepdim=True) if means is None else rows


UNDERFLOW_POWER = 0.75  # of the smallest normal number, below which a variance has lost digits: 4e-29 in float32
ROUNDINGS = 2  # in units of the mean, by which the samples of a constant feature may differ once it was computed


def inverse_std(variance: Tensor, mean: Tensor | None = None) -> Tensor:
    """1 / sqrt(variance), or 0 for a constant feature, which so takes no part in loss or gradient: its rounding noise
    over its tiny deviation would be a gradient larger than all others'.

    Features as they were given are constant only if they are exactly: their variance is that of differences between
    samples. For features that were computed, pass their ``mean`` (or any one sample): rounding is relative to it. An
    infinite variance, the overflow of a square, gives NaN, where 0 would hide it.
    """
    info = torch.finfo(variance.dtype)
    floor: float | Tensor = info.tiny**UNDERFLOW_POWER
    if mean is not None:
        floor = (mean * (ROUNDINGS * info.eps)).square() + floor
    return (variance.sqrt() / variance).masked_fill(variance <= floor, 0.0)


def noise_floor(options: Options, dim: int, samples: int | Tensor, dtype: torch.dtype) -> Floor:
    """The noise under ``dim`` features in a determinant of a batch, in units of feature variance: our reading.

    It is the larger of the second number and the first times w, the share of the features' variance that differs
    between the views of an image, in the mean over them: ``noise = w dim / min(DIRECTIONS, samples)``.

    What differs between views is noise by definition, and its variance, ``w dim`` in all, is spread evenly over 64
    directions, or over those that so few samples show. As long as an encoder does not know an image again, w is near 1
    and only the strongest 64 directions rise above the noise; later it is small, and as many rise as the data of many
    classes use. A floor that does not move is too fine for the one or too coarse for the other (docs/defaults.md). The
    second number, ``dim / (4 samples)``, is a quarter of what a sample adds to the variance of its own direction: finer
    than that, all is chance. The noise is a constant for the gradient, which would else lower it for its own sake. It
    bounds the exact loss: log(1 + x) <= x, so half of log det(I + M / noise) is at most half of tr M / noise, 32 / w
    nats, and never more than ``2 samples``.

    With ``snr`` given, and where views are not pooled, so that nothing says what differs, all variance takes the place
    of w: ``noise = dim / min(snr, samples)``. ``samples`` in a tensor gives a tensor: reading it would wait for the
    device.
    """
    # Rounding perturbs the spectrum of a dim x dim correlation matrix by about dim * eps; a floor below that would make
    # singular matrices indefinite.
    least = 8 * dim * torch.finfo(dtype).eps
    if options.ridge is not None:
        return 0.0, max(options.ridge, least)
    snr = options.snr or DIRECTIONS
    factor: float | Tensor = 0.0
    noise: float | Tensor = dim / (samples.clamp(max=snr) if isinstance(samples, Tensor) else min(snr, samples))
    if options.snr is None and options.row.is_pooled:
        factor, noise = noise, dim / samples / FINEST
    return factor, noise.clamp(min=least) if isinstance(noise, Tensor) else max(noise, least)


def noise_of(floor: Floor, squares: Tensor, inverse_std: Tensor, samples: int | Tensor) -> Tensor:
    """The noise (..., 1) by a floor, from the sums of squares (V, ..., k) of the contrasts: the larger of its second
    number and its first times the share of a feature's variance that differs between views, mean over the features.
    """
    factor, least = floor
    parts = len(squares)
    if parts == 1:
        return torch.as_tensor(least, dtype=squares.dtype, device=squares.device)
    share = (squares[1:].sum(0) * inverse_std.square()).mean(-1, keepdim=True)
    return share.mul_(factor / (parts * (parts - 1) * samples)).clamp_(min=least)


def cholesky(groups: Sequence[Tensor], null_dims: Sequence[int], weights: Weights) -> tuple[Tensor, list[Tensor]]:
    """Exact log dets, a :data:`LogDet`, by one factorisation each. d log det A = tr(A^-1 dA). Where it fails they are
    NaN, where a GradScaler looks: checking on the host would wait, and both LAPACK and cuSOLVER leave finite numbers.
    """
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


def weighted_sum(log_dets: Tensor, weights: Weights) -> Tensor:
    """Log-determinants (m, ...) to the loss: half the weighted sum over the first dimension, mean over the other."""
    scale = 0.5 / log_dets[0].numel()
    total = log_dets[0] * (weights[0] * scale)
    for j in range(1, len(weights)):
        total = total.add(log_dets[j], alpha=weights[j] * scale)
    return total.sum()


class CovarianceLoss(torch.autograd.Function):
    """Loss (a scalar, in nats), the constant log-determinants (m, S) it is made of, and the noise, of views (S, N, k),
    or (N, k).

    ``floor`` is what :func:`noise_of` takes; of views side by side its second number may be (K,), one for every
    feature. The noise is a constant for the gradient. ``is_computed``: features were not given as they are, but
    projected. With ``*`` elementwise and U_i the parts,

        L = 1/2 sum_j w_j log det A_j, averaged over slices,    A_j = I + n n^T * M_j,    n = 1 / (std V sqrt(N noise)),
        M_j = V / V_j sum_{i in j} P_i,    P_i = U_i^T U_i.

    Pooled views have V parts, their contrasts, which are sqrt(V) times orthonormal; j takes V_j of them, and the
    variance is that of all, sum_i diag(P_i) / (V^2 N). Other views are one part, side by side (V = 1), and A_j a block.

    Backward, with F_j = dL/dA_j = w_j A_j^-1 / 2 symmetric:

        dP_i = V sum_{j with i} (F_j * n n^T) / V_j  -  diag(n^2 noise sum_j (F_j (A_j - I))_dd),

    the second term through the variances: ds = -s^3 dvar / 2 for s = 1 / std, so dL/dvar_d = -s_d^2 sum_j (F_j (A_j -
    I))_dd; dU_i = 2 U_i dP_i; and from parts back to views. The means are constants: moments about them are stationary.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        # Unpacked here: as parameters, exactly two views make torch.compile under no_grad take them for another form.
        objective, floor, log_det, shared, is_computed, *views = arguments
        if objective.is_pooled:
            mean = None if shared is None else sum(shared.means[1:], shared.means[0]) / len(views)
            rows = contrasts(views, mean)
            location = views[0] if mean is None else mean
        else:
            rows = side_by_side(views, None if shared is None else shared.means)
            samples_of_each = views if shared is None else shared.means
            location = torch.cat([z[..., :1, :] for z in samples_of_each], dim=-1)
        parts, samples, dim = len(rows), rows.shape[-2], rows.shape[-1]
        slices = 1 if rows.ndim == 3 else rows.shape[1]
        flat = rows.view(parts * slices, samples, dim)
        products = torch.bmm(flat.mT, flat).view(parts, slices, dim, dim)
        count: int | Tensor = samples
        if shared is not None:
            products, count = shared.reduce(products), shared.samples
        squares = products.diagonal(dim1=-2, dim2=-1)
        variance = squares.sum(0).div_(parts**2 * count)
        is_rounded = is_computed or shared is not None
        n = inverse_std(variance, location.select(-2, 0) if is_rounded else None)
        noise = noise_of(floor, squares, n, count)
        n = n.mul_((parts**2 * count * noise) ** -0.5)
        coefficients = []
        for first, last in objective.moments if objective.is_pooled else [(0, 1)]:
            row = [0.0] * parts
            degrees = len(row[first:last])
            row[first:last] = [parts / degrees] * degrees
            coefficients.append(row)
        scales = n.unsqueeze(-1) * n.unsqueeze(-2)
        signal = _combine(products, coefficients).mul_(scales)
        matrices = signal.clone()
        matrices.diagonal(dim1=-2, dim2=-1).add_(1)
        weights = objective.weights
        if objective.is_pooled:
            log_dets, (factor,) = log_det([matrices], [0], weights)
        else:
            log_dets, factor = _of_blocks(matrices, log_det, objective, [z.shape[-1] for z in views])
        loss = weighted_sum(log_dets, weights)

        # The factors of F_j = w_j A_j^-1 / 2 and of dU_i = 2 U_i dP_i cancel. Where the loss is NaN, so is the diagonal
        # and by it every gradient.
        through_variance = (factor * signal).sum((0, -1)).mul_(n.square()).mul_(noise).add_(loss, alpha=0)
        factor.mul_(scales)
        grad_products = _combine(factor, list(zip(*coefficients, strict=True)))
        grad_products.diagonal(dim1=-2, dim2=-1).sub_(through_variance)
        ctx.save_for_backward(rows, grad_products)
        ctx.shared, ctx.widths = shared, None if objective.is_pooled else [z.shape[-1] for z in views]
        ctx.mark_non_differentiable(log_dets, noise)
        return loss, log_dets, noise

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        rows, grad_products = ctx.saved_tensors
        grad_products = grad_products * (grad / grad_products.shape[1])  # the loss is the mean over slices
        if ctx.shared is not None:
            grad_products = ctx.shared.reduce(grad_products)
        samples, dim = rows.shape[-2:]
        grad_products = grad_products.flatten(0, 1)
        grad_rows = torch.bmm(rows.view(len(grad_products), samples, dim), grad_products).view(rows.shape).unbind()
        of_views = grad_rows[0].split(ctx.widths, dim=-1) if ctx.widths else gradients_of_views(grad_rows)
        return *(None,) * 5, *of_views


def _combine(matrices: Tensor, coefficients: Sequence[Sequence[float]]) -> Tensor:
    """Weighted sums over the first dimension, one for each row of coefficients; zero weights cost nothing."""
    parts, sums, buffer = matrices.unbind(), [], None
    if not torch.compiler.is_compiling():
        buffer = matrices.new_empty((len(coefficients), *matrices.shape[1:]))
    for j, row in enumerate(coefficients):
        out = None if buffer is None else buffer[j]
        (total, weight), *others = [(part, weight) for part, weight in zip(parts, row, strict=True) if weight]
        if weight != 1 or not others:
            total = torch.mul(total, weight, out=out)
        for part, weight in others:
            total = torch.add(total, part, alpha=weight, out=out)
        sums.append(total)
    return torch.stack(sums) if buffer is None else buffer


def _of_blocks(matrices: Tensor, log_det: LogDet, objective: Objective, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log dets (m, S) of the blocks of (1, S, K, K) that the moments take; their gradients' sum, each in its place."""
    ranges = [(sum(widths[:first]), sum(widths[:last])) for first, last in objective.moments]
    blocks = [matrices[..., start:stop, start:stop] for start, stop in ranges]
    log_dets, gradients = log_det(blocks, [0] * len(blocks), objective.weights)
    total = torch.zeros_like(matrices)
    for (start, stop), gradient in zip(ranges, gradients, strict=True):
        total[..., start:stop, start:stop] += gradient
    return log_dets, total
