"""Gram matrices of standardised features for fewer samples than features: half the tiles, rows made on the fly.

U stacks the contrasts (a + b - 2 mean) / (std sqrt 2) and (a - b) / (std sqrt 2) of two views, or is the one
standardised view; K = U U^T. The standardised rows are never stored. The gradient, derived in :mod:`mmi_loss.ops.gram`:

    dU = (G + G^T) U,   t = sum_n dU U / (V N),   dU0 = (dU - U t) / std,   centred for the first contrast.
"""

# ruff: noqa: N803  (constexpr arguments are written in capitals, Triton's habit)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _statistics_kernel(
    a_ptr,
    b_ptr,
    mean_ptr,
    inverse_std_ptr,
    n,
    dim,
    stride_an,
    stride_ad,
    stride_bn,
    stride_bd,
    TWO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean and inverse standard deviation of BLOCK_D features over one view or two, in two passes."""
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = column < dim
    count = (2.0 if TWO else 1.0) * n
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, n, BLOCK_N):
        sample = (start + tl.arange(0, BLOCK_N)[:, None]).to(tl.int64)
        is_inside = (sample < n) & is_column[None, :]
        x = tl.load(a_ptr + sample * stride_an + column[None, :] * stride_ad, mask=is_inside, other=0.0).to(tl.float32)
        if TWO:
            x += tl.load(b_ptr + sample * stride_bn + column[None, :] * stride_bd, mask=is_inside, other=0.0).to(
                tl.float32
            )
        total += tl.sum(x, 0)
    mean = total / count
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, n, BLOCK_N):
        sample = (start + tl.arange(0, BLOCK_N)[:, None]).to(tl.int64)
        is_inside = (sample < n) & is_column[None, :]
        x = tl.load(a_ptr + sample * stride_an + column[None, :] * stride_ad, mask=is_inside, other=0.0).to(tl.float32)
        x = tl.where(is_inside, x - mean[None, :], 0.0)
        squares += tl.sum(x * x, 0)
        if TWO:
            x = tl.load(b_ptr + sample * stride_bn + column[None, :] * stride_bd, mask=is_inside, other=0.0).to(
                tl.float32
            )
            x = tl.where(is_inside, x - mean[None, :], 0.0)
            squares += tl.sum(x * x, 0)
    variance, floor = squares / count, 1.9073486328125e-06 * mean
    floor = floor * floor + 3.5699769e-29
    variance = tl.where(variance <= floor, float("inf"), variance + floor)
    tl.store(mean_ptr + column, mean, mask=is_column)
    tl.store(inverse_std_ptr + column, tl.rsqrt(variance), mask=is_column)


@triton.jit
def _rows(
    a_ptr,
    b_ptr,
    contrast,
    sample,
    column,
    is_inside,
    mean,
    inverse_std,
    stride_an,
    stride_ad,
    stride_bn,
    stride_bd,
    TWO: tl.constexpr,
):
    """Standardised rows of one contrast, zero outside."""
    x = tl.load(a_ptr + sample * stride_an + column * stride_ad, mask=is_inside, other=0.0).to(tl.float32)
    if TWO:
        b = tl.load(b_ptr + sample * stride_bn + column * stride_bd, mask=is_inside, other=0.0).to(tl.float32)
        is_sum = contrast == 0
        # Centred before they are added: where the mean is large, their sum would be rounded to its precision.
        x = tl.where(is_sum, (x - mean) + (b - mean), x - b) * 0.7071067811865476
    else:
        x = x - mean
    return tl.where(is_inside, x * inverse_std, 0.0)


@triton.jit
def _gram_kernel(
    a_ptr,
    b_ptr,
    mean_ptr,
    inverse_std_ptr,
    gram_ptr,
    n,
    dim,
    tiles,
    stride_an,
    stride_ad,
    stride_bn,
    stride_bd,
    TWO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A pair of row tiles, i >= j, of K (V n, V n), both triangles; a tile lies in one contrast."""
    pair = tl.program_id(0)
    i = ((tl.sqrt(8.0 * pair + 1.0) - 1.0) / 2.0).to(tl.int32)
    i += ((i + 1) * (i + 2) // 2 <= pair).to(tl.int32) - (i * (i + 1) // 2 > pair).to(tl.int32)
    j = pair - i * (i + 1) // 2
    sample_i = (i % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample_j = (j % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    product = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for start in range(0, dim, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mean = tl.load(mean_ptr + column, mask=column < dim, other=0.0)[None, :]
        inverse_std = tl.load(inverse_std_ptr + column, mask=column < dim, other=0.0)[None, :]
        in_i, in_j = (
            (sample_i < n)[:, None] & (column < dim)[None, :],
            (sample_j < n)[:, None] & (column < dim)[None, :],
        )
        rows_i = _rows(
            a_ptr, b_ptr, i // tiles, sample_i[:, None].to(tl.int64), column[None, :], in_i, mean, inverse_std,
            stride_an, stride_ad, stride_bn, stride_bd, TWO,
        )  # fmt: skip
        rows_j = _rows(
            a_ptr, b_ptr, j // tiles, sample_j[:, None].to(tl.int64), column[None, :], in_j, mean, inverse_std,
            stride_an, stride_ad, stride_bn, stride_bd, TWO,
        )  # fmt: skip
        product = tl.dot(rows_i, tl.trans(rows_j), product, input_precision=PRECISION)
    size = 2 * n if TWO else n
    row_i, row_j = ((i // tiles) * n + sample_i).to(tl.int64), ((j // tiles) * n + sample_j).to(tl.int64)
    is_inside = (sample_i < n)[:, None] & (sample_j < n)[None, :]
    tl.store(gram_ptr + row_i[:, None] * size + row_j[None, :], product, mask=is_inside)
    if i != j:
        is_inside = (sample_j < n)[:, None] & (sample_i < n)[None, :]
        tl.store(gram_ptr + row_j[:, None] * size + row_i[None, :], tl.trans(product), mask=is_inside)


@triton.jit
def _gram_rows_gradient(
    a_ptr, b_ptr, grad_ptr, contrast, sample, column, mean, inverse_std, n, dim,
    stride_an, stride_ad, stride_bn, stride_bd,
    TWO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of dU = G U (G symmetric) for BLOCK_N samples of one contrast and BLOCK_D columns."""
    size = 2 * n if TWO else n
    gradient = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    row = (contrast * n + sample)[:, None].to(tl.int64)
    for other in tl.static_range(2 if TWO else 1):
        for start in range(0, n, BLOCK_N):
            inner = start + tl.arange(0, BLOCK_N)
            is_inside = (inner < n)[:, None] & (column < dim)[None, :]
            rows = _rows(
                a_ptr, b_ptr, other, inner[:, None].to(tl.int64), column[None, :], is_inside, mean, inverse_std,
                stride_an, stride_ad, stride_bn, stride_bd, TWO,
            )  # fmt: skip
            is_entry = (sample < n)[:, None] & (inner < n)[None, :]
            entry = tl.load(grad_ptr + row * size + other * n + inner[None, :], mask=is_entry, other=0.0)
            gradient = tl.dot(entry, rows, gradient, input_precision=PRECISION)
    return gradient


@triton.jit
def _gram_backward_kernel(
    a_ptr,
    b_ptr,
    mean_ptr,
    inverse_std_ptr,
    grad_ptr,
    da_ptr,
    db_ptr,
    n,
    dim,
    stride_an,
    stride_ad,
    stride_bn,
    stride_bd,
    TWO: tl.constexpr,
    NEED_A: tl.constexpr,
    NEED_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of BLOCK_D columns of the views, contiguous (n, dim), from the symmetric G = dK + dK^T.

    Two passes over the samples: the columns' sums, then the gradient itself; dU is recomputed, not stored.
    """
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = column < dim
    mean = tl.load(mean_ptr + column, mask=is_column, other=0.0)[None, :]
    inverse_std = tl.load(inverse_std_ptr + column, mask=is_column, other=0.0)[None, :]
    aligned = tl.zeros((BLOCK_D,), tl.float32)
    first_sum = tl.zeros((BLOCK_D,), tl.float32)
    row_sum = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, n, BLOCK_N):
        sample = start + tl.arange(0, BLOCK_N)
        is_inside = (sample < n)[:, None] & is_column[None, :]
        for contrast in tl.static_range(2 if TWO else 1):
            gradient = _gram_rows_gradient(
                a_ptr, b_ptr, grad_ptr, contrast, sample, column, mean, inverse_std, n, dim,
                stride_an, stride_ad, stride_bn, stride_bd, TWO, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip
            rows = _rows(
                a_ptr, b_ptr, contrast, sample[:, None].to(tl.int64), column[None, :], is_inside, mean, inverse_std,
                stride_an, stride_ad, stride_bn, stride_bd, TWO,
            )  # fmt: skip
            aligned += tl.sum(gradient * rows, 0)
            if contrast == 0:
                first_sum += tl.sum(gradient, 0)
                row_sum += tl.sum(rows, 0)
    aligned = aligned / (2.0 * n if TWO else n)
    # The mean of the first contrast's dU - U t, which the mean's own gradient takes away.
    centre = (first_sum - aligned * row_sum) / n
    for start in range(0, n, BLOCK_N):
        sample = start + tl.arange(0, BLOCK_N)
        is_inside = (sample < n)[:, None] & is_column[None, :]
        first = _gram_rows_gradient(
            a_ptr, b_ptr, grad_ptr, 0, sample, column, mean, inverse_std, n, dim,
            stride_an, stride_ad, stride_bn, stride_bd, TWO, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
        rows = _rows(
            a_ptr, b_ptr, 0, sample[:, None].to(tl.int64), column[None, :], is_inside, mean, inverse_std,
            stride_an, stride_ad, stride_bn, stride_bd, TWO,
        )  # fmt: skip
        first = (first - rows * aligned[None, :] - centre[None, :]) * inverse_std
        offset = sample[:, None].to(tl.int64) * dim + column[None, :]
        if TWO:
            second = _gram_rows_gradient(
                a_ptr, b_ptr, grad_ptr, 1, sample, column, mean, inverse_std, n, dim,
                stride_an, stride_ad, stride_bn, stride_bd, TWO, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip
            rows = _rows(
                a_ptr, b_ptr, 1, sample[:, None].to(tl.int64), column[None, :], is_inside, mean, inverse_std,
                stride_an, stride_ad, stride_bn, stride_bd, TWO,
            )  # fmt: skip
            second = (second - rows * aligned[None, :]) * inverse_std
            if NEED_B:
                db = (first - second) * 0.7071067811865476
                tl.store(db_ptr + offset, db.to(db_ptr.dtype.element_ty), mask=is_inside)
            first = (first + second) * 0.7071067811865476
        if NEED_A:
            tl.store(da_ptr + offset, first.to(da_ptr.dtype.element_ty), mask=is_inside)
