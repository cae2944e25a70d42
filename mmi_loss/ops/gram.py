"""Gram matrices of standardised features: the Gram route, for fewer samples than features.

log det(I_D + X^T X / ridge) = log det(I_N + X X^T / ridge), so no D x D matrix is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmi_loss.ops.autograd import closed_form
from mmi_loss.ops.covariance import variance_floor


def helmert(size: int) -> list[list[float]]:
    """The orthonormal Helmert matrix: first row the (scaled) sum, the others contrasts. size=2: sum and difference."""
    rows = [[size**-0.5] * size]
    for j in range(1, size):
        norm = (j * (j + 1)) ** -0.5
        rows.append([norm] * j + [-j * norm] + [0.0] * (size - j - 1))
    return rows


class _StandardisedGram(torch.autograd.Function):
    """K = U U^T, where U stacks the Helmert contrasts u_j = sum_v H_jv (z_v - mean) / std of V views.

    H is orthonormal, so K holds every second moment of the views; contrasts j >= 1 are free of the mean, and
    their block is accurate even where the views nearly agree.

    Backward. dU = (G + G^T) U. With v_i = sum_n u_ni^2 / (N V) the pooled variance and U = U0 / sqrt(v), the chain
    rule through the variance gives dU0 = (dU - U t) / std, t_i = sum_n dU_ni U_ni / (N V). Then dz_v =
    sum_j H_jv du0_j. The mean enters u_0 alone, whose gradient is therefore centred. (For functions of the spectrum, as
    all that is taken here, it is centred already but for rounding; where the mean is far larger than the deviation,
    that rounding is the largest error.)
    """

    @staticmethod
    def forward(ctx: Any, *views: Tensor) -> Tensor:
        num_views, (n, dim) = len(views), views[0].shape
        mean = views[0].mean(0)
        for view in views[1:]:
            mean = mean + view.mean(0)
        mean /= num_views
        rows = views[0].new_empty((num_views * n, dim))
        for j, weights in enumerate(helmert(num_views)):
            contrast = rows[j * n : (j + 1) * n]
            torch.mul(views[0], weights[0], out=contrast)
            for view, weight in zip(views[1:], weights[1:], strict=True):
                if weight:
                    contrast.add_(view, alpha=weight)
        rows[:n].sub_(mean * num_views**0.5)
        variance = torch.linalg.vector_norm(rows, dim=0).square_().div_(num_views * n)
        inverse_std = variance.add_(variance_floor(mean)).rsqrt_()
        rows *= inverse_std
        ctx.save_for_backward(rows, inverse_std)
        ctx.num_views = num_views
        return _symmetric_product(rows, n)

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, inverse_std = ctx.saved_tensors
        num_views = ctx.num_views
        n = rows.shape[0] // num_views
        grad_rows = (grad + grad.mT) @ rows
        shrink = torch.linalg.vecdot(grad_rows, rows, dim=0).div_(-num_views * n)
        grad_rows.addcmul_(rows, shrink).mul_(inverse_std)
        grad_rows[:n] -= grad_rows[:n].mean(0)
        contrasts = grad_rows.split(n)
        grads: list[Tensor | None] = []
        for v, needed in enumerate(ctx.needs_input_grad):
            if not needed:
                grads.append(None)
                continue
            weights = [row[v] for row in helmert(num_views)]
            grad_view = contrasts[0] * weights[0]
            for contrast, weight in zip(contrasts[1:], weights[1:], strict=True):
                if weight:
                    grad_view.add_(contrast, alpha=weight)
            grads.append(grad_view)
        return tuple(grads)


def _symmetric_product(rows: Tensor, n: int) -> Tensor:
    """X X^T by blocks of n rows, those below the diagonal mirrored instead of multiplied."""
    first, rest = rows[:n], rows[n:]
    if not len(rest):
        return first @ first.mT
    top = first @ rows.mT
    bottom = torch.cat([top[:, n:].mT, _symmetric_product(rest, n)], dim=1)
    return torch.cat([top, bottom])


class _IdentityPlus(torch.autograd.Function):
    """I + c K, in one pass."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        result = matrix * scale
        result.diagonal(dim1=-2, dim2=-1).add_(1)
        return result

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def identity_plus(matrix: Tensor, scale: float) -> Tensor:
    """I + scale * matrix for (..., n, n)."""
    result: Tensor = _IdentityPlus.apply(matrix, scale)
    return result


def standardised_gram(views: Sequence[Tensor]) -> Tensor:
    """V views (N, D) to the (V N, V N) Gram matrix of their standardised Helmert contrasts.

    Mean and variance of a feature are pooled over the views. For one view it is the plain Gram matrix.
    """
    result: Tensor = _StandardisedGram.apply(*views)
    return result
