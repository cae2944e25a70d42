"""Gram matrix of standardised features for fewer samples than features: rows made on the fly, never stored.

U stacks the sums a + b - 2 mean and the differences a - b of two views (N, D) over the standard deviations; K = U U^T.
With G = dL/dK + (dL/dK)^T the gradient is

    dU = G U,   t = sum_n dU U / 4N,   da, db = (dU - U t) / std, that of the sum plus and minus that of the difference,

where t is the way through the variances, sum_n U^2 / 4N before standardisation. The mean enters as a constant: the rows
of U sum to zero, and so do those of dU.
"""

# ruff: noqa: N803  (constexpr arguments are written in capitals, Triton's habit)

import triton
import triton.language as tl

from mmi_loss.ops.triton.factor import _dot, _inverse_std
from mmi_loss.ops.triton.moments import _centred, _first_row, _load, _store


@triton.jit
def _statistics_kernel(
    a_ptr, b_ptr, statistics_ptr, smallest, n, dim, stride_an, stride_ad, stride_bn, stride_bd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """First sample, mean relative to it and 1 / std, (3, dim), of BLOCK_D features over both views, in two passes."""
    a, b = (a_ptr, stride_an, stride_ad), (b_ptr, stride_bn, stride_bd)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    shift = _first_row(a, column, dim)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    for is_second in tl.static_range(2):
        total = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(0, n, BLOCK_N):
            sample = start + tl.arange(0, BLOCK_N)[:, None]
            is_inside = (sample < n) & (column < dim)[None, :]
            x_a = _centred(_load(a, sample, column[None, :], is_inside), shift, mean, is_inside)
            x_b = _centred(_load(b, sample, column[None, :], is_inside), shift, mean, is_inside)
            total += tl.sum(x_a * x_a + x_b * x_b if is_second else x_a + x_b, 0)
        total = total / (2.0 * n)
        mean = mean if is_second else total
    tl.store(statistics_ptr + column, shift, mask=column < dim)
    tl.store(statistics_ptr + dim + column, mean, mask=column < dim)
    tl.store(statistics_ptr + 2 * dim + column, _inverse_std(total, 0.0, 0.0, smallest), mask=column < dim)


@triton.jit
def _rows(a, b, statistics_ptr, sample, column, n, dim):
    """Rows of U for some samples: sums, differences, and 1 / std; zero outside."""
    is_inside = (sample < n)[:, None] & (column < dim)[None, :]
    shift = tl.load(statistics_ptr + column, mask=column < dim, other=0.0)
    mean = tl.load(statistics_ptr + dim + column, mask=column < dim, other=0.0)
    inverse_std = tl.load(statistics_ptr + 2 * dim + column, mask=column < dim, other=0.0)[None, :]
    x_a = _load(a, sample[:, None], column[None, :], is_inside)
    x_b = _load(b, sample[:, None], column[None, :], is_inside)
    # Centred before they are added: where the mean is large, their sum would be rounded to its precision.
    sums = _centred(x_a, shift, mean, is_inside) + _centred(x_b, shift, mean, is_inside)
    return sums * inverse_std, (x_a - x_b) * inverse_std, inverse_std


@triton.jit
def _gram_kernel(
    a_ptr, b_ptr, statistics_ptr, gram_ptr, n, dim, stride_an, stride_ad, stride_bn, stride_bd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The products of two tiles of samples, i >= j, in the lower triangle of K (2 n, 2 n): Cholesky reads no other."""
    tiles = tl.cdiv(n, BLOCK_N)
    i, j = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if i < j:
        return
    a, b = (a_ptr, stride_an, stride_ad), (b_ptr, stride_bn, stride_bd)
    sample_i, sample_j = i * BLOCK_N + tl.arange(0, BLOCK_N), j * BLOCK_N + tl.arange(0, BLOCK_N)
    zeros = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    of_sums, of_differences, mixed_ij, mixed_ji = zeros, zeros, zeros, zeros
    for start in range(0, dim, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        sum_i, difference_i, _ = _rows(a, b, statistics_ptr, sample_i, column, n, dim)
        sum_j, difference_j, _ = _rows(a, b, statistics_ptr, sample_j, column, n, dim)
        of_sums = _dot(sum_i, tl.trans(sum_j), of_sums)
        of_differences = _dot(difference_i, tl.trans(difference_j), of_differences)
        mixed_ij = _dot(difference_i, tl.trans(sum_j), mixed_ij)
        mixed_ji = _dot(difference_j, tl.trans(sum_i), mixed_ji)
    gram = (gram_ptr, 2 * n, 1)
    row, column = sample_i[:, None], sample_j[None, :]
    is_inside = (row < n) & (column < n)
    _store(gram, row, column, is_inside, of_sums)
    _store(gram, n + row, column, is_inside, mixed_ij)
    _store(gram, n + row, n + column, is_inside, of_differences)
    row, column = sample_j[:, None], sample_i[None, :]
    _store(gram, n + row, column, (row < n) & (column < n) & (i != j), mixed_ji)


@triton.jit
def _gram_backward_kernel(
    a_ptr, b_ptr, statistics_ptr, grad_ptr, upstream_ptr, da_ptr, db_ptr,
    n, dim, stride_an, stride_ad, stride_bn, stride_bd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_D columns of the views, contiguous (n, dim), from the symmetric G (2 n, 2 n).

    Two passes over the samples: first t, then the gradient itself; dU is computed twice, not stored.
    """
    a, b = (a_ptr, stride_an, stride_ad), (b_ptr, stride_bn, stride_bd)
    grad = (grad_ptr, 2 * n, 1)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    upstream = tl.load(upstream_ptr)
    t = tl.zeros((BLOCK_D,), tl.float32)
    for is_second in tl.static_range(2):
        for start in range(0, n, BLOCK_N):
            sample = start + tl.arange(0, BLOCK_N)
            row = sample[:, None]
            zeros = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            d_sums, d_differences = zeros, zeros
            for inner_start in range(0, n, BLOCK_N):
                inner = inner_start + tl.arange(0, BLOCK_N)
                sums, differences, _ = _rows(a, b, statistics_ptr, inner, column, n, dim)
                other, is_entry = inner[None, :], (row < n) & (inner < n)[None, :]
                d_sums = _dot(_load(grad, row, other, is_entry), sums, d_sums)
                d_sums = _dot(_load(grad, row, n + other, is_entry), differences, d_sums)
                d_differences = _dot(_load(grad, n + row, other, is_entry), sums, d_differences)
                d_differences = _dot(_load(grad, n + row, n + other, is_entry), differences, d_differences)
            sums, differences, inverse_std = _rows(a, b, statistics_ptr, sample, column, n, dim)
            if is_second:
                of_sums = (d_sums - sums * t[None, :]) * inverse_std * upstream
                of_differences = (d_differences - differences * t[None, :]) * inverse_std * upstream
                is_inside = (row < n) & (column < dim)[None, :]
                if da_ptr is not None:
                    _store((da_ptr, dim, 1), row, column[None, :], is_inside, of_sums + of_differences)
                if db_ptr is not None:
                    _store((db_ptr, dim, 1), row, column[None, :], is_inside, of_sums - of_differences)
            else:
                t += tl.sum(d_sums * sums + d_differences * differences, 0) / (4.0 * n)
