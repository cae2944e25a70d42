"""Values and gradients of every objective and route against independent oracles."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from mmi_loss import functional
from mmi_loss.functional import mmi_loss, mmi_loss_multiview
from mmi_loss.objectives import OBJECTIVES, Objective
from mmi_loss.options import LOGDETS, SLICE_KINDS, Options
from tests import oracle
from tests.conftest import views

pytestmark = pytest.mark.filterwarnings("ignore:objective=")

# Covariance and Gram route of every objective: N >> D, D < N < 2 D, N < D / 2, and single extra samples.
SHAPES = [(64, 8), (9, 8), (24, 20), (20, 24), (10, 48), (33, 33), (2, 5), (2, 1)]
IMPLS = ("eager", "reference")


def more_views(n, *dims, num_views=2):
    """Correlated views, of one width or of one each."""
    dims = dims if len(dims) > 1 else dims * num_views
    pairs = [views(n, max(dims), seed=seed) for seed in range((len(dims) + 1) // 2)]
    return [z[:, :dim].detach().requires_grad_() for z, dim in zip(itertools.chain(*pairs), dims, strict=False)]


def value_and_gradients(given, **options):
    leaves = [z.detach().clone().requires_grad_() for z in given]
    loss = mmi_loss_multiview(leaves, **options)
    loss.backward()
    return loss.detach(), [z.grad for z in leaves]


def assert_same(ours, expected):
    (loss, grads), (expected_loss, expected_grads) = ours, expected
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-9, abs=1e-10)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-7, atol=1e-8 * float(other.abs().max()) + 1e-11)


def relative_error(ours, truth):
    return float((ours.double() - truth).norm() / truth.norm().clamp(min=1e-300))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise_floor", [{}, {"snr": 64}, {"ridge": Fraction(3, 10)}, {"snr": np.float64(2)}], ids=str)
def test_value_is_the_oracles(impl, objective, shape, noise_floor):
    pair = views(*shape)
    expected = -oracle.information(pair, objective, **{name: float(value) for name, value in noise_floor.items()})
    options = {"objective": objective, "slice_dim": None, "impl": impl, **noise_floor}
    assert mmi_loss(*pair, **options).item() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    single = [z.detach().float() for z in pair]
    assert mmi_loss(*single, **options).item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("order", "beta"), [(1, 1.0), (4, 1.0), (7, 1.8)])
@pytest.mark.parametrize("shape", [(40, 9), (3, 30)])
def test_series_is_the_oracles(impl, objective, order, beta, shape):
    for given in (views(*shape), more_views(*shape, num_views=3)):
        expected = -oracle.information(given, objective, order=order, beta=beta)
        series = {"logdet": "taylor", "order": order, "beta": beta}
        loss = mmi_loss_multiview(given, objective=objective, slice_dim=None, impl=impl, **series)
        assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", SLICE_KINDS)
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (2**32 + 5, 2**31 + 7), (-(2**40), 2**40)])
def test_slices_are_numpys(impl, kind, seed, step):
    """From seed and step to the loss; the mean over the slices."""
    pair = views(40, 30)
    for k, count in ((9, 1), (13, 3)):
        drawn = [oracle.slices(z, k, count, kind, seed, step) for z in pair]
        expected = -np.mean([oracle.information(slices) for slices in zip(*drawn, strict=True)])
        options = {"slice_dim": k, "num_slices": count, "slice_kind": kind, "seed": seed, "impl": impl}
        assert mmi_loss(*pair, step=step, **options).item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ridge": 1e-4},
        {"logdet": "taylor"},
        {"logdet": "taylor", "order": 1},
        {"logdet": "taylor", "order": 2, "beta": 0.5},
        {"logdet": "taylor", "order": 7, "beta": 1.8},
    ],
    ids=str,
)
def test_gradient_is_the_references(objective, shape, options):
    options = {"objective": objective, "slice_dim": None, **options}
    for num_views in (2, 3):
        given = more_views(*shape, num_views=num_views)
        assert_same(value_and_gradients(given, **options), value_and_gradients(given, impl="reference", **options))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", SLICE_KINDS)
@pytest.mark.parametrize("logdet", LOGDETS)
@pytest.mark.parametrize("samples", [40, 4])
@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("num_slices", [1, 3])
def test_slices_are_the_references(objective, kind, logdet, samples, num_views, num_slices):
    """Slices of more features than samples, and of fewer; two steps of the counter."""
    given = more_views(samples, 30, num_views=num_views)
    options = {"objective": objective, "slice_kind": kind, "logdet": logdet, "num_slices": num_slices}
    for step in (1, 2**33):
        options |= {"slice_dim": 13, "seed": 3, "step": step}
        assert_same(value_and_gradients(given, **options), value_and_gradients(given, impl="reference", **options))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", [(16, 5), (4, 12)])
def test_gradcheck(objective, shape):
    for given in (views(*shape), more_views(*shape, num_views=4)):
        options = {"objective": objective, "slice_dim": None, "snr": 3.0}
        assert torch.autograd.gradcheck(lambda *z, o=options: mmi_loss_multiview(z, **o), given)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("objective", ["content", "exchangeable"])
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(90, 5), (9, 40)])
def test_the_floor_follows_what_differs_between_views_as_a_constant(shape, spread, objective, impl):
    """Not below a quarter of a sample's own variance; with the gradient of a ridge of that size."""
    pair, (n, dim) = views(*shape, noise=spread), shape
    within = oracle.moments(pair)[2].trace() / dim
    noise = max(within * dim / min(64, n), dim / n / 4)
    assert (noise == dim / n / 4) == (spread == 0.1)
    options = {"objective": objective, "slice_dim": None, "impl": impl}
    assert_same(value_and_gradients(pair, **options), value_and_gradients(pair, ridge=noise, **options))


