"""Random slices of the embedding, a pure function of (seed, step): fresh each step, the same on every rank,
device and backend without communication, and independent of the global random state.

The generator is a counter-based hash in wrapping 32-bit integer arithmetic, which every backend computes
identically. ``_mix`` is a bijection of the 32-bit integers (Ettinger's ``lowbias32`` finaliser).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmi_loss.ops.autograd import closed_form


def _wrap(value: int) -> int:
    """The signed 32-bit integer with the bits of ``value``."""
    return (value + 2**31) % 2**32 - 2**31


def _mix(x: Tensor) -> Tensor:
    # Arithmetic shifts are masked to logical ones; int32 products wrap.
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _wrap(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _key(step: Tensor, seed: int, stream: int) -> Tensor:
    """A 32-bit key for one random stream of one step; ``step`` stays on its device."""
    low, high = step.to(torch.int32), (step >> 31).to(torch.int32)
    key = _mix(low + _wrap(seed * 0x9E3779B9))
    return _mix(key + high * _wrap(0x85EBCA6B) + _wrap((seed >> 32) * 0xC2B2AE35 + stream * 0x27D4EB2F))


def random_coordinates(dim: int, slice_dim: int, num_slices: int, step: Tensor, seed: int) -> Tensor:
    """``num_slices`` uniformly random subsets of ``slice_dim`` of the ``dim`` features, sorted.

    Returns int64 indices of shape (num_slices, slice_dim) on the device of ``step``.
    """
    features = torch.arange(dim, dtype=torch.int32, device=step.device)
    # A bijection of distinct counters: no two features share a rank, so the subset does not depend on how a
    # backend breaks ties.
    ranks = torch.stack([_mix(features + _key(step, seed, stream)) for stream in range(num_slices)])
    chosen = torch.topk(ranks, slice_dim, dim=1, sorted=False).indices
    return chosen.sort(dim=1).values


def gaussian_directions(
    dim: int, slice_dim: int, num_slices: int, step: Tensor, seed: int, dtype: torch.dtype
) -> Tensor:
    """A (dim, num_slices * slice_dim) matrix of standard normal entries (Box-Muller on two hash streams)."""
    columns = num_slices * slice_dim
    half = (columns + 1) // 2
    counter = torch.arange(dim * half, dtype=torch.int32, device=step.device).view(dim, half)
    # 24 bits fill a float32 mantissa, so the numbers are the same for every dtype and device; +0.5 avoids log(0).
    uniform = [
        ((_mix(counter + _key(step, seed, s)) >> 8) & 0xFFFFFF).to(dtype).add_(0.5).mul_(2.0**-24) for s in (0, 1)
    ]
    radius = uniform[0].log_().mul_(-2.0).sqrt_()
    angle = uniform[1].mul_(2.0 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin_()], dim=1)[:, :columns]


class _TakeCoordinates(torch.autograd.Function):
    """Columns of ``z`` in the computing dtype. The untouched columns are still read once: their sum times zero is
    0, or NaN where an input is not finite, and is added to what is taken. A loss that skipped them would hide an
    overflow from a GradScaler.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.shape, ctx.dtype = z.shape, z.dtype
        poison = z.sum(dtype=dtype) * 0
        return z.index_select(1, indices).to(dtype).add_(poison)

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        # Slices may share a coordinate, hence add instead of copy; the sums of few terms fit the input's dtype.
        grad_z = grad.new_zeros(ctx.shape, dtype=ctx.dtype)
        grad_z.index_add_(1, indices, grad.to(ctx.dtype))
        return grad_z, None, None


def take_coordinates(z: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, D) and (S, k) indices to the slices (S, N, k), in ``dtype``; non-finite input anywhere makes all NaN."""
    num_slices, slice_dim = indices.shape
    taken: Tensor = _TakeCoordinates.apply(z, indices.flatten(), dtype)
    return taken.unflatten(1, (num_slices, slice_dim)).transpose(0, 1)


class _Project(torch.autograd.Function):
    """Y = Z P in the computing dtype; dZ = dY P^T in the input's."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, directions: Tensor) -> Tensor:
        ctx.save_for_backward(directions)
        ctx.dtype = z.dtype
        return z.to(directions.dtype) @ directions

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (directions,) = ctx.saved_tensors
        return (grad @ directions.mT).to(ctx.dtype), None


def project(z: Tensor, directions: Tensor, num_slices: int) -> Tensor:
    """(N, D) times (D, S*k) to the slices (S, N, k), in the directions' dtype."""
    projected: Tensor = _Project.apply(z, directions)
    return projected.unflatten(1, (num_slices, -1)).transpose(0, 1)
