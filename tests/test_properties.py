"""Invariances, bounds, agreements and rules, over drawn shapes, data and options.

CI draws a few examples of each; ``make fuzz`` (tests/fuzz.py) draws 20,000 in all.
"""

import io
import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mmi_loss import MMILoss, diagnostics
from mmi_loss.functional import mmi_loss, mmi_loss_multiview, noise_floor
from mmi_loss.objectives import OBJECTIVES
from mmi_loss.ops.covariance import CovarianceLoss
from mmi_loss.ops.gram import gram_loss
from mmi_loss.options import IMPLS, LOGDETS, SLICE_KINDS, Options
from tests import oracle

pytestmark = pytest.mark.filterwarnings("ignore:(objective|num_slices)=")

sizes = st.tuples(st.integers(2, 32), st.integers(1, 32))
seeds = st.integers(0, 2**31)
objectives = st.sampled_from(list(OBJECTIVES))
snrs = st.floats(0.1, 1000)
floors = st.none() | snrs  # by default the noise is that of the batch
half_dtypes = st.sampled_from([torch.float16, torch.bfloat16])
floating_dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
slice_options = st.fixed_dictionaries(
    {
        "slice_dim": st.one_of(st.none(), st.integers(1, 40)),
        "num_slices": st.integers(1, 3),
        "slice_kind": st.sampled_from(SLICE_KINDS),
        "step": st.integers(0, 2**40),
        "seed": st.integers(-(2**40), 2**40),
    }
).map(lambda drawn: drawn if drawn["slice_dim"] else {**drawn, "num_slices": 1})
exact = st.just({"logdet": "cholesky"})
series = st.fixed_dictionaries(
    {"logdet": st.just("taylor"), "order": st.integers(1, 7), "beta": st.floats(0.05, 1.95)},
)
log_dets = st.one_of(exact, series)


def draw_views(shape, seed, rank=None, num_views=2):
    """Correlated views with arbitrary mean and scale; ``rank`` limits the content's."""
    n, dim = shape
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(n, rank or dim, generator=generator, dtype=torch.float64)
    content = content @ torch.randn(rank or dim, dim, generator=generator, dtype=torch.float64)
    scale = torch.rand(dim, generator=generator, dtype=torch.float64) * 10 + 0.1
    strength = torch.rand((), generator=generator, dtype=torch.float64)
    noise = torch.randn(num_views, n, dim, generator=generator, dtype=torch.float64)
    return [(content + strength * e + 3) * scale for e in noise]


def draw_shared_views(shape, seed):
    """Views whose sample cross-covariance is positive semi-definite: content is shared, chance correlations are not.

    The nuisances are opposite in the views, orthogonal to the content and smaller than it: S = content - nuisance >= 0.
    """
    content, nuisance = (z - z.mean(0) for z in draw_views(shape, seed))
    assume(shape[0] > shape[1] + 1)
    basis, _ = torch.linalg.qr(content)
    nuisance = 0.9 * torch.linalg.svdvals(content)[-1] * nuisance / torch.linalg.matrix_norm(nuisance, 2)
    nuisance = nuisance - basis @ (basis.T @ nuisance)
    return content + nuisance, content - nuisance


def backward(views, loss=mmi_loss_multiview, **options):
    """The loss and the gradients of all views."""
    leaves = [z.detach().clone().requires_grad_() for z in views]
    value = loss(leaves, **options)
    value.backward()
    return value.detach(), [z.grad for z in leaves]


def gradient_rounding(views, snr=64):
    """What float32 leaves of a gradient whose terms cancel: their size, 1 / standard deviation, times the condition
    number of the matrices, times some epsilons.
    """
    std = torch.cat([z.double() for z in views]).std(0, unbiased=False)
    condition = 1 + 2 * snr
    return 16 * torch.finfo(torch.float32).eps * condition / std[std > 0].min() if std.any() else math.inf


