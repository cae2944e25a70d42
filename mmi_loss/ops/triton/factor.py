"""One program per matrix: standardise, add the noise floor, log det, inverse, and the gradient's small matrices.

A = I + s M s / ridge with s = diag(v)^{-1/2} and v the diagonal of the total moment plus its rounding floor. The matrix
stays in registers while it is swept (symmetric Gauss-Jordan): sweeping the pivots P replaces

    A_PP by -A_PP^-1,   A_iP by A_iP A_PP^-1,   A_ij by A_ij - A_iP A_PP^-1 A_Pj,

and after all of them -A^-1 stands there. The scalar pivots are those of the Cholesky factorisation: log det A is the
sum of their logarithms, and A is positive definite if and only if all are positive. Pivots are taken in pairs on
blocks of BLOCK_B, whose panels are applied to the rest as one matrix product.

With c = dL/dlog det the gradient of the loss with respect to M is c A^-1 (s s^T / ridge) less, on the diagonal of the
total moment, sum_j c_j (A_j^-1 (A_j - I))_ii / v_i = sum_j c_j (1 - (A_j^-1)_ii) / v_i, the way through the variances.
"""

# ruff: noqa: N803  (constexpr arguments are written in capitals, Triton's habit)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sweep_block(block, BLOCK_B: tl.constexpr):
    """A symmetric positive definite block to its inverse and its log det; NaN where a pivot is not positive."""
    index = tl.arange(0, BLOCK_B)
    row, column = index[:, None], index[None, :]
    log_det = 0.0
    for first in range(0, BLOCK_B, 2):
        second = first + 1
        # The pair's columns, once along the rows and once along the columns.
        u0 = tl.sum(tl.where(column == first, block, 0.0), 1)
        u1 = tl.sum(tl.where(column == second, block, 0.0), 1)
        w0 = tl.sum(tl.where(row == first, block, 0.0), 0)
        w1 = tl.sum(tl.where(row == second, block, 0.0), 0)
        d0 = tl.sum(tl.where(index == first, u0, 0.0), 0)
        cross = tl.sum(tl.where(index == second, u0, 0.0), 0)
        # [[d0, cross], [cross, .]] = L diag(d0, d1) L^T with L_10 = slope
        slope = cross / d0
        d1 = tl.sum(tl.where(index == second, u1, 0.0), 0) - slope * cross
        is_definite = (d0 > 0.0) & (d1 > 0.0)
        log_det += tl.where(is_definite, tl.log(d0) + tl.log(d1), float("nan"))
        # V = U [[d0, cross], [cross, .]]^-1 for the rows outside the pair
        u1, w1 = u1 - slope * u0, w1 - slope * w0
        v1, x1 = u1 / d1, w1 / d1
        v0, x0 = u0 / d0 - slope * v1, w0 / d0 - slope * x1
        swept = block - (u0 / d0)[:, None] * w0[None, :] - v1[:, None] * w1[None, :]
        swept = tl.where(column == first, v0[:, None], tl.where(column == second, v1[:, None], swept))
        swept = tl.where(row == first, x0[None, :], tl.where(row == second, x1[None, :], swept))
        off_diagonal = slope / d1
        is_pair = ((row == first) | (row == second)) & ((column == first) | (column == second))
        inverse = tl.where(row == first, -1.0 / d0 - slope * off_diagonal, -1.0 / d1)
        swept = tl.where(is_pair, tl.where(row == column, inverse, off_diagonal), swept)
        block = swept
    return -block, log_det


