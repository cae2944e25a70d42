"""Standardisation of moments too large for the fused factorisation, on the way to batched Choleskys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmi_loss.ops.autograd import closed_form
from mmi_loss.ops.covariance import add_variance_floor


class _SignalToNoise(torch.autograd.Function):
    """A_j = I + s M_j s / ridge, s = diag(v)^{-1/2}, v the diagonal of M_0 plus a floor.

    With F_j = dL/dA_j: dL/dM_j = F_j s s^T / ridge elementwise, less sum_j (F_j (A_j - I))_ii / v_i on the diagonal of
    M_0.
    """

    @staticmethod
    def forward(ctx: Any, moments: Tensor, mean: Tensor, ridge: float) -> Tensor:
        variance = add_variance_floor(moments[0].diagonal(dim1=-2, dim2=-1), mean)
        inverse_std = variance.rsqrt()
        weight = inverse_std[..., :, None] * (inverse_std[..., None, :] / ridge)
        signal = moments * weight
        ctx.save_for_backward(signal, weight, variance)
        matrices = signal.clone()
        matrices.diagonal(dim1=-2, dim2=-1).add_(1)
        return matrices

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        signal, weight, variance = ctx.saved_tensors
        grad_variance = (grad * signal).sum((0, -1)).div_(variance)
        grad_moments = grad * weight
        grad_moments[0].diagonal(dim1=-2, dim2=-1).sub_(grad_variance)
        return grad_moments, None, None


def signal_to_noise(moments: Tensor, mean: Tensor, ridge: float) -> Tensor:
    """I + (standardised moments) / ridge for symmetric moments (m, S, k, k), the first of which is the covariance.

    Its diagonal, plus a floor for features that are constant but for the rounding of their ``mean`` (S, k), is the
    variance that standardises all.
    """
    result: Tensor = _SignalToNoise.apply(moments, mean, ridge)
    return result
