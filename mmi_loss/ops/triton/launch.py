"""Launchers: outputs, block sizes and grids of the kernels. They know plain tensors only and never wait for the device.

Block sizes are chosen from shapes alone, so that a captured graph or a compiled step is replayed as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from mmi_loss.ops.triton.factor import _factor_kernel
from mmi_loss.ops.triton.gram import _gram_backward_kernel, _gram_kernel, _statistics_kernel
from mmi_loss.ops.triton.moments import _column_sums_kernel, _moments_backward_kernel, _moments_kernel
from mmi_loss.ops.triton.projection import _project_backward_kernel, _project_kernel

# Two tf32 terms for each float32 operand on tensor cores: 21 of float32's 23 bits. Other backends read it as float32.
PRECISION = "tf32x3"
PROGRAMS = 256
"""Programs that fill a large GPU about twice."""


def _power(value: int, low: int, high: int) -> int:
    """The power of two from ``value`` up, within [low, high]."""
    return min(max(triton.next_power_of_2(value), low), high)


def _samples_per_program(n: int, high: int) -> int:
    """A power of two that leaves about PROGRAMS programs, at most ``high`` samples each."""
    return _power(n // PROGRAMS + 1, 1, high) if n > PROGRAMS else 1


def projection_blocks(n: int, dim: int, rows: int, block_dim: int) -> dict[str, int]:
    """Block sizes of the projection: rows of both products (samples by features of a block) fill a matrix unit."""
    block_c = triton.next_power_of_2(block_dim)
    least = max(1, 16 // block_c)
    samples = max(least, min(_samples_per_program(n, 16), max(1, (128 if rows <= 16 else 64) // block_c)))
    if block_c == 1:  # dense: the mixtures are as many as the slice's features
        samples = 64 if n >= 64 * PROGRAMS // 4 else 16
    return {
        "BLOCK_N": samples,
        "BLOCK_B": 32,
        "BLOCK_C": block_c,
        "BLOCK_R": _power(rows, 8, 32 if block_c > 1 else 128),
    }


def project_kernel(
    z_a: Tensor, z_b: Tensor, step: Tensor, slice_dim: int, num_slices: int, block_dim: int, seed_keys: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N, D) views to the slices (2, S, N, k), sums (tiles, 2, S, k), the streams' keys (2,), and a zero counter."""
    n, dim = z_a.shape
    blocks, rows = -(-dim // block_dim), -(-slice_dim // block_dim)
    sizes = projection_blocks(n, dim, num_slices * rows, block_dim)
    tiles = triton.cdiv(n, sizes["BLOCK_N"])
    sliced = torch.empty((2, num_slices, n, slice_dim), dtype=torch.float32, device=z_a.device)
    sums = torch.empty((tiles, 2, num_slices, slice_dim), dtype=torch.float32, device=z_a.device)
    keys = torch.empty(2, dtype=torch.int32, device=z_a.device)
    counter = torch.empty(1, dtype=torch.int32, device=z_a.device)
    _project_kernel[(tiles, triton.cdiv(num_slices * rows, sizes["BLOCK_R"]))](
        z_a,
        z_b,
        step,
        sliced[0],
        sliced[1],
        sums,
        keys,
        counter,
        *seed_keys,
        n,
        dim,
        blocks,
        slice_dim,
        num_slices,
        rows,
        *z_a.stride(),
        *z_b.stride(),
        C=block_dim,
        **sizes,
        PRECISION=PRECISION,
        num_warps=4,
    )
    return sliced, sums, keys, counter


def project_backward_kernel(
    grad: Tensor, keys: Tensor, out_a: Tensor | None, out_b: Tensor | None, block_dim: int
) -> None:
    """The gradient (2, S, N, k) of both views' slices to those of the views, written to ``out`` (N, D)."""
    _, num_slices, n, slice_dim = grad.shape
    outs = [out for out in (out_a, out_b) if out is not None]
    dim = outs[0].shape[1]
    blocks, rows = -(-dim // block_dim), -(-slice_dim // block_dim)
    block_c = triton.next_power_of_2(block_dim)
    block_n = max(1, 64 // block_c)
    block_b = 32
    columns, tiles = triton.cdiv(blocks, block_b), triton.cdiv(n, block_n)
    # The mixtures are drawn once per program: as many samples each as leave enough programs.
    per_program = max(1, tiles * columns * len(outs) // (4 * PROGRAMS))
    _project_backward_kernel[(columns, triton.cdiv(tiles, per_program), len(outs))](
        grad,
        keys,
        grad if out_a is None else out_a,
        grad if out_b is None else out_b,
        n,
        dim,
        blocks,
        slice_dim,
        num_slices,
        rows,
        per_program,
        0 if out_a is not None else 1,
        C=block_dim,
        BLOCK_N=block_n,
        BLOCK_B=block_b,
        BLOCK_C=block_c,
        BLOCK_R=_power(num_slices * rows, 8, 32 if block_c > 1 else 16),
        PRECISION=PRECISION,
        num_warps=4,
    )


def column_sums_kernel(z_a: Tensor, z_b: Tensor, objective: str) -> tuple[Tensor, Tensor]:
    """(N, K) views to the sums of tiles of shifted samples (tiles, 2, 1, K), and a zero counter."""
    n, dim = z_a.shape
    block_n, block_k = 64, _power(dim, 16, 128)
    tiles = triton.cdiv(n, block_n)
    sums = torch.empty((tiles, 2, 1, dim), dtype=torch.float32, device=z_a.device)
    counter = torch.empty(1, dtype=torch.int32, device=z_a.device)
    _column_sums_kernel[(tiles, triton.cdiv(dim, block_k))](
        z_a,
        z_b,
        sums,
        counter,
        n,
        dim,
        *z_a.stride(),
        *z_b.stride(),
        JOINT=objective == "joint",
        BLOCK_N=block_n,
        BLOCK_K=block_k,
    )
    return sums, counter


MATRICES = {"content": 2, "exchangeable": 3, "joint": 1}


def moments_kernel(
    a: Tensor, b: Tensor, sums: Tensor, objective: str, chunks: int, shifted: bool
) -> tuple[Tensor, Tensor]:
    """Slices (S, N, k) to the objective's moments, chunk by chunk (chunks, m, S, K, K), and means (2, S, K), relative
    to the shift and absolute.
    """
    num_slices, n, k = a.shape
    size = 2 * k if objective == "joint" else k
    matrices = MATRICES[objective]
    block_k = _power(size, 16, 64)
    side = triton.cdiv(size, block_k)
    moments = torch.empty((chunks, matrices, num_slices, size, size), dtype=torch.float32, device=a.device)
    mean = torch.empty((2, num_slices, size), dtype=torch.float32, device=a.device)
    _moments_kernel[(side * (side + 1) // 2, chunks, matrices * num_slices)](
        a,
        b,
        sums,
        mean,
        moments,
        n,
        k,
        num_slices,
        sums.shape[0],
        triton.cdiv(n, chunks),
        *a.stride(),
        *b.stride(),
        JOINT=objective == "joint",
        CONTENT=objective == "content",
        SHIFTED=shifted,
        BLOCK_N=32,
        BLOCK_K=block_k,
        BLOCK_P=16,
        PRECISION=PRECISION,
        num_warps=4,
    )
    return moments, mean


def moments_backward_kernel(
    a: Tensor,
    b: Tensor,
    mean: Tensor,
    grad: Tensor,
    diagonal: Tensor | None,
    upstream: Tensor,
    out_a: Tensor | None,
    out_b: Tensor | None,
    objective: str,
    shifted: bool,
) -> None:
    """Symmetric gradients (m, S, K, K) of the moments to those of the slices, written to ``out`` (S, N, k)."""
    num_slices, n, k = a.shape
    block_k = _power(k, 16, 64)
    block_n = 16 if n <= 16 * PROGRAMS else 64
    _moments_backward_kernel[(triton.cdiv(n, block_n), triton.cdiv(k, block_k), num_slices)](
        a,
        b,
        mean,
        grad,
        grad if diagonal is None else diagonal,
        upstream,
        grad if out_a is None else out_a,
        grad if out_b is None else out_b,
        n,
        k,
        num_slices,
        *a.stride(),
        *b.stride(),
        MATRICES=MATRICES[objective],
        JOINT=objective == "joint",
        SHIFTED=shifted,
        DIAGONAL=diagonal is not None,
        NEED_A=out_a is not None,
        NEED_B=out_b is not None,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PRECISION=PRECISION,
        num_warps=4,
        num_stages=2,
    )


def factor_kernel(
    moments: Tensor, mean: Tensor, counter: Tensor, ridge: float, objective: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss (), log dets (m, S), gradient matrices (m, S, k, k) and diagonals (m, S, k) of the moments."""
    chunks, matrices, num_slices, k, _ = moments.shape
    block_k, block_b = _power(k, 16, 128), 16
    new: Any = {"dtype": torch.float32, "device": moments.device}
    loss, values = torch.empty((), **new), torch.empty((matrices, num_slices), **new)
    grad, diagonal = torch.empty(moments.shape[1:], **new), torch.empty((matrices, num_slices, k), **new)
    scratch = torch.empty((matrices, num_slices, 2, block_k, block_b), **new)
    _factor_kernel[(matrices * num_slices,)](
        moments,
        mean,
        values,
        grad,
        diagonal,
        loss,
        counter,
        scratch,
        k,
        num_slices,
        chunks,
        ridge,
        CONTENT=objective == "content",
        BLOCK_K=block_k,
        BLOCK_B=block_b,
        PRECISION=PRECISION,
        num_warps=8 if block_k > 64 else 4,
        # The sweep reads back what it has just stored: nothing may be fetched ahead.
        num_stages=1,
    )
    return loss, values, grad, diagonal


def gram_kernel(z_a: Tensor, z_b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """One view or two (N, D) to the Gram matrix (V N, V N), means (D,) and inverse standard deviations (D,)."""
    n, dim = z_a.shape
    views = 1 if z_b is None else 2
    second = z_a if z_b is None else z_b
    strides = (*z_a.stride(), *second.stride())
    gram = torch.empty((views * n, views * n), dtype=torch.float32, device=z_a.device)
    mean = torch.empty(dim, dtype=torch.float32, device=z_a.device)
    inverse_std = torch.empty_like(mean)
    _statistics_kernel[(triton.cdiv(dim, 32),)](
        z_a, second, mean, inverse_std, n, dim, *strides, TWO=views == 2, BLOCK_N=64, BLOCK_D=32
    )
    block_n = _power(n, 16, 64)
    tiles = triton.cdiv(n, block_n)
    side = views * tiles
    _gram_kernel[(side * (side + 1) // 2,)](
        z_a,
        second,
        mean,
        inverse_std,
        gram,
        n,
        dim,
        tiles,
        *strides,
        TWO=views == 2,
        BLOCK_N=block_n,
        BLOCK_D=32,
        PRECISION=PRECISION,
    )
    return gram, mean, inverse_std


def gram_backward_kernel(
    z_a: Tensor,
    z_b: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    grad: Tensor,
    out_a: Tensor | None,
    out_b: Tensor | None,
) -> None:
    """The symmetric gradient (V N, V N), G + G^T, of the Gram matrix to those of the views, written to ``out``."""
    n, dim = z_a.shape
    second = z_a if z_b is None else z_b
    block_d = 32
    _gram_backward_kernel[(triton.cdiv(dim, block_d),)](
        z_a,
        second,
        mean,
        inverse_std,
        grad,
        grad if out_a is None else out_a,
        grad if out_b is None else out_b,
        n,
        dim,
        *z_a.stride(),
        *second.stride(),
        TWO=z_b is not None,
        NEED_A=out_a is not None,
        NEED_B=out_b is not None,
        BLOCK_N=_power(n, 16, 64),
        BLOCK_D=block_d,
        PRECISION=PRECISION,
    )