def information(pair, **options):
    return -mmi_loss(*pair, **options).item()


def assert_close(value, expected, rel=1e-8, abs_=1e-9):
    assert value == pytest.approx(expected, rel=rel, abs=abs_)


def assert_same(ours, expected):
    assert_close(ours[0].item(), expected[0].item())
    for grad, other in zip(ours[1], expected[1], strict=True):
        assert (grad - other).norm() <= 1e-6 * other.norm() + 1e-9


# Agreement between routes, and with the definition


@given(
    shape=sizes,
    seed=seeds,
    objective=objectives,
    options=slice_options,
    log_det=log_dets,
    snr=floors,
    num_views=st.integers(2, 4),
)
def test_estimators_agree_with_the_reference(shape, seed, objective, options, log_det, snr, num_views):
    views = draw_views(shape, seed, num_views=num_views)
    if objective == "joint":  # of widths of their own
        views = [z[:, : 1 + (seed >> i) % shape[1]] for i, z in enumerate(views)]
    options = {"objective": objective, "snr": snr, **options, **log_det}
    assert_same(backward(views, impl="eager", **options), backward(views, impl="reference", **options))


@given(shape=sizes, seed=seeds, objective=objectives, num_views=st.integers(2, 4), log_det=log_dets, snr=floors)
def test_covariance_and_gram_routes_agree(shape, seed, objective, num_views, log_det, snr):
    """At every shape, not only where each is chosen."""
    options = Options(objective=objective, slice_dim=None, snr=snr, **log_det)
    floor = noise_floor(options, shape[1], shape[0], torch.float64)
    views = draw_views(shape, seed, num_views=num_views if objective == "content" else 2)
    covariance = backward(
        views, lambda z: CovarianceLoss.apply(options.row, floor, options.log_det, None, False, *z)[0]
    )
    assert_same(covariance, backward(views, lambda z: gram_loss(options.row, floor, options.log_det, z, False)[0]))


@given(shape=sizes, seed=seeds, objective=objectives, snr=floors)
def test_all_features_agree_with_numpy(shape, seed, objective, snr):
    pair = draw_views(shape, seed)
    expected = oracle.information(pair, objective, snr=snr)
    assert_close(information(pair, objective=objective, slice_dim=None, snr=snr), expected)


@given(shape=sizes, seed=seeds, num_views=st.integers(2, 5), snr=floors)
def test_more_views_agree_with_numpy(shape, seed, num_views, snr):
    """Content: an analysis of variance over all views; the others: the mean over pairs. In any order of the views."""
    views = draw_views(shape, seed, num_views=num_views)
    for objective, ordered in itertools.product(OBJECTIVES, (views, views[::-1])):
        loss = mmi_loss_multiview(ordered, objective=objective, slice_dim=None, snr=snr)
        assert_close(-loss.item(), oracle.information(views, objective, snr=snr))


@given(
    shape=sizes,
    seed=seeds,
    objective=objectives,
    options=slice_options,
    log_det=log_dets,
    num_views=st.integers(2, 3),
    snr=st.floats(0.1, 100),
)
def test_gradient_is_the_derivative(shape, seed, objective, options, log_det, num_views, snr):
    """Central difference along a random direction of all views."""
    views = draw_views(shape, seed, num_views=num_views)
    options = {"objective": objective, "snr": snr, **options, **log_det}
    _, grads = backward(views, **options)
    spread = torch.stack(views).std() + torch.zeros(())
    directions = [torch.sin(torch.arange(z.numel(), dtype=z.dtype) + seed % 7).view_as(z) * spread for z in views]
    slope = sum((grad * d).sum() for grad, d in zip(grads, directions, strict=True)).item()
    step = 1e-6
    ahead, behind = (
        mmi_loss_multiview([z + sign * step * d for z, d in zip(views, directions, strict=True)], **options).item()
        for sign in (1, -1)
    )
    scale = sum(grad.norm() * d.norm() for grad, d in zip(grads, directions, strict=True)).item()
    assert_close((ahead - behind) / (2 * step), slope, rel=1e-4, abs_=1e-5 * scale + 1e-7)