@pytest.mark.parametrize("kind", SLICE_KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck_of_slices(kind, objective):
    options = {"objective": objective, "slice_dim": 3, "num_slices": 2, "slice_kind": kind, "snr": 5.0}
    assert torch.autograd.gradcheck(lambda a, b: mmi_loss(a, b, **options), views(9, 7))


@pytest.mark.parametrize("dims", [(5, 12), (12, 5), (5, 9, 5)], ids=str)
@pytest.mark.parametrize("samples", [14, 4])
@pytest.mark.parametrize("options", [{}, {"ridge": 0.3}, {"logdet": "taylor", "order": 3}], ids=str)
def test_joint_views_may_differ_in_width(dims, samples, options):
    """Each with the noise floor of its width, on slices of its own where it is wider than they are."""
    given, options = more_views(samples, *dims), {"objective": "joint", **options}
    noise_and_series = {name: value for name, value in options.items() if name in ("ridge", "order")}
    expected = -oracle.information(given, **noise_and_series, objective="joint")
    for impl in IMPLS:
        loss = mmi_loss_multiview(given, slice_dim=None, impl=impl, **options)
        assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.gradcheck(lambda *z: mmi_loss_multiview(z, slice_dim=None, **options), given)
    for kind in SLICE_KINDS:
        sliced = {"slice_dim": 6, "num_slices": 2, "slice_kind": kind, **options}
        assert_same(value_and_gradients(given, **sliced), value_and_gradients(given, impl="reference", **sliced))


# Not in the table: what changes for another objective is one row of it. Weights are of (total, between, within), or of
# a view, the other and both.
ADDED = {
    "between": (True, ((0, None), (0, 1)), (1, 0), (0, 1)),
    "three moments": (True, ((0, 1), (1, None), (0, None)), (0.5, 0, 1), (0, 2, -0.25)),
    "unpooled": (False, ((0, 1), (0, None)), (2, 0), (0, 0.5)),
}


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("logdet", [{}, {"logdet": "taylor", "order": 3, "beta": 0.8}], ids=str)
@pytest.mark.parametrize("shape", [(14, 7), (3, 14)])
def test_an_added_objective_works_on_every_route(name, logdet, shape, monkeypatch):
    is_pooled, ranges, entropy, conditional = ADDED[name]
    row = Objective(
        is_pooled=is_pooled,
        is_pairwise=not is_pooled,
        is_spurious=False,
        moments=ranges,
        entropy_a=entropy,
        entropy_b=entropy,
        conditional_entropy=conditional,
    )
    monkeypatch.setitem(OBJECTIVES, name, row)
    series = {option: value for option, value in logdet.items() if option != "logdet"}

    def expected(given):
        n, dim = given[0].shape
        if is_pooled:
            of_ranges = dict(zip([(0, None), (0, 1), (1, None)], oracle.moments(given), strict=True))
        else:
            x = np.concatenate([(z - z.mean(0)) / z.std(0) for z in given], 1)
            of_ranges = {(0, 1): x[:, :dim].T @ x[:, :dim] / n, (0, None): x.T @ x / n}
        noise = dim / min(64, n)
        if is_pooled:
            noise = max(noise * oracle.moments(given)[2].trace() / dim, dim / n / 4)
        snr = [of_ranges[range_] / noise for range_ in ranges]
        return oracle.half_sum(np.subtract(conditional, entropy), snr, **series)

    for num_views, impl in itertools.product((2, 3), IMPLS):
        given = more_views(*shape, num_views=num_views)
        groups = [given] if is_pooled else list(itertools.combinations(given, 2))
        options = {"objective": name, "impl": impl, **logdet}
        loss = mmi_loss_multiview(given, slice_dim=None, **options)
        arrays = [[z.detach().numpy() for z in group] for group in groups]
        assert loss.item() == pytest.approx(np.mean([expected(group) for group in arrays]), rel=1e-9)
        for kind in SLICE_KINDS:
            slices = [[oracle.slices(z, 5, 2, kind, 0, 4) for z in group] for group in groups]
            every = [expected(of_slice) for group in slices for of_slice in zip(*group, strict=True)]
            loss = mmi_loss_multiview(given, slice_dim=5, num_slices=2, slice_kind=kind, step=4, **options)
            assert loss.item() == pytest.approx(np.mean(every), rel=1e-7)
    for slice_dim in (None, 5):
        options = {"objective": name, "slice_dim": slice_dim, "num_slices": 2 if slice_dim else 1, "snr": 5.0, **logdet}
        assert torch.autograd.gradcheck(lambda *z, o=options: mmi_loss_multiview(z, **o), given)


def test_triton_refuses_an_added_objective_by_name(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "added", OBJECTIVES["content"])
    with pytest.raises(ValueError, match=r"impl='triton' cannot compute .*(objective='added'|Triton 3.4)"):
        mmi_loss(*views(40, 8, torch.float32), objective="added", impl="triton")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("slice_kind", [None, *SLICE_KINDS])
@pytest.mark.parametrize("shape", [(256, 64), (64, 256), (100, 130), (500, 17), (9, 40)])
@pytest.mark.parametrize("ridge", [None, 0.1])
def test_float32_error_is_no_worse_than_plain_torch(objective, slice_kind, shape, ridge):
    """Error against error: both in float32 against float64, also where the mean is far larger than the deviation."""
    options = {"objective": objective, "slice_dim": None, "ridge": ridge}
    if slice_kind is not None:
        options |= {"slice_dim": 12, "slice_kind": slice_kind}
    for offset in (0.0, 1e2, 1e3, 1e4, 1e5, 1e6):
        pair = [(z.detach() + offset).float() for z in views(*shape)]
        truth, true_grads = value_and_gradients([z.double() for z in pair], impl="reference", **options)
        ours, grads = value_and_gradients(pair, **options)
        plain, plain_grads = value_and_gradients(pair, impl="reference", **options)
        # A projection is rounded relative to the mean (the reference projects what differs from one sample).
        chance = 2 * torch.finfo(torch.float32).eps * offset if slice_kind in ("kronecker", "gaussian") else 0
        assert relative_error(ours, truth) <= 2 * relative_error(plain, truth) + 2e-6 + chance
        for grad, plain_grad, true_grad in zip(grads, plain_grads, true_grads, strict=True):
            assert relative_error(grad, true_grad) <= 2 * relative_error(plain_grad, true_grad) + 1e-5 + chance


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
def test_analytic_mutual_information(rho):
    dim, n = 16, 100_000
    generator = torch.Generator().manual_seed(1)
    content, *noise = torch.randn(3, n, dim, generator=generator, dtype=torch.float64)
    pair = [math.sqrt(rho) * content + math.sqrt(1 - rho) * e for e in noise]
    per_dim = {"joint": -0.5 * math.log(1 - rho**2), "content": -0.5 * math.log(1 - rho)}
    per_dim["exchangeable"] = per_dim["joint"]
    for objective, expected in per_dim.items():
        measured = -mmi_loss(*pair, objective=objective, slice_dim=None, ridge=1e-9)
        assert measured.item() == pytest.approx(dim * expected, rel=0.01)


def test_no_more_directions_than_samples_rise_above_the_noise():
    for objective, (n, dim) in itertools.product(OBJECTIVES, [(12, 5), (12, 40), (300, 7)]):
        options = {"objective": objective, "slice_dim": None}
        floors = ({"snr": float(n)}, {"snr": 1e9}, {"ridge": dim / n})
        losses = [mmi_loss(*views(n, dim), **options, **floor) for floor in floors]
        assert losses[0] == losses[1] == losses[2]
        assert mmi_loss(*views(n, dim), **options, snr=6.0) == mmi_loss(*views(n, dim), **options, ridge=dim / 6)
    for floor, bound in (({"snr": 99.0}, -12 / 2), ({}, -2 * 12)):
        assert 0.3 * bound > mmi_loss(*views(12, 40, noise=1e-3), **floor).item() > bound


def test_slice_is_the_loss_of_its_features():
    """Independent of the slicing code: the gradient says which features were taken, their loss must be the value."""
    pair = views(40, 30)
    for objective in OBJECTIVES:
        loss, grads = value_and_gradients(pair, objective=objective, slice_dim=7, step=5, slice_kind="coordinates")
        taken = grads[0].abs().sum(0).nonzero().flatten()
        assert len(taken) == 7
        expected = -oracle.information([z[:, taken] for z in pair], objective)
        assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_gaussian_slices_average_to_the_sliced_information():
    """On isotropic views every slice holds the same information: the expectation is known."""
    rho, n, dim, k = 0.5, 20_000, 30, 3
    generator = torch.Generator().manual_seed(0)
    content, *noise = torch.randn(3, n, dim, generator=generator)
    z_a, z_b = (math.sqrt(rho) * content + math.sqrt(1 - rho) * e for e in noise)
    options = {"slice_dim": k, "num_slices": 8, "slice_kind": "gaussian", "ridge": 1e-5}
    loss = mmi_loss(z_a, z_b, objective="content", **options)
    assert loss.item() == pytest.approx(k / 2 * math.log(1 - rho), rel=0.03)


@pytest.mark.parametrize(
    ("objective", "dims"), [*((o, (d, d)) for o in OBJECTIVES for d in (6, 40)), ("joint", (6, 40)), ("joint", (40, 6))]
)
@pytest.mark.parametrize("num_views", [2, 3])
def test_components(objective, dims, num_views):
    """The loss with its gradient, and the entropies that it is the difference of, the first from numpy."""
    given = more_views(20, *dims, *dims[:1] * (num_views - 2))
    for options in ({"slice_dim": None}, {"slice_dim": 12, "num_slices": 2, "step": 3, "impl": "reference"}):
        options |= {"objective": objective}
        expected, grads = value_and_gradients(given, **options)
        step = options.pop("step", 0)
        parts = functional.components(given, step, Options(**options))
        assert parts.loss == expected
        for grad, other in zip(torch.autograd.grad(parts.loss, given), grads, strict=True):
            torch.testing.assert_close(grad, other)
        assert not any(part.requires_grad or part.dtype != torch.float64 for part in parts[1:])
        difference = parts.entropy_a - parts.conditional_entropy
        assert -parts.loss.item() == parts.mutual_information.item() == pytest.approx(difference.item(), rel=1e-9)
        if objective == "joint":  # the mean over all pairs
            of = [functional.components(pair, step, Options(**options)) for pair in itertools.combinations(given, 2)]
            for part, of_pairs in zip(parts, zip(*of, strict=True), strict=True):
                torch.testing.assert_close(part, torch.stack(of_pairs).mean())
        single = [z.detach().float() for z in given]
        plain = functional.components(single, step, Options(**options))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert functional.components(single, step, Options(**options)) == plain
    pair = given[:2]
    parts = functional.components(pair, 0, Options(objective=objective, slice_dim=None))
    for view, entropy in zip(pair, (parts.entropy_a, parts.entropy_b), strict=True):
        like = view if objective == "joint" else torch.cat(pair)
        x = ((like - like.mean(0)) / like.std(0, correction=0)).detach().numpy()
        noise = x.shape[1] / 20
        if objective != "joint":
            noise = max(noise * np.trace(oracle.moments(pair)[2]) / x.shape[1], noise / 4)
        covariance = x.T @ x / len(x) + noise * np.eye(x.shape[1])
        assert entropy.item() == pytest.approx(0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1], rel=1e-9)


def test_series_converges_to_the_exact_loss():
    """For a spectrum within the disc of convergence the error falls with the order."""
    pair = views(400, 6)
    exact = mmi_loss(*pair, slice_dim=None, snr=2.0)
    errors = [
        abs(mmi_loss(*pair, slice_dim=None, snr=2.0, logdet="taylor", order=order, beta=1.2) - exact).item()
        for order in (2, 8, 32, 128)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8
