"""Projection on the step's random slices, and its transpose: the matrix is generated where it is used, never stored.

Y_n = A Z_n with Z_n the features of sample n as a (blocks, C) matrix (:mod:`mmi_loss.ops.slices`, whose numbers these
are). Both views share the A in registers. It is computed as rows (n, c) of Z times A^T, so that the tensor cores see
C BLOCK_N rows.
"""

# ruff: noqa: N803  (constexpr arguments are written in capitals, Triton's habit)

import triton
import triton.language as tl

from mmi_loss.ops.triton.factor import _dot


@triton.jit
def _mix(x):
    """Ettinger's lowbias32 on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _key(step, low_key, high_key):
    """The 32-bit key of the step's random stream; the seed's part of it is computed on the host."""
    low, high = step.to(tl.uint32), (step >> 31).to(tl.uint32)
    return _mix(_mix(low + low_key.to(tl.uint32)) + high * 0x85EBCA6B + high_key.to(tl.uint32))


@triton.jit
def _mixing(row, column, columns, key):
    """Entries of A: the hash of their place, as a number in [-1, 1)."""
    bits = _mix((row * columns + column).to(tl.uint32) + key)
    return bits.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-31


@triton.jit
def _place(row, inner, k, slices, C: tl.constexpr):
    """Where feature ``inner`` of mixture ``row`` stands: its slice, its column there, and whether there is one."""
    rows = tl.cdiv(k, C)
    s, column = row // rows, (row % rows) * C + inner
    return s, column, (s < slices) & (column < k) & (inner < C)


@triton.jit(do_not_specialize=["low_key", "high_key"])
def _project_kernel(
    a_ptr, b_ptr, step_ptr, y_a_ptr, y_b_ptr, sums_ptr, state_ptr,
    low_key, high_key, n, dim, k, slices, stride_an, stride_ad, stride_bn, stride_bd,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Y of BLOCK_N samples of both views for BLOCK_R mixtures, and what these samples add up to: see ``_mean``."""
    tile = tl.program_id(0)
    key = _key(tl.load(step_ptr), low_key, high_key)
    if (tile == 0) & (tl.program_id(1) == 0):
        tl.store(state_ptr, key.to(tl.int32, bitcast=True))  # for the backward pass, whatever the step is by then
        tl.store(state_ptr + 1, 0)
    sample = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None, None]
    inner = tl.arange(0, BLOCK_C)[None, None, :]
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    blocks = tl.cdiv(dim, C)
    zeros = tl.zeros((BLOCK_N * BLOCK_C, BLOCK_R), tl.float32)
    y_a, y_b = zeros, zeros
    for start in range(0, blocks, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        mixing = _mixing(row, block[:, None], blocks, key)
        feature = block[None, :, None] * C + inner
        is_inside = (sample < n) & (feature < dim) & (inner < C)
        z_a = tl.load(a_ptr + sample.to(tl.int64) * stride_an + feature * stride_ad, mask=is_inside, other=0.0)
        z_b = tl.load(b_ptr + sample.to(tl.int64) * stride_bn + feature * stride_bd, mask=is_inside, other=0.0)
        z_a = tl.reshape(tl.permute(z_a.to(tl.float32), (0, 2, 1)), (BLOCK_N * BLOCK_C, BLOCK_B))
        z_b = tl.reshape(tl.permute(z_b.to(tl.float32), (0, 2, 1)), (BLOCK_N * BLOCK_C, BLOCK_B))
        y_a, y_b = _dot(z_a, mixing, y_a), _dot(z_b, mixing, y_b)
    y_a = tl.permute(tl.reshape(y_a, (BLOCK_N, BLOCK_C, BLOCK_R)), (0, 2, 1))
    y_b = tl.permute(tl.reshape(y_b, (BLOCK_N, BLOCK_C, BLOCK_R)), (0, 2, 1))
    s, column, is_kept = _place(row[:, :, None], inner, k, slices, C)
    offset = (s.to(tl.int64) * n + sample) * k + column
    tl.store(y_a_ptr + offset, y_a, mask=is_kept & (sample < n))
    tl.store(y_b_ptr + offset, y_b, mask=is_kept & (sample < n))
    first = tl.sum(tl.where(sample == tile * BLOCK_N, y_a, 0.0), 0)[None, :, :]
    sums = tl.sum(tl.where(sample < n, (y_a - first) + (y_b - first), 0.0), 0)[None, :, :]
    tl.store(sums_ptr + (tile * slices + s) * k + column, sums, mask=is_kept)


@triton.jit
def _project_backward_kernel(
    dy_ptr, state_ptr, da_ptr, db_ptr, n, dim, k, slices, tiles_per_program,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dZ_n = A^T dY_n, (n, dim) contiguous, for BLOCK_B feature blocks, several tiles of samples and one view."""
    view = tl.program_id(2) if da_ptr is not None else 1
    block = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    key = tl.load(state_ptr).to(tl.uint32, bitcast=True)
    blocks, total = tl.cdiv(dim, C), slices * tl.cdiv(k, C)
    rows, features = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    mixing = _mixing(rows[:, None], block[None, :], blocks, key)
    for i in range(0, tiles_per_program):
        sample = (tl.program_id(1) * tiles_per_program + i) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None, None]
        grad = tl.zeros((BLOCK_N * BLOCK_C, BLOCK_B), tl.float32)
        for start in range(0, total, BLOCK_R):
            s, column, is_kept = _place((start + rows)[None, None, :], features[None, :, None], k, slices, C)
            offset = ((view * slices + s).to(tl.int64) * n + sample) * k + column
            dy = tl.load(dy_ptr + offset, mask=is_kept & (sample < n), other=0.0)
            if total > BLOCK_R:  # one set of mixtures is drawn once for all samples
                mixing = _mixing((start + rows)[:, None], block[None, :], blocks, key)
            grad = _dot(tl.reshape(dy, (BLOCK_N * BLOCK_C, BLOCK_R)), mixing, grad)
        grad = tl.permute(tl.reshape(grad, (BLOCK_N, BLOCK_C, BLOCK_B)), (0, 2, 1))
        inner = features[None, None, :]
        feature = block[None, :, None] * C + inner
        is_inside = (sample < n) & (feature < dim) & (inner < C)
        offset = sample.to(tl.int64) * dim + feature
        if da_ptr is not None:
            tl.store(da_ptr + offset, grad.to(da_ptr.dtype.element_ty), mask=is_inside & (view == 0))
        if db_ptr is not None:
            tl.store(db_ptr + offset, grad.to(db_ptr.dtype.element_ty), mask=is_inside & (view == 1))
