"""The whole loss in plain torch, for checking. From the counter to the number it shares no code with the routes but the
table of objectives: its own random slices, noise floor, standardisation and weights, explicit covariances,
log-determinants by LU, and no backward of its own, so that it has derivatives of any order and lives under
``torch.func``'s transforms.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmi_loss.options import Options


def loss(
    views: Sequence[Tensor], step: int | Tensor, options: Options
) -> tuple[Tensor, Tensor, list[int], list[Tensor]]:
    """The loss of views (N, D), its log-determinants (m, S), and of each view its features in them and their noise."""
    dtype = functools.reduce(torch.promote_types, [z.dtype for z in views], torch.float32)
    slices = [_slices(z.to(dtype), torch.as_tensor(step, device="cpu"), options) for z in views]
    # NaN everywhere if an input that no slice holds is not finite.
    poison = torch.stack([z.to(dtype).sum() * 0 for z in views]).sum()
    slices = [z.expand(max(map(len, slices)), -1, -1) + poison for z in slices]
    groups = list(itertools.combinations(range(len(views)), 2)) if options.row.is_pairwise else [range(len(views))]
    # Features that were projected differ by rounding where they are constant; given ones do not.
    is_sliced = options.slice_dim is not None and options.slice_dim < max(z.shape[1] for z in views)
    is_computed = is_sliced and options.slice_kind != "coordinates"
    estimates = [_log_dets([slices[i] for i in group], is_computed, options) for group in groups]
    log_dets = torch.stack([log_dets for log_dets, _ in estimates]).mean(0)
    noises = [torch.stack([noise for _, noise in estimates])] * len(views)
    if not options.row.is_pooled:
        noises = [_noise(z, None, options) for z in slices]
    weights = torch.tensor(options.row.conditional_entropy) - torch.tensor(options.row.entropy_a)
    value = (weights.to(log_dets) @ log_dets).mean() / 2
    return value, log_dets.detach(), [z.shape[2] for z in slices], noises


def _slices(z: Tensor, step: Tensor, options: Options) -> Tensor:
    """(N, D) to the step's slices (S, N, k), by matrices P (S, D, k): coordinates, dense, or block-structured."""
    (dim, k, count), seed = (z.shape[1], options.slice_dim, options.num_slices), options.seed
    if k is None or k >= dim:
        return z[None]
    if options.slice_kind == "coordinates":
        ranks = [(_scramble(torch.arange(dim) + _key(step, seed, s)) + 2**31) % 2**32 for s in range(count)]
        return torch.stack([z[:, rank.argsort(descending=True)[:k].sort().values.to(z.device)] for rank in ranks])
    block = 1 if options.slice_kind == "gaussian" else max(1, k // 4)
    rows, blocks = count * -(-k // block), -(-dim // block)
    if block == 1:
        half = (blocks + 1) // 2
        counter = torch.arange(rows * half).reshape(rows, half)
        u, v = (((_scramble(counter + _key(step, seed, s)) >> 8).double() + 0.5) / 2**24 for s in (0, 1))
        radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
        mixing = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :blocks]
    else:
        counter = torch.arange(rows * blocks).reshape(rows, blocks)
        mixing = (_scramble(counter + _key(step, seed, 0)) + 2**31).remainder(2**32).double() / 2**31 - 1
    # Feature f of block b is feature f of every mixture m, with weight A_mb: P = A^T kron I.
    identity = torch.eye(block, dtype=torch.float64)
    matrices = [torch.kron(a.T.contiguous(), identity)[:dim, :k] for a in mixing.reshape(count, -1, blocks)]
    # A constant embedding stays constant bit by bit: a product rounds equal rows differently, by their place.
    projections = torch.stack(matrices).to(z)
    return (z - z[:1]) @ projections + z[:1] @ projections


def _key(step: Tensor, seed: int, stream: int) -> Tensor:
    low = _scramble(step % 2**32 + seed * 0x9E3779B9 % 2**32)
    high = (step >> 31) * 0x85EBCA6B + ((seed >> 32) * 0xC2B2AE35 + stream * 0x27D4EB2F) % 2**32
    return _scramble(low + high)


def _scramble(x: Tensor) -> Tensor:
    """Ettinger's lowbias32, in int64 cut to 32 bits."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _noise(z: Tensor, within: Tensor | None, options: Options) -> Tensor:
    """Of each slice (S, 1, 1), under the features of slices (S, N, k)."""
    # In an exported program the number of samples is a symbol.
    noise: float = options.ridge or z.shape[2] / torch.sym_min(options.snr or 64.0, z.shape[1])  # type: ignore[assignment]
    share = torch.ones(len(z), 1, 1).to(z)
    if within is not None and options.ridge is options.snr is None:
        share = within.detach().clamp(min=torch.sym_min(64.0, z.shape[1]) / (4 * z.shape[1]))
    return (share * noise).clamp(min=8 * z.shape[2] * torch.finfo(z.dtype).eps)


def _log_dets(views: list[Tensor], is_computed: bool, options: Options) -> tuple[Tensor, Tensor]:
    """Log det(I + M_j / noise) of every moment of the objective, (m, S), from views (S, N, k), and the noise."""
    row, origins = options.row, [z[:, :1].detach() for z in views]
    if row.is_pooled:
        pooled = _standardise(torch.cat(views, 1), origins[0], is_computed)
        by_view = pooled.unflatten(1, (len(views), -1))
        contrasts = torch.einsum("iv,svnk->isnk", _helmert(len(views)).to(pooled), by_view)
        noise = _noise(views[0], contrasts[1:].square().mean((0, 2, 3))[:, None, None], options)
        rows = [torch.cat(list(contrasts[i:j] / noise.sqrt()), 1) for i, j in row.moments]
    else:
        pairs = zip(views, origins, strict=True)
        scaled = [_standardise(z, origin, is_computed) / _noise(z, None, options).sqrt() for z, origin in pairs]
        noise, rows = _noise(views[0], None, options), [torch.cat(scaled[i:j], -1) for i, j in row.moments]
    matrices = [x.mT @ x / x.shape[1] + torch.eye(x.shape[2]).to(x) for x in rows]
    if options.logdet == "cholesky":
        return torch.stack([torch.linalg.slogdet(matrix).logabsdet for matrix in matrices]), noise
    # Fourth-power norms relative to the trace, whose powers overflow.
    traces = torch.stack([_trace(matrix) for matrix in matrices])
    relative = [matrix / t[:, None, None] for matrix, t in zip(matrices, traces, strict=True)]
    norms = torch.stack([_trace(r @ r @ r @ r) for r in relative]) ** 0.25 * traces
    scale = norms.amax(0) / options.beta
    return torch.stack([_series(matrix, scale, options.order) for matrix in matrices]), noise


def _helmert(num_views: int) -> Tensor:
    """Orthonormal contrasts of the views, one a row, the mean first."""
    rows = [[1.0] * num_views] + [[1.0] * i + [-float(i)] + [0.0] * (num_views - 1 - i) for i in range(1, num_views)]
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float64))


def _standardise(x: Tensor, origin: Tensor, is_computed: bool) -> Tensor:
    """Zero mean and unit population variance per feature of (S, N, k); a constant feature is 0."""
    x = x - origin
    centred = x - x.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True)
    info = torch.finfo(x.dtype)
    is_constant = variance <= info.tiny**0.75 + (2 * info.eps * origin * is_computed) ** 2
    # The square root has no second derivative at 0, and an overflow divided by itself is not finite.
    std = torch.where(is_constant, 1.0, variance).sqrt()
    return torch.where(is_constant, 0.0, centred / std) + torch.where(variance.isinf(), math.nan, 0.0)


def _series(matrix: Tensor, scale: Tensor, order: int) -> Tensor:
    """The logarithm of the scale times n, and the trace of the series of log(1 + x) at A / scale - I."""
    power = identity = torch.eye(matrix.shape[-1]).to(matrix)
    total = matrix.shape[-1] * scale.log()
    for m in range(1, order + 1):
        power = power @ (matrix / scale[:, None, None] - identity)
        total = total + (-1) ** (m + 1) / m * _trace(power)
    return total


def _trace(matrix: Tensor) -> Tensor:
    return torch.diagonal(matrix, dim1=-2, dim2=-1).sum(-1)