@given(shape=sizes, seed=seeds, objective=objectives, options=slice_options, log_det=log_dets, snr=snrs)
def test_single_precision_errs_no_more_than_plain_torch(shape, seed, objective, options, log_det, snr):
    pair = [z.float() for z in draw_views(shape, seed)]
    options = {"objective": objective, "snr": snr, **options, **log_det}
    exact_value, exact_grads = backward([z.double() for z in pair], impl="reference", **options)
    value, grads = backward(pair, impl="eager", **options)
    plain_value, plain_grads = backward(pair, impl="reference", **options)
    # The value is what is left of log-determinants of this size.
    size = 1 + abs(exact_value.item()) + 0.1 * shape[1] * math.log1p(snr)
    # A determinant loses as many digits as its matrix's condition number has.
    rounding = 4 * torch.finfo(torch.float32).eps * (1 + 2 * snr)
    assert abs(value - exact_value) <= 4 * abs(plain_value - exact_value) + 1e-5 * size + rounding
    for grad, plain, other in zip(grads, plain_grads, exact_grads, strict=True):
        error, plain_error = (grad - other).norm(), (plain - other).norm()
        assert error <= 4 * plain_error + 1e-4 * other.norm() + gradient_rounding(pair, snr)


# Mathematics of the information


@given(dim=st.integers(1, 8), seed=seeds)
def test_canonical_and_intraclass_correlations(dim, seed):
    """Without noise floor the information is a function of correlations alone."""
    pair = draw_views((10 * dim + 5, dim), seed)
    canonical = oracle.canonical_correlations(*pair)
    intraclass = oracle.intraclass_correlations(*pair)
    assume(max(canonical.max(), abs(intraclass).max()) < 0.9999)
    expected = {
        "joint": -0.5 * np.log1p(-(canonical**2)).sum(),
        "exchangeable": -0.5 * np.log1p(-(intraclass**2)).sum(),
        "content": -0.5 * np.log1p(-intraclass).sum(),
    }
    for objective, value in expected.items():
        assert_close(information(pair, objective=objective, slice_dim=None, ridge=1e-13), value, rel=1e-5, abs_=1e-6)


@given(shape=sizes, seed=seeds, objective=objectives, options=slice_options, log_det=log_dets)
def test_symmetric_in_views_and_samples(shape, seed, objective, options, log_det):
    z_a, z_b = draw_views(shape, seed)
    options = {"objective": objective, **options, **log_det}
    value = information((z_a, z_b), **options)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    for pair in ((z_b, z_a), (z_a[order], z_b[order])):
        assert_close(information(pair, **options), value)


@given(shape=sizes, seed=seeds, objective=objectives, options=slice_options, shift=st.floats(-100, 100))
def test_invariant_to_a_common_scale_and_shift(shape, seed, objective, options, shift):
    z_a, z_b = draw_views(shape, seed)
    value = information((z_a, z_b), objective=objective, **options)
    moved = information((z_a * 0.37 + shift, z_b * 0.37 + shift), objective=objective, **options)
    assert_close(moved, value, rel=1e-6, abs_=1e-7)


@given(shape=sizes, seed=seeds, objective=objectives, log_det=log_dets, snr=floors)
def test_invariant_to_order_sign_scale_and_mean_of_features(shape, seed, objective, log_det, snr):
    """Features are standardised: maps of single features change nothing; under "joint" each view may have its own."""
    pair = draw_views(shape, seed)
    options = {"objective": objective, "snr": snr, **log_det}
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(shape[1], generator=generator)
    gains, shifts = torch.randn(2, 2, shape[1], generator=generator, dtype=torch.float64)
    assume(gains.abs().min() > 1e-3)
    mapped = [
        (z * gains[view] + shifts[view])[:, order]
        for view, z in zip((0, 1) if objective == "joint" else (0, 0), pair, strict=True)
    ]
    for slice_dim in (None, 5):  # the same coordinates only where they keep their places
        moved = mapped if slice_dim is None else [z[:, order.argsort()] for z in mapped]
        options |= {"slice_dim": slice_dim, "slice_kind": "coordinates"}
        assert_close(information(moved, **options), information(pair, **options), rel=1e-6, abs_=1e-7)


