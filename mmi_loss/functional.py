"""Mutual information between views from second-order statistics. The loss can be read here, in :func:`_eager_estimate`.

Every objective is half a weighted sum of log-determinants, I = 1/2 sum_j w_j log det(I + M_j / noise), with M_j second
moments of features standardised over the batch (:mod:`mmi_loss.objectives`) and ``noise`` a floor in units of feature
variance: the mutual information of views observed through isotropic noise of that variance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmi_loss import checks, distributed, reference
from mmi_loss.diagnostics import mutual_information
from mmi_loss.ops import slices, triton
from mmi_loss.ops.covariance import CovarianceLoss, Shared, noise_floor
from mmi_loss.ops.gram import gram_loss
from mmi_loss.options import Options, OptionTypes, shows_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["MMIComponents", "Options", "mmi_loss", "mmi_loss_multiview", "mutual_information"]

AUTO_TRITON = False  # whether impl="auto" takes the kernels on CUDA: not before benchmarks/speed_cuda.py has run there
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class MMIComponents(NamedTuple):
    """The loss and what it is made of: float32 (float64 for such input) scalars in nats; only ``loss`` has gradients.

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
def mmi_loss(
    z_a: Tensor | Sequence[Tensor], z_b: Tensor | None = None,
    *, step: int | Tensor = 0, **options: Unpack[OptionTypes],
) -> Tensor:  # fmt: skip
    """Negative mutual information of views, in nats: the stateless form of :class:`mmi_loss.MMILoss`.

    It takes two views (N, D), or a sequence of V >= 2 of them; the module's options by keyword; and the ``step`` that,
    with ``seed``, determines the random slice, where the module counts its calls.

    Example:
        >>> z = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
        >>> identical, independent = mmi_loss(z, z), mmi_loss([z, z.roll(1, 0)])
        >>> bool(identical < -20 < independent < 0)
        True
    """
    return loss(checks.views_of_call(z_a, z_b, None, None), step, Options(**options))


mmi_loss_multiview = mmi_loss


def loss(views: Sequence[Tensor], step: int | Tensor, options: Options) -> Tensor:
    """The loss of validated options."""
    return _estimate(views, step, options).loss


def components(views: Sequence[Tensor], step: int | Tensor, options: Options) -> MMIComponents:
    """The loss and the entropies it is made of."""
    value, log_dets, widths, noises = _estimate(views, step, options)
    row = options.row
    # log det(I + M / noise) to the differential entropy of the features plus noise, one constant for each view.
    log_noises = torch.stack(
        [torch.as_tensor(noise, dtype=log_dets.dtype, device=log_dets.device).log().mean() for noise in noises]
    )
    constants = torch.tensor(widths).to(log_dets) / 2 * (math.log(2 * math.pi * math.e) + log_noises)
    of_moments = [constants[0]] * len(row.moments)
    if not row.is_pooled:
        of_groups = torch.stack([torch.stack(group) for group in combinations(constants, 2)])
        of_moments = [of_groups[:, first:last].sum(1).mean() for first, last in row.moments]
    entropies = log_dets.reshape(len(log_dets), -1).mean(-1) / 2 + torch.stack(of_moments)
    weights = torch.tensor([row.entropy_a, row.entropy_b, row.conditional_entropy]).to(log_dets)
    of_views = (weights * entropies).sum(-1)  # no product of matrices, which autocast would round
    return MMIComponents(value, -value.detach(), *of_views)


def noise(views: Sequence[Tensor], step: int | Tensor, options: Options) -> Tensor:
    """The noise under the features of each slice of the views, in units of feature variance."""
    return torch.as_tensor(_estimate(views, step, options).noises[0])


class _Estimate(NamedTuple):
    loss: Tensor  # with gradient
    log_dets: Tensor  # (m, ...), constant
    widths: Sequence[int]  # features of each view in them
    noises: Sequence[float | Tensor]  # under each of them: one, or of every slice


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
    if not is_well_formed or views[0].shape[0] < 2 or not views[0].shape[1]:
        checks.explain(views, not options.row.is_pooled, gathers)
        dtype = functools.reduce(torch.promote_types, [z.dtype for z in views], torch.float32)
    if type(step) is not Tensor or step.dtype != torch.int64 or step.ndim:
        checks.check_step(step)
        step = torch.as_tensor(step, dtype=torch.int64, device=views[0].device).reshape(())
    device = views[0].device.type
    if torch.is_autocast_enabled(device):
        # Second moments and determinants of half precision numbers overflow or lose the signal.
        with torch.autocast(device, enabled=False):
            return _estimate(views, step, options)
    is_plain = _is_exporting() or not (torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active())
    is_plain &= options.impl != "triton"
    if options.impl == "reference" or is_plain:
        # torch.func's transforms do not know closed forms, and torch.export loses them: torch differentiates the plain.
        if gathers:
            views, group, widths = [z.to(dtype) for z in views], options.process_group, [z.shape[1] for z in views]
            _, sizes = distributed.share(views, widths, options.fingerprint, step, group, few=math.inf)
            views = [distributed.Concatenate.apply(z, sizes, group) for z in views]
        return _Estimate(*reference.loss(views, step, options))
    if options.impl == "triton" or (AUTO_TRITON and options.impl == "auto" and device == "cuda"):
        refusal = triton.refusal(views, options, gathers)
        if refusal is None:
            width = min(views[0].shape[1], options.slice_dim or views[0].shape[1])
            floor = noise_floor(options, width, len(views[0]), torch.float32)
            value, log_dets, noise = triton.content_loss(views[0], views[1], step, options, floor)
            return _Estimate(value, log_dets, [width] * 2, [noise] * 2)
        if options.impl == "triton":
            raise ValueError(f"impl='triton' cannot compute this loss: {refusal}. impl='eager' computes every loss")
    return _eager_estimate(views, step, options, dtype, gathers)


