"""Log-determinants of symmetric positive definite matrices, exact and as the paper's truncated series."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmi_loss.ops.autograd import closed_form
from mmi_loss.ops.covariance import scatter


def _cholesky(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and log-determinant. Where LAPACK or cuSOLVER reports failure the log-determinant is NaN: both leave
    finite numbers in the factor, and checking on the host would synchronise.
    """
    # The upper factor is LAPACK's layout of the lower one in row-major storage: it saves the transposition.
    factor, info = torch.linalg.cholesky_ex(matrices, upper=True)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).mul_(2)
    return factor, log_det.masked_fill_(info != 0, float("nan"))


class _CholeskyLogDet(torch.autograd.Function):
    """d log det A = tr(A^-1 dA); the inverse comes from the factor already at hand."""

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> Tensor:
        factor, log_det = _cholesky(matrices)
        # 0 * log_det carries a failed factorisation into the gradient, where a GradScaler looks.
        ctx.save_for_backward(factor, log_det)
        return log_det

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        factor, log_det = ctx.saved_tensors
        scale = grad + 0 * log_det
        return torch.cholesky_inverse(factor, upper=True).mul_(scale[..., None, None])


class _JointLogDets(torch.autograd.Function):
    """log det of both diagonal blocks of J = [[A, X], [X^T, B]] and of J itself.

    The first half of J's Cholesky factor is the factor of A, so only B needs a second factorisation.
    """

    @staticmethod
    def forward(ctx: Any, joint: Tensor) -> Tensor:
        half = joint.shape[-1] // 2
        factor, log_det = _cholesky(joint)
        factor_b, log_det_b = _cholesky(joint[..., half:, half:])
        pivots = factor.diagonal(dim1=-2, dim2=-1)[..., :half]
        # NaN of a failure in the second half must not be hidden in the first: a failed J is a failed loss.
        log_det_a = pivots.log().sum(-1).mul_(2).add_(0 * log_det)
        log_dets = torch.stack([log_det_a, log_det_b, log_det])
        ctx.save_for_backward(factor, factor_b, log_dets)
        return log_dets

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        factor, factor_b, log_dets = ctx.saved_tensors
        half = factor_b.shape[-1]
        scale_a, scale_b, scale = (grad + 0 * log_dets)[..., None, None]
        grad_joint = torch.cholesky_inverse(factor, upper=True).mul_(scale)
        grad_joint[..., :half, :half] += torch.cholesky_inverse(factor[..., :half, :half], upper=True).mul_(scale_a)
        grad_joint[..., half:, half:] += torch.cholesky_inverse(factor_b, upper=True).mul_(scale_b)
        return grad_joint


class _SeriesLogDet(torch.autograd.Function):
    """tr of the truncated series of log: with X = A/c - I,

        f(A, c) = n log c + sum_{m=1}^{p} (-1)^{m+1}/m tr X^m.

    Its derivatives use P(X) = sum_{j<p} (-X)^j, the truncated series of (I + X)^-1:

        df/dA = P(X) / c,
        df/dc = n/c - tr(A P(X)) / c^2 = [n - tr((I + X) P(X))] / c = tr((-X)^p) / c,

    because (I + X) P(X) = I - (-X)^p telescopes.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor, scale: Tensor, order: int) -> Tensor:
        n = matrices.shape[-1]
        x = matrices / scale[..., None, None]
        x.diagonal(dim1=-2, dim2=-1).sub_(1)
        # tr X^{i+j} = <X^i, X^j> for symmetric X: powers up to half the order suffice.
        powers = [x]
        for _ in range((order + 1) // 2 - 1):
            powers.append(powers[-1] @ x)
        traces = [x.diagonal(dim1=-2, dim2=-1).sum(-1)]
        for m in range(2, order + 1):
            traces.append((powers[m // 2 - 1] * powers[m - m // 2 - 1]).sum((-2, -1)))
        value = n * scale.log()
        for m, trace in enumerate(traces, start=1):
            value = value + trace * ((-1) ** (m + 1) / m)
        ctx.save_for_backward(x, scale, traces[-1] * (-1) ** order)
        ctx.order = order
        return value

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, remainder = ctx.saved_tensors
        identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        if ctx.order == 1:
            series = identity.expand_as(x)
        else:  # Horner's scheme: I - X (I - X (I - ...))
            series = identity - x
            for _ in range(ctx.order - 2):
                series = identity - x @ series
        return series * (grad / scale)[..., None, None], grad * remainder / scale, None


def _spectral_scale(matrices: Tensor, beta: float, null_dim: int) -> Tensor:
    """C = (tr A^4)^(1/4) / beta. The norm is at least the largest eigenvalue, so every eigenvalue of A/c lies in
    (0, beta], inside the series' disc of convergence (0, 2) about 1 for beta < 2.
    """
    square = scatter(matrices)
    # Normalised before the fourth power: float32 would overflow from 1e9.
    largest = square.detach().diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1)
    fourth = (square / largest[..., None, None]).square().sum((-2, -1)) + null_dim / largest.square()
    return fourth.pow(0.25) * largest.sqrt() / beta


def log_det(matrices: Tensor) -> Tensor:
    """Exact log det of (..., n, n) by one Cholesky each; NaN where a matrix is not positive definite."""
    result: Tensor = _CholeskyLogDet.apply(matrices)
    return result


def joint_log_dets(joint: Tensor) -> Tensor:
    """(..., 2k, 2k) to (3, ...): log det of the first and the second diagonal block and of the whole."""
    result: Tensor = _JointLogDets.apply(joint)
    return result


def series_log_det(matrices: Tensor, order: int, beta: float, null_dim: int = 0) -> Tensor:
    """The truncated series of log det of (..., n, n), in nats, with ``null_dim`` further eigenvalues equal to 1.

    The paper's eq. 10 names a fourth-order approximation and a rescaling with a parameter beta. Our reading:
    the matrix is divided by a scale that puts its spectrum into (0, beta], 0 < beta < 2, and the scale's log
    is added back. For beta <= 1 all terms left out are negative: the series is an upper bound of log det.
    """
    scale = _spectral_scale(matrices, beta, null_dim)
    value: Tensor = _SeriesLogDet.apply(matrices, scale, order)
    if null_dim:
        x = scale.reciprocal() - 1
        terms = sum((-1) ** (m + 1) / m * x**m for m in range(1, order + 1))
        value = value + null_dim * (scale.log() + terms)
    return value
