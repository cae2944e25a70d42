"""Log-determinants of symmetric positive definite matrices, exact and as the paper's truncated series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mmi_loss.ops.autograd import closed_form


class LogDet(Protocol):
    """A log-determinant with its closed-form derivative, for matrices (..., n, n), symmetric positive definite."""

    def value(self, matrices: Tensor, null_dim: int = 0) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Log det (...) in nats, with ``null_dim`` more eigenvalues equal to 1, and what the derivative needs."""

    def derivative(self, *state: Tensor) -> Tensor:
        """The gradient of log det A with respect to A, symmetric, (..., n, n): a new tensor."""


class Cholesky(LogDet):
    """Exact; NaN where a matrix is not positive definite. d log det A = tr(A^-1 dA), A^-1 = L^-T L^-1."""

    def value(self, matrices: Tensor, null_dim: int = 0) -> tuple[Tensor, tuple[Tensor, ...]]:
        """L^-1 holds the log-determinant on its diagonal, and all that the derivative needs."""
        inverse_factor = _inverse_factor(matrices)
        return inverse_factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).mul_(-2), (inverse_factor,)

    def derivative(self, *state: Tensor) -> Tensor:
        """A failed factorisation is NaN here too, where a GradScaler looks."""
        (inverse_factor,) = state
        return inverse_factor.mT @ inverse_factor


LAPACK_SIZE = 64


def _inverse_factor(matrices: Tensor) -> Tensor:
    """L^-1 of A = L L^T, by halves: with A = [[P, Q^T], [Q, R]], M = Q L_P^-T and L_S that of the Schur complement
    R - M M^T,

        L^-1 = [[L_P^-1, 0], [-L_S^-1 M L_P^-1, L_S^-1]].

    Matrix products of all matrices at once replace most of LAPACK's factorisations of one after the other, a tenth as
    fast at these sizes. Where the factorisation fails, the diagonal of L^-1 is NaN: checking on the host would
    synchronise, and both LAPACK and cuSOLVER leave finite numbers.
    """
    size = matrices.shape[-1]
    if size <= LAPACK_SIZE:
        factor, info = torch.linalg.cholesky_ex(matrices)
        factor.diagonal(dim1=-2, dim2=-1).masked_fill_((info != 0)[..., None], float("nan"))
        identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    half = (size + 1) // 2
    first = _inverse_factor(matrices[..., :half, :half])
    mixed = matrices[..., half:, :half] @ first.mT
    last = _inverse_factor(matrices[..., half:, half:] - mixed @ mixed.mT)
    inverse_factor = torch.zeros_like(matrices)
    inverse_factor[..., :half, :half] = first
    inverse_factor[..., half:, half:] = last
    torch.neg(last @ (mixed @ first), out=inverse_factor[..., half:, :half])
    return inverse_factor


