"""The paper's truncated series of the log-determinant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmi_loss.objectives import Weights
from mmi_loss.ops.covariance import weighted


@dataclass(frozen=True)
class Series:
    """The truncated series about one scale c common to all matrices: with X_j = A_j / c - I,

        f_j = n_j log c + sum_{m=1}^{p} (-1)^{m+1}/m tr X_j^m,    c = max_j t_j^{1/4} / beta,    t_j = tr A_j^4.

    (The paper's eq. 10 names a fourth-order approximation and a rescaling with a parameter beta; the scale is our
    reading.) The norm is at least the largest eigenvalue, so every eigenvalue of A/c lies in (0, beta]; the series
    about 1 converges in (0, 2). The scale is common because in sum_j w_j log det A_j the dimensions add up to zero, so
    n_j log c cancels; with a scale for each matrix it does not, and the largest log det is that of a collapsed code.

    The derivatives use P(X) = sum_{i<p} (-X)^i, the truncated series of (I + X)^-1, and r_j = tr (-X_j)^p:

        df_j/dA_j = P(X_j) / c at constant c,    dc/dA = c A^3 / t = (I + X)^3 / beta^4 for the largest matrix,
        df_j/dc = n_j/c - tr(A_j P(X_j)) / c^2 = [n_j - tr((I + X_j) P(X_j))] / c = r_j / c,

    because (I + X) P(X) = I - (-X)^p telescopes, and t = (beta c)^4. The information is a lower bound of the exact one
    for every objective and order at beta <= 1, for content and even p at any beta (tests/test_theorems.py).
    """

    order: int
    beta: float

    def __call__(
        self, groups: Sequence[Tensor], null_dims: Sequence[int], weights: Weights
    ) -> tuple[Tensor, list[Tensor]]:
        """The square of A serves the scale and the series: at order 4 it is the only product of matrices for the value.
        P grows by P_{p+2} = I - X + X^2 P_p: at order 4 one more product, and one for the scale.
        """
        squares = [matrices @ matrices for matrices in groups]
        norms = _fourth_power_norms(squares, null_dims)
        largest = norms.amax(0)
        inverse = self.beta / largest
        values, remainders, powers = [], [], []
        for matrices, square, null_dim in zip(groups, squares, null_dims, strict=True):
            identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
            x = matrices * inverse[..., None, None] - identity
            x_square = (square * inverse.square()[..., None, None]).sub_(x, alpha=2) - identity  # (A/c)^2 - 2 X - I
            value = -(x.shape[-1] + null_dim) * inverse.log()
            for m, trace in enumerate(_traces(x, x_square, self.order), 1):
                trace = trace + null_dim * (inverse - 1) ** m
                value = value + trace * ((-1) ** (m + 1) / m)
            values.append(value)
            remainders.append(trace * (-1) ** self.order)
            powers.append((x, x_square, identity))
        # All log dets share the scale, and the largest matrix sets it.
        total = torch.stack([r * w for w, r in zip(weights, torch.cat(remainders).unbind(), strict=True)]).sum(0)
        is_largest = (norms == largest).to(norms.dtype)
        through_scale = total * is_largest / is_largest.sum(0) / self.beta**4
        gradients = weighted([_inverse_series(*power, self.order) for power in powers], weights)
        shares = through_scale.split([len(gradient) for gradient in gradients])
        for i, ((x, x_square, identity), share) in enumerate(zip(powers, shares, strict=True)):
            cube = (x @ x_square).add_(x, alpha=3).add_(x_square, alpha=3) + identity  # (I + X)^3
            gradients[i] = (gradients[i] + cube * share[..., None, None]) * inverse[..., None, None]
        return torch.cat(values), gradients


def _fourth_power_norms(squares: Sequence[Tensor], null_dims: Sequence[int]) -> Tensor:
    """(tr A^4)^{1/4} of every matrix, (sum of g, ...), from the squares A^2 of groups (g, ..., n, n)."""
    # Normalised before the fourth power: float32 would overflow from 1e9.
    diagonals = [square.diagonal(dim1=-2, dim2=-1).amax((0, -1)) for square in squares]
    largest = torch.stack(diagonals).amax(0).clamp(min=1)
    fourth = [
        (square / largest[..., None, None]).square().sum((-2, -1)) + null_dim / largest.square()
        for square, null_dim in zip(squares, null_dims, strict=True)
    ]
    return torch.cat(fourth).pow(0.25) * largest.sqrt()


def _traces(x: Tensor, x_square: Tensor, order: int) -> list[Tensor]:
    """Traces of X^m for m from 1 to the order. tr X^{i+j} = <X^i, X^j>, so powers up to half of it suffice."""
    powers = [x, x_square]
    while 2 * len(powers) < order:
        powers.append(powers[-1] @ x)
    traces = [matrix.diagonal(dim1=-2, dim2=-1).sum(-1) for matrix in powers[:2]]
    traces += [(powers[m // 2 - 1] * powers[m - m // 2 - 1]).sum((-2, -1)) for m in range(3, order + 1)]
    return traces[:order]


def _inverse_series(x: Tensor, x_square: Tensor, identity: Tensor, order: int) -> Tensor:
    """P_p(X) = sum_{i<p} (-X)^i, a new tensor."""
    if order == 1:
        return torch.zeros_like(x) + identity
    linear = identity - x
    series = linear if order % 2 == 0 else linear + x_square
    for _ in range(3 + order % 2, order, 2):
        series = linear + x_square @ series
    return series
