"""Mutual information between views from second-order statistics. The loss can be read here, in :func:`_estimate`.

Every objective is half a weighted sum of log-determinants,

    I = 1/2 sum_j w_j log det(I + M_j / noise),

with M_j second moments of features standardised over the batch (:mod:`mmi_loss.objectives`). ``noise`` is a floor in
units of feature variance; I is the mutual information of views observed through isotropic noise of that variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mmi_loss import checks, distributed, reference
from mmi_loss.diagnostics import mutual_information
from mmi_loss.ops import slices
from mmi_loss.ops.covariance import CovarianceLoss, Shared
from mmi_loss.ops.gram import gram_loss
from mmi_loss.options import Options, OptionTypes, shows_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["MMIComponents", "Options", "mmi_loss", "mmi_loss_multiview", "mutual_information"]

AUTO_TRITON = False
"""Whether ``impl="auto"`` takes the Triton kernels on CUDA. Not before ``benchmarks speed_cuda`` has been run there."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class MMIComponents(NamedTuple):
    """The loss and what it is made of: float32 (float64 for float64 input) scalars, in nats.

    ``mutual_information = entropy_a - conditional_entropy = -loss``, with Gaussian differential entropies of the
    standardised features plus noise, averaged over slices. The conditional entropy is what remains of a view's once the
    content is known (``objective="content"``), or the other view. For content and exchangeable views, which are of one
    kind, ``entropy_b`` equals ``entropy_a``. Only ``loss`` carries a gradient.
    """

    loss: Tensor
    mutual_information: Tensor
    entropy_a: Tensor
    entropy_b: Tensor
    conditional_entropy: Tensor


@shows_options
def mmi_loss(z_a: Tensor, z_b: Tensor, *, step: int | Tensor = 0, **options: Unpack[OptionTypes]) -> Tensor:
    """Negative mutual information of two views, in nats.

    The stateless form of :class:`mmi_loss.MMILoss`: the same options by keyword, and the ``step`` that, with
    ``seed``, determines the random slice.

    Args:
        z_a: Embeddings of the first view, (N, D), floating point.
        z_b: Embeddings of the second view, (N, D), row i of the same image as row i of ``z_a``.
        step: Which slice to take; the module counts its calls here.
        **options: See :class:`mmi_loss.MMILoss`.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        TypeError: An input is not a floating point tensor, or an option is unknown.
        ValueError: Shapes, devices or an option's value do not fit; the message names the remedy.

    Example:
        >>> z = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
        >>> identical, independent = mmi_loss(z, z), mmi_loss(z, z.roll(1, 0))
        >>> bool(identical < -20 < independent < 0)
        True
    """
    return loss([z_a, z_b], step, Options(**options))


@shows_options
def mmi_loss_multiview(views: Sequence[Tensor], *, step: int | Tensor = 0, **options: Unpack[OptionTypes]) -> Tensor:
    """Negative mutual information of V >= 2 views, each (N, D), in nats.

    For ``objective="content"`` the covariance of one view is split into within-image and between-image parts over
    all views at once (an analysis of variance); for the others it is the mean over all pairs, on the same slice.
    Options, errors and the return value are those of :func:`mmi_loss`.
    """
    return loss(views, step, Options(**options))


def loss(views: Sequence[Tensor], step: int | Tensor, options: Options) -> Tensor:
    """The loss of validated options; :func:`mmi_loss` and :class:`mmi_loss.MMILoss` both call it."""
    return _estimate(views, step, options).loss


def components(views: Sequence[Tensor], step: int | Tensor, options: Options) -> MMIComponents:
    """The loss and the entropies it is made of."""
    value, log_dets, widths, noises = _estimate(views, step, options)
    # log det(I + M / noise) to the differential entropy of the features plus noise, view by view.
    constants = []
    for width, noise in zip(widths, noises, strict=True):
        log_noise = noise.log() if isinstance(noise, Tensor) else math.log(noise)
        constants.append(width / 2 * (math.log(2 * math.pi * math.e) + log_noise))
    row = options.row
    half = log_dets.reshape(len(log_dets), -1).mean(-1) / 2
    entropies = []
    for (first, last), log_det in zip(row.moments, half, strict=True):
        entropies.append(log_det + (constants[0] if row.is_pooled else sum(constants[first:last])))
    summed = [
        sum(weight * entropy for weight, entropy in zip(weights, entropies, strict=True))
        for weights in (row.entropy_a, row.entropy_b, row.conditional_entropy)
    ]
    return MMIComponents(value, -value.detach(), *summed)


