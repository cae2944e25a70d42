"""Second moments of two views about their common mean, and the gradient: half the tiles, centring fused, float32 sums.

With a, b the centred views (N, k) and G_j = dL/dM_j symmetric,

    total   T = (a^T a + b^T b) / 2N        da += a G_T / N,        db += b G_T / N
    within  W = (a - b)^T (a - b) / 2N      da += (a - b) G_W / N,  db -= (a - b) G_W / N

W is formed from differences, so it is accurate where the views nearly agree. The mean enters as a constant: moments
about it are stationary in it.

Everything is taken relative to the first sample: these differences are nearly exact where the mean is far larger than
the deviation, and 0 where a feature is constant.

In the kernels a matrix is a tuple of its pointer and both strides.
"""

# ruff: noqa: N803  (constexpr arguments are written in capitals, Triton's habit)

import triton
import triton.language as tl

from mmi_loss.ops.triton.factor import _dot


@triton.jit
def _load(matrix, row, column, is_inside):
    """A tile of float32, zero outside."""
    pointer = matrix[0] + row.to(tl.int64) * matrix[1] + column * matrix[2]
    return tl.load(pointer, mask=is_inside, other=0.0).to(tl.float32)


@triton.jit
def _store(matrix, row, column, is_inside, x):
    """A tile, in the matrix's dtype."""
    pointer = matrix[0] + row.to(tl.int64) * matrix[1] + column * matrix[2]
    tl.store(pointer, x.to(matrix[0].dtype.element_ty), mask=is_inside)


@triton.jit
def _first_row(matrix, column, columns):
    """The first sample's features, by which all samples are shifted."""
    return tl.load(matrix[0] + column * matrix[2], mask=column < columns, other=0.0).to(tl.float32)


@triton.jit
def _centred(x, shift, mean, is_inside):
    """Zero outside."""
    return tl.where(is_inside, (x - shift[None, :]) - mean[None, :], 0.0)