def _eager_estimate(
    views: Sequence[Tensor], step: Tensor, options: Options, dtype: torch.dtype, gathers: bool
) -> _Estimate:
    """Views to slices, noise floor, log-determinants and their weighted sum, by covariances or Gram matrices."""
    row, is_traced = options.row, torch.compiler.is_compiling()
    dims = [z.shape[1] for z in views]
    is_sliced = options.slice_dim is not None and options.slice_dim < max(dims)
    if is_sliced:
        views = slices.slice_views(
            views, options.slice_dim, options.num_slices, options.block_dim, step, options.seed, dtype
        )
    else:
        views = [z.to(dtype) for z in views]
        if options.num_slices > 1 and not is_traced:
            checks.warn_without_slices(options.num_slices, options.slice_dim, views[0].shape[1])
    shared, samples = None, views[0].shape[-2]
    if gathers:
        views, shared, samples = _gather(views, dims, step, options, is_sliced)
    if row.is_spurious and not is_traced:
        checks.warn_if_starved(options.objective, samples, views[0].shape[-1])

    # In a traced graph the number of samples is a symbol, which a tensor hides from what must be a number there.
    count = shared.samples if shared else views[0].new_full((), samples) if is_traced else samples
    widths, estimates = [z.shape[-1] for z in views], []
    floor = noise_floor(options, widths[0], count, dtype)
    floors = [floor if width == widths[0] else noise_floor(options, width, count, dtype) for width in widths]
    is_computed = is_sliced and options.slice_kind != "coordinates"
    for group in combinations(range(len(views)), 2) if row.is_pairwise else [tuple(range(len(views)))]:
        chosen, floor, columns = [views[i] for i in group], floors[group[0]], widths[0]
        if not row.is_pooled:
            widths_of_group = [widths[i] for i in group]
            columns = sum(widths_of_group)
            if widths_of_group[0] != widths_of_group[-1]:
                noises = [torch.as_tensor(floors[i][1], dtype=dtype, device=chosen[0].device) for i in group]
                repeats = torch.tensor(widths_of_group, device=chosen[0].device)
                floor = 0.0, torch.stack(noises).repeat_interleave(repeats, output_size=columns)
        # The rows of the other ranks are not here: shared statistics are covariances.
        if shared is None and len(group) * samples < columns:
            estimates.append(gram_loss(row, floor, options.log_det, chosen, is_computed))
        else:
            of_group = shared and Shared(shared.samples, [shared.means[i] for i in group], shared.reduce)
            estimates.append(CovarianceLoss.apply(row, floor, options.log_det, of_group, is_computed, *chosen))
    value, log_dets, noise = estimates[0]
    if len(estimates) > 1:
        value, log_dets = (torch.stack(column).mean(0) for column in list(zip(*estimates, strict=True))[:2])
        noise = torch.cat([of_group.flatten() for _, _, of_group in estimates])
    return _Estimate(value, log_dets, widths, [noise] * len(views) if row.is_pooled else [floor[1] for floor in floors])


def _gather(
    views: Sequence[Tensor], widths: Sequence[int], step: Tensor, options: Options, is_sliced: bool
) -> tuple[Sequence[Tensor], Shared | None, int]:
    """Views (S, N, k) or (N, D) and what the ranks share of them, or for the Gram route the rows of all ranks; and the
    number of samples, guessed where counting would wait. ``widths`` are those before slicing.
    """
    group, few = options.process_group, None
    if not (is_sliced or torch.compiler.is_compiling()):  # a graph cannot choose its route by what it counts
        columns = widths[0] if options.row.is_pooled else widths[0] + widths[-1]
        few = columns / (2 if options.row.is_pairwise else len(views))
    shared, sizes = distributed.share(views, widths, options.fingerprint, step, group, few)
    if few is None:
        return views, shared, views[0].shape[-2] * dist.get_world_size(group)
    if shared is None:
        views = [distributed.Concatenate.apply(z, sizes, group) for z in views]
    return views, shared, sum(sizes)
