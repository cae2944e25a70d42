"""Values and gradients of every objective and route against independent oracles."""

import itertools
import math

import numpy as np
import pytest
import torch

from mmi_loss import functional
from mmi_loss.functional import OBJECTIVES, mmi_loss, mmi_loss_multiview
from tests import oracle
from tests.conftest import views

pytestmark = pytest.mark.filterwarnings("ignore:objective=")

# Covariance and Gram route of every objective: N >> D, D < N < 2 D, N < D / 2, and single extra samples.
SHAPES = [(64, 8), (9, 8), (24, 20), (20, 24), (10, 48), (33, 33), (2, 5), (2, 1)]


def value_and_gradients(pair, **options):
    leaves = [z.detach().clone().requires_grad_() for z in pair]
    loss = mmi_loss(*leaves, **options)
    loss.backward()
    return loss.detach(), [z.grad for z in leaves]


def relative_error(ours, truth):
    return float((ours.double() - truth).norm() / truth.norm().clamp(min=1e-300))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise_floor", [{"snr": 64.0}, {"ridge": 0.3}, {"snr": 2.0}])
def test_value_is_the_oracles(objective, shape, noise_floor):
    pair = views(*shape)
    expected = -oracle.mutual_information(*pair, objective, **noise_floor)
    options = {"objective": objective, "slice_dim": None, **noise_floor}
    assert mmi_loss(*pair, **options).item() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    single = [z.detach().float() for z in pair]
    assert mmi_loss(*single, **options).item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


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
    pair = views(*shape)
    options = {"objective": objective, "slice_dim": None, **options}
    loss, grads = value_and_gradients(pair, **options)
    expected_loss, expected_grads = value_and_gradients(pair, impl="reference", **options)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-9, abs=1e-10)
    for grad, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-7, atol=1e-8 * float(expected.abs().max()) + 1e-11)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", [(16, 5), (4, 12)])
def test_gradcheck(objective, shape):
    pair = views(*shape)
    assert torch.autograd.gradcheck(lambda a, b: mmi_loss(a, b, objective=objective, slice_dim=None), pair)


