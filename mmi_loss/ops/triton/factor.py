"""One program per matrix: standardise, add the noise floor, log det, inverse, and the gradient's small matrices.

A = I + s M s / noise with s = diag(v)^{-1/2} and v the diagonal of the total moment. The matrix stays in registers
while it is swept (symmetric Gauss-Jordan): sweeping the pivots P replaces

    A_PP by -A_PP^-1,   A_iP by A_iP A_PP^-1,   A_ij by A_ij - A_iP A_PP^-1 A_Pj,

and after all of them -A^-1 stands there. The scalar pivots are those of the Cholesky factorisation: log det A is the
sum of their logarithms, and A is positive definite if and only if all are positive. Pivots are taken in pairs on
blocks of BLOCK_B, whose panels are applied to the rest as one matrix product.

With c = dL/dlog det the gradient of the loss with respect to M is c A^-1 (s s^T / noise) less, on the diagonal of the
total moment, sum_j c_j (A_j^-1 (A_j - I))_ii s_i^2 = sum_j c_j (1 - (A_j^-1)_ii) s_i^2, the way through the variances.
"""

# ruff: noqa: N803  (constexpr arguments are written in capitals, Triton's habit)

import triton
import triton.language as tl


@triton.jit
def _dot(x, y, accumulator):
    """X Y plus the accumulator, by three products of two tf32 terms each: 21 of float32's 23 bits, on tensor cores."""
    return tl.dot(x, y, accumulator, input_precision="tf32x3")


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
        log_det += tl.where((d0 > 0.0) & (d1 > 0.0), tl.log(d0) + tl.log(d1), float("nan"))
        # V = U [[d0, cross], [cross, .]]^-1 for the rows outside the pair
        u1, w1 = u1 - slope * u0, w1 - slope * w0
        v1, x1 = u1 / d1, w1 / d1
        v0, x0 = u0 / d0 - slope * v1, w0 / d0 - slope * x1
        block = block - (u0 / d0)[:, None] * w0[None, :] - v1[:, None] * w1[None, :]
        block = tl.where(column == first, v0[:, None], tl.where(column == second, v1[:, None], block))
        block = tl.where(row == first, x0[None, :], tl.where(row == second, x1[None, :], block))
        off_diagonal = slope / d1
        is_pair = ((row == first) | (row == second)) & ((column == first) | (column == second))
        inverse = tl.where(row == first, -1.0 / d0 - slope * off_diagonal, -1.0 / d1)
        block = tl.where(is_pair, tl.where(row == column, inverse, off_diagonal), block)
    return -block, log_det


@triton.jit
def _inverse_std(variance, location, resolution, smallest):
    """The rule of :func:`mmi_loss.ops.covariance.inverse_std`."""
    rounding = location * resolution
    return tl.where(variance <= rounding * rounding + smallest, 0.0, tl.sqrt(variance) / variance)


