"""Random slices of the embedding, a pure function of (seed, step): fresh each step, the same on every rank,
device and backend without communication, and independent of the global random state.

The generator is a counter-based hash in wrapping 32-bit integer arithmetic, which every backend computes
identically. ``_mix`` is a bijection of the 32-bit integers (Ettinger's ``lowbias32`` finaliser).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
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


def gaussian_matrix(rows: int, columns: int, step: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """A (rows, columns) matrix of standard normal entries (Box-Muller on two hash streams)."""
    half = (columns + 1) // 2
    counter = torch.arange(rows * half, dtype=torch.int32, device=step.device).view(rows, half)
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
    """Y_n = A Z_n with Z_n the features of sample n as a (blocks, block_dim) matrix; dZ_n = A^T dY_n."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, mixing: Tensor, block_dim: int) -> Tensor:
        ctx.save_for_backward(mixing)
        ctx.block_dim, ctx.dim, ctx.dtype = block_dim, z.shape[1], z.dtype
        z = z.to(mixing.dtype)
        if block_dim == 1:
            return z @ mixing.mT
        padding = mixing.shape[1] * block_dim - z.shape[1]
        blocks = (F.pad(z, (0, padding)) if padding else z).reshape(len(z), mixing.shape[1], block_dim)
        return torch.bmm(mixing.expand(len(z), -1, -1), blocks).flatten(1)

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mixing,) = ctx.saved_tensors
        if ctx.block_dim == 1:
            return (grad @ mixing).to(ctx.dtype), None, None
        rows = grad.reshape(len(grad), mixing.shape[0], ctx.block_dim)
        grad_z = torch.bmm(mixing.mT.expand(len(grad), -1, -1), rows).flatten(1)
        return grad_z[:, : ctx.dim].to(ctx.dtype), None, None


def mixing_matrix(
    dim: int, slice_dim: int, num_slices: int, block_dim: int, step: Tensor, seed: int, dtype: torch.dtype
) -> Tensor:
    """The fresh Gaussian A (S * m, dim / block_dim) of a step's projections P = A^T kron I, for :func:`project`.

    The features are cut into blocks of ``block_dim``, and each of the m = k / block_dim rows of a slice is a random
    mixture of all blocks. ``block_dim=1`` is the dense Gaussian projection; larger blocks need as many times fewer
    products, and the square of it fewer random numbers, and still every feature is read and gets a gradient.
    """
    rows, blocks = -(-slice_dim // block_dim), -(-dim // block_dim)
    return gaussian_matrix(num_slices * rows, blocks, step, seed, dtype)


def project(z: Tensor, mixing: Tensor, slice_dim: int, num_slices: int, block_dim: int) -> Tensor:
    """(N, D) to the slices (S, N, k), in the dtype of ``mixing``."""
    projected: Tensor = _Project.apply(z, mixing, block_dim)
    return projected.unflatten(1, (num_slices, projected.shape[1] // num_slices)).transpose(0, 1)[..., :slice_dim]
