"""The whole loss in plain torch, for checking: the oracle of the tests and the naive form of the benchmarks.

From the counter to the number it shares no code with the routes but the table of objectives: its own random slices,
noise floor, standardisation and weights, explicit covariances of all views, log-determinants by LU, and no backward of
its own, so that it has derivatives of any order and lives under ``torch.func``'s transforms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmi_loss.objectives import Objective

if TYPE_CHECKING:
    from mmi_loss.options import Options

Floors = list[float]


def loss(views: Sequence[Tensor], step: int | Tensor, options: Options) -> tuple[Tensor, Tensor, list[int], Floors]:
    """The loss of views (N, D), its log-determinants (m, S), and of each view its features in them and their noise."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(views[0].dtype, views[-1].dtype))
    slices = _all_finite([_slices(z.to(dtype), int(step), options) for z in views], views)
    widths = [z.shape[-1] for z in slices]
    samples = slices[0].shape[-2]
    directions = min(options.snr, samples) if options.ridge is None else math.nan
    least = [8 * width * torch.finfo(dtype).eps for width in widths]
    noises = [
        max(width / directions if options.ridge is None else options.ridge, floor)
        for width, floor in zip(widths, least, strict=True)
    ]
    groups = [range(len(views))]
    if options.row.is_pairwise:
        groups = list(itertools.combinations(range(len(views)), 2))
    order = options.order if options.logdet == "taylor" else None
    is_computed = options.slice_kind != "coordinates" and options.slice_dim is not None
    log_dets = torch.stack(
        [
            _log_dets(
                [slices[i] for i in group], [noises[i] for i in group], options.row, order, options.beta, is_computed
            )
            for group in groups
        ]
    ).mean(0)
    weights = [c - a for c, a in zip(options.row.conditional_entropy, options.row.entropy_a, strict=True)]
    halves = [weight * log_det / 2 for weight, log_det in zip(weights, log_dets, strict=True)]
    return torch.stack(halves).sum(0).mean(), log_dets.detach(), widths, noises


