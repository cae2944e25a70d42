"""Second moments of two views about their mean, and the gradient: half the tiles, centring fused, float32 sums.

With a, b the centred views (N, k) and G_j = dL/dM_j symmetric,

    total       T = (a^T a + b^T b) / 2N      da += a G_T / N,        db += b G_T / N
    sum         B = (a + b)^T (a + b) / 2N    da += (a + b) G_B / N,  db += (a + b) G_B / N
    difference  W = (a - b)^T (a - b) / 2N    da += (a - b) G_W / N,  db -= (a - b) G_W / N
    joint       J = [a b]^T [a b] / N         [da db] = 2 [a b] G_J / N

W is formed from differences, so it is accurate where the views nearly agree. The mean enters as a constant: moments
about it are stationary in it. For the joint matrix each view has its own mean, for the others they share one.

Views that come as they are given (SHIFTED) are taken relative to their first sample: those differences are small and
nearly exact, and so is their mean, where a mean of the numbers themselves would be rounded to their precision.
"""

# ruff: noqa: N803  (constexpr arguments are written in capitals, Triton's habit)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _shifts(a_ptr, b_ptr, column, in_a, in_b, stride_ak, stride_bk, JOINT: tl.constexpr):
    """What is taken off both views: the first sample, of each view or of the first for both."""
    shift_a = tl.load(a_ptr + column * stride_ak, mask=in_a, other=0.0).to(tl.float32)
    if JOINT:
        return shift_a, tl.load(b_ptr + column * stride_bk, mask=in_b, other=0.0).to(tl.float32)
    else:
        return shift_a, shift_a


