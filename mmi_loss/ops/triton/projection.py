"""Projection on the step's random slices, and its transpose: the matrix is generated where it is used, never stored.

Y_n = A Z_n with Z_n the features of sample n as a (blocks, C) matrix (:mod:`mmi_loss.ops.slices`, whose numbers these
are; Gaussian ones to the rounding of log, sin and cos). Both views share the A in registers. It is computed as rows
(n, c) of Z times A^T, so that the tensor cores see C BLOCK_N rows.
"""

# ruff: noqa: N803  (constexpr arguments are written in capitals, Triton's habit)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    """Ettinger's lowbias32 on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _key(step, seed_key, stream_key):
    """The 32-bit key of one random stream of a step; the seed's part is computed on the host."""
    low, high = step.to(tl.uint32), (step >> 31).to(tl.uint32)
    return _mix(_mix(low + seed_key.to(tl.uint32)) + high * 0x85EBCA6B + stream_key.to(tl.uint32))


@triton.jit
def _gaussian(row, column, half, key_0, key_1):
    """Entries of the step's Gaussian matrix with 2 * half columns: Box-Muller, cosines left and sines right."""
    is_right = column >= half
    counter = (row * half + tl.where(is_right, column - half, column)).to(tl.uint32)
    uniform_0 = ((_mix(counter + key_0) >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    uniform_1 = ((_mix(counter + key_1) >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    radius = tl.sqrt(-2.0 * tl.log(uniform_0))
    # 2 pi u is q quarter turns and x in [-pi/4, pi/4]; a quarter turn more makes the sine a cosine. The polynomials are
    # Cephes' sinf and cosf: a general sine carries code for arguments beyond any that occur.
    turns = 4.0 * uniform_1
    quarter = tl.floor(turns + 0.5)
    x = (turns - quarter) * 1.5707963267948966
    square = x * x
    sine = x + x * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    tail = 4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    cosine = 1.0 - 0.5 * square + square * square * tail
    quadrant = quarter.to(tl.int32) + tl.where(is_right, 0, 1)
    value = tl.where((quadrant & 1) == 1, cosine, sine)
    return radius * tl.where((quadrant & 2) == 2, -value, value)


@triton.jit
def _mixing(row, column, columns, key_0, key_1, DENSE: tl.constexpr):
    """Entries of the step's matrix: Gaussian for a dense projection, uniform in [-1, 1) for mixtures of blocks."""
    if DENSE:
        return _gaussian(row, column, (columns + 1) // 2, key_0, key_1)
    else:
        bits = _mix((row * columns + column).to(tl.uint32) + key_0)
        return bits.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10


@triton.jit(do_not_specialize=["seed_key", "stream_key_0", "stream_key_1"])
def _project_kernel(
    a_ptr,
    b_ptr,
    step_ptr,
    y_a_ptr,
    y_b_ptr,
    sums_ptr,
    keys_ptr,
    counter_ptr,
    seed_key,
    stream_key_0,
    stream_key_1,
    n,
    dim,
    blocks,
    k,
    slices,
    rows_per_slice,
    stride_an,
    stride_ad,
    stride_bn,
    stride_bd,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Y of BLOCK_N samples of both views for BLOCK_R mixtures, and its sum over these samples."""
    tile, row_tile = tl.program_id(0), tl.program_id(1)
    step = tl.load(step_ptr)
    key_0, key_1 = _key(step, seed_key, stream_key_0), _key(step, seed_key, stream_key_1)
    if (tile == 0) & (row_tile == 0):
        # The backward pass draws the same numbers, whatever the step counter says by then.
        tl.store(keys_ptr, key_0.to(tl.int32, bitcast=True))
        tl.store(keys_ptr + 1, key_1.to(tl.int32, bitcast=True))
        tl.store(counter_ptr, 0)
    samples = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None, None]
    features = tl.arange(0, BLOCK_C)[None, None, :]
    rows = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    y_a = tl.zeros((BLOCK_N * BLOCK_C, BLOCK_R), tl.float32)
    y_b = tl.zeros((BLOCK_N * BLOCK_C, BLOCK_R), tl.float32)
    for start in range(0, blocks, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        mixing = _mixing(rows[None, :], block[:, None], blocks, key_0, key_1, C == 1)
        feature = block[None, :, None] * C + features
        is_inside = (samples < n) & (feature < dim) & (features < C)
        row_a = a_ptr + samples.to(tl.int64) * stride_an
        row_b = b_ptr + samples.to(tl.int64) * stride_bn
        z_a = tl.load(row_a + feature * stride_ad, mask=is_inside, other=0.0).to(tl.float32)
        z_b = tl.load(row_b + feature * stride_bd, mask=is_inside, other=0.0).to(tl.float32)
        z_a = tl.reshape(tl.permute(z_a, (0, 2, 1)), (BLOCK_N * BLOCK_C, BLOCK_B))
        z_b = tl.reshape(tl.permute(z_b, (0, 2, 1)), (BLOCK_N * BLOCK_C, BLOCK_B))
        y_a = tl.dot(z_a, mixing, y_a, input_precision=PRECISION)
        y_b = tl.dot(z_b, mixing, y_b, input_precision=PRECISION)
    sample = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None, None]
    row = (row_tile * BLOCK_R + tl.arange(0, BLOCK_R))[None, :, None]
    y_a = tl.permute(tl.reshape(y_a, (BLOCK_N, BLOCK_C, BLOCK_R)), (0, 2, 1))
    y_b = tl.permute(tl.reshape(y_b, (BLOCK_N, BLOCK_C, BLOCK_R)), (0, 2, 1))
    s, f = row // rows_per_slice, (row % rows_per_slice) * C + features
    is_kept = (s < slices) & (f < k) & (features < C)
    offset = (s.to(tl.int64) * n + sample) * k + f
    tl.store(y_a_ptr + offset, y_a, mask=is_kept & (sample < n))
    tl.store(y_b_ptr + offset, y_b, mask=is_kept & (sample < n))
    # Columns of the sums: mixtures (r) by features (c), one row of `sums` per tile and view.
    row = (row_tile * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    feature = tl.arange(0, BLOCK_C)[None, :]
    s, f = row // rows_per_slice, (row % rows_per_slice) * C + feature
    is_kept = (s < slices) & (f < k) & (feature < C)
    offset = (tile * 2 * slices + s) * k + f
    tl.store(sums_ptr + offset, tl.sum(y_a, 0), mask=is_kept)
    tl.store(sums_ptr + offset + slices * k, tl.sum(y_b, 0), mask=is_kept)


@triton.jit
def _project_backward_kernel(
    dy_ptr,
    keys_ptr,
    da_ptr,
    db_ptr,
    n,
    dim,
    blocks,
    k,
    slices,
    rows_per_slice,
    tiles_per_program,
    first_view,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dZ_n = A^T dY_n, (n, dim) contiguous, for BLOCK_B feature blocks, several tiles of samples and one view."""
    view = first_view + tl.program_id(2)
    block = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    key_0 = tl.load(keys_ptr).to(tl.uint32, bitcast=True)
    key_1 = tl.load(keys_ptr + 1).to(tl.uint32, bitcast=True)
    total = slices * rows_per_slice
    features = tl.arange(0, BLOCK_C)[None, :, None]
    first = tl.arange(0, BLOCK_R)
    mixing = _mixing(first[:, None], block[None, :], blocks, key_0, key_1, C == 1)
    for i in range(0, tiles_per_program):
        sample = (tl.program_id(1) * tiles_per_program + i) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None, None]
        grad = tl.zeros((BLOCK_N * BLOCK_C, BLOCK_B), tl.float32)
        for start in range(0, total, BLOCK_R):
            row = (start + tl.arange(0, BLOCK_R))[None, None, :]
            s, f = row // rows_per_slice, (row % rows_per_slice) * C + features
            is_inside = (row < total) & (f < k) & (features < C) & (sample < n)
            offset = ((view * slices + s).to(tl.int64) * n + sample) * k + f
            dy = tl.load(dy_ptr + offset, mask=is_inside, other=0.0)
            dy = tl.reshape(dy, (BLOCK_N * BLOCK_C, BLOCK_R))
            if total > BLOCK_R:  # one set of mixtures is drawn once for all samples
                mixing = _mixing((start + first)[:, None], block[None, :], blocks, key_0, key_1, C == 1)
            grad = tl.dot(dy, mixing, grad, input_precision=PRECISION)
        grad = tl.permute(tl.reshape(grad, (BLOCK_N, BLOCK_C, BLOCK_B)), (0, 2, 1))
        inner = tl.arange(0, BLOCK_C)[None, None, :]
        feature = block[None, :, None] * C + inner
        is_inside = (sample < n) & (feature < dim) & (inner < C)
        offset = sample.to(tl.int64) * dim + feature
        if view == 0:
            tl.store(da_ptr + offset, grad.to(da_ptr.dtype.element_ty), mask=is_inside)
        else:
            tl.store(db_ptr + offset, grad.to(db_ptr.dtype.element_ty), mask=is_inside)
