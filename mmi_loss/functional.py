"""Mutual information between views from second-order statistics. The loss can be read here, in :func:`_estimate`.

Every objective is half a weighted sum of log-determinants,

    I = 1/2 sum_j w_j log det(I + M_j / noise),

with M_j second moments of features standardised over the batch (:mod:`mmi_loss.objectives`). ``noise`` is a floor in
units of feature variance; I is the mutual information of views observed through isotropic noise of that variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, repeat
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mmi_loss import checks, distributed, reference
from mmi_loss.diagnostics import mutual_information
from mmi_loss.ops import slices, triton
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
    """The loss and what it is made of: float32 (float64 for float64 input) scalars, in nats. Only ``loss`` has a gradient.

    ``mutual_information = entropy_a - conditional_entropy = -loss``, with Gaussian differential entropies of the
    standardised features plus noise, averaged over slices. The conditional entropy is what remains of a view's once the
    content is known (``objective="content"``), or the other view. Of content and exchangeable views, which are of one
    kind, ``entropy_b`` equals ``entropy_a``.
    """

    loss: Tensor
    mutual_information: Tensor
    entropy_a: Tensor
    entropy_b: Tensor
    conditional_entropy: Tensor


@shows_options
def mmi_loss(z_a: Tensor, z_b: Tensor, *, step: int | Tensor = 0, **options: Unpack[OptionTypes]) -> Tensor:
    """Negative mutual information of two views (N, D), in nats: the stateless form of :class:`mmi_loss.MMILoss`.

    It takes the same options by keyword, and the ``step`` that, with ``seed``, determines the random slice; the module
    counts its calls there. The returned scalar and the errors are the module's too.

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

    For ``objective="content"`` the covariance of one view is split into within-image and between-image parts over all
    views at once (an analysis of variance); for the others it is the mean over all pairs, on the same slice.
    """
    return loss(views, step, Options(**options))


def loss(views: Sequence[Tensor], step: int | Tensor, options: Options) -> Tensor:
    """The loss of validated options."""
    return _estimate(views, step, options).loss


def components(views: Sequence[Tensor], step: int | Tensor, options: Options) -> MMIComponents:
    """The loss and the entropies it is made of."""
    value, log_dets, widths, noises = _estimate(views, step, options)
    row, new = options.row, {"dtype": log_dets.dtype, "device": log_dets.device}
    # log det(I + M / noise) to the differential entropy of the features plus noise, one constant for each view.
    log_noises = torch.stack([torch.as_tensor(noise, **new).log() for noise in noises])
    constants = torch.tensor(widths, **new) / 2 * (math.log(2 * math.pi * math.e) + log_noises)
    of_moments = [constants[0] if row.is_pooled else constants[first:last].sum() for first, last in row.moments]
    entropies = log_dets.reshape(len(log_dets), -1).mean(-1) / 2 + torch.stack(of_moments)
    weights = torch.tensor([row.entropy_a, row.entropy_b, row.conditional_entropy], **new)
    return MMIComponents(value, -value.detach(), *(weights @ entropies))


def noise_floor(options: Options, dim: int, samples: int | Tensor, dtype: torch.dtype) -> float | Tensor:
    """The noise under ``dim`` features in a determinant of a batch, in units of feature variance: our reading.

    Adding ``noise * I`` is mutual information in the presence of isotropic noise. With ``noise = dim / snr`` the total
    variance of the embedding, ``dim``, is ``snr`` times the noise in one direction: about ``snr`` directions can rise
    above it, however wide the projector. ``samples`` points span no more directions than they are, and what rises above
    the noise in others is chance: hence ``noise = dim / min(snr, samples)``.

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
    loss: Tensor  # with gradient
    log_dets: Tensor  # (m, ...), constant
    widths: Sequence[int]  # features of each view in them
    noises: Sequence[float | Tensor]  # under each of them


def _estimate(views: Sequence[Tensor], step: int | Tensor, options: Options) -> _Estimate:
    """Checks the call and chooses the implementation."""
    is_well_formed, dtype = len(views) > 1, torch.float32
    for z in views:
        if not (isinstance(z, Tensor) and z.dtype in _FLOATS and z.ndim == 2 and z.shape == views[0].shape):
            is_well_formed = False
            break
        is_well_formed &= z.device == views[0].device and z.layout == torch.strided
        dtype = z.dtype if z.dtype == torch.float64 else dtype
    gathers = options.gathers and distributed.is_active(options.process_group)
    if not is_well_formed or len(views[0]) < 2 or not views[0].shape[1]:
        checks.explain(views, not options.row.is_pooled, gathers)
        dtype = torch.promote_types(torch.float32, torch.promote_types(views[0].dtype, views[-1].dtype))
    if type(step) is not Tensor or step.dtype != torch.int64 or step.ndim:
        checks.check_step(step)
        step = torch.as_tensor(step, dtype=torch.int64, device=views[0].device).reshape(())
    device = views[0].device.type
    if torch.is_autocast_enabled(device):
        # Second moments and determinants of half precision numbers overflow or lose the signal.
        with torch.autocast(device, enabled=False):
            return _estimate(views, step, options)
    if options.impl == "reference" or torch._C._are_functorch_transforms_active():
        # Under torch.func's transforms, which closed forms do not know, torch differentiates the plain form.
        if gathers:
            sizes = distributed.batch_sizes(views[0], options.fingerprint, options.process_group)
            views = [distributed.concatenate(z, sizes, options.process_group) for z in views]
        return _Estimate(*reference.loss(views, step, options))
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
    return _eager_estimate(views, step, options, dtype, gathers)