@triton.jit
def _column_sums_kernel(
    a_ptr, b_ptr, sums_ptr, state_ptr, n, k, stride_an, stride_ak, stride_bn, stride_bk,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What BLOCK_N samples add up to, (tiles, k), see ``_mean``: the first launch where nothing is projected."""
    tile = tl.program_id(0)
    if (tile == 0) & (tl.program_id(1) == 0):
        tl.store(state_ptr + 1, 0)
    sample = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    is_inside = (sample < n) & (column < k)
    a = _load((a_ptr, stride_an, stride_ak), sample, column, is_inside)
    b = _load((b_ptr, stride_bn, stride_bk), sample, column, is_inside)
    first = tl.sum(tl.where(sample == tile * BLOCK_N, a, 0.0), 0)[None, :]
    sums = tl.sum(tl.where(is_inside, (a - first) + (b - first), 0.0), 0)[None, :]
    tl.store(sums_ptr + tile * k + column, sums, mask=column < k)


@triton.jit
def _mean(a, shift, sums_ptr, column, n, k, s, slices, TILE: tl.constexpr, BLOCK_T: tl.constexpr):
    """The mean of both views relative to ``shift``, from sums (tiles, S, k) relative to the first sample of a tile."""
    total = tl.zeros(column.shape, tl.float32)
    for start in range(0, tl.cdiv(n, TILE), BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)[:, None]
        is_inside = (tile * TILE < n) & (column < k)[None, :]
        first = _load(a, tile * TILE, column[None, :], is_inside) - shift[None, :]
        sums = tl.load(sums_ptr + (tile * slices + s) * k + column[None, :], mask=is_inside, other=0.0)
        total += tl.sum(tl.where(is_inside, sums + 2 * tl.minimum(TILE, n - tile * TILE) * first, 0.0), 0)
    return total / (2.0 * n)


@triton.jit
def _moments_kernel(
    a_ptr, b_ptr, sums_ptr, centre_ptr, moments_ptr, n, k, stride_an, stride_ak, stride_bn, stride_bk,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One pair of column tiles, i >= j, of one moment of one slice over one chunk of samples.

    Writes moments (chunks, 2, S, k, k), both triangles, and their centres (2, S, k): the first sample, and the mean
    relative to it.
    """
    side, chunk = tl.cdiv(k, BLOCK_K), tl.cdiv(n, tl.num_programs(1))
    i, j, c = tl.program_id(0) // side, tl.program_id(0) % side, tl.program_id(1)
    slices = tl.num_programs(2) // 2
    which, s = tl.program_id(2) // slices, tl.program_id(2) % slices
    if i < j:
        return
    start_of_slice = s.to(tl.int64) * n * k
    a, b = (a_ptr + start_of_slice, stride_an, stride_ak), (b_ptr + start_of_slice, stride_bn, stride_bk)
    col_i, col_j = i * BLOCK_K + tl.arange(0, BLOCK_K), j * BLOCK_K + tl.arange(0, BLOCK_K)
    shift_i, shift_j = _first_row(a, col_i, k), _first_row(a, col_j, k)
    mean_i = _mean(a, shift_i, sums_ptr, col_i, n, k, s, slices, TILE, BLOCK_T)
    mean_j = _mean(a, shift_j, sums_ptr, col_j, n, k, s, slices, TILE, BLOCK_T)
    if (c == 0) & (which == 0) & (i == j):
        tl.store(centre_ptr + s * k + col_i, shift_i, mask=col_i < k)
        tl.store(centre_ptr + (slices + s) * k + col_i, mean_i, mask=col_i < k)
    moment = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    end = tl.minimum(n, (c + 1) * chunk)
    for start in range(c * chunk, end, BLOCK_N):
        sample = start + tl.arange(0, BLOCK_N)[:, None]
        in_i, in_j = (sample < end) & (col_i < k)[None, :], (sample < end) & (col_j < k)[None, :]
        a_i, a_j = _load(a, sample, col_i[None, :], in_i), _load(a, sample, col_j[None, :], in_j)
        b_i, b_j = _load(b, sample, col_i[None, :], in_i), _load(b, sample, col_j[None, :], in_j)
        if which == 0:
            a_i, a_j = _centred(a_i, shift_i, mean_i, in_i), _centred(a_j, shift_j, mean_j, in_j)
            b_i, b_j = _centred(b_i, shift_i, mean_i, in_i), _centred(b_j, shift_j, mean_j, in_j)
            moment = _dot(tl.trans(a_i), a_j, moment)
            moment = _dot(tl.trans(b_i), b_j, moment)
        else:
            moment = _dot(tl.trans(a_i - b_i), a_j - b_j, moment)
    moment = moment / (2.0 * n)
    out = (moments_ptr + (c * tl.num_programs(2) + tl.program_id(2)).to(tl.int64) * k * k, k, 1)
    is_inside = (col_i < k)[:, None] & (col_j < k)[None, :]
    _store(out, col_i[:, None], col_j[None, :], is_inside, moment)
    _store(out, col_j[:, None], col_i[None, :], tl.trans(is_inside) & (i != j), tl.trans(moment))


@triton.jit
def _moments_backward_kernel(
    a_ptr, b_ptr, centre_ptr, grad_ptr, diagonal_ptr, upstream_ptr, da_ptr, db_ptr,
    n, k, stride_an, stride_ak, stride_bn, stride_bk,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_N samples and BLOCK_K columns of one slice, contiguous (S, N, k), from G (2, S, k, k).

    ``diagonal`` (2, S, k), summed over moments, is first taken off the diagonal of G_T.
    """
    s, slices = tl.program_id(2), tl.num_programs(2)
    start_of_slice = s.to(tl.int64) * n * k
    a, b = (a_ptr + start_of_slice, stride_an, stride_ak), (b_ptr + start_of_slice, stride_bn, stride_bk)
    grad_total = (grad_ptr + s.to(tl.int64) * k * k, k, 1)
    grad_within = (grad_ptr + (slices + s).to(tl.int64) * k * k, k, 1)
    sample = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    zeros = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    da, db, difference = zeros, zeros, zeros
    for start in range(0, k, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        is_inside, is_entry = (sample < n) & (row < k)[None, :], (row < k)[:, None] & (column < k)
        x_a, x_b = _load(a, sample, row[None, :], is_inside), _load(b, sample, row[None, :], is_inside)
        difference = _dot(x_a - x_b, _load(grad_within, row[:, None], column, is_entry), difference)
        diagonal = tl.load(diagonal_ptr + s * k + row, mask=row < k, other=0.0)
        diagonal += tl.load(diagonal_ptr + (slices + s) * k + row, mask=row < k, other=0.0)
        total = _load(grad_total, row[:, None], column, is_entry)
        total -= tl.where(row[:, None] == column, diagonal[:, None], 0.0)
        shift = tl.load(centre_ptr + s * k + row, mask=row < k, other=0.0)
        mean = tl.load(centre_ptr + (slices + s) * k + row, mask=row < k, other=0.0)
        if da_ptr is not None:
            da = _dot(_centred(x_a, shift, mean, is_inside), total, da)
        if db_ptr is not None:
            db = _dot(_centred(x_b, shift, mean, is_inside), total, db)
    scale = tl.load(upstream_ptr) / n
    is_inside = (sample < n) & (column < k)
    if da_ptr is not None:
        _store((da_ptr + start_of_slice, k, 1), sample, column, is_inside, (da + difference) * scale)
    if db_ptr is not None:
        _store((db_ptr + start_of_slice, k, 1), sample, column, is_inside, (db - difference) * scale)
