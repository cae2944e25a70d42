"""Random slices of the embedding, a pure function of (seed, step): fresh each step, the same on every rank, device and
backend without communication, and independent of the global random state.

The generator is a counter-based hash in wrapping 32-bit integer arithmetic, which every backend computes identically.
``_mix`` is a bijection of the 32-bit integers (Ettinger's ``lowbias32`` finaliser).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_loss.ops.autograd import closed_form

MIXTURES = 4  # of blocks of features in a Kronecker slice: half of them are half the products (docs/defaults.md)


def slice_views(
    views: Sequence[Tensor],
    slice_dim: int,
    num_slices: int,
    block_dim: int,
    step: Tensor,
    seed: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The step's slices (S, N, k) of views (N, D), by the same random numbers for all, in ``dtype``.

    A view of no more than ``slice_dim`` features is taken whole; views of different widths get slices of their own.
    ``block_dim`` neighbouring features stay together in a projection (:func:`mixing_matrix`); 0 takes coordinates.
    """
    dim = views[0].shape[1]
    for z in views:
        if z.shape[1] != dim:
            return [slice_views([z], slice_dim, num_slices, block_dim, step, seed, dtype)[0] for z in views]
    if dim <= slice_dim:
        return [z.to(dtype).expand(num_slices, -1, -1) for z in views]
    if not block_dim:
        indices = random_coordinates(dim, slice_dim, num_slices, step, seed)
        # The untouched columns are read too: their sum times zero is 0, or NaN where an input is not finite, in the
        # value and in every gradient. A loss that skipped them would hide an overflow from a GradScaler.
        taken = [z.index_select(1, indices.flatten()).to(dtype) + z.sum(dtype=dtype) * 0 for z in views]
        return [z.unflatten(1, indices.shape).transpose(0, 1) for z in taken]
    mixing = mixing_matrix(dim, slice_dim, num_slices, block_dim, step, seed, dtype)
    return list(_Project.apply(mixing, slice_dim, num_slices, block_dim, *views))


def _wrap(value: int) -> int:
    """The signed 32-bit integer with the bits of ``value``."""
    return (value + 2**31) % 2**32 - 2**31


_MULTIPLIERS = 0x7FEB352D, 0x846CA68B
_SIGNED_MULTIPLIERS = _MULTIPLIERS[0], _wrap(_MULTIPLIERS[1])


def _mix(x: Tensor) -> Tensor:
    # Arithmetic shifts are masked to logical ones; int32 products wrap. The first new tensor is then reused.
    x = ((x >> 16) & 0xFFFF).bitwise_xor_(x)
    x.mul_(_SIGNED_MULTIPLIERS[0])
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))
    x.mul_(_SIGNED_MULTIPLIERS[1])
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def key(step: Tensor, seed: int, stream: int) -> Tensor | int:
    """A 32-bit key for one random stream of one step.

    ``step`` stays on its device, for reading it would wait. In eager mode on the CPU nothing waits, and two dozen tiny
    operations are a few integers.
    """
    seed_key, stream_key = seed * 0x9E3779B9, (seed >> 32) * 0xC2B2AE35 + stream * 0x27D4EB2F
    if type(step) is Tensor and step.device.type == "cpu" and not torch.compiler.is_compiling():
        value, x = int(step), 0
        for part in (value + seed_key, (value >> 31) * 0x85EBCA6B + stream_key):
            x = (x + part) % 2**32
            x = (x ^ (x >> 16)) * _MULTIPLIERS[0] % 2**32
            x = (x ^ (x >> 15)) * _MULTIPLIERS[1] % 2**32
            x ^= x >> 16
        return x - 2**32 if x >= 2**31 else x
    low, high = step.to(torch.int32), (step >> 31).to(torch.int32)
    return _mix(_mix(low + _wrap(seed_key)) + high * _wrap(0x85EBCA6B) + _wrap(stream_key))