def _eager_estimate(
    views: Sequence[Tensor], step: Tensor, options: Options, dtype: torch.dtype, gathers: bool
) -> _Estimate:
    """Views to slices, to the noise floor, to log-determinants and their weighted sum, by covariances or Gram matrices."""
    row, is_traced = options.row, torch.compiler.is_compiling()
    is_sliced = options.slice_dim is not None and options.slice_dim < max(views[0].shape[1], views[-1].shape[1])
    if is_sliced:
        views = slices.slice_views(
            views, options.slice_dim, options.num_slices, options.block_dim, step, options.seed, dtype
        )
    else:
        views = tuple(map(Tensor.to, views, repeat(dtype)))
        if options.num_slices > 1 and not is_traced:
            checks.warn_without_slices(options.num_slices, options.slice_dim, views[0].shape[1])
    shared, samples = None, views[0].shape[-2]
    if gathers:
        views, shared, samples = _gather(views, step, options, is_sliced)
    if row.is_spurious and not is_traced:
        checks.warn_if_starved(options.objective, samples, views[0].shape[-1])

    # In a traced graph the number of samples is a symbol, which a tensor hides from what must be a number there.
    count = shared.samples if shared else views[0].new_full((), samples) if is_traced else samples
    widths, noises = [], []
    for z in views:
        if z.shape[-1] not in widths:
            noise = noise_floor(options, z.shape[-1], count, dtype)
        widths.append(z.shape[-1])
        noises.append(noise)
    is_computed = is_sliced and options.slice_kind != "coordinates"
    losses, log_dets = [], []
    for group in combinations(range(len(views)), 2) if row.is_pairwise else [tuple(range(len(views)))]:
        chosen = itemgetter(*group)
        of_group = shared and shared._replace(means=chosen(shared.means))
        estimate = _route(chosen(views), chosen(noises), options, is_computed, of_group)
        losses.append(estimate[0])
        log_dets.append(estimate[1])
    if len(losses) == 1:
        return _Estimate(losses[0], log_dets[0], widths, noises)
    return _Estimate(torch.stack(losses).mean(), torch.stack(log_dets).mean(0), widths, noises)


def _route(
    views: Sequence[Tensor],
    noises: Sequence[float | Tensor],
    options: Options,
    is_computed: bool,
    shared: Shared | None,
) -> tuple[Tensor, Tensor]:
    """The loss of views (S, N, k) or (N, D) that make one estimate, and its constant log-determinants (m, ...)."""
    row, noise = options.row, noises[0]
    rows, columns = len(views) * views[0].shape[-2], views[0].shape[-1]
    if not row.is_pooled:
        columns += views[1].shape[-1]
        if views[0].shape[-1] != views[1].shape[-1]:
            pairs = zip(views, noises, strict=True)
            noise = torch.cat(
                [torch.as_tensor(floor, dtype=z.dtype, device=z.device).expand(z.shape[-1]) for z, floor in pairs]
            )
    # The rows of the other ranks are not here: shared statistics are covariances.
    if shared is None and rows < columns:
        return gram_loss(row, noise, options.log_det, views, is_computed)
    return CovarianceLoss.apply(row, noise, options.log_det, shared, is_computed, *views)


def _gather(
    views: Sequence[Tensor], step: Tensor, options: Options, is_sliced: bool
) -> tuple[Sequence[Tensor], Shared | None, int]:
    """Views (S, N, k) or (N, D) and what the ranks share of them; or, for the Gram route, the rows of all ranks. And the
    number of samples, guessed where counting would wait.
    """
    group, guess = options.process_group, views[0].shape[-2] * distributed.world_size(options.process_group)
    # Not a hash of the widths, which tracing could not follow.
    fingerprint = (options.fingerprint + 0x9E3779B9 * (len(views) + 64 * sum(z.shape[-1] for z in views))) % 2**32
    if is_sliced:
        return views, distributed.share(views, [fingerprint, slices.key(step, options.seed, 0)], group), guess
    if torch.compiler.is_compiling():  # a graph cannot choose its route by what it counts
        return views, distributed.share(views, [fingerprint, 0], group), guess
    sizes = distributed.batch_sizes(views[0], fingerprint, group)
    samples = sum(sizes)
    if samples < 2:
        raise ValueError(
            f"z_a must hold at least 2 samples on all ranks together, got {sizes} on ranks 0 to {len(sizes) - 1}; "
            "drop the last incomplete batch (drop_last=True)"
        )
    columns = views[0].shape[-1] if options.row.is_pooled else views[0].shape[-1] + views[1].shape[-1]
    if (len(views) if options.row.is_pooled else 2) * samples < columns:
        return [distributed.concatenate(z, sizes, group) for z in views], None, samples
    return views, distributed.share(views, [fingerprint, 0], group), samples


def _triton_estimate(z_a: Tensor, z_b: Tensor, step: Tensor, options: Options) -> _Estimate:
    dim = z_a.shape[1]
    slice_dim = None if options.slice_dim is None or options.slice_dim >= dim else options.slice_dim
    noise = noise_floor(options, slice_dim or dim, len(z_a), torch.float32)
    value, log_dets = triton.content_loss(
        z_a, z_b, step, options.seed, slice_dim, options.num_slices, options.block_dim, noise, options.row.weights
    )
    return _Estimate(value, log_dets.detach(), [slice_dim or dim] * 2, [noise] * 2)
