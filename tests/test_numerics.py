"""Precision, scales, non-finite and degenerate input: nothing silent, nothing wrong."""

import pytest
import torch
from torch import nn

from mmi_loss import MMILoss
from mmi_loss.functional import mmi_loss, mmi_loss_multiview
from mmi_loss.objectives import OBJECTIVES
from mmi_loss.options import SLICE_KINDS
from tests.conftest import views

pytestmark = pytest.mark.filterwarnings("ignore:objective=")

ESTIMATORS = [
    {"objective": objective, "slice_dim": slice_dim, "slice_kind": kind}
    for objective in OBJECTIVES
    for slice_dim, kind in ((None, "kronecker"), *((8, kind) for kind in SLICE_KINDS))
]
SHAPES = [(40, 12), (6, 40)]


def backward(pair, **options):
    leaves = [z.detach().clone().requires_grad_() for z in pair]
    loss = mmi_loss(*leaves, **options)
    loss.backward()
    return loss.detach(), [z.grad for z in leaves]


@pytest.mark.parametrize("options", ESTIMATORS, ids=str)
@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e12])
def test_loss_does_not_depend_on_the_scale(options, scale):
    pair = [z.detach().float() for z in views(40, 12)]
    scaled = mmi_loss(*(z * scale for z in pair), **options)
    assert scaled.item() == pytest.approx(mmi_loss(*pair, **options).item(), rel=1e-4)


@pytest.mark.parametrize("options", ESTIMATORS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_reach_the_loss(options, dtype):
    layer = nn.Linear(12, 40)
    z = [view.detach().float() for view in views(16, 12)]
    with torch.autocast("cpu", dtype=dtype):
        pair = [layer(view) for view in z]
        loss = mmi_loss(*pair, **options)
        assert pair[0].dtype == dtype
        loss.backward()  # under autocast, as some scripts do
    assert loss.dtype == torch.float32
    exact = mmi_loss(*(p.double() for p in pair), **options)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    assert layer.weight.grad.isfinite().all()

    leaves = [p.detach().float().requires_grad_() for p in pair]
    with torch.autocast("cpu", dtype=dtype):
        mmi_loss(*leaves, **options).backward()
    _, grads = backward(leaves, **options)
    torch.testing.assert_close(leaves[0].grad, grads[0])


@pytest.mark.parametrize("options", ESTIMATORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_non_finite_input_is_seen_in_loss_and_gradient(options, shape, value, dtype):
    """Whichever feature holds it, taken or not, in every gradient: a GradScaler looks at them."""
    for feature in range(0, shape[1], 5):
        pair = [z.detach().to(dtype) for z in views(*shape)]
        pair[1][2, feature] = value
        for impl in ("eager", "reference"):
            loss, grads = backward(pair, impl=impl, **options)
            assert loss.isnan()
            assert all(grad.isnan().all() for grad in grads)


@pytest.mark.parametrize("options", ESTIMATORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 3.1, -1234.5, 1e4])
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_collapsed_embeddings(options, shape, dtype, value, impl):
    pair = [torch.full(shape, value, dtype=dtype) for _ in range(2)]
    loss, grads = backward(pair, impl=impl, **options)
    assert abs(loss.item()) < 1e-6
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("options", [o for o in ESTIMATORS if not o["slice_dim"] or o["slice_kind"] == "coordinates"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("level", [0.1, 7.1, 1e4])
def test_dead_feature_is_ignored(options, shape, level):
    """A constant's mean is off by a rounding: that is no variance, and no gradient."""
    pair = [z.detach().float() for z in views(*shape)]
    for z in pair:
        z[:, ::2] = level
    exact, exact_grads = backward([z.double() for z in pair], impl="reference", **options)
    loss, grads = backward(pair, **options)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    assert loss < -0.05
    for grad, expected in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)
        assert not grad[:, ::2].any()


@pytest.mark.parametrize("kind", SLICE_KINDS)
@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 5, 64, 100])
def test_constant_embedding_has_no_information(kind, impl, dtype, n):
    """Products round equal rows differently, by their place among the others: that is no variance either."""
    z = torch.full((n, 1300), 0.1, dtype=dtype)
    loss, grads = backward([z, z.clone()], slice_kind=kind, slice_dim=32, impl=impl)
    assert loss == 0
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("options", ESTIMATORS, ids=str)
@pytest.mark.parametrize("logdet", ["cholesky", "taylor"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e19), (torch.float64, 1e154)])
def test_squares_that_overflow_are_seen(options, logdet, shape, dtype, scale):
    """Finite input, infinite variance: NaN, neither the 0 of features taken for constant nor another number."""
    pair = [(z.detach() * 100).to(dtype) * scale for z in views(*shape)]
    assert all(z.isfinite().all() for z in pair)
    for impl in ("eager", "reference"):
        loss, grads = backward(pair, impl=impl, logdet=logdet, **options)
        assert loss.isnan()
        assert all(grad.isnan().all() for grad in grads)


