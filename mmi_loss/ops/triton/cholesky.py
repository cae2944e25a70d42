"""What :mod:`mmi_loss.ops.triton.factor` does, for matrices that no program can hold: by cuSOLVER, or LAPACK."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmi_loss.ops import covariance

Numbers = Sequence[float]


def factorise_moments(
    moments: Tensor, floor: Numbers, coefficients: Numbers
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (), log dets (2, 1), noise (1,), gradient matrices (2, 1, D, D) and diagonals (2, 1, D) of moments
    (2, 1, D, D).
    """
    inverse_std = covariance.inverse_std(moments[0, 0].diagonal())
    noise = _noise(moments[1, 0].diagonal() * inverse_std**2, len(inverse_std), floor)
    row, column = inverse_std[:, None], inverse_std / noise
    matrices = moments[:, 0] * row * column
    loss, log_dets, inverses = _factorise(list(matrices), coefficients)
    # c (1 - (A^-1)_ii) s_i^2; the inverses have been multiplied by c.
    diagonal = torch.stack([c - x.diagonal() for c, x in zip(coefficients, inverses, strict=True)]) * inverse_std**2
    grad = torch.stack(inverses).mul_(row * column)
    return loss, log_dets, noise, grad[:, None], diagonal[:, None]


def factorise_gram(
    gram: Tensor, dim: int, floor: Numbers, coefficients: Numbers
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), log dets (2, 1), noise (1,) and G + G^T, with G the gradient of the Gram matrix K (2 N, 2 N) of ``dim``
    features.

    T = U^T U / 4N has the spectrum of K / 4N, W = (a - b)^T (a - b) / 2N that of the differences' block / 2N.
    """
    n = len(gram) // 2
    within = gram[n:, n:] / (2 * n)
    noise = _noise(within.diagonal(), dim, floor)
    loss, log_dets, (grad, grad_within) = _factorise([gram / (4 * n * noise), within / noise], coefficients)
    grad.div_(2 * n * noise)[n:, n:].add_(grad_within / (n * noise))
    return loss, log_dets, noise, grad.mT.contiguous()  # symmetric: LAPACK's columns are rows


def _noise(squares: Tensor, dim: int, floor: Numbers) -> Tensor:
    """The noise (1,) of :func:`mmi_loss.ops.covariance.noise_of`; ``squares`` add up to the variance within images."""
    return (squares.sum() * (floor[0] / dim)).clamp(min=floor[1])[None]


def _factorise(matrices: Sequence[Tensor], coefficients: Numbers) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of A = I + matrix: the sum of coefficients times log dets, the log dets (2, 1), coefficients times inverses.

    Only lower triangles are read. Where a factorisation fails all is NaN.
    """
    for matrix in matrices:
        matrix.diagonal().add_(1)
    log_dets, inverses = covariance.cholesky([matrix[None] for matrix in matrices], [0, 0], tuple(coefficients))
    total, within = (c * log_det for c, log_det in zip(coefficients, log_dets, strict=True))
    loss = total + within
    return loss, log_dets[:, None], [inverse[0].add_(loss, alpha=0) for inverse in inverses]