@given(dim=st.integers(1, 8), seed=seeds, objective=objectives)
def test_affine_invariance_without_noise_floor(dim, seed, objective):
    z_a, z_b = draw_views((10 * dim + 5, dim), seed)
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, dim, dim, generator=generator, dtype=torch.float64)
    assume(torch.linalg.cond(maps).max() < 1e3)
    # Exchangeable views share their map: they come from one network.
    map_a, map_b = maps if objective == "joint" else (maps[0], maps[0])
    options = {"objective": objective, "slice_dim": None, "ridge": 1e-13}
    value = information((z_a, z_b), **options)
    assert_close(information((z_a @ map_a - 2, z_b @ map_b - 2), **options), value, rel=1e-3, abs_=1e-4)


@given(shape=sizes, seed=seeds, snr=st.floats(0.5, 1000))
def test_content_bounds(shape, seed, snr):
    """I(Z;Z') <= I(Z;content) <= I(Z;Z') + k/2 log 2."""
    pair = draw_shared_views(shape, seed)
    shared = information(pair, objective="exchangeable", slice_dim=None, snr=snr)
    total = information(pair, objective="content", slice_dim=None, snr=snr)
    assert shared <= total + 1e-7
    assert total <= shared + shape[1] / 2 * math.log(2) + 1e-7


@given(shape=sizes, seed=seeds, snr=st.floats(0.5, 1000))
def test_exchangeable_is_joint_on_the_doubled_batch(shape, seed, snr):
    z_a, z_b = draw_views(shape, seed)
    options = {"slice_dim": None, "ridge": shape[1] / snr}
    doubled = information((torch.cat([z_a, z_b]), torch.cat([z_b, z_a])), objective="joint", **options)
    assert_close(information((z_a, z_b), objective="exchangeable", **options), doubled)


@given(shape=sizes, seed=seeds, k=st.integers(1, 31), snr=snrs, step=st.integers(0, 2**40))
def test_coordinates_lose_information(shape, seed, k, snr, step):
    """Data processing: with the same noise, some of the features never tell more than all of them."""
    options = {"ridge": shape[1] / snr, "slice_kind": "coordinates", "step": step}
    for objective in OBJECTIVES:
        pair = draw_shared_views(shape, seed) if objective == "content" else draw_views(shape, seed)
        some = information(pair, objective=objective, slice_dim=k, num_slices=2, **options)
        assert some <= information(pair, objective=objective, slice_dim=None, **options) + 1e-8


@given(dim=st.integers(2, 8), seed=seeds, options=slice_options)
def test_projections_lose_information(dim, seed, options):
    """Data processing without noise: a slice never tells more than all features, nor the mean of several."""
    options["slice_dim"] = 1 + seed % (dim - 1)
    shape = (12 * dim, dim)
    for objective in OBJECTIVES:
        pair = draw_shared_views(shape, seed) if objective == "content" else draw_views(shape, seed)
        every = information(pair, objective=objective, slice_dim=None, ridge=1e-13)
        assert information(pair, objective=objective, ridge=1e-13, **options) <= every * (1 + 1e-4) + 1e-4


@given(shape=sizes, seed=seeds, objective=objectives, snr=snrs, factor=st.floats(1, 100))
def test_noise_loses_information_and_none_is_negative(shape, seed, objective, snr, factor):
    pair = draw_shared_views(shape, seed) if objective == "content" else draw_views(shape, seed)
    clear = information(pair, objective=objective, slice_dim=None, snr=snr * factor)
    noisy = information(pair, objective=objective, slice_dim=None, snr=snr)
    assert -1e-9 <= noisy <= clear + 1e-9