@pytest.mark.parametrize("options", ESTIMATORS, ids=str)
def test_rank_one_dead_and_duplicated(options):
    """Degenerate covariances are singular: the noise floor makes the loss finite."""
    line = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    rank_one = line @ torch.ones(1, 12)
    dead = views(40, 12)[0].detach().float()
    dead[:, 3] = 7.0
    duplicated = views(40, 12)[0].detach().float()
    duplicated[20:] = duplicated[:20]
    for ridge in (None, 1e-12):
        for z in (rank_one, dead, duplicated):
            loss, grads = backward([z, z.roll(1, 0)], ridge=ridge, **options)
            assert loss.isfinite()
            assert all(grad.isfinite().all() for grad in grads)
            identical, _ = backward([z, z], ridge=ridge, **options)
            assert identical.isfinite()


@pytest.mark.parametrize("options", ESTIMATORS, ids=str)
def test_views_of_one_tensor_and_calls_without_gradient(options):
    pair = [z.detach() for z in views(20, 14)]
    loss, grads = backward(pair, **options)
    chunks = torch.cat(pair).requires_grad_()
    mmi_loss(*chunks.chunk(2), **options).backward()
    torch.testing.assert_close(chunks.grad, torch.cat(grads))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(mmi_loss(*pair, **options), loss)


def test_same_tensor_twice():
    z = views(20, 14)[0].detach().requires_grad_()
    mmi_loss(z, z).backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("kind", SLICE_KINDS)
def test_slice_dim_beyond_the_features_takes_them_all(impl, kind):
    """As they are given: also where the mean is so large that a projection would be rounding alone."""
    pair = [(z.detach() + 1e7).float() for z in views(20, 14)]
    for slice_dim in (14, 15, 1000):
        loss = mmi_loss(*pair, slice_dim=slice_dim, slice_kind=kind, impl=impl)
        assert loss == mmi_loss(*pair, slice_dim=None, impl=impl) < -1


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_mixed_precision_views_are_promoted(impl):
    """To float64 if one of them is, whichever."""
    half, single, double = (
        z.to(d) for z, d in zip(views(20, 14) * 2, (torch.half, torch.float, torch.double), strict=False)
    )
    assert mmi_loss(half, single, impl=impl).dtype == torch.float32
    for given in ([double, half], [half, double, single], [half, double[:, :9], single]):
        assert mmi_loss_multiview(given, objective="joint", impl=impl).dtype == torch.float64


@pytest.mark.parametrize("slicing", [{}, *({"slice_dim": 4, "slice_kind": kind} for kind in SLICE_KINDS)], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_second_derivative_is_the_references_alone(slicing, objective):
    """Elsewhere it is refused, and the error says where it can be had."""
    pair, options = views(7, 6), {"objective": objective, "snr": 5.0, **slicing}
    (grad,) = torch.autograd.grad(mmi_loss(*pair, **options), pair[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*impl='reference'"):
        grad.sum().backward()
    assert torch.autograd.gradgradcheck(lambda a, b: mmi_loss(a, b, impl="reference", **options), pair)


@pytest.mark.parametrize("options", ESTIMATORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_transforms_of_torch_func(options, shape):
    """Of the eager module: grad, a batch of pairs, a Jacobian."""
    pairs = [torch.stack([views(*shape, seed=seed)[view].detach() for seed in range(3)]) for view in (0, 1)]
    loss_fn = MMILoss(**options).eval()
    losses, grads = zip(*(backward(pair, **options) for pair in zip(*pairs, strict=True)), strict=True)
    torch.testing.assert_close(torch.func.vmap(loss_fn)(*pairs), torch.stack(losses))
    of_both = torch.func.vmap(torch.func.grad(loss_fn, argnums=(0, 1)))(*pairs)
    torch.testing.assert_close(torch.stack(of_both, 1), torch.stack([torch.stack(both) for both in grads]))
    first = [z[0] for z in pairs]
    for transform in (torch.func.grad, torch.func.jacrev):
        torch.testing.assert_close(transform(loss_fn, argnums=1)(*first), grads[0][1])


def test_transforms_of_torch_func_count_calls():
    """A module in training that the function captures: transforms forbid changing what they do not see."""
    a, b = (z.detach() for z in views(20, 200))
    loss_fn = MMILoss()
    for step in (0, 1):
        got = torch.func.grad(lambda z: loss_fn(z, b))(a)
        torch.testing.assert_close(got, backward((a, b), step=step)[1][0])
    jacobian = torch.func.jacrev(lambda z: loss_fn(z, b))(a)
    torch.testing.assert_close(jacobian, backward((a, b), step=2)[1][0])
    assert torch.func.vmap(loss_fn)(torch.stack([a, a]), torch.stack([b, a])).shape == (2,)
    assert loss_fn.step == 4


@pytest.mark.parametrize("kind", ["kronecker", "coordinates"])
def test_deterministic_algorithms(kind):
    torch.use_deterministic_algorithms(True)
    try:
        results = [backward(views(20, 200), num_slices=2, slice_dim=16, slice_kind=kind) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1][0], results[1][1][0])


def test_more_information_is_a_lower_loss():
    """Sign and order: identical views, noisy views, independent views."""
    z, other = (view.detach() for view in views(400, 20))
    independent = other[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    for options in ESTIMATORS:
        losses = [mmi_loss(z, partner, **options).item() for partner in (z, other, independent)]
        assert losses == sorted(losses)
        assert losses[0] < losses[1] - 0.05
        assert losses[1] < losses[2] - 0.05
