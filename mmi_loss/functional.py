"""Mutual information between views from second-order statistics: validation, estimators and the choice of route.

Every estimator is half a weighted sum of log-determinants,

    I = 1/2 sum_j w_j log det(I + M_j / ridge),

with M_j second moments of features standardised over the batch. ``ridge`` is a noise floor in units of feature
variance; I is the mutual information of views observed through isotropic noise of that variance.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mmi_loss import distributed, reference
from mmi_loss.diagnostics import mutual_information
from mmi_loss.distributed import Shared
from mmi_loss.ops import covariance, gram, registry, slices
from mmi_loss.ops import logdet as logdets
from mmi_loss.ops.contrasts import squared_norms

__all__ = ["MMIComponents", "Options", "mmi_loss", "mmi_loss_multiview", "mutual_information"]

# Evidence for the defaults: `python -m benchmarks ablate` (benchmarks/results/ablate.csv), 100 steps, D = 512, N = 256.
# Numbers are differences of a score, the mean of kNN and linear accuracy, to the default's, on the latent task / on
# digits; from one seed, with a 95 % interval of .09 on digits, or from two (*) with .06. Slices had 8 mixtures then.
DEFAULT_SLICE_DIM = 128
"""Slices of 32, 64, 256 and all 512 features: -.01, .00*, .00*, .00* / -.10, -.03*, +.03*, +.05*. At N = 1024 the last
two are +.02 and +.06 on digits, at N = 32 -.01 and .00, on the latent task nothing differs. All features learn faster
then; but a slice already learns no worse than other losses do, and a determinant's cost grows with its cube.
"""
DEFAULT_SNR = 64.0
"""At most one per sample: see :meth:`Options.noise_floor`. 16, 32, 128 and 256 at N = 256 (two seeds): -.01, .00, .00,
.01 / -.01, .01, .00, -.03; at N = 1024: -.02, -.01, .01, .01 / .01, .01, .01, -.01. 4 and a ridge of 0.01 (12800):
-.05, .00 / -.14, -.10. Smaller batches want one direction per sample: after 300 steps at N = 64, 32 and 128 are -.04
and -.05 on digits; after 424 at N = 32, the scores of 16, 24, 32 and 64 are .53, .57, .58 and .53 there, on the latent
task .87 each.
"""
DEFAULT_BETA = 1.0
"""0.5, 0.75, 1, 1.5 and 1.75 against the exact loss, first seed: -.02, -.02, -.01, .00, .00 / -.13, -.11, -.07, -.04,
-.05. 1.5 was better than 1 on both tasks, by .01 / .03*, within the interval; 1 is the largest at which the series
is a lower bound for every objective and order.
"""
DEFAULT_ORDER = 4
"""The paper's. Orders 1 to 6 against the exact loss, first seed: -.03, -.02, -.02, -.01, -.01, .00 / -.14, -.09, -.10,
-.07, -.06, -.04: each costs one more product of matrices at most and comes nearer.
"""
DEFAULT_NUM_SLICES = 1
"""Four slices, two seeds: .00 / +.03, at N = 32 .00 / -.01, at N = 1024 .00 / +.04, for four times the determinants."""
SAMPLES_PER_DIM = 8
"""Joint and exchangeable MI of fewer samples per dimension are mostly spurious; training then fails quietly."""

# Weights of the log-determinants in -2 I, twice the loss, in the order in which the routes below return them.
OBJECTIVES = {
    "content": (-1, 1),  # total, within
    "exchangeable": (-2, 1, 1),  # total, sum, difference
    "joint": (-1, -1, 1),  # view a, view b, both
}
Value = tuple[Tensor, Tensor]
"""A loss with gradient and the constant log-determinants it is made of."""
LOGDETS = ("cholesky", "taylor")
SLICE_KINDS = ("kronecker", "gaussian", "coordinates")
MIXTURES = 4
"""Random mixtures of feature blocks in a Kronecker slice. 2, 4, 8 and 16 learn alike within what seeds differ: scores
of .63, .65, .64, .64 on digits at D = 512, two or three seeds. Half of them are half the products of the projection.
"""
AUTO_TRITON = False
"""Whether ``impl="auto"`` takes the Triton kernels on CUDA. Not before ``benchmarks speed_cuda`` has been run there."""
IMPLS = ("auto", *registry.IMPLEMENTATIONS)


class MMIComponents(NamedTuple):
    """The loss and what it is made of: float32 (float64 for float64 input) scalars, in nats.

    ``mutual_information = entropy_a + entropy_b - joint_entropy = -loss``, with Gaussian differential entropies of
    the standardised features plus noise, averaged over slices. Under ``objective="content"`` the joint entropy is
    that of a view plus that of its nuisance, H(Z) + H(Z | content), so that the identity holds. Only ``loss``
    carries a gradient.
    """

    loss: Tensor
    mutual_information: Tensor
    entropy_a: Tensor
    entropy_b: Tensor
    joint_entropy: Tensor


@dataclass(frozen=True)
class Options:
    """Everything that defines the loss but the data and the step, validated; see :class:`mmi_loss.MMILoss`."""

    objective: str = "content"
    slice_dim: int | None = DEFAULT_SLICE_DIM
    num_slices: int = DEFAULT_NUM_SLICES
    seed: int = 0
    snr: float | None = DEFAULT_SNR
    ridge: float | None = None
    logdet: str = "cholesky"
    order: int = DEFAULT_ORDER
    beta: float = DEFAULT_BETA
    gather_distributed: bool = False
    impl: str = "auto"
    slice_kind: str = "kronecker"

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, known))}")
        for name in ("slice_dim", "num_slices", "order"):
            value = getattr(self, name)
            if name == "slice_dim" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}" + _SLICE_DIM_HINT * (name == "slice_dim"))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {self.seed!r}")
        if not isinstance(self.gather_distributed, bool):
            raise TypeError(f"gather_distributed must be True or False, got {self.gather_distributed!r}")
        for name in ("snr", "ridge", "beta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not (value is None or isinstance(value, numbers.Real)):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if self.beta is None or not 0 < self.beta < 2:
            raise ValueError(f"beta must lie in (0, 2), where the series of the logarithm converges, got {self.beta}")
        if self.ridge is not None and self.snr not in (None, DEFAULT_SNR):
            raise ValueError(f"snr={self.snr} and ridge={self.ridge} set the same noise floor: give only one of them")
        name, value = ("snr", self.snr) if self.ridge is None else ("ridge", self.ridge)
        if value is None or not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a positive number, got {value}")

    def noise_floor(self, dim: int, samples: int | Tensor, dtype: torch.dtype) -> float | Tensor:
        """The ridge for ``dim`` features in a determinant of a batch, in units of feature variance: our reading.

        Adding ``ridge * I`` is mutual information in the presence of isotropic noise. With ``ridge = dim / snr`` the
        total variance of the embedding, ``dim``, is ``snr`` times the noise in one direction: about ``snr``
        directions can rise above it, however wide the projector. ``samples`` points span no more directions than
        they are, and what rises above the noise in others is chance: hence ``ridge = dim / min(snr, samples)``.

        It also bounds the loss: log(1 + x) <= x, so that half of log det(I + M / ridge) is at most half of
        tr M / ridge, ``snr / 2`` nats, for every width and slice. The default's 32 nats are more than any data set
        holds (images drawn from a million are told apart by 14), and little enough that chance cannot fill them:
        unrelated Gaussian views of 512 features show 2.2 nats in 64 samples, 0.8 in 256 and 0.2 in 1024, at
        ``snr=256`` 9.4, 3.1 and 0.8, at a ridge of 0.01 77, 10 and 2.

        ``samples`` in a tensor, as counted over all ranks, gives a tensor: reading it would wait for the device.
        """
        # Rounding perturbs the spectrum of a dim x dim correlation matrix by about dim * eps; a floor below that
        # would make singular matrices indefinite.
        least = 8 * dim * torch.finfo(dtype).eps
        if self.ridge is not None:
            return max(self.ridge, least)
        snr = cast(float, self.snr)
        if isinstance(samples, Tensor):
            return (dim / samples.clamp(max=snr)).clamp(min=least)
        return max(dim / min(snr, samples), least)

    def log_det(self) -> logdets.LogDet:
        """How log-determinants are taken."""
        return logdets.Series(self.order, self.beta) if self.logdet == "taylor" else logdets.Cholesky()


_CHOICES: dict[str, Sequence[str]] = {
    "objective": tuple(OBJECTIVES),
    "logdet": LOGDETS,
    "slice_kind": SLICE_KINDS,
    "impl": IMPLS,
}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_SLICE_DIM_HINT = "; slice_dim=None takes all features"


def mmi_loss(z_a: Tensor, z_b: Tensor, *, step: int | Tensor = 0, **options: Any) -> Tensor:
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


def mmi_loss_multiview(views: Sequence[Tensor], *, step: int | Tensor = 0, **options: Any) -> Tensor:
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
    """The loss of two views and the entropies it is made of."""
    value, log_dets, dim, ridge = _estimate(views, step, options)
    # log det(I + M / ridge) to the differential entropy of the features plus noise.
    log_ridge = ridge.log() if isinstance(ridge, Tensor) else math.log(ridge)
    constant = dim / 2 * (math.log(2 * math.pi * math.e) + log_ridge)
    half = log_dets.reshape(len(log_dets), -1).mean(-1) / 2
    entropy_a = half[0] + constant
    if options.objective == "joint":
        entropy_b, joint_entropy = half[1] + constant, half[2] + 2 * constant
    elif options.objective == "exchangeable":
        entropy_b, joint_entropy = entropy_a, half[1] + half[2] + 2 * constant
    else:
        entropy_b, joint_entropy = entropy_a, half[0] + half[1] + 2 * constant
    return MMIComponents(value, -value.detach(), entropy_a, entropy_b, joint_entropy)


class _Estimate(NamedTuple):
    """The loss with gradient, the constant log-determinants (m,) or (m, S) it is made of, the features in each, and
    the noise floor under them.
    """

    loss: Tensor
    log_dets: Tensor
    dim: int
    ridge: float | Tensor


def _estimate(views: Sequence[Tensor], step: int | Tensor, options: Options) -> _Estimate:
    _validate(views, step, options)
    device_type = views[0].device.type
    if not torch.is_autocast_enabled(device_type):  # entering a context takes longer than a small operation
        return _estimate_in_full_precision(views, step, options)
    # Second moments and determinants of half precision numbers overflow or lose the signal.
    with torch.autocast(device_type, enabled=False):
        return _estimate_in_full_precision(views, step, options)


def _estimate_in_full_precision(views: Sequence[Tensor], step: int | Tensor, options: Options) -> _Estimate:
    gather = options.gather_distributed and distributed.is_active()
    if _takes_triton(views, options, gather):
        return _triton_estimate(views[0], views[1], step, options)
    dtype = torch.float64 if any(z.dtype == torch.float64 for z in views) else torch.float32
    sliced = _slice(views, step, options, dtype)
    num_views, (samples, dim) = len(views), sliced[0].shape[-2:]
    if gather and (options.slice_dim is None or options.impl == "reference"):
        # Whether N < D is known only after counting, and the Gram route needs the embeddings themselves.
        sizes = distributed.batch_sizes(views[0])
        samples = sum(sizes)
        if samples < 2:
            raise ValueError(
                f"z_a must hold at least 2 samples on all ranks together, got {sizes} on ranks 0 to {len(sizes) - 1}; "
                "drop the last incomplete batch (drop_last=True)"
            )
        if options.impl == "reference" or _is_wide(options.objective, num_views, samples, dim):
            sliced = [distributed.concatenate(z.movedim(-2, 0), sizes).movedim(0, -2) for z in sliced]
            gather = False
    elif gather:
        samples *= distributed.world_size()  # a guess: the warning is not worth a wait
    _warn_if_starved(options.objective, samples, dim)
    shared = distributed.share(sliced) if gather else None
    ridge = options.noise_floor(dim, shared.samples if shared else samples, dtype)
    groups = [range(num_views)] if options.objective == "content" else combinations(range(num_views), 2)
    estimates = []
    for group in groups:
        of_group = shared and Shared(shared.samples, [shared.means[i] for i in group])
        estimates.append(_route([sliced[i] for i in group], ridge, options, of_group))
    value, log_dets = estimates[0] if len(estimates) == 1 else _mean(estimates)
    return _Estimate(value, log_dets, dim, ridge)


def _mean(estimates: Sequence[Value]) -> Value:
    values, log_dets = zip(*estimates, strict=True)
    return torch.stack(values).mean(0), torch.stack(log_dets).mean(0)


def _slice(views: Sequence[Tensor], step: int | Tensor, options: Options, dtype: torch.dtype) -> list[Tensor]:
    """All features (N, D), or the step's random slices (S, N, slice_dim), the same for all views."""
    dim, device = views[0].shape[1], views[0].device
    if options.slice_dim is None or options.slice_dim >= dim:
        return [z.to(dtype) for z in views]
    slice_dim, num_slices = options.slice_dim, options.num_slices
    step = torch.as_tensor(step, dtype=torch.int64, device=device)
    if options.slice_kind == "coordinates":
        indices = slices.random_coordinates(dim, slice_dim, num_slices, step, options.seed)
        return [slices.take_coordinates(z, indices, dtype) for z in views]
    block_dim = _block_dim(slice_dim, options.slice_kind)
    mixing = slices.mixing_matrix(dim, slice_dim, num_slices, block_dim, step, options.seed, dtype)
    return slices.project(views, mixing, slice_dim, num_slices, block_dim)