@given(shape=sizes, seed=seeds, objective=objectives, snr=snrs, order=st.integers(1, 7), beta=st.floats(0.05, 1.95))
def test_series_bounds(shape, seed, objective, snr, order, beta):
    """What the docstring of ``ops.series.Series`` derives from the remainder."""
    options = {"objective": objective, "slice_dim": None, "snr": snr}
    pair = draw_shared_views(shape, seed) if objective == "content" else draw_views(shape, seed)
    value = information(pair, logdet="taylor", order=order, beta=beta, **options)
    is_even = order % 2 == 0
    is_lower_bound = beta <= 1 or (is_even if objective == "content" else not is_even)
    if is_lower_bound:
        assert value <= information(pair, **options) + 1e-8
    if objective != "content" and is_even:
        assert value >= -1e-8


@given(shape=sizes, seed=seeds, objective=objectives, options=slice_options, log_det=log_dets, snr=floors)
def test_components_add_up(shape, seed, objective, options, log_det, snr):
    pair = draw_views(shape, seed)
    options = {"objective": objective, "snr": snr, **options, **log_det}
    step = options.pop("step")
    criterion = MMILoss(**options)
    criterion.step.fill_(step)
    parts = criterion.forward_components(*pair)
    assert parts.loss.item() == -parts.mutual_information.item() == mmi_loss(*pair, step=step, **options).item()
    tolerance = 1e-12 * (abs(parts.entropy_a) + abs(parts.conditional_entropy)).item() + 1e-9
    assert_close((parts.entropy_a - parts.conditional_entropy).item(), parts.mutual_information.item(), abs_=tolerance)
    assert objective == "joint" or parts.entropy_a == parts.entropy_b


