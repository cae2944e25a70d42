"""What :mod:`mmi_loss.ops.triton.factor` does, for matrices that no program can hold: by cuSOLVER, or LAPACK."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmi_loss.ops import covariance

Numbers = Sequence[float]


def factorise_moments(moments: Tensor, ridge: float, coefficients: Numbers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), log dets (2, 1), gradient matrices (2, 1, D, D) and diagonals (2, 1, D) of moments (2, 1, D, D)."""
    inverse_std = covariance.inverse_std(moments[0, 0].diagonal())
    row, column = inverse_std[:, None], inverse_std / ridge
    matrices = moments[:, 0] * row * column
    loss, log_dets, inverses = _factorise(list(matrices), coefficients)
    # c (1 - (A^-1)_ii) s_i^2; the inverses have been multiplied by c.
    diagonal = torch.stack([c - x.diagonal() for c, x in zip(coefficients, inverses, strict=True)]) * inverse_std**2
    grad = torch.stack(inverses).mul_(row * column)
    return loss, log_dets, grad[:, None], diagonal[:, None]


def factorise_gram(gram: Tensor, ridge: float, coefficients: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), log dets (2, 1) and G + G^T, with G the gradient of the Gram matrix K (2 N, 2 N).

    T = U^T U / 4N has the spectrum of K / 4N, W = (a - b)^T (a - b) / 2N that of the differences' block / 2N.
    """
    n = len(gram) // 2
    matrices = [gram / (4 * n * ridge), gram[n:, n:] / (2 * n * ridge)]
    loss, log_dets, (grad, grad_within) = _factorise(matrices, coefficients)
    grad.div_(2 * n * ridge)[n:, n:].add_(grad_within, alpha=1 / (n * ridge))
    return loss, log_dets, grad.mT.contiguous()  # symmetric: LAPACK's columns are rows


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
