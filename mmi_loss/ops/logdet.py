"""Log-determinants of symmetric positive definite matrices, exact and as the paper's truncated series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mmi_loss.ops.autograd import closed_form

Groups = Sequence[Tensor]
Weights = Sequence[float | Tensor]


class LogDet(Protocol):
    """Log-determinants of groups of SPD matrices (g, ..., n, n), with their derivatives in closed form."""

    def value(self, groups: Groups, null_dims: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Log dets (sum of g, ...) in nats, each with ``null_dims`` more eigenvalues equal to 1, and what the
        derivatives need.
        """

    def gradients(self, weights: Weights, *state: Tensor) -> list[Tensor]:
        """The gradient of the sum of weights times log dets with respect to each matrix, symmetric: new tensors.

        A weight is a number or has the shape (...) of a log det.
        """


class Cholesky(LogDet):
    """Exact, by one factorisation each. d log det A = tr(A^-1 dA).

    Where the factorisation fails, the log-determinant and the gradient are NaN, where a GradScaler looks: checking on
    the host would synchronise, and both LAPACK and cuSOLVER leave finite numbers.
    """

    def value(self, groups: Groups, null_dims: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The state is the factors."""
        factors = [_factor(matrices) for matrices in groups]
        log_dets = [_log_det(factor) for factor in factors]
        return torch.cat(log_dets) if len(log_dets) > 1 else log_dets[0], tuple(factors)

    def gradients(self, weights: Weights, *state: Tensor) -> list[Tensor]:
        """The inverses come from the factors already at hand."""
        inverses = [_inverse(factor) for factor in state]
        _scale(inverses, weights)
        return inverses


LAPACK_SIZE = 256
"""Above it LAPACK's inverse of a factored matrix is faster than a triangular solve and a product."""


def _factor(matrices: Tensor) -> Tensor:
    """Lower Cholesky factors, with a NaN diagonal where the factorisation failed."""
    factor, info = torch.linalg.cholesky_ex(matrices)
    factor.diagonal(dim1=-2, dim2=-1).masked_fill_((info != 0)[..., None], float("nan"))
    return factor


def _log_det(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).mul_(2)


def _inverse(factor: Tensor) -> Tensor:
    """A^-1 = L^-T L^-1."""
    size = factor.shape[-1]
    if size > LAPACK_SIZE:
        return torch.cholesky_inverse(factor)
    identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
    inverse_factor = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    return inverse_factor.mT @ inverse_factor


@dataclass(frozen=True)
class Series(LogDet):
    """The truncated series about one scale c common to all matrices: with X_j = A_j / c - I,

        f_j = n_j log c + sum_{m=1}^{p} (-1)^{m+1}/m tr X_j^m,    c = max_j t_j^{1/4} / beta,    t_j = tr A_j^4.

    (The paper's eq. 10 names a fourth-order approximation and a rescaling with a parameter beta; the scale is our
    reading.) The norm is at least the largest eigenvalue and at most n^{1/4} times that, so every eigenvalue of A/c
    lies in (0, beta]; the series about 1 converges in (0, 2).

    Why the scale is common: in mutual information, sum_j w_j log det A_j, the dimensions add up to zero, so n_j log c
    cancels. With a scale for each matrix it does not: then for even p df/dc = tr X^p / c grows to n/c while a small
    eigenvalue earns p/c at most, and the largest log det is that of a collapsed code.

    The derivatives use P(X) = sum_{i<p} (-X)^i, the truncated series of (I + X)^-1, and r_j = tr (-X_j)^p:

        df_j/dA_j = P(X_j) / c at constant c,
        df_j/dc = n_j/c - tr(A_j P(X_j)) / c^2 = [n_j - tr((I + X_j) P(X_j))] / c = r_j / c,
        dc/dA = c A^3 / t = (I + X)^3 / beta^4 for the largest matrix,

    because (I + X) P(X) = I - (-X)^p telescopes, and t = (beta c)^4.

    The information is a lower bound of the exact one, as the remainder r(x) = log(1+x) - f(x) shows:

    * content, [log det T - log det W]/2 with T >= W (as for covariances; samples deviate by chance correlations):
      where the slope of r is positive: for even p everywhere, so at any beta; for odd p at beta <= 1.
    * joint and exchangeable, whose blocks are a pinching of the whole: where r is concave: at beta <= 1, for odd p at
      any beta. For even p it is never negative, f being concave.

    How far below: on embeddings of two tasks after 100 steps (``benchmarks ablate --only series-values``), order 4
    holds .64 and .72 of the exact content information (k = 128) at beta 1, .78 and .83 at beta 1.5, and .19 and .30 of
    the joint one (k = 32) at beta 1. None of 756 claimed bounds was violated there, nor any other.
    """

    order: int
    beta: float

    def value(self, groups: Groups, null_dims: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The square of A serves the scale and the series: at order 4 it is the only product of matrices."""
        squares = [matrices @ matrices for matrices in groups]
        norms = _fourth_power_norms(squares, null_dims)
        largest = norms.amax(0)
        inverse = self.beta / largest
        is_largest = (norms == largest).to(norms.dtype)
        powers, values, remainders = [], [], []
        for matrices, square, null_dim in zip(groups, squares, null_dims, strict=True):
            x = matrices * inverse[..., None, None]
            x.diagonal(dim1=-2, dim2=-1).sub_(1)
            # X^2 = (A/c)^2 - 2 X - I
            x_square = square.mul_(inverse.square()[..., None, None]).sub_(x, alpha=2)
            x_square.diagonal(dim1=-2, dim2=-1).sub_(1)
            value = -(x.shape[-1] + null_dim) * inverse.log()
            traces = [trace + null_dim * (inverse - 1) ** m for m, trace in _traces(x, x_square, self.order)]
            for m, trace in enumerate(traces, start=1):
                value = value + trace * ((-1) ** (m + 1) / m)
            values.append(value)
            remainders.append(traces[-1] * (-1) ** self.order)
            powers += [x, x_square]
        return torch.cat(values), (inverse, is_largest / is_largest.sum(0), torch.cat(remainders), *powers)

    def gradients(self, weights: Weights, *state: Tensor) -> list[Tensor]:
        """P grows by P_{p+2} = I - X + X^2 P_p: at order 4 one more product of matrices, and one for the scale."""
        inverse, is_largest, remainders, *powers = state
        pairs = list(zip(powers[::2], powers[1::2], strict=True))
        # All log dets share the scale, and the largest matrix sets it.
        total = torch.stack([r * w for w, r in zip(weights, remainders.unbind(), strict=True)]).sum(0)
        through_scale = total * is_largest / self.beta**4
        grads = [_inverse_series(x, x_square, self.order) for x, x_square in pairs]
        _scale(grads, weights)
        for grad, (x, x_square), share in zip(grads, pairs, through_scale.split([len(g) for g in grads]), strict=True):
            # (I + X)^3 = I + 3 X + 3 X^2 + X^3
            cube = (x @ x_square).add_(x, alpha=3).add_(x_square, alpha=3)
            cube.diagonal(dim1=-2, dim2=-1).add_(1)
            grad.add_(cube.mul_(share[..., None, None])).mul_(inverse[..., None, None])
        return grads


def _scale(grads: Groups, weights: Weights) -> None:
    """Multiply the matrices of all groups by their weights, in place."""
    matrices = [matrix for group in grads for matrix in group.unbind()]
    for matrix, weight in zip(matrices, weights, strict=True):
        if isinstance(weight, Tensor):
            matrix.mul_(weight[..., None, None])
        elif weight != 1:
            matrix.mul_(weight)


def _fourth_power_norms(squares: Groups, null_dims: Sequence[int]) -> Tensor:
    """(tr A^4)^{1/4} of every matrix, (sum of g, ...), from the squares A^2 of groups (g, ..., n, n)."""
    # Normalised before the fourth power: float32 would overflow from 1e9.
    diagonals = [square.diagonal(dim1=-2, dim2=-1).amax((0, -1)) for square in squares]
    largest = torch.stack(diagonals).amax(0).clamp(min=1)
    fourth = [
        (square / largest[..., None, None]).square().sum((-2, -1)) + null_dim / largest.square()
        for square, null_dim in zip(squares, null_dims, strict=True)
    ]
    return torch.cat(fourth).pow(0.25) * largest.sqrt()


def _traces(x: Tensor, x_square: Tensor, order: int) -> list[tuple[int, Tensor]]:
    """(m, tr X^m) for m up to the order."""
    traces = [matrix.diagonal(dim1=-2, dim2=-1).sum(-1) for matrix in (x, x_square)][:order]
    # tr X^{i+j} = <X^i, X^j> for symmetric X: powers up to half the order suffice.
    powers = [x, x_square]
    for m in range(3, order + 1):
        if len(powers) < (m + 1) // 2:
            powers.append(powers[-1] @ x)
        traces.append((powers[m // 2 - 1] * powers[m - m // 2 - 1]).sum((-2, -1)))
    return list(enumerate(traces, start=1))


def _inverse_series(x: Tensor, x_square: Tensor, order: int) -> Tensor:
    """P_p(X) = sum_{i<p} (-X)^i, a new tensor."""
    linear = -x
    linear.diagonal(dim1=-2, dim2=-1).add_(1)
    if order == 1:
        return torch.zeros_like(x) + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    series = linear if order % 2 == 0 else linear + x_square
    for _ in range(3 + order % 2, order, 2):
        series = torch.baddbmm(linear, x_square, series) if x.ndim == 3 else linear + x_square @ series
    return series


class _LogDets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_det: LogDet, null_dims: Sequence[int], *groups: Tensor) -> Tensor:
        value, state = log_det.value(groups, null_dims)
        ctx.save_for_backward(*state)
        ctx.log_det = log_det
        return value

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.log_det.gradients(grad.unbind(), *ctx.saved_tensors)


class _JointLogDets(torch.autograd.Function):
    """Exact log det of both diagonal blocks of J = [[A, X], [X^T, B]] and of J itself.

    The first half of J's factor is that of A, so only B needs a second factorisation.
    """

    @staticmethod
    def forward(ctx: Any, joint: Tensor) -> Tensor:
        half = joint.shape[-1] // 2
        factor, factor_b = _factor(joint), _factor(joint[..., half:, half:])
        ctx.save_for_backward(factor, factor_b)
        return torch.stack([_log_det(factor[..., :half, :half]), _log_det(factor_b), _log_det(factor)])

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        factor, factor_b = ctx.saved_tensors
        half = factor_b.shape[-1]
        scale_a, scale_b, scale = grad[..., None, None]
        grad_joint = _inverse(factor).mul_(scale)
        grad_joint[..., :half, :half] += _inverse(factor[..., :half, :half]).mul_(scale_a)
        grad_joint[..., half:, half:] += _inverse(factor_b).mul_(scale_b)
        return grad_joint


def log_dets(groups: Groups, method: LogDet, null_dims: Sequence[int] | None = None) -> Tensor:
    """Log dets (sum of g, ...), in nats, of groups (g, ..., n, n), each matrix with ``null_dims`` further eigenvalues
    equal to 1.
    """
    result: Tensor = _LogDets.apply(method, null_dims or [0] * len(groups), *groups)
    return result


def joint_log_dets(joint: Tensor) -> Tensor:
    """(..., 2k, 2k) to (3, ...): exact log det of the first and the second diagonal block and of the whole."""
    result: Tensor = _JointLogDets.apply(joint)
    return result


def weighted_sum(log_dets: Tensor, weights: Sequence[float]) -> Tensor:
    """Half the weighted sum over the first dimension, mean over the others: log-determinants to the loss."""
    first, *others = log_dets.unbind()
    total = first * (weights[0] / 2)
    for log_det, weight in zip(others, weights[1:], strict=True):
        total = total.add(log_det, alpha=weight / 2)
    return total.mean() if total.ndim else total