def _all_finite(slices: list[Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """NaN in all slices where an input that no slice holds is not finite."""
    poison = torch.stack([z.to(slices[0].dtype).sum() * 0 for z in views]).sum()
    return [z + poison for z in slices]


def _slices(z: Tensor, step: int, options: Options) -> Tensor:
    """(N, D) to the step's slices (S, N, k), by matrices P (S, D, k): coordinates, dense, or block-structured."""
    (dim, k, count), seed = (z.shape[1], options.slice_dim, options.num_slices), options.seed
    if k is None or k >= dim:
        return z[None]
    if options.slice_kind == "coordinates":
        ranks = [_signed(_scramble(torch.arange(dim) + _key(step, seed, s))) for s in range(count)]
        return torch.stack([z[:, rank.argsort(descending=True)[:k].sort().values.to(z.device)] for rank in ranks])
    block = 1 if options.slice_kind == "gaussian" else max(1, k // 4)
    mixtures, blocks = -(-k // block), -(-dim // block)
    if block == 1:
        half = (blocks + 1) // 2
        counter = torch.arange(count * mixtures * half).reshape(count * mixtures, half)
        u, v = (((_scramble(counter + _key(step, seed, s)) >> 8).double() + 0.5) / 2**24 for s in (0, 1))
        radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
        weights = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :blocks]
    else:
        counter = torch.arange(count * mixtures * blocks).reshape(count * mixtures, blocks)
        weights = _signed(_scramble(counter + _key(step, seed, 0))).double() / 2**31
    # Feature f of block b is feature f of every mixture m, with weight A_mb: P = A^T kron I.
    projections = [
        torch.kron(a.T.contiguous(), torch.eye(block, dtype=a.dtype))[:dim, :k]
        for a in weights.reshape(count, mixtures, blocks)
    ]
    return z @ torch.stack(projections).to(z)


def _scramble(x: Tensor) -> Tensor:
    """Ettinger's lowbias32, in int64 cut to 32 bits."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _signed(x: Tensor) -> Tensor:
    return torch.where(x >= 2**31, x - 2**32, x)


def _key(step: int, seed: int, stream: int) -> int:
    def scramble(value: int) -> int:
        return int(_scramble(torch.tensor(value % 2**32)))

    low = scramble(step + seed * 0x9E3779B9)
    return scramble(low + (step >> 31) * 0x85EBCA6B + (seed >> 32) * 0xC2B2AE35 + stream * 0x27D4EB2F)


def _log_dets(
    views: list[Tensor], noises: Floors, row: Objective, order: int | None, beta: float, is_computed: bool
) -> Tensor:
    """Log det(I + M_j / noise) of every moment of the objective, (m, S), from views (S, N, k)."""
    num_views = len(views)
    if row.is_pooled:
        pooled = torch.cat([z - views[0][:, :1] for z in views], 1)
        location = views[0][:, :1]
        standardised = torch.stack(_standardise(pooled, location if is_computed else None).chunk(num_views, 1))
        parts = torch.einsum("iv,vsnk->isnk", _helmert(num_views).to(pooled), standardised) / noises[0] ** 0.5
        moments = [
            torch.einsum("isnk,isnl->skl", parts[i:j], parts[i:j]) / (len(parts[i:j]) * parts.shape[2])
            for i, j in row.moments
        ]
    else:
        scaled = [
            _standardise(z - z[:, :1], z[:, :1] if is_computed else None) / noise**0.5
            for z, noise in zip(views, noises, strict=True)
        ]
        joined = [torch.cat(scaled[i:j], -1) for i, j in row.moments]
        moments = [x.mT @ x / x.shape[1] for x in joined]
    matrices = [moment + torch.eye(moment.shape[-1]).to(moment) for moment in moments]
    if order is None:
        return torch.stack([torch.linalg.slogdet(matrix).logabsdet for matrix in matrices])
    # Fourth-power norms relative to the trace, which overflows later.
    traces = [torch.diagonal(m, dim1=-2, dim2=-1).sum(-1) for m in matrices]
    norms = [
        (torch.linalg.matrix_norm((m / t[:, None, None]) @ (m / t[:, None, None])).square()) ** 0.25 * t
        for m, t in zip(matrices, traces, strict=True)
    ]
    scale = torch.stack(norms).amax(0) / beta
    return torch.stack([_series(matrix, scale, order) for matrix in matrices])


def _helmert(num_views: int) -> Tensor:
    """Orthonormal contrasts of the views, one a row, the mean first."""
    rows = [torch.ones(num_views)]
    for i in range(1, num_views):
        rows.append(torch.tensor([1.0] * i + [-float(i)] + [0.0] * (num_views - 1 - i)))
    return torch.stack([row.double() / row.double().norm() for row in rows])


def _standardise(x: Tensor, location: Tensor | None) -> Tensor:
    """Zero mean and unit population variance per feature of (S, N, k); a constant feature is 0.

    ``location``: of features that were computed, whose rounding counts as none; given features vary or do not.
    """
    centred = x - x.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True)
    info = torch.finfo(x.dtype)
    floor = info.tiny**0.75
    if location is not None:
        floor = floor + (2 * info.eps * location.detach()) ** 2
    is_constant = variance <= floor
    # sqrt has no second derivative at 0.
    std = torch.where(is_constant, 1.0, variance).sqrt()
    # An overflow of the variance is not a finite number over infinity.
    overflow = torch.where(variance.isinf(), math.nan, 0.0)
    return torch.where(is_constant, 0.0, centred / std) + overflow


def _series(matrix: Tensor, scale: Tensor, order: int) -> Tensor:
    """n log c + tr of the series of log(1 + x) at A / c - I."""
    identity = torch.eye(matrix.shape[-1]).to(matrix)
    x = matrix / scale[:, None, None] - identity
    power, total = identity, matrix.shape[-1] * scale.log()
    for m in range(1, order + 1):
        power = power @ x
        total = total + (-1) ** (m + 1) / m * torch.diagonal(power, dim1=-2, dim2=-1).sum(-1)
    return total