def noise_floor(options: Options, dim: int, samples: int | Tensor, dtype: torch.dtype) -> float | Tensor:
    """The noise under ``dim`` features in a determinant of a batch, in units of feature variance: our reading.

    Adding ``noise * I`` is mutual information in the presence of isotropic noise. With ``noise = dim / snr`` the
    total variance of the embedding, ``dim``, is ``snr`` times the noise in one direction: about ``snr`` directions
    can rise above it, however wide the projector. ``samples`` points span no more directions than they are, and what
    rises above the noise in others is chance: hence ``noise = dim / min(snr, samples)``.

    It also bounds the exact loss: log(1 + x) <= x, so that half of log det(I + M / noise) is at most half of
    tr M / noise, ``snr / 2`` nats, for every width and slice. The default's 32 nats are more than any data set holds
    (images drawn from a million are told apart by 14), and little enough that chance cannot fill them: unrelated
    Gaussian views of 512 features show, on the default slice, 2.2 nats in 64 samples, 0.8 in 256 and 0.2 in 1024, at
    ``snr=256`` 9.4, 3.1 and 0.8, at a ridge of 0.01 77, 10 and 2.

    ``samples`` in a tensor, as counted over all ranks, gives a tensor: reading it would wait for the device.
    """
    # Rounding perturbs the spectrum of a dim x dim correlation matrix by about dim * eps; a floor below that would make
    # singular matrices indefinite.
    least = 8 * dim * torch.finfo(dtype).eps
    if options.ridge is not None:
        return max(options.ridge, least)
    if isinstance(samples, Tensor):
        return (dim / samples.clamp(max=options.snr)).clamp(min=least)
    return max(dim / min(options.snr, samples), least)


class _Estimate(NamedTuple):
    """The loss with gradient, the constant log-determinants (m, ...) it is made of, and of each view in them the number
    of features and the noise under each.
    """

    loss: Tensor
    log_dets: Tensor
    widths: list[int]
    noises: list[float | Tensor]


def _estimate(views: Sequence[Tensor], step: int | Tensor, options: Options) -> _Estimate:
    """Views to slices, to the noise floor, to log-determinants and their weighted sum by one of the routes."""
    row, is_well_formed, dtype = options.row, len(views) > 1, torch.float32
    for z in views:
        if not (
            isinstance(z, Tensor) and z.dtype in _FLOATS and z.shape == views[0].shape and z.layout == torch.strided
        ):
            is_well_formed = False
            break
        is_well_formed &= z.ndim == 2 and z.device == views[0].device
        dtype = z.dtype if z.dtype == torch.float64 else dtype
    if not is_well_formed or len(views[0]) < 2 or not views[0].shape[1]:
        checks.explain(views, not row.is_pooled, options.gathers and distributed.is_active(options.process_group))
        dtype = torch.promote_types(torch.float32, torch.promote_types(views[0].dtype, views[-1].dtype))
    if type(step) is not Tensor or step.dtype != torch.int64 or step.ndim:
        checks.check_step(step)
        step = torch.as_tensor(step, dtype=torch.int64, device=views[0].device).reshape(())
    device = views[0].device.type
    if torch.is_autocast_enabled(device):
        # Second moments and determinants of half precision numbers overflow or lose the signal.
        with torch.autocast(device, enabled=False):
            return _estimate(views, step, options)

    gathers = options.gathers and distributed.is_active(options.process_group)
    if options.impl == "reference" or torch._C._are_functorch_transforms_active():
        # Under torch.func's transforms, which closed forms do not know, torch differentiates the plain form.
        return _reference_estimate(views, step, options, gathers)
    triton = None
    if options.impl == "triton" or (AUTO_TRITON and options.impl == "auto" and device == "cuda"):
        refusal = triton.refusal(
            views, options.objective, options.logdet, options.slice_dim, options.slice_kind, gathers
        )
        if refusal is None:
            return _triton_estimate(views[0], views[1], step, options)
        if options.impl == "triton":
            raise ValueError(
                f"impl='triton' cannot compute this loss: {refusal}. impl='eager' computes every loss on every device"
            )

    is_sliced = options.slice_dim is not None and options.slice_dim < max(views[0].shape[1], views[-1].shape[1])
    if is_sliced:
        sliced = slices.slice_views(
            views, options.slice_dim, options.num_slices, options.block_dim, step, options.seed, dtype
        )
    else:
        sliced = []
        for z in views:
            sliced.append(z.to(dtype))
        if options.num_slices > 1 and not torch.compiler.is_compiling():
            checks.warn_without_slices(options.num_slices, options.slice_dim, views[0].shape[1])
    shared, samples = None, sliced[0].shape[-2]
    if gathers:
        sliced, shared, samples = _gather(sliced, step, options, is_sliced)
    if row.is_spurious and not torch.compiler.is_compiling():
        checks.warn_if_starved(options.objective, samples, sliced[0].shape[-1])

    # In a traced graph the number of samples is a symbol, which a tensor hides from what must be a number there.
    counted = sliced[0].new_full((), samples) if torch.compiler.is_compiling() else samples
    widths, noises = [], []
    for z in sliced:
        if z.shape[-1] not in widths:
            noise = noise_floor(options, z.shape[-1], shared.samples if shared else counted, dtype)
        widths.append(z.shape[-1])
        noises.append(noise)
    is_computed = is_sliced and options.slice_kind != "coordinates"
    if not row.is_pairwise or len(views) == 2:
        value, log_dets = _route(sliced, noises, options, is_computed, shared)
    else:
        value, log_dets = _mean_over_pairs(sliced, noises, options, is_computed, shared)
    return _Estimate(value, log_dets, widths, noises)


