"""Launchers: outputs, block sizes and grids of the kernels. They know plain tensors only and never wait for the device.

Block sizes are chosen from shapes alone, so that a captured graph or a compiled step is replayed as it was. A gradient
that is not needed is None.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mmi_loss.ops import covariance
from mmi_loss.ops.triton import MAX_SLICE_DIM
from mmi_loss.ops.triton.factor import _factor_kernel
from mmi_loss.ops.triton.gram import _gram_backward_kernel, _gram_kernel, _statistics_kernel
from mmi_loss.ops.triton.moments import _column_sums_kernel, _moments_backward_kernel, _moments_kernel
from mmi_loss.ops.triton.projection import _project_backward_kernel, _project_kernel

PROGRAMS = 256  # fill a large GPU about twice
SMALLEST_VARIANCE = torch.finfo(torch.float32).tiny ** covariance.UNDERFLOW_POWER
RELATIVE_RESOLUTION = covariance.ROUNDINGS * torch.finfo(torch.float32).eps
Gradients = Sequence[Tensor | None]


def new(z: Tensor, *shape: int) -> Tensor:
    """An uninitialised float32 tensor on the device of ``z``."""
    return torch.empty(shape, dtype=torch.float32, device=z.device)


def new_state(z: Tensor) -> Tensor:
    """What launches pass on (2,): the key of the random stream, and how many programs have finished."""
    return torch.empty(2, dtype=torch.int32, device=z.device)


def _power(value: int, low: int, high: int) -> int:
    """The power of two from ``value`` up, within [low, high]."""
    return min(max(triton.next_power_of_2(value), low), high)


def _tile(n: int, num_slices: int, slice_dim: int, block_dim: int) -> int:
    """Samples of a program of the first launch: projected, they fill a matrix unit, and programs the device."""
    if not block_dim:
        return 64
    block_c, rows = triton.next_power_of_2(block_dim), num_slices * triton.cdiv(slice_dim, block_dim)
    wanted = _power(triton.cdiv(n, PROGRAMS), 1, 16)
    return max(16 // block_c, min(wanted, (128 if rows <= 16 else 64) // block_c), 1)


def project_kernel(
    z_a: Tensor, z_b: Tensor, step: Tensor, seed_keys: Sequence[int], slice_dim: int, num_slices: int, block_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, D) views to the slices (2, S, N, k), sums of tiles (tiles, S, k), and the state (2,)."""
    n, dim = z_a.shape
    rows = num_slices * triton.cdiv(slice_dim, block_dim)
    tile, block_r = _tile(n, num_slices, slice_dim, block_dim), _power(rows, 8, 32)
    slices, state = new(z_a, 2, num_slices, n, slice_dim), new_state(z_a)
    sums = new(z_a, triton.cdiv(n, tile), num_slices, slice_dim)
    _project_kernel[(len(sums), triton.cdiv(rows, block_r))](
        z_a, z_b, step, *slices, sums, state, *seed_keys, n, dim, slice_dim, num_slices, *z_a.stride(), *z_b.stride(),
        C=block_dim, BLOCK_N=tile, BLOCK_B=32, BLOCK_C=triton.next_power_of_2(block_dim), BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip
    return slices, sums, state


def project_backward_kernel(grad: Tensor, state: Tensor, outs: Gradients, block_dim: int) -> None:
    """The gradient (2, S, N, k) of both views' slices to those of the views, in ``outs`` (N, D)."""
    _, num_slices, n, slice_dim = grad.shape
    views = [out for out in outs if out is not None]
    dim, block_r = views[0].shape[1], _power(num_slices * triton.cdiv(slice_dim, block_dim), 16, 32)
    block_c, block_b = triton.next_power_of_2(block_dim), 32
    block_n = max(1, 64 // block_c)
    columns, tiles = triton.cdiv(triton.cdiv(dim, block_dim), block_b), triton.cdiv(n, block_n)
    # The mixtures are drawn once per program: as many samples each as leave enough programs.
    per_program = max(1, tiles * columns * len(views) // (4 * PROGRAMS))
    _project_backward_kernel[(columns, triton.cdiv(tiles, per_program), len(views))](
        grad, state, *outs, n, dim, slice_dim, num_slices, per_program,
        C=block_dim, BLOCK_N=block_n, BLOCK_B=block_b, BLOCK_C=block_c, num_warps=4,
        BLOCK_R=block_r,  # 16 at least: what Triton 3.6 sums over in a product
    )  # fmt: skip


def column_sums_kernel(z_a: Tensor, z_b: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) views to the sums of tiles of samples (tiles, 1, D), and the state (2,)."""
    n, dim = z_a.shape
    tile, block_k = _tile(n, 1, dim, 0), _power(dim, 16, 128)
    sums, state = new(z_a, triton.cdiv(n, tile), 1, dim), new_state(z_a)
    _column_sums_kernel[(len(sums), triton.cdiv(dim, block_k))](
        z_a, z_b, sums, state, n, dim, *z_a.stride(), *z_b.stride(), BLOCK_N=tile, BLOCK_K=block_k
    )
    return sums, state


def moments_kernel(a: Tensor, b: Tensor, sums: Tensor, block_dim: int) -> tuple[Tensor, Tensor]:
    """Slices (S, N, k) to total and within moments, chunk by chunk (chunks, 2, S, k, k), and centres (2, S, k)."""
    num_slices, n, k = a.shape
    tile, block_k = _tile(n, num_slices, k, block_dim), _power(k, 16, 64)
    # Small matrices have few tiles: the samples are divided instead, for as many programs at work.
    chunks = min(max(n // 64, 1), 16) if k <= MAX_SLICE_DIM else 1
    moments, centre = new(a, chunks, 2, num_slices, k, k), new(a, 2, num_slices, k)
    _moments_kernel[(triton.cdiv(k, block_k) ** 2, chunks, 2 * num_slices)](
        a, b, sums, centre, moments, n, k, *a.stride()[1:], *b.stride()[1:],
        TILE=tile, BLOCK_N=32, BLOCK_K=block_k, BLOCK_T=16, num_warps=4,
    )  # fmt: skip
    return moments, centre


def moments_backward_kernel(
    a: Tensor, b: Tensor, centre: Tensor, grad: Tensor, diagonal: Tensor, upstream: Tensor, outs: Gradients
) -> None:
    """Symmetric gradients of the moments, and of their diagonals, to those of the slices, in ``outs`` (S, N, k)."""
    num_slices, n, k = a.shape
    block_n, block_k = 16 if n <= 16 * PROGRAMS else 64, _power(k, 16, 64)
    _moments_backward_kernel[(triton.cdiv(n, block_n), triton.cdiv(k, block_k), num_slices)](
        a, b, centre, grad, diagonal, upstream, *outs, n, k, *a.stride()[1:], *b.stride()[1:],
        BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=2,
    )  # fmt: skip


def factor_kernel(
    moments: Tensor,
    centre: Tensor,
    state: Tensor,
    block_dim: int,
    floor: Sequence[float],
    coefficients: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss (), log dets (2, S), noise (S,), gradients (2, S, k, k) and diagonals (2, S, k) of the moments."""
    chunks, _, num_slices, k, _ = moments.shape
    block_k, block_b = _power(k, 16, MAX_SLICE_DIM), 16
    loss, log_dets, noise = new(moments), new(moments, 2, num_slices), new(moments, num_slices)
    grad, diagonal = new(moments, 2, num_slices, k, k), new(moments, 2, num_slices, k)
    scratch = new(moments, 2, num_slices, 2, block_k, block_b)
    _factor_kernel[(2 * num_slices,)](
        moments, centre, log_dets, noise, grad, diagonal, loss, state, scratch,
        k, chunks, floor[0] / k, floor[1], RELATIVE_RESOLUTION if block_dim else 0.0, SMALLEST_VARIANCE, *coefficients,
        BLOCK_K=block_k, BLOCK_B=block_b, num_warps=8 if block_k > 64 else 4,
        num_stages=1,  # the sweep reads back what it has just stored: nothing may be fetched ahead
    )  # fmt: skip
    return loss, log_dets, noise, grad, diagonal


def gram_kernel(z_a: Tensor, z_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two views (N, D) to the lower triangle of their Gram matrix (2 N, 2 N), and statistics (3, D)."""
    n, dim = z_a.shape
    gram, statistics = new(z_a, 2 * n, 2 * n), new(z_a, 3, dim)
    sizes, block_n, block_d = (n, dim, *z_a.stride(), *z_b.stride()), _power(n, 16, 32), 32
    _statistics_kernel[(triton.cdiv(dim, block_d),)](
        z_a, z_b, statistics, SMALLEST_VARIANCE, *sizes, BLOCK_N=64, BLOCK_D=block_d
    )
    _gram_kernel[(triton.cdiv(n, block_n) ** 2,)](
        z_a, z_b, statistics, gram, *sizes, BLOCK_N=block_n, BLOCK_D=16, num_warps=4, num_stages=2
    )
    return gram, statistics


def gram_backward_kernel(
    z_a: Tensor, z_b: Tensor, statistics: Tensor, grad: Tensor, upstream: Tensor, outs: Gradients
) -> None:
    """The symmetric gradient G + G^T (2 N, 2 N) of the Gram matrix to those of the views, in ``outs``."""
    (n, dim), block_n, block_d = z_a.shape, 16, 32
    _gram_backward_kernel[(triton.cdiv(dim, block_d),)](
        z_a, z_b, statistics, grad, upstream, *outs, n, dim, *z_a.stride(), *z_b.stride(),
        BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4, num_stages=2,
    )  # fmt: skip