def random_coordinates(dim: int, slice_dim: int, num_slices: int, step: Tensor, seed: int) -> Tensor:
    """Uniformly random subsets (num_slices, slice_dim) of the ``dim`` features: indices, sorted."""
    features = torch.arange(dim, dtype=torch.int32, device=step.device)
    # A bijection of distinct counters: no two features share a rank, so no backend has a tie to break.
    ranks = torch.stack([_mix(features + key(step, seed, stream)) for stream in range(num_slices)])
    return torch.topk(ranks, slice_dim, dim=1, sorted=False).indices.sort(dim=1).values


class _Project(torch.autograd.Function):
    """Y_n = A Z_n with Z_n the features of sample n as a (blocks, block_dim) matrix; dZ_n = A^T dY_n."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        mixing, slice_dim, num_slices, block_dim, *views = arguments  # see CovarianceLoss
        n, dim = views[0].shape
        ctx.save_for_backward(mixing)
        ctx.dim, ctx.block_dim, ctx.dtypes = dim, block_dim, []
        padding = mixing.shape[1] * block_dim - dim
        width = mixing.shape[0] * block_dim // num_slices  # inferred it would be ambiguous for a rank without samples
        projections = []
        for z in views:
            ctx.dtypes.append(z.dtype)
            z = z.to(mixing.dtype)
            if block_dim == 1:
                # Rows that are equal stay equal, bit by bit: products round them differently, by their place.
                projected = (z - z[:1]) @ mixing.mT + z[:1] @ mixing.mT
            else:
                blocks = (F.pad(z, (0, padding)) if padding else z).reshape(n, mixing.shape[1], block_dim)
                projected = torch.bmm(mixing.expand(n, -1, -1), blocks)
            projections.append(projected.reshape(n, num_slices, width)[..., :slice_dim].transpose(0, 1))
        return tuple(projections)

    @staticmethod
    @closed_form
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mixing,) = ctx.saved_tensors
        rows, blocks = mixing.shape
        num_slices, n, slice_dim = grads[0].shape
        width = rows * ctx.block_dim // num_slices
        grad_views: list[Tensor | None] = [None] * len(grads)
        for view, (grad, dtype) in enumerate(zip(grads, ctx.dtypes, strict=True)):
            if not ctx.needs_input_grad[4 + view]:
                continue
            grad = F.pad(grad, (0, width - slice_dim)) if width > slice_dim else grad
            if ctx.block_dim == 1:
                grad_z = grad.transpose(0, 1).reshape(n, rows) @ mixing
            else:
                grad_rows = grad.transpose(0, 1).reshape(n, rows, ctx.block_dim)
                grad_z = torch.bmm(mixing.mT.expand(n, -1, -1), grad_rows).view(n, blocks * ctx.block_dim)[:, : ctx.dim]
            grad_views[view] = grad_z.to(dtype)
        return None, None, None, None, *grad_views


def mixing_matrix(
    dim: int, slice_dim: int, num_slices: int, block_dim: int, step: Tensor, seed: int, dtype: torch.dtype
) -> Tensor:
    """The fresh random A (S * m, dim / block_dim) of a step's projections P = A^T kron I.

    The features are cut into blocks of ``block_dim``, and each of the m = k / block_dim rows of a slice is a random
    mixture of all blocks. ``block_dim=1`` is the dense Gaussian projection; larger blocks need as many times fewer
    products, and the square of it fewer random numbers, and still every feature is read and gets a gradient. Mixtures
    have uniform weights: the loss does not see their scale, their sums are near Gaussian, and they cost a third.
    """
    rows, columns = num_slices * -(-slice_dim // block_dim), -(-dim // block_dim)
    half = (columns + 1) // 2 if block_dim == 1 else columns
    counter = torch.arange(rows * half, dtype=torch.int32, device=step.device).view(rows, half)
    if block_dim > 1:
        return _mix(counter + key(step, seed, 0)).to(dtype).mul_(2.0**-31)
    # Box-Muller. 24 bits fill a float32 mantissa, so the numbers are the same for every dtype; + 0.5 avoids log(0).
    bits = [(_mix(counter + key(step, seed, stream)) >> 8) & 0xFFFFFF for stream in (0, 1)]
    radius = bits[0].to(dtype).add_(0.5).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = bits[1].to(dtype).add_(0.5).mul_(2.0**-24).mul_(2.0 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :columns]