@pytest.mark.parametrize("kind", ["kronecker", "gaussian", "coordinates"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck_of_slices(kind, objective):
    options = {"objective": objective, "slice_dim": 3, "num_slices": 2, "slice_kind": kind}
    assert torch.autograd.gradcheck(lambda a, b: mmi_loss(a, b, **options), views(9, 7))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", [(256, 64), (64, 256), (100, 130), (500, 17)])
@pytest.mark.parametrize("offset", [0.0, 100.0], ids=lambda x: f"mean{x:g}")
@pytest.mark.parametrize("ridge", [None, 0.1])
def test_float32_error_is_no_worse_than_plain_torch(objective, shape, offset, ridge):
    """Error against error: both in float32 against float64, also where the mean is far larger than the deviation."""
    pair = [(z.detach() + offset).float() for z in views(*shape)]
    options = {"objective": objective, "slice_dim": None, "ridge": ridge}
    truth, true_grads = value_and_gradients([z.double() for z in pair], impl="reference", **options)
    ours, grads = value_and_gradients(pair, **options)
    plain, plain_grads = value_and_gradients(pair, impl="reference", **options)
    assert relative_error(ours, truth) <= 2 * relative_error(plain, truth) + 2e-6
    for grad, plain_grad, true_grad in zip(grads, plain_grads, true_grads, strict=True):
        assert relative_error(grad, true_grad) <= 2 * relative_error(plain_grad, true_grad) + 5e-6


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


def test_canonical_correlations_give_every_objective():
    pair = views(200, 6)
    rho = oracle.canonical_correlations(*pair)
    joint = mmi_loss(*pair, objective="joint", slice_dim=None, ridge=1e-12)
    assert joint.item() == pytest.approx(0.5 * np.log(1 - rho**2).sum(), rel=1e-8)
    intraclass = oracle.intraclass_correlations(*pair)
    exchangeable = mmi_loss(*pair, objective="exchangeable", slice_dim=None, ridge=1e-12)
    assert exchangeable.item() == pytest.approx(0.5 * np.log(1 - intraclass**2).sum(), rel=1e-8)
    content = mmi_loss(*pair, objective="content", slice_dim=None, ridge=1e-12)
    assert content.item() == pytest.approx(0.5 * np.log(1 - intraclass).sum(), rel=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("logdet", ["cholesky", "taylor"])
def test_joint_on_the_doubled_batch_is_exchangeable(shape, logdet):
    z_a, z_b = views(*shape)
    doubled = mmi_loss(
        torch.cat([z_a, z_b]), torch.cat([z_b, z_a]), objective="joint", slice_dim=None, ridge=0.4, logdet="cholesky"
    )
    exchangeable = mmi_loss(z_a, z_b, objective="exchangeable", slice_dim=None, ridge=0.4)
    assert doubled.item() == pytest.approx(exchangeable.item(), rel=1e-10)


def test_no_more_directions_than_samples_rise_above_the_noise():
    for objective, (n, dim) in itertools.product(OBJECTIVES, [(12, 5), (12, 40)]):
        options = {"objective": objective, "slice_dim": None}
        losses = [mmi_loss(*views(n, dim), **options, **floor) for floor in ({}, {"snr": 12.0}, {"ridge": dim / 12})]
        assert losses[0] == losses[1] == losses[2]
        assert mmi_loss(*views(n, dim), **options, snr=6.0) == mmi_loss(*views(n, dim), **options, ridge=dim / 6)
    assert mmi_loss(*views(12, 40, noise=1e-3)).item() > -12 / 2


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("logdet", ["cholesky", "taylor"])
def test_routes_agree(objective, logdet, monkeypatch):
    for shape in [(12, 30), (30, 12), (12, 20)]:
        results = []
        for is_wide in (True, False):
            monkeypatch.setattr(functional, "_is_wide", lambda *_, is_wide=is_wide: is_wide)
            # The Gram matrix of more rows than features is singular, not wrong: the identity is added.
            if not is_wide or logdet == "cholesky" or shape[0] * 2 < shape[1]:
                results.append(value_and_gradients(views(*shape), objective=objective, slice_dim=None, logdet=logdet))
        for loss, grads in results[1:]:
            assert loss.item() == pytest.approx(results[0][0].item(), rel=1e-10)
            for grad, expected in zip(grads, results[0][1], strict=True):
                torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-12)


def test_slice_is_the_loss_of_its_features():
    """Independent of the slicing code: the gradient says which features were taken, their loss must be the value."""
    pair = views(40, 30)
    for objective in OBJECTIVES:
        loss, grads = value_and_gradients(pair, objective=objective, slice_dim=7, step=5, slice_kind="coordinates")
        taken = grads[0].abs().sum(0).nonzero().flatten()
        assert len(taken) == 7
        expected = -oracle.mutual_information(pair[0][:, taken], pair[1][:, taken], objective)
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


def test_several_slices_are_averaged():
    pair = views(50, 30)
    one_by_one = []
    _, grads = value_and_gradients(pair, slice_dim=5, num_slices=3, step=2, slice_kind="coordinates")
    for kind in ("kronecker", "gaussian", "coordinates"):
        both = mmi_loss(*pair, slice_dim=5, num_slices=3, slice_kind=kind, step=2)
        assert both.shape == ()
        one_by_one.append(both)
    assert (grads[0].abs().sum(0) > 0).sum() > 5


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_components(objective, shape):
    pair = views(*shape)
    options = functional.Options(objective=objective, slice_dim=None)
    parts = functional.components(pair, 0, options)
    assert parts.loss.item() == pytest.approx(-parts.mutual_information.item())
    sum_of_entropies = parts.entropy_a + parts.entropy_b - parts.joint_entropy
    assert sum_of_entropies.item() == pytest.approx(parts.mutual_information.item(), rel=1e-9)
    assert parts.loss.item() == pytest.approx(mmi_loss(*pair, objective=objective, slice_dim=None).item())
    # Gaussian entropy of standardised features plus noise, from numpy.
    like = pair[0] if objective == "joint" else torch.cat(pair)
    x = ((like - like.mean(0)) / like.std(0, correction=0)).detach().numpy()
    covariance = x.T @ x / len(x) + options.noise_floor(shape[1], shape[0], torch.float64) * np.eye(shape[1])
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]
    assert parts.entropy_a.item() == pytest.approx(entropy, rel=1e-9)
    assert parts.loss.requires_grad
    assert not any(part.requires_grad for part in parts[1:])


@pytest.mark.parametrize("shape", [(30, 5), (4, 31)])
def test_multiview_content_is_an_analysis_of_variance(shape):
    """V views against the textbook between/within decomposition, with numpy."""
    stacked = torch.stack([z for seed in (0, 1) for z in views(*shape, seed=seed)])
    num_views, n, dim = stacked.shape
    x = ((stacked - stacked.mean((0, 1))) / stacked.flatten(0, 1).std(0, correction=0)).detach().numpy()
    total = np.einsum("vni,vnj->ij", x, x) / (num_views * n)
    within = sum(np.cov(x[:, i].T, ddof=1) for i in range(n)).reshape(dim, dim) / n
    noise = dim / min(64, n) * np.eye(dim)
    expected = -0.5 * (np.linalg.slogdet(total + noise)[1] - np.linalg.slogdet(within + noise)[1])
    assert mmi_loss_multiview(list(stacked), slice_dim=None).item() == pytest.approx(expected, rel=1e-9)
    leaves = [z.detach().requires_grad_() for z in stacked]
    assert torch.autograd.gradcheck(lambda *z: mmi_loss_multiview(z, slice_dim=None), leaves)


@pytest.mark.parametrize("objective", ["joint", "exchangeable"])
def test_multiview_of_pairs_is_their_mean(objective):
    a, b = views(30, 12)
    c, _ = views(30, 12, seed=3)
    options = {"objective": objective, "slice_dim": 4, "step": 9}
    pairs = [mmi_loss(x, y, **options) for x, y in ((a, b), (a, c), (b, c))]
    assert mmi_loss_multiview([a, b, c], **options).item() == pytest.approx(sum(pairs).item() / 3)


def test_two_views_are_the_smallest_multiview():
    pair = views(30, 6)
    for objective in OBJECTIVES:
        options = {"objective": objective, "slice_dim": None}
        assert mmi_loss_multiview(pair, **options).item() == mmi_loss(*pair, **options).item()


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