@triton.jit
def _column_sums_kernel(
    a_ptr,
    b_ptr,
    sums_ptr,
    counter_ptr,
    n,
    k,
    stride_an,
    stride_ak,
    stride_bn,
    stride_bk,
    JOINT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over BLOCK_N shifted samples of each view, (tiles, 2, k): the first launch where nothing is projected."""
    tile = tl.program_id(0)
    if (tile == 0) & (tl.program_id(1) == 0):
        tl.store(counter_ptr, 0)
    sample = (tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]).to(tl.int64)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_inside = (sample < n) & (column[None, :] < k)
    a = tl.load(a_ptr + sample * stride_an + column[None, :] * stride_ak, mask=is_inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + sample * stride_bn + column[None, :] * stride_bk, mask=is_inside, other=0.0).to(tl.float32)
    shift_a, shift_b = _shifts(a_ptr, b_ptr, column, column < k, column < k, stride_ak, stride_bk, JOINT)
    a = tl.where(is_inside, a - shift_a[None, :], 0.0)
    b = tl.where(is_inside, b - shift_b[None, :], 0.0)
    tl.store(sums_ptr + (tile * 2) * k + column, tl.sum(a, 0), mask=column < k)
    tl.store(sums_ptr + (tile * 2 + 1) * k + column, tl.sum(b, 0), mask=column < k)


@triton.jit
def _column_mean(sums_ptr, view, column, is_column, tiles, k, slices, s, BLOCK_P: tl.constexpr):
    """The sum over tiles of the columns' sums (tiles, 2, S, k) in one view."""
    total = tl.zeros(column.shape, tl.float32)
    for start in range(0, tiles, BLOCK_P):
        tile = start + tl.arange(0, BLOCK_P)[:, None]
        offset = ((tile * 2 + view[None, :]) * slices + s) * k + column[None, :]
        total += tl.sum(tl.load(sums_ptr + offset, mask=(tile < tiles) & is_column[None, :], other=0.0), 0)
    return total


@triton.jit
def _load_view(ptr, sample, column, is_inside, shift, mean, stride_n, stride_k):
    """Shifted and centred samples of one view, float32; zero outside."""
    x = tl.load(ptr + sample * stride_n + column[None, :] * stride_k, mask=is_inside, other=0.0).to(tl.float32)
    return tl.where(is_inside, (x - shift[None, :]) - mean[None, :], 0.0)


@triton.jit
def _moments_kernel(
    a_ptr,
    b_ptr,
    sums_ptr,
    mean_ptr,
    moments_ptr,
    n,
    k,
    slices,
    tiles,
    chunk,
    stride_as,
    stride_an,
    stride_ak,
    stride_bs,
    stride_bn,
    stride_bk,
    JOINT: tl.constexpr,
    CONTENT: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One pair of column tiles, i >= j, of one moment of one slice over one chunk of samples.

    Writes moments (chunks, m, S, K, K), both triangles, and means (2, S, K), relative to the shift and absolute; K = 2k
    for the joint matrix, else k.
    """
    pair, c, which, s = tl.program_id(0), tl.program_id(1), tl.program_id(2) // slices, tl.program_id(2) % slices
    i = ((tl.sqrt(8.0 * pair + 1.0) - 1.0) / 2.0).to(tl.int32)
    i += ((i + 1) * (i + 2) // 2 <= pair).to(tl.int32) - (i * (i + 1) // 2 > pair).to(tl.int32)
    j = pair - i * (i + 1) // 2
    size = 2 * k if JOINT else k
    col_i, col_j = i * BLOCK_K + tl.arange(0, BLOCK_K), j * BLOCK_K + tl.arange(0, BLOCK_K)
    is_i, is_j = col_i < size, col_j < size
    if JOINT:
        # A column belongs to one view; the other view's loads of it are masked.
        mean_i = _column_mean(sums_ptr, col_i // k, col_i % k, is_i, tiles, k, slices, s, BLOCK_P) / n
        mean_j = _column_mean(sums_ptr, col_j // k, col_j % k, is_j, tiles, k, slices, s, BLOCK_P) / n
    else:
        zero_i, zero_j = col_i * 0, col_j * 0
        mean_i = _column_mean(sums_ptr, zero_i, col_i, is_i, tiles, k, slices, s, BLOCK_P)
        mean_i += _column_mean(sums_ptr, zero_i + 1, col_i, is_i, tiles, k, slices, s, BLOCK_P)
        mean_j = _column_mean(sums_ptr, zero_j, col_j, is_j, tiles, k, slices, s, BLOCK_P)
        mean_j += _column_mean(sums_ptr, zero_j + 1, col_j, is_j, tiles, k, slices, s, BLOCK_P)
        mean_i, mean_j = mean_i / (2.0 * n), mean_j / (2.0 * n)
    a_ptr += s * stride_as
    b_ptr += s * stride_bs
    shift_i, shift_j = mean_i * 0.0, mean_j * 0.0
    if SHIFTED:
        if JOINT:
            is_b_i, is_b_j, joint_b_ptr = is_i & (col_i >= k), is_j & (col_j >= k), b_ptr - k * stride_bk
            a_i, b_i = _shifts(a_ptr, joint_b_ptr, col_i, col_i < k, is_b_i, stride_ak, stride_bk, JOINT)
            a_j, b_j = _shifts(a_ptr, joint_b_ptr, col_j, col_j < k, is_b_j, stride_ak, stride_bk, JOINT)
            shift_i, shift_j = a_i + b_i, a_j + b_j
        else:
            shift_i, _ = _shifts(a_ptr, b_ptr, col_i, is_i, is_i, stride_ak, stride_bk, JOINT)
            shift_j, _ = _shifts(a_ptr, b_ptr, col_j, is_j, is_j, stride_ak, stride_bk, JOINT)
    if (c == 0) & (which == 0) & (i == j):
        tl.store(mean_ptr + s * size + col_i, mean_i, mask=is_i)
        tl.store(mean_ptr + (slices + s) * size + col_i, shift_i + mean_i, mask=is_i)
    # content: total, difference; exchangeable: total, sum, difference
    sign = tl.where((which == 2) | CONTENT, -1.0, 1.0)
    moment = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    for start in range(c * chunk, min(n, (c + 1) * chunk), BLOCK_N):
        sample = (start + tl.arange(0, BLOCK_N)[:, None]).to(tl.int64)
        is_sample = sample < min(n, (c + 1) * chunk)
        if JOINT:
            in_a_i, in_a_j = is_sample & (col_i < k)[None, :], is_sample & (col_j < k)[None, :]
            in_b_i = is_sample & (is_i & (col_i >= k))[None, :]
            in_b_j = is_sample & (is_j & (col_j >= k))[None, :]
            x_i = _load_view(a_ptr, sample, col_i, in_a_i, shift_i, mean_i, stride_an, stride_ak)
            x_j = _load_view(a_ptr, sample, col_j, in_a_j, shift_j, mean_j, stride_an, stride_ak)
            x_i += _load_view(b_ptr, sample, col_i - k, in_b_i, shift_i, mean_i, stride_bn, stride_bk)
            x_j += _load_view(b_ptr, sample, col_j - k, in_b_j, shift_j, mean_j, stride_bn, stride_bk)
            moment = tl.dot(tl.trans(x_i), x_j, moment, input_precision=PRECISION)
        else:
            in_i, in_j = is_sample & is_i[None, :], is_sample & is_j[None, :]
            a_i = _load_view(a_ptr, sample, col_i, in_i, shift_i, mean_i, stride_an, stride_ak)
            a_j = _load_view(a_ptr, sample, col_j, in_j, shift_j, mean_j, stride_an, stride_ak)
            b_i = _load_view(b_ptr, sample, col_i, in_i, shift_i, mean_i, stride_bn, stride_bk)
            b_j = _load_view(b_ptr, sample, col_j, in_j, shift_j, mean_j, stride_bn, stride_bk)
            if which == 0:
                moment = tl.dot(tl.trans(a_i), a_j, moment, input_precision=PRECISION)
                moment = tl.dot(tl.trans(b_i), b_j, moment, input_precision=PRECISION)
            else:
                moment = tl.dot(tl.trans(a_i + sign * b_i), a_j + sign * b_j, moment, input_precision=PRECISION)
    moment = moment / n if JOINT else moment / (2.0 * n)
    matrices = tl.num_programs(2)
    out_ptr = moments_ptr + (c * matrices + which * slices + s).to(tl.int64) * size * size
    tl.store(out_ptr + col_i[:, None].to(tl.int64) * size + col_j[None, :], moment, mask=is_i[:, None] & is_j[None, :])
    if i != j:
        mirror = tl.trans(moment)
        tl.store(
            out_ptr + col_j[:, None].to(tl.int64) * size + col_i[None, :], mirror, mask=is_j[:, None] & is_i[None, :]
        )


@triton.jit
def _moments_backward_kernel(
    a_ptr,
    b_ptr,
    mean_ptr,
    grad_ptr,
    diagonal_ptr,
    upstream_ptr,
    da_ptr,
    db_ptr,
    n,
    k,
    slices,
    stride_as,
    stride_an,
    stride_ak,
    stride_bs,
    stride_bn,
    stride_bk,
    MATRICES: tl.constexpr,
    JOINT: tl.constexpr,
    SHIFTED: tl.constexpr,
    DIAGONAL: tl.constexpr,
    NEED_A: tl.constexpr,
    NEED_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of BLOCK_N samples and BLOCK_K columns of one slice from G (m, S, K, K), contiguous (S, N, k).

    DIAGONAL: the sum over j of diagonal (m, S, K) is taken off G_T's diagonal.
    """
    s = tl.program_id(2)
    sample = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]).to(tl.int64)
    is_sample = sample < n
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_column = column < k
    upstream = tl.load(upstream_ptr)
    a_ptr += s * stride_as
    b_ptr += s * stride_bs
    da = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    db = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if JOINT:
        size = 2 * k
        for start in range(0, size, BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)
            mean = tl.load(mean_ptr + s * size + row, mask=row < size, other=0.0)
            is_a, is_b = row < k, (row >= k) & (row < size)
            in_a, in_b = is_sample & is_a[None, :], is_sample & is_b[None, :]
            shift = mean * 0.0
            if SHIFTED:
                shift_a, shift_b = _shifts(a_ptr, b_ptr - k * stride_bk, row, is_a, is_b, stride_ak, stride_bk, JOINT)
                shift = shift_a + shift_b
            x = _load_view(a_ptr, sample, row, in_a, shift, mean, stride_an, stride_ak)
            x += _load_view(b_ptr, sample, row - k, in_b, shift, mean, stride_bn, stride_bk)
            is_inside = (row < size)[:, None] & is_column[None, :]
            entry = grad_ptr + (s * size + row[:, None]).to(tl.int64) * size + column[None, :]
            if NEED_A:
                grad_a = tl.load(entry, mask=is_inside, other=0.0)
                da = tl.dot(x, grad_a, da, input_precision=PRECISION)
            if NEED_B:
                grad_b = tl.load(entry + k, mask=is_inside, other=0.0)
                db = tl.dot(x, grad_b, db, input_precision=PRECISION)
        da, db = da * 2.0, db * 2.0
    else:
        shared = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(0, k, BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)
            mean = tl.load(mean_ptr + s * k + row, mask=row < k, other=0.0)
            shift = mean * 0.0
            if SHIFTED:
                shift, _ = _shifts(a_ptr, b_ptr, row, row < k, row < k, stride_ak, stride_bk, JOINT)
            is_inside = is_sample & (row < k)[None, :]
            a = _load_view(a_ptr, sample, row, is_inside, shift, mean, stride_an, stride_ak)
            b = _load_view(b_ptr, sample, row, is_inside, shift, mean, stride_bn, stride_bk)
            is_entry = (row < k)[:, None] & is_column[None, :]
            entry = grad_ptr + (s * k + row[:, None]).to(tl.int64) * k + column[None, :]
            matrix = tl.num_programs(2).to(tl.int64) * k * k
            total = tl.load(entry, mask=is_entry, other=0.0)
            if DIAGONAL:
                diagonal = tl.zeros((BLOCK_K,), tl.float32)
                for which in tl.static_range(MATRICES):
                    offset = (which * slices + s) * k + row
                    diagonal += tl.load(diagonal_ptr + offset, mask=row < k, other=0.0)
                total -= tl.where(row[:, None] == column[None, :], diagonal[:, None], 0.0)
            if NEED_A:
                da = tl.dot(a, total, da, input_precision=PRECISION)
            if NEED_B:
                db = tl.dot(b, total, db, input_precision=PRECISION)
            difference = tl.load(entry + (MATRICES - 1) * matrix, mask=is_entry, other=0.0)
            shared = tl.dot(a - b, difference, shared, input_precision=PRECISION)
            if MATRICES == 3:
                both = tl.load(entry + matrix, mask=is_entry, other=0.0)
                both = tl.dot(a + b, both, input_precision=PRECISION)
                da += both
                db += both
        da += shared
        db -= shared
    scale = upstream / n
    offset = (s * n + sample) * k + column[None, :]
    is_inside = is_sample & is_column[None, :]
    if NEED_A:
        tl.store(da_ptr + offset, (da * scale).to(da_ptr.dtype.element_ty), mask=is_inside)
    if NEED_B:
        tl.store(db_ptr + offset, (db * scale).to(db_ptr.dtype.element_ty), mask=is_inside)