@triton.jit
def _factor_kernel(
    moments_ptr, centre_ptr, log_dets_ptr, noise_ptr, grad_ptr, diagonal_ptr, loss_ptr, state_ptr, scratch_ptr,
    k, chunks, factor, least, resolution, smallest, total_coefficient, within_coefficient,
    BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Log det, gradient and diagonal of one matrix; the last program to finish adds up coefficients times log dets."""
    matrices, this = tl.num_programs(0), tl.program_id(0)
    s = this % (matrices // 2)
    index = tl.arange(0, BLOCK_K)
    row, column = index[:, None], index[None, :]
    is_inside = (row < k) & (column < k)
    matrix = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    variance, within = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for c in range(0, chunks):
        moment_ptr, total_ptr = moments_ptr + (c * matrices + this) * k * k, moments_ptr + (c * matrices + s) * k * k
        matrix += tl.load(moment_ptr + row * k + column, mask=is_inside, other=0.0)
        variance += tl.load(total_ptr + index * (k + 1), mask=index < k, other=0.0)
        within_ptr = total_ptr + matrices // 2 * k * k
        within += tl.load(within_ptr + index * (k + 1), mask=index < k, other=0.0)
    location = tl.load(centre_ptr + s * k + index, mask=index < k, other=0.0)
    inverse_std = _inverse_std(variance, location, resolution, smallest)
    # Both programs of a slice find the same: what differs between views, spread over directions.
    noise = tl.maximum(factor * tl.sum(within * inverse_std * inverse_std, 0), least)
    tl.store(noise_ptr + s, noise)
    swept = matrix * inverse_std[:, None] * (inverse_std[None, :] / noise) + tl.where(row == column, 1.0, 0.0)
    # Set aside: they would not fit beside the matrix in registers.
    diagonal_ptr += this * k
    tl.store(diagonal_ptr + index, inverse_std, mask=index < k)

    panel = tl.arange(0, BLOCK_B)
    panel_ptr = scratch_ptr + this * 2 * BLOCK_K * BLOCK_B
    update_ptr = panel_ptr + BLOCK_K * BLOCK_B
    log_det = 0.0
    for start in range(0, BLOCK_K, BLOCK_B):
        in_row, in_column = (row >= start) & (row < start + BLOCK_B), (column >= start) & (column < start + BLOCK_B)
        tl.store(panel_ptr + row * BLOCK_B + column - start, swept, mask=in_column & (row < BLOCK_K))
        tl.debug_barrier()
        block = tl.load(panel_ptr + (start + panel[:, None]) * BLOCK_B + panel[None, :])
        inverse, block_log_det = _sweep_block(block, BLOCK_B)
        log_det += block_log_det
        outside = tl.where(in_row, 0.0, tl.load(panel_ptr + row * BLOCK_B + panel[None, :]))
        update = _dot(outside, inverse, tl.zeros_like(outside))
        swept = _dot(-update, tl.trans(outside), swept)
        not_in_row = (row < start) | (row >= start + BLOCK_B)
        tl.store(update_ptr + row * BLOCK_B + panel[None, :], update, mask=not_in_row)
        tl.store(update_ptr + (start + panel[:, None]) * BLOCK_B + panel[None, :], -inverse)
        tl.debug_barrier()
        new_columns = tl.load(update_ptr + row * BLOCK_B + column - start, mask=in_column & (row < BLOCK_K), other=0.0)
        new_rows = tl.load(update_ptr + column * BLOCK_B + row - start, mask=in_row & (column < BLOCK_K), other=0.0)
        swept = tl.where(in_column, new_columns, tl.where(in_row, new_rows, swept))
        tl.debug_barrier()

    coefficient = tl.where(this == s, total_coefficient, within_coefficient)
    # 0 * log_det carries a failed factorisation into the gradient, where a GradScaler looks.
    poison = 0.0 * log_det
    inverse_row = tl.load(diagonal_ptr + row, mask=row < k, other=0.0)
    inverse_column = tl.load(diagonal_ptr + column, mask=column < k, other=0.0)
    inverse_std = tl.load(diagonal_ptr + index, mask=index < k, other=0.0)
    grad = -coefficient * swept * (inverse_row * (inverse_column / noise)) + poison
    tl.store(grad_ptr + this * k * k + row * k + column, grad, mask=is_inside)
    tl.debug_barrier()
    of_diagonal = 1.0 + tl.sum(tl.where(row == column, swept, 0.0), 1)
    tl.store(diagonal_ptr + index, coefficient * of_diagonal * inverse_std * inverse_std + poison, mask=index < k)

    tl.store(log_dets_ptr + this, log_det)
    tl.debug_barrier()
    # The first launch has counted no program yet. Acquire and release order the programs' stores of their log dets.
    if tl.atomic_add(state_ptr + 1, 1, sem="acq_rel", scope="gpu") == matrices - 1:
        loss = 0.0
        for i in range(0, matrices):  # in a fixed order: the same bits whoever comes last
            value = tl.load(log_dets_ptr + i, cache_modifier=".cg")
            loss += tl.where(i < matrices // 2, total_coefficient, within_coefficient) * value
        tl.store(loss_ptr, loss)