def _block_dim(slice_dim: int, slice_kind: str) -> int:
    """Features that a projection leaves together: see :func:`mmi_loss.ops.slices.mixing_matrix`."""
    return 1 if slice_kind == "gaussian" else max(1, slice_dim // MIXTURES)


def _is_wide(objective: str, num_views: int, samples: int, dim: int) -> bool:
    """Whether the Gram matrices, of as many rows as there are samples in one estimate, are the smaller ones."""
    rows = samples if objective == "joint" else num_views * samples
    return rows < dim


def _route(views: list[Tensor], ridge: float | Tensor, options: Options, shared: Shared | None) -> Value:
    """The loss from all features (N, D) or slices (S, N, k), and the log-determinants (m,) or (m, S)."""
    num_views, (samples, dim) = len(views), views[0].shape[-2:]
    is_joint = options.objective == "joint"
    if options.impl == "reference":
        order = options.order if options.logdet == "taylor" else None
        stacked = [z.reshape(-1, samples, dim) for z in views]
        log_dets = reference.log_dets(stacked, options.objective, cast(float, ridge), order, options.beta)
        return logdets.weighted_sum(log_dets, OBJECTIVES[options.objective]), log_dets.detach()
    # The rows of the other ranks are not here: gathered statistics are covariances.
    if shared or not _is_wide(options.objective, num_views, samples, dim):
        covariance_route = _joint if is_joint else _pooled
        return covariance_route(views, ridge, options, shared)
    ridge = cast(float, ridge)  # no rank is left to count
    gram_route = _joint_gram if is_joint else _pooled_gram
    if views[0].ndim == 2:
        return gram_route(views, ridge, options)
    values, log_dets_of_slices = zip(
        *(gram_route([z[s] for z in views], ridge, options) for s in range(len(views[0]))), strict=True
    )
    return torch.stack(values).mean(), torch.stack(log_dets_of_slices, dim=1)


def _pooled(views: list[Tensor], ridge: float | Tensor, options: Options, shared: Shared | None) -> Value:
    """Covariance route of exchangeable views: they share one mean, one covariance, one symmetric cross-covariance."""
    num_views = len(views)
    norms = squared_norms(num_views)
    total = [1 / (num_views * norm) for norm in norms]
    if options.objective == "content":
        coefficients = [total, [0.0, *(1 / ((num_views - 1) * norm) for norm in norms[1:])]]
    else:
        coefficients = [total, [1 / norms[0], 0.0], [0.0, 1 / norms[1]]]
    arguments = coefficients, OBJECTIVES[options.objective], ridge, options.log_det()
    if shared is None:
        return covariance.pooled_loss(views, *arguments)
    mean = torch.stack(shared.means).mean(0)
    return covariance.pooled_loss(views, *arguments, distributed.sum_constant, shared.samples, mean)


def _joint(views: list[Tensor], ridge: float | Tensor, options: Options, shared: Shared | None) -> Value:
    """Covariance route of any two views, each with its own mean and variance."""
    z_a, z_b = (z if z.ndim == 3 else z[None] for z in views)
    count, means = shared or (z_a.shape[-2], [z.detach().mean(-2, keepdim=True) for z in (z_a, z_b)])
    mean_a, mean_b = (mean.reshape(len(z_a), 1, -1) for mean in means)
    x_a, x_b = z_a - mean_a, z_b - mean_b
    scatters = torch.stack([covariance.scatter(x_a), covariance.cross_scatter(x_a, x_b), covariance.scatter(x_b)])
    if shared:
        scatters = distributed.all_reduce_sum(scatters)
    s_aa, s_ab, s_bb = scatters / count
    joint = torch.cat([torch.cat([s_aa, s_ab], -1), torch.cat([s_ab.mT, s_bb], -1)], -2)
    mean = torch.cat([mean_a, mean_b], -1)[:, 0]
    return _loss_of_joint(covariance.signal_to_noise(joint, mean, ridge), options)


def _loss_of_joint(matrix: Tensor, options: Options) -> Value:
    """From I + (standardised joint covariance) / ridge, (S, 2k, 2k)."""
    if options.logdet == "cholesky":
        values = logdets.joint_log_dets(matrix)
    else:
        dim = matrix.shape[-1] // 2
        blocks = torch.stack([matrix[..., :dim, :dim], matrix[..., dim:, dim:]])
        values = logdets.log_dets([blocks, matrix[None]], options.log_det())
    return logdets.weighted_sum(values, OBJECTIVES["joint"]), values.detach()


def _pooled_gram(views: list[Tensor], ridge: float, options: Options) -> Value:
    """Gram route of exchangeable views (N, D): log det(I_D + X^T X) = log det(I_N + X X^T)."""
    blocks = _gram_blocks(options.objective, len(views))
    weights = OBJECTIVES[options.objective]
    return gram.pooled_loss(views, blocks, weights, ridge, options.log_det())


def _gram_blocks(objective: str, num_views: int) -> list[gram.Block]:
    """The contrasts and degrees of freedom of each moment."""
    all_contrasts, differences = (0, num_views, num_views), (1, num_views, num_views - 1)
    return [all_contrasts, differences] if objective == "content" else [all_contrasts, (0, 1, 1), differences]


def _joint_gram(views: list[Tensor], ridge: float, options: Options) -> Value:
    """Gram route of any two views (N, D)."""
    gram_a, gram_b = (gram.standardised_gram(z, ridge) for z in views)
    return _loss_of_joint_grams(gram_a, gram_b, views[0].shape[1], options)


def _loss_of_joint_grams(gram_a: Tensor, gram_b: Tensor, dim: int, options: Options) -> Value:
    """From both views' Gram matrices (N, N) in units of the noise."""
    n = len(gram_a)
    groups = [
        torch.stack([gram.identity_plus(gram_a), gram.identity_plus(gram_b)]),
        gram.identity_plus(gram_a + gram_b)[None],
    ]
    values = logdets.log_dets(groups, options.log_det(), [dim - n, 2 * dim - n])
    return logdets.weighted_sum(values, OBJECTIVES["joint"]), values.detach()


def _takes_triton(views: Sequence[Tensor], options: Options, gather: bool) -> bool:
    """Whether the kernels compute this loss. ``impl="auto"`` leaves all but the fused content objective to torch."""
    if options.impl not in ("auto", "triton") or (options.impl == "auto" and not views[0].is_cuda):
        return False
    reason = registry.triton_refusal(views, options.slice_dim, options.slice_kind, gather)
    if options.impl == "auto":
        return (
            AUTO_TRITON
            and reason is None
            and options.objective == "content"
            and options.slice_kind == "kronecker"
            and _is_fused(views[0].shape[1], options)
        )
    if reason is not None:
        raise registry.refuse("triton", reason)
    return True


def _is_fused(dim: int, options: Options) -> bool:
    """Whether a program holds the objective's matrix: then the whole loss is three launches."""
    rows = dim if options.slice_dim is None else min(dim, options.slice_dim)
    return options.logdet == "cholesky" and options.objective != "joint" and rows <= registry.MAX_FUSED_DIM


def _triton_estimate(z_a: Tensor, z_b: Tensor, step: int | Tensor, options: Options) -> _Estimate:
    from mmi_loss.ops import triton as kernels

    samples, dim = z_a.shape
    is_sliced = options.slice_dim is not None and options.slice_dim < dim
    slice_dim, num_slices = (cast(int, options.slice_dim), options.num_slices) if is_sliced else (dim, 1)
    ridge = cast(float, options.noise_floor(slice_dim, samples, torch.float32))
    block_dim = _block_dim(slice_dim, options.slice_kind) if is_sliced else 0
    step = torch.as_tensor(step, dtype=torch.int64, device=z_a.device)
    keys = kernels.seed_keys(options.seed)
    weights = OBJECTIVES[options.objective]
    _warn_if_starved(options.objective, samples, slice_dim)
    if _is_fused(dim, options):
        value, log_dets, *_ = kernels.sliced_loss(
            z_a, z_b, step, keys, slice_dim, num_slices, block_dim, ridge, options.objective
        )
        return _Estimate(value, log_dets.detach(), slice_dim, ridge)
    a, b = z_a[None], z_b[None]
    if is_sliced:
        a, b = kernels.project(z_a, z_b, step, keys, slice_dim, num_slices, block_dim)[0].unbind()
    if _is_wide(options.objective, 2, samples, slice_dim):
        values, log_dets_of_slices = zip(
            *(_triton_gram(view_a, view_b, ridge, options) for view_a, view_b in zip(a, b, strict=True)), strict=True
        )
        return _Estimate(torch.stack(values).mean(), torch.stack(log_dets_of_slices, dim=1), slice_dim, ridge)
    moments, means = kernels.moments(a, b, options.objective)
    mean = means[1].detach()
    if options.objective == "joint":
        value, log_dets = _loss_of_joint(covariance.signal_to_noise(moments[0], mean, ridge), options)
    else:
        matrices = kernels.signal_to_noise(moments, mean, ridge)
        log_dets = logdets.log_dets([matrices], options.log_det())
        value = logdets.weighted_sum(log_dets, weights)
    return _Estimate(value, log_dets.detach(), slice_dim, ridge)


def _triton_gram(z_a: Tensor, z_b: Tensor, ridge: float, options: Options) -> Value:
    from mmi_loss.ops import triton as kernels

    n, dim = z_a.shape
    if options.objective == "joint":
        gram_a, gram_b = (kernels.gram(z, None)[0] / (n * ridge) for z in (z_a, z_b))
        return _loss_of_joint_grams(gram_a, gram_b, dim, options)
    products = kernels.gram(z_a, z_b)[0]
    groups, null_dims = [], []
    for start, stop, degrees in _gram_blocks(options.objective, 2):
        block = slice(start * n, stop * n)
        groups.append(gram.identity_plus(products[block, block] / (degrees * n * ridge))[None])
        null_dims.append(dim - (stop - start) * n)
    log_dets = logdets.log_dets(groups, options.log_det(), null_dims)
    return logdets.weighted_sum(log_dets, OBJECTIVES[options.objective]), log_dets.detach()


def _validate(views: Sequence[Tensor], step: int | Tensor, options: Options) -> None:
    _validate_step(step)
    names = ["z_a", "z_b"] if len(views) == 2 else [f"views[{i}]" for i in range(len(views))]
    if len(views) < 2:
        raise ValueError(f"mutual information needs at least 2 views, got {len(views)}")
    for name, z in zip(names, views, strict=True):
        if not isinstance(z, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(z).__name__}")
        if z.layout != torch.strided:
            raise TypeError(f"{name} must be dense, got layout {z.layout}; convert it with {name}.to_dense()")
        if not z.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {z.dtype}; convert it with {name}.float()")
        if z.ndim != 2:
            raise ValueError(
                f"{name} must have shape (N, D), got {tuple(z.shape)}; flatten or pool the other dimensions"
            )
        if z.shape != views[0].shape:
            raise ValueError(
                f"{names[0]} and {name} must have the same shape, got {tuple(views[0].shape)} and {tuple(z.shape)}; "
                "row i of every view must come from the same image"
            )
        if z.device != views[0].device:
            raise ValueError(f"{names[0]} and {name} must be on the same device, got {views[0].device} and {z.device}")
    samples, dim = views[0].shape
    if dim < 1:
        raise ValueError(f"{names[0]} must have at least one feature, got shape {tuple(views[0].shape)}")
    if samples < 2 and not (options.gather_distributed and distributed.is_active()):
        raise ValueError(
            f"{names[0]} must hold at least 2 samples, got shape {tuple(views[0].shape)}; statistics over the batch "
            "need more, so drop the last incomplete batch (drop_last=True)"
        )


def _validate_step(step: int | Tensor) -> None:
    if isinstance(step, Tensor):
        if step.dtype not in _INTEGERS or step.numel() != 1:
            raise TypeError(
                f"step must be one integer, got a tensor of {step.dtype} and shape {tuple(step.shape)}; pass a scalar "
                "of dtype int64"
            )
    elif isinstance(step, bool) or not isinstance(step, numbers.Integral):
        raise TypeError(f"step must be an int or an integer tensor, got {step!r}; convert it with int(step)")


def _warn_if_starved(objective: str, samples: int, dim: int) -> None:
    if objective == "content" or samples >= SAMPLES_PER_DIM * dim or torch.compiler.is_compiling():
        return
    warnings.warn(
        f"objective={objective!r} estimates mutual information between {dim} dimensions from {samples} samples; below "
        f"{SAMPLES_PER_DIM} samples per dimension most of it is spurious and training is known to fail quietly. Use "
        f"objective='content' (the default), or slice_dim={max(1, samples // SAMPLES_PER_DIM)}, or larger batches.",
        UserWarning,
        stacklevel=2,
    )