@triton.jit
def _factor_kernel(
    moments_ptr,
    mean_ptr,
    values_ptr,
    grad_ptr,
    diagonal_ptr,
    loss_ptr,
    counter_ptr,
    scratch_ptr,
    k,
    slices,
    chunks,
    ridge,
    CONTENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Log det, gradient matrix and diagonal of matrix (which, s); the last program to finish adds up the loss."""
    which, s = tl.program_id(0) // slices, tl.program_id(0) % slices
    matrices = tl.num_programs(0)
    index = tl.arange(0, BLOCK_K)
    row, column = index[:, None], index[None, :]
    is_inside = (row < k) & (column < k)
    matrix = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    variance_row = tl.zeros((BLOCK_K, 1), tl.float32)
    variance_column = tl.zeros((1, BLOCK_K), tl.float32)
    for c in range(0, chunks):
        moment_ptr = moments_ptr + (c * matrices + which * slices + s) * k * k
        total_ptr = moments_ptr + (c * matrices + s) * k * k
        matrix += tl.load(moment_ptr + row * k + column, mask=is_inside, other=0.0)
        variance_row += tl.load(total_ptr + row * (k + 1), mask=row < k, other=0.0)
        variance_column += tl.load(total_ptr + column * (k + 1), mask=column < k, other=0.0)
    # What rounding alone gives a constant feature: (16 eps mean)^2 + tiny^(3/4). Where that is all there is, the
    # variance is infinite: see covariance.add_variance_floor.
    floor_row = 1.9073486328125e-06 * tl.load(mean_ptr + (slices + s) * k + row, mask=row < k, other=1.0)
    floor_column = 1.9073486328125e-06 * tl.load(mean_ptr + (slices + s) * k + column, mask=column < k, other=1.0)
    floor_row = floor_row * floor_row + 3.5699769e-29
    floor_column = floor_column * floor_column + 3.5699769e-29
    variance_row = tl.where(variance_row <= floor_row, float("inf"), variance_row + floor_row)
    variance_column = tl.where(variance_column <= floor_column, float("inf"), variance_column + floor_column)
    inverse_row, inverse_column = tl.rsqrt(variance_row), tl.rsqrt(variance_column)
    swept = matrix * (inverse_row * (inverse_column / ridge)) + tl.where(row == column, 1.0, 0.0)
    # Set aside: a second matrix of weights would not fit beside the first in registers.
    diagonal_ptr += tl.program_id(0) * k
    tl.store(diagonal_ptr + row, inverse_row, mask=row < k)

    panel = tl.arange(0, BLOCK_B)
    panel_ptr = scratch_ptr + tl.program_id(0) * 2 * BLOCK_K * BLOCK_B
    update_ptr = panel_ptr + BLOCK_K * BLOCK_B
    log_det = 0.0
    for start in range(0, BLOCK_K, BLOCK_B):
        in_row, in_column = (row >= start) & (row < start + BLOCK_B), (column >= start) & (column < start + BLOCK_B)
        tl.store(panel_ptr + row * BLOCK_B + column - start, swept, mask=in_column & (row < BLOCK_K))
        tl.debug_barrier()
        block = tl.load(panel_ptr + (start + panel[:, None]) * BLOCK_B + panel[None, :])
        inverse, block_log_det = _sweep_block(block, BLOCK_B)
        log_det += block_log_det
        outside = tl.load(panel_ptr + row * BLOCK_B + panel[None, :])
        outside = tl.where(in_row, 0.0, outside)
        update = tl.dot(outside, inverse, input_precision=PRECISION)
        swept = tl.dot(-update, tl.trans(outside), swept, input_precision=PRECISION)
        not_in_row = (row < start) | (row >= start + BLOCK_B)
        tl.store(update_ptr + row * BLOCK_B + panel[None, :], update, mask=not_in_row)
        tl.store(update_ptr + (start + panel[:, None]) * BLOCK_B + panel[None, :], -inverse)
        tl.debug_barrier()
        new_columns = tl.load(update_ptr + row * BLOCK_B + column - start, mask=in_column & (row < BLOCK_K), other=0.0)
        new_rows = tl.load(update_ptr + column * BLOCK_B + row - start, mask=in_row & (column < BLOCK_K), other=0.0)
        swept = tl.where(in_column, new_columns, tl.where(in_row, new_rows, swept))
        tl.debug_barrier()
    # The entropies' weights in 2 I are (1, -1) for content, (2, -1, -1) for exchangeable views; the loss is -I.
    coefficient = tl.where(which == 0, -0.5 if CONTENT else -1.0, 0.5) / slices
    # 0 * log_det carries a failed factorisation into the gradient, where a GradScaler looks.
    poison = 0.0 * log_det
    inverse_row = tl.load(diagonal_ptr + row, mask=row < k, other=0.0)
    inverse_column = tl.load(diagonal_ptr + column, mask=column < k, other=0.0)
    inverse_std = tl.load(diagonal_ptr + index, mask=index < k, other=0.0)
    out = grad_ptr + tl.program_id(0) * k * k + row * k + column
    tl.store(out, -coefficient * swept * (inverse_row * (inverse_column / ridge)) + poison, mask=is_inside)
    swept_diagonal = tl.sum(tl.where(row == column, swept, 0.0), 1)
    grad_variance = coefficient * (1.0 + swept_diagonal) * inverse_std * inverse_std + poison
    tl.debug_barrier()
    tl.store(diagonal_ptr + index, grad_variance, mask=index < k)

    tl.store(values_ptr + tl.program_id(0), log_det)
    tl.debug_barrier()
    # The first launch has set the counter to zero. Acquire and release order the programs' stores of their values.
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == matrices - 1:
        loss = 0.0
        for i in range(0, matrices):  # in a fixed order: the same bits whoever comes last
            value = tl.load(values_ptr + i, cache_modifier=".cg")
            loss += tl.where(i < slices, -0.5 if CONTENT else -1.0, 0.5) / slices * value
        tl.store(loss_ptr, loss)