@given(seed=seeds, dims=st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_measured_information_is_invariant(seed, dims):
    """``mutual_information`` has no noise floor: any invertible affine map of either view leaves it alone."""
    dim_a, dim_b = dims
    z_a, z_b = draw_views((40, max(dims)), seed)
    z_a, z_b = z_a[:, :dim_a], z_b[:, :dim_b]
    value = diagnostics.mutual_information(z_a, z_b).item()
    generator = torch.Generator().manual_seed(seed)
    map_a, map_b = (torch.randn(d, d, generator=generator, dtype=torch.float64) for d in dims)
    assume(max(torch.linalg.cond(map_a), torch.linalg.cond(map_b)) < 1e3)
    assume(diagnostics.canonical_correlations(z_a, z_b).max() < 0.9999)
    assert_close(diagnostics.mutual_information(z_b @ map_b, z_a @ map_a - 7).item(), value, 1e-6, 1e-6)
    plain = diagnostics.mutual_information(z_a, z_b, bias_correction=False).item()
    assert_close(plain, -0.5 * np.log1p(-(oracle.canonical_correlations(z_a, z_b) ** 2)).sum(), 1e-6, 1e-8)
    bias = diagnostics.spurious_information(40, *dims)
    assert_close(value, plain - bias)
    assert bias > 0


# Rules of the numerics


class NoWaiting(TorchDispatchMode):
    """Reading a tensor's value on the host raises, but for the step counter, which is read on the CPU alone."""

    READS = frozenset(
        {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_linalg_check_errors"}
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, tensors = function.overloadpacket.__name__, [a for a in args if isinstance(a, torch.Tensor)]
        is_step = bool(tensors) and tensors[0].dtype == torch.int64 and tensors[0].ndim == 0
        has_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if (name in self.READS and not is_step) or has_mask:
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@given(
    shape=sizes,
    seed=seeds,
    objective=objectives,
    options=slice_options,
    dtype=half_dtypes,
    exponent=st.floats(-4, 4),
)
def test_half_precision_at_any_scale(shape, seed, objective, options, dtype, exponent):
    """The inputs' rounding is the only error: the same numbers in float64 give the same loss and gradients."""
    views = torch.stack(draw_views(shape, seed))
    pair = [(z / views.abs().max() * 10**exponent * 4).to(dtype) for z in views]
    options = {"objective": objective, **options}
    value, grads = backward(pair, **options)
    exact_value, exact_grads = backward([z.double() for z in pair], impl="reference", **options)
    assert value.dtype == torch.float32
    plain_value, plain_grads = backward([z.float() for z in pair], impl="reference", **options)
    assert abs(value - exact_value) <= 4 * abs(plain_value - exact_value) + 1e-4 * (1 + abs(exact_value))
    limits = torch.finfo(dtype)
    for grad, plain, other in zip(grads, plain_grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        largest = other.abs().max()
        if largest < limits.max / 2:
            error, plain_error = (grad - other).abs().max(), (plain - other).abs().max()
            rounding = 2 * options["num_slices"] * limits.eps * largest + limits.tiny
            assert error <= 4 * plain_error + rounding + 1e-4 * largest + gradient_rounding(pair)


@given(
    shape=sizes,
    seed=seeds,
    objective=objectives,
    options=slice_options,
    dtypes=st.tuples(floating_dtypes, floating_dtypes),
    autocast=half_dtypes,
)
def test_dtypes_and_autocast(shape, seed, objective, options, dtypes, autocast):
    """Float64 if a view is, else float32; gradients in each view's own dtype; autocast changes no bit."""
    pair = [z.to(dtype) for z, dtype in zip(draw_views(shape, seed), dtypes, strict=True)]
    options = {"objective": objective, **options}
    value, grads = backward(pair, **options)
    assert value.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    assert tuple(grad.dtype for grad in grads) == dtypes
    with torch.autocast("cpu", dtype=autocast):
        same_value, same_grads = backward(pair, **options)
    assert torch.equal(value, same_value)
    assert all(torch.equal(*both) for both in zip(grads, same_grads, strict=True))


@given(
    shape=sizes,
    seed=seeds,
    objective=objectives,
    options=slice_options,
    rank=st.integers(1, 5),
    kind=st.sampled_from(["low rank", "constant", "dead features", "duplicated samples", "identical views"]),
    dtype=floating_dtypes,
    level=st.floats(-1e4, 1e4).map(lambda level: level * math.pi),  # so that the mean is rounded
    ridge=st.sampled_from([None, 1e-12]),
)
def test_degenerate_embeddings_are_finite(shape, seed, objective, options, rank, kind, dtype, level, ridge):
    """Never silent, never hanging: any finite input gives a finite loss and finite gradients."""
    views = torch.stack(draw_views(shape, seed, rank))
    pair = [z.to(dtype) for z in views / views.abs().max()]
    if kind == "constant":
        pair = [torch.full_like(z, level) for z in pair]
    elif kind == "dead features":
        for z in pair:
            z[:, ::2] = level
    elif kind == "duplicated samples":
        pair = [z[: (len(z) + 1) // 2].repeat(2, 1) for z in pair]
    elif kind == "identical views":
        pair = [pair[0], pair[0]]
    value, grads = backward(pair, objective=objective, ridge=ridge, **options)
    assert value.isfinite()
    if ridge is None:
        assert all(grad.isfinite().all() for grad in grads)
    # What is constant has no signal and no gradient: rounding is not blown up to unit variance. But a projection of
    # constants may be near 0, so that the rounding of its sum is not small beside its mean.
    is_mixed = options["slice_kind"] != "coordinates" and (options["slice_dim"] or shape[1]) < shape[1]
    if kind == "constant" and is_mixed:
        assert abs(value) < 1 or ridge is not None
    elif kind == "constant":
        assert value == 0
        assert not any(grad.any() for grad in grads)
    elif kind == "dead features" and not is_mixed:
        assert not any(grad[:, ::2].any() for grad in grads)


@given(
    shape=sizes,
    seed=seeds,
    objective=objectives,
    options=slice_options,
    log_det=log_dets,
    dtype=floating_dtypes,
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    num_views=st.integers(2, 3),
)
def test_non_finite_input_is_seen_everywhere(shape, seed, objective, options, log_det, dtype, value, num_views):
    """One element of one view, in a feature that a slice takes or not: NaN loss, NaN in the gradient of every view."""
    if options["slice_dim"] is not None:  # few features, so that most are not taken
        options["slice_dim"] = 1 + options["slice_dim"] % ((shape[1] + 1) // 2)
    views = [z.to(dtype) for z in draw_views(shape, seed, num_views=num_views)]
    views[seed % num_views][seed % shape[0], seed % shape[1]] = value
    loss, grads = backward(views, objective=objective, **options, **log_det)
    assert loss.isnan()
    assert all(grad.isnan().all() for grad in grads)


FAULTS = {
    "samples": (lambda z: (z[:1], z[:1]), ValueError, "z_a must hold at least 2 samples, got shape (1, {dim})"),
    "features": (lambda z: (z[:, :0], z[:, :0]), ValueError, "z_a must have at least one feature, got shape ({n}, 0)"),
    "rows": (lambda z: (z, z[:-1]), ValueError, "z_a and z_b must have the same shape, got ({n}, {dim}) and"),
    "columns": (lambda z: (z, torch.cat([z, z], 1)), ValueError, "objective='joint' takes views of different width"),
    "rank": (lambda z: (z, z[None]), ValueError, "z_b must have shape (N, D), got (1, {n}, {dim})"),
    "integers": (lambda z: (z.long(), z), TypeError, "z_a must be floating point of 16 bits or more, got torch.int64"),
    "complex": (
        lambda z: (z, z + 0j),
        TypeError,
        "z_b must be floating point of 16 bits or more, got torch.complex128",
    ),
    "device": (lambda z: (z, z.to("meta")), ValueError, "z_a and z_b must be on the same device, got cpu and meta"),
    "type": (lambda z: (z.tolist(), z), TypeError, "z_a must be a torch.Tensor, got list"),
}
not_positive = st.one_of(st.floats(max_value=0), st.just(math.nan), st.just(math.inf))
bad_options = st.one_of(
    *(
        st.tuples(st.just(name), values)
        for name, values in {
            "objective": st.text(max_size=9),
            "logdet": st.text(max_size=7),
            "impl": st.text(max_size=8),
            "slice_kind": st.text(max_size=8),
            "slice_dim": st.one_of(st.integers(max_value=0), st.floats(), st.booleans(), st.text()),
            "num_slices": st.one_of(st.integers(max_value=0), st.floats(), st.booleans(), st.none()),
            "order": st.one_of(st.integers(max_value=0), st.floats(), st.booleans(), st.none()),
            "seed": st.one_of(st.floats(), st.booleans(), st.none(), st.text()),
            "beta": st.one_of(st.floats(max_value=0), st.floats(min_value=2), st.just(math.nan)),
            "snr": not_positive,
            "ridge": not_positive,
            "process_group": st.one_of(st.text(), st.integers(), st.booleans()),
        }.items()
    )
)


@given(shape=sizes, seed=seeds, fault=st.sampled_from(sorted(FAULTS)), options=slice_options, objective=objectives)
def test_errors_name_the_argument(shape, seed, fault, options, objective):
    assume(fault != "columns" or objective != "joint")
    z, _ = draw_views(shape, seed)
    break_, error, message = FAULTS[fault]
    with pytest.raises(error) as raised:
        mmi_loss(*break_(z), objective=objective, **options)
    assert message.format(n=shape[0], dim=shape[1]) in str(raised.value)


@given(option=bad_options)
def test_errors_name_the_option(option):
    name, value = option
    known = {"objective": OBJECTIVES, "logdet": LOGDETS, "impl": IMPLS, "slice_kind": SLICE_KINDS}
    assume(value not in known.get(name, ()))
    with pytest.raises((TypeError, ValueError)) as raised:
        MMILoss(**{name: value})
    assert name in str(raised.value)
    assert str(value) in str(raised.value) or repr(value) in str(raised.value)


# Not of two samples: their correlations are 1 or -1 on every slice.
@given(shape=st.tuples(st.integers(8, 24), st.integers(8, 32)), seed=seeds, objective=objectives, options=slice_options)
def test_seed_and_step_alone_determine_the_slices(shape, seed, objective, options):
    pair = draw_views(shape, seed)
    options |= {"objective": objective, "slice_dim": 2 + seed % 3}
    step = options.pop("step")
    torch.manual_seed(seed)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    values = [information(pair, step=step + ahead, **options) for ahead in range(4)]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tobytes())
    torch.manual_seed(seed + 1)
    assert [information(pair, step=torch.tensor(step + ahead), **options) for ahead in range(4)] == values
    assert len(set(values)) > 1
    options["seed"] += 1
    assert [information(pair, step=step + ahead, **options) for ahead in range(4)] != values


@given(
    seed=seeds,
    objective=objectives,
    options=slice_options,
    before=st.integers(0, 4),
    training=st.lists(st.booleans(), min_size=1, max_size=4),
)
def test_a_resumed_run_goes_on(seed, objective, options, before, training):
    """Also after evaluation in between, which does not count."""
    pair = draw_views((12, 20), seed)
    options |= {"objective": objective, "slice_dim": 4}
    options.pop("step")
    criterion = MMILoss(**options)
    for _ in range(before):
        criterion(*pair)
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    resumed = MMILoss(**options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for mode in training:
        losses = [c.train(mode)(*pair).item() for c in (criterion, resumed)]
        assert losses[0] == losses[1]
    assert criterion.step == resumed.step == before + sum(training)


@given(
    shape=sizes,
    objective=objectives,
    options=slice_options,
    log_det=log_dets,
    dtype=floating_dtypes,
    num_views=st.integers(2, 3),
)
def test_nothing_waits_for_the_device(shape, objective, options, log_det, dtype, num_views):
    views = [torch.ones(shape, dtype=dtype) for _ in range(num_views)]
    with NoWaiting():
        backward(views, objective=objective, **options, **log_det)


@given(
    shape=sizes,
    seed=seeds,
    objective=objectives,
    options=slice_options,
    log_det=log_dets,
    scale=st.sampled_from([1.0, -3.0, 1e-6, 2.0**16, 2.0**24]),
    needs=st.sampled_from([(True, True), (True, False), (False, True)]),
    layout=st.sampled_from(["transposed", "strided", "column slice", "expanded"]),
)
def test_layout_partial_gradients_and_scaling(shape, seed, objective, options, log_det, scale, needs, layout):
    pair = draw_views(shape, seed)
    if layout == "expanded":
        pair = [z[:1].expand(shape) if view else z for view, z in enumerate(pair)]
    options = {"objective": objective, **options, **log_det}
    value, grads = backward([z.contiguous() for z in pair], **options)
    if layout == "transposed":
        pair = [z.T.contiguous().T for z in pair]
    elif layout == "strided":
        pair = [torch.stack([z, z], 1).flatten(0, 1)[::2] for z in pair]
    elif layout == "column slice":
        pair = [torch.cat([z, z], 1)[:, : shape[1]] for z in pair]
    leaves = [z.requires_grad_(need) for z, need in zip(pair, needs, strict=True)]
    loss = mmi_loss(*leaves, **options)
    (loss * scale).backward()
    assert_close(loss.item(), value.item())
    for leaf, grad, need in zip(leaves, grads, needs, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, grad * scale, rtol=1e-7, atol=1e-9 * abs(scale) * (1 + grad.norm()))