def _route(
    views: Sequence[Tensor], noises: list[float | Tensor], options: Options, is_computed: bool, shared: Shared | None
) -> tuple[Tensor, Tensor]:
    """The loss of slices (S, N, k), or all features (N, D), that make one estimate, and its constant log-determinants (m, S)."""
    row, noise = options.row, noises[0]
    rows, columns = len(views) * views[0].shape[-2], views[0].shape[-1]
    if not row.is_pooled:
        columns += views[1].shape[-1]
        if views[0].shape[-1] != views[1].shape[-1]:
            pairs = zip(views, noises, strict=True)
            noise = torch.cat([torch.as_tensor(floor).to(z).expand(z.shape[-1]) for z, floor in pairs])
    # The rows of the other ranks are not here: shared statistics are covariances.
    if shared is None and rows < columns:
        return gram_loss(row, noise, options.log_det, views, is_computed)
    return CovarianceLoss.apply(row, noise, options.log_det, shared, is_computed, *views)


def _mean_over_pairs(
    views: list[Tensor], noises: list[float | Tensor], options: Options, is_computed: bool, shared: Shared | None
) -> tuple[Tensor, Tensor]:
    estimates = []
    for i, j in combinations(range(len(views)), 2):
        of_pair = shared and shared._replace(means=[shared.means[i], shared.means[j]])
        estimates.append(_route([views[i], views[j]], [noises[i], noises[j]], options, is_computed, of_pair))
    values, log_dets = zip(*estimates, strict=True)
    return torch.stack(values).mean(), torch.stack(log_dets).mean(0)


def _gather(
    views: list[Tensor], step: Tensor, options: Options, is_sliced: bool
) -> tuple[list[Tensor], Shared | None, int]:
    """Of slices (S, N, k), or all features (N, D): themselves and what the ranks share; or, for the Gram route, the rows of all ranks."""
    group = options.process_group
    # Not a hash of the widths, which tracing could not follow.
    fingerprint = (options.fingerprint + 0x9E3779B9 * (len(views) + 64 * sum(z.shape[-1] for z in views))) % 2**32
    if is_sliced:
        slice_key = slices.key(step, options.seed, 0)
        guess = views[0].shape[-2] * torch.distributed.get_world_size(group)  # the warning is not worth a wait
        return views, distributed.share(views, [fingerprint, slice_key], group), guess
    if torch.compiler.is_compiling():  # a graph cannot choose its route by what it counts
        return views, distributed.share(views, [fingerprint, 0], group), views[0].shape[-2]
    sizes = distributed.batch_sizes(views[0], fingerprint, group)
    samples = sum(sizes)
    if samples < 2:
        raise ValueError(
            f"z_a must hold at least 2 samples on all ranks together, got {sizes} on ranks 0 to {len(sizes) - 1}; "
            "drop the last incomplete batch (drop_last=True)"
        )
    if len(views) * samples < sum(z.shape[-1] for z in views) / (len(views) if options.row.is_pooled else 1):
        return [distributed.concatenate(z, sizes, group) for z in views], None, samples
    return views, distributed.share(views, [fingerprint, 0], group), samples


def _reference_estimate(views: Sequence[Tensor], step: Tensor, options: Options, gathers: bool) -> _Estimate:
    if gathers:
        sizes = distributed.batch_sizes(views[0], options.fingerprint, options.process_group)
        views = [distributed.concatenate(z, sizes, options.process_group) for z in views]
    return _Estimate(*reference.loss(views, step, options))


def _triton_estimate(z_a: Tensor, z_b: Tensor, step: Tensor, options: Options) -> _Estimate:
    samples, dim = z_a.shape
    slice_dim = None if options.slice_dim is None or options.slice_dim >= dim else options.slice_dim
    width = slice_dim or dim
    noise = noise_floor(options, width, samples, torch.float32)
    value, log_dets = triton.content_loss(
        z_a, z_b, step, options.seed, slice_dim, options.num_slices, options.block_dim, noise, options.row.weights
    )
    return _Estimate(value, log_dets.detach(), [width] * 2, [noise] * 2)