@dataclass(frozen=True)
class Series(LogDet):
    """The truncated series of log, rescaled: with X = A/c - I and c = (tr A^4)^(1/4) / beta,

        f(A) = n log c + sum_{m=1}^{p} (-1)^{m+1}/m tr X^m.

    The norm is at least the largest eigenvalue, so every eigenvalue of A/c lies in (0, beta], inside the series' disc
    of convergence (0, 2) about 1 for beta < 2. For beta <= 1 all terms left out are negative: an upper bound of
    log det. (The paper's eq. 10 names a fourth-order approximation and a rescaling with a parameter beta; this is our
    reading.)

    The derivatives use P(X) = sum_{j<p} (-X)^j, the truncated series of (I + X)^-1:

        df/dA = P(X) / c at constant c,
        df/dc = n/c - tr(A P(X)) / c^2 = [n - tr((I + X) P(X))] / c = tr((-X)^p) / c = r / c,

    because (I + X) P(X) = I - (-X)^p telescopes, and with t = tr A^4, dc/dA = c A^3 / t, so that

        df/dA = P(X) / c + r A^3 / t.
    """

    order: int
    beta: float

    def value(self, matrices: Tensor, null_dim: int = 0) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As the class says; the state is A, A^2, X, c and r / t."""
        square = matrices @ matrices
        # Normalised before the fourth power: float32 would overflow from 1e9.
        largest = square.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1)
        fourth = (square / largest[..., None, None]).square().sum((-2, -1)) + null_dim / largest.square()
        scale = fourth.pow(0.25) * largest.sqrt() / self.beta
        x = matrices / scale[..., None, None]
        x.diagonal(dim1=-2, dim2=-1).sub_(1)
        # tr X^{i+j} = <X^i, X^j> for symmetric X: powers up to half the order suffice.
        powers = [x]
        for _ in range((self.order + 1) // 2 - 1):
            powers.append(powers[-1] @ x)
        traces = [x.diagonal(dim1=-2, dim2=-1).sum(-1)]
        for m in range(2, self.order + 1):
            traces.append((powers[m // 2 - 1] * powers[m - m // 2 - 1]).sum((-2, -1)))
        null = scale.reciprocal() - 1
        value = (matrices.shape[-1] + null_dim) * scale.log()
        for m, trace in enumerate(traces, start=1):
            value = value + (trace + null_dim * null**m) * ((-1) ** (m + 1) / m)
        remainder = (traces[-1] + null_dim * null**self.order) * (-1) ** self.order
        return value, (matrices, square, x, scale, remainder / (fourth * largest.square()))

    def derivative(self, *state: Tensor) -> Tensor:
        """Five products at order four: two of the value, two of Horner's scheme, and A^3."""
        matrices, square, x, scale, cubic = state
        # Horner's scheme: I - X (I - X (I - ...))
        series = torch.zeros_like(x)
        for j in range(self.order):
            series = x @ series.neg_() if j > 1 else -x if j else series
            series.diagonal(dim1=-2, dim2=-1).add_(1)
        return series.div_(scale[..., None, None]).add_((matrices @ square).mul_(cubic[..., None, None]))


class _LogDet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrices: Tensor, log_det: LogDet, null_dim: int) -> Tensor:
        value, state = log_det.value(matrices, null_dim)
        ctx.save_for_backward(*state)
        ctx.log_det = log_det
        return value

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.log_det.derivative(*ctx.saved_tensors).mul_(grad[..., None, None]), None, None


class _JointLogDets(torch.autograd.Function):
    """Exact log det of both diagonal blocks of J = [[A, X], [X^T, B]] and of J itself.

    The first half of J's inverse factor is that of A, so only B needs a second factorisation.
    """

    @staticmethod
    def forward(ctx: Any, joint: Tensor) -> Tensor:
        half = joint.shape[-1] // 2
        factor = _inverse_factor(joint)
        factor_b = _inverse_factor(joint[..., half:, half:])
        pivots = factor.diagonal(dim1=-2, dim2=-1).log()
        log_det_b = factor_b.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        ctx.save_for_backward(factor, factor_b)
        return torch.stack([pivots[..., :half].sum(-1), log_det_b, pivots.sum(-1)]).mul_(-2)

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        factor, factor_b = ctx.saved_tensors
        half = factor_b.shape[-1]
        scale_a, scale_b, scale = grad[..., None, None]
        factor_a = factor[..., :half, :half]
        grad_joint = (factor.mT @ factor).mul_(scale)
        grad_joint[..., :half, :half] += (factor_a.mT @ factor_a).mul_(scale_a)
        grad_joint[..., half:, half:] += (factor_b.mT @ factor_b).mul_(scale_b)
        return grad_joint


def log_det(matrices: Tensor, method: LogDet, null_dim: int = 0) -> Tensor:
    """Log det (...), in nats, of (..., n, n) with ``null_dim`` further eigenvalues equal to 1."""
    result: Tensor = _LogDet.apply(matrices, method, null_dim)
    return result


def joint_log_dets(joint: Tensor) -> Tensor:
    """(..., 2k, 2k) to (3, ...): exact log det of the first and the second diagonal block and of the whole."""
    result: Tensor = _JointLogDets.apply(joint)
    return result


def weighted_sum(log_dets: Tensor, weights: Sequence[float]) -> Tensor:
    """Half the weighted sum over the first dimension: log-determinants to the loss."""
    terms = [log_det * (weight / 2) for log_det, weight in zip(log_dets.unbind(), weights, strict=True)]
    return sum(terms[1:], start=terms[0])
