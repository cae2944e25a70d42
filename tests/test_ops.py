"""Every custom Function: gradcheck in float64, second derivatives refused, random streams as promised."""

import numpy as np
import pytest
import torch

from mmi_loss.objectives import OBJECTIVES
from mmi_loss.ops import covariance, slices
from mmi_loss.ops.covariance import CovarianceLoss
from mmi_loss.ops.gram import gram_loss
from mmi_loss.options import Options
from tests import oracle


def spd(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator, dtype=torch.float64)
    return (x @ x.mT / shape[-1] + 0.5 * torch.eye(shape[-1])).requires_grad_()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def step(value):
    return torch.tensor(value, dtype=torch.int64)


def exact():
    return Options().log_det


def series(order, beta):
    return Options(logdet="taylor", order=order, beta=beta).log_det


NOISES = torch.tensor([0.7] * 3 + [0.3] * 4, dtype=torch.float64)
"""Of views of 3 and of 4 features, side by side."""


def covariance_loss(objective, log_det, noise=0.7, is_computed=False):
    return lambda *z: CovarianceLoss.apply(OBJECTIVES[objective], (0.0, noise), log_det, None, is_computed, *z)[0]


def gram(objective, log_det, noise=0.7, is_computed=False):
    return lambda *z: gram_loss(OBJECTIVES[objective], (0.0, noise), log_det, z, is_computed)[0]


def sliced(block_dim):
    return lambda *z: slices.slice_views(z, 3, 2, block_dim, step(7), 3, torch.float64)


def many(number, *shape):
    return [normal(*shape, seed=seed) for seed in range(number)]


FUNCTIONS = {
    "covariance": (covariance_loss("content", exact()), many(2, 9, 3)),
    "covariance_of_slices": (covariance_loss("exchangeable", exact(), is_computed=True), many(4, 2, 5, 3)),
    "covariance_series": (covariance_loss("exchangeable", series(3, 1.2)), many(2, 5, 3)),
    "covariance_side_by_side": (covariance_loss("joint", exact(), NOISES), [normal(2, 9, 3), normal(2, 9, 4, seed=1)]),
    "covariance_side_by_side_series": (covariance_loss("joint", series(4, 1.0)), many(2, 9, 3)),
    "gram": (gram("content", exact()), many(3, 3, 10)),
    "gram_of_slices": (gram("exchangeable", exact()), many(2, 2, 3, 8)),
    "gram_series": (gram("exchangeable", series(4, 1.0)), many(2, 3, 7)),
    "gram_side_by_side": (gram("joint", exact(), NOISES), [normal(3, 3), normal(3, 4, seed=1)]),
    "gram_side_by_side_series": (gram("joint", series(3, 1.2)), many(2, 3, 6)),
    "project_dense": (sliced(1), many(2, 4, 5)),
    "project_blocks": (sliced(2), many(2, 4, 5)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name):
    function, inputs = FUNCTIONS[name]
    assert torch.autograd.gradcheck(function, inputs)


def squares(function, inputs):
    outputs = function(*inputs)
    return sum(o.square().sum() for o in (outputs if isinstance(outputs, (tuple, list)) else (outputs,)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivative_is_refused(name):
    function, inputs = FUNCTIONS[name]
    grads = torch.autograd.grad(squares(function, inputs), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        sum(g.square().sum() for g in grads).backward()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_partial_gradients(name):
    function, inputs = FUNCTIONS[name]
    both = torch.autograd.grad(squares(function, inputs), inputs)
    (alone,) = torch.autograd.grad(squares(function, [*(z.detach() for z in inputs[:-1]), inputs[-1]]), inputs[-1:])
    torch.testing.assert_close(alone, both[-1])


@pytest.mark.parametrize("num_views", [1, 2, 3, 5])
def test_contrasts(num_views):
    """sqrt(V) times orthonormal; only the first sees what all share; the backward is the adjoint."""
    identity = torch.eye(num_views, dtype=torch.float64)[:, None]
    weights = covariance.contrasts(list(identity), torch.zeros(1, 1, dtype=torch.float64))[:, 0]
    np.testing.assert_allclose(weights @ weights.mT, num_views * np.eye(num_views), atol=1e-14)
    np.testing.assert_allclose(weights[0], np.ones(num_views), atol=1e-15)
    adjoint = torch.stack(covariance.gradients_of_views(list(identity.clone())))[:, 0]
    np.testing.assert_allclose(adjoint, weights.mT, atol=1e-15)


def test_contrasts_of_a_large_mean():
    """Exact for constant features, and no digits lost to the mean beyond those the input has lost."""
    deviations = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0))
    views = list((deviations + 1e4).unbind())
    exactly = covariance.contrasts([z.double() for z in views])
    np.testing.assert_allclose(covariance.contrasts(views), exactly, atol=4e-6)
    assert not covariance.contrasts([torch.full((5, 3), 0.1)] * 3).any()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("route", "samples"), [(covariance_loss, 40), (gram, 3)])
def test_rounding_is_a_signal_of_given_features_alone(objective, route, samples):
    """Where a feature was computed, what differs in the last digit is constant: no loss, no gradient."""
    generator = torch.Generator().manual_seed(0)
    last_digits = torch.randint(2, (2, samples, 8), generator=generator) * torch.finfo(torch.float32).eps
    for is_computed in (True, False):
        views = [(3.1 + 3.1 * digits).requires_grad_() for digits in last_digits]
        loss = route(objective, exact(), is_computed=is_computed)(*views)
        loss.backward()
        assert (loss == 0) == is_computed
        assert all(z.grad.any() != is_computed for z in views)


class WeightedSum(torch.autograd.Function):
    """The weighted sum of log-determinants with the gradients that come with them."""

    @staticmethod
    def forward(ctx, log_det, null_dims, weights, *groups):
        log_dets, gradients = log_det(groups, null_dims, weights)
        ctx.save_for_backward(*gradients)
        return (torch.tensor(weights)[:, None] * log_dets).sum()

    @staticmethod
    def backward(ctx, grad):
        return None, None, None, *(grad * gradient for gradient in ctx.saved_tensors)


LOG_DETS = {"cholesky": {}, **{f"series_order_{order}": {"order": order, "beta": 1.3} for order in range(1, 8)}}


@pytest.mark.parametrize("name", LOG_DETS)
def test_log_dets_and_their_gradients(name):
    """Of groups of different sizes, one with more eigenvalues 1: both the matrix that sets the common scale of a series
    and the others have a gradient.
    """
    groups, null_dims, weights = [spd(2, 3, 4, 4), spd(1, 3, 5, 5, seed=1)], [2, 0], (0.5, -1.0, 2.0)
    log_det = series(**LOG_DETS[name]) if LOG_DETS[name] else exact()
    log_dets, _ = log_det([group.detach() for group in groups], null_dims, weights)
    for i in range(3):
        matrices = [np.pad(group[i].detach().numpy() - np.eye(4), (0, 2)) for group in groups[0]]
        matrices.append(groups[1][0, i].detach().numpy() - np.eye(5))
        expected = [2 * oracle.half_sum(row, matrices, **LOG_DETS[name]) for row in np.eye(3)]
        np.testing.assert_allclose(log_dets[:, i], expected, rtol=1e-10)
    assert torch.autograd.gradcheck(
        lambda *z: WeightedSum.apply(log_det, null_dims, weights, *((m + m.mT) / 2 for m in z)), groups
    )


@pytest.mark.parametrize("size", [3, 65, 201])
def test_log_det_of_an_indefinite_matrix_is_nan(size):
    """Wherever the factorisation fails, and of no other matrix."""
    matrices = spd(4, size, size).detach()
    matrices[1, 0, 0] = matrices[2, size // 2, size // 2] = matrices[3, -1, -1] = -1
    log_dets, (gradients,) = exact()([matrices.clone()], [0], [1.0] * 4)
    assert log_dets.isnan().tolist() == [False, True, True, True]
    np.testing.assert_allclose(log_dets[0], np.linalg.slogdet(matrices[0])[1], rtol=1e-12)
    np.testing.assert_allclose(gradients[0] @ matrices[0], np.eye(size), atol=1e-11)


def information(log_det, groups, weights):
    return (torch.tensor(weights) / 2 * log_det(groups, [0] * len(groups), weights)[0]).sum()


@pytest.mark.parametrize(("order", "beta"), [(1, 1.0), (2, 1.9), (3, 0.7), (3, 1.0), (4, 1.0), (4, 1.9), (6, 1.9)])
def test_series_is_a_lower_bound_of_content_information(order, beta):
    """T >= W: even orders at any beta, odd ones at beta <= 1; and above zero, where the slope is positive."""
    for seed in range(20):
        nuisance, content = spd(6, 6, seed=seed).detach(), 20 ** (seed % 3) * spd(6, 6, seed=99 + seed).detach()
        groups = [torch.stack([content + nuisance, nuisance])]
        assert 0 < information(series(order, beta), groups, [1, -1]) < information(exact(), groups, [1, -1])


@pytest.mark.parametrize(("order", "beta"), [(2, 1.0), (3, 1.9), (4, 0.5), (4, 1.0), (5, 1.9), (7, 1.9)])
def test_series_is_a_lower_bound_of_joint_information(order, beta):
    """Odd orders at any beta, even ones at beta <= 1; even orders are never negative."""
    for seed in range(20):
        joint = spd(8, 8, seed=seed).detach() * torch.linspace(0.1, 1 + seed, 8).outer(torch.linspace(0.1, 1 + seed, 8))
        groups = [torch.stack([joint[:4, :4], joint[4:, 4:]]), joint[None]]
        approximate = information(series(order, beta), groups, [1, 1, -1])
        assert approximate < information(exact(), groups, [1, 1, -1])
        if order % 2 == 0:
            assert approximate > 0


def test_series_does_not_reward_collapse():
    """Pushing one large eigenvalue up at the cost of the small ones, the trace fixed, must not pay: it did, with a
    scale for each matrix.
    """
    total = torch.diag(torch.tensor([40.0] + [1.0] * 31))
    _, (gradients,) = series(4, 1.0)([torch.stack([total, torch.eye(32)])], [0], [1, -1])
    slopes = gradients[0].diagonal()
    assert (slopes[1:] > slopes[0]).all()


def test_series_survives_large_eigenvalues_in_float32():
    matrices = (spd(1, 4, 4).detach() * 1e12).float()
    approximate, expected = (log_det([matrices], [0], [1])[0] for log_det in (series(60, 1.0), exact()))
    assert approximate.item() == pytest.approx(expected.item(), rel=0.02)


def test_random_coordinates_are_distinct_and_uniform():
    dim, k, steps = 40, 10, 2000
    counts = torch.zeros(dim)
    for t in range(steps):
        indices = slices.random_coordinates(dim, k, 1, step(t), seed=0)[0]
        assert len(indices.unique()) == k
        counts[indices] += 1
    expected = steps * k / dim
    # Binomial counts: within five standard deviations, and not suspiciously even.
    deviation = (steps * k / dim * (1 - k / dim)) ** 0.5
    assert (counts - expected).abs().max() < 5 * deviation
    assert counts.std() > 0.5 * deviation


def test_random_streams_differ_in_step_seed_and_slice():
    draws = [
        slices.random_coordinates(1000, 20, 2, step(t), seed)
        for t in (0, 1, 2**31, 2**32, 2**40)
        for seed in (0, 1, -1, 2**40)
    ]
    sets = {tuple(indices.tolist()) for draw in draws for indices in draw}
    assert len(sets) == 2 * len(draws)


def test_random_streams_ignore_and_keep_the_global_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = slices.mixing_matrix(40, 4, 1, 1, step(3), 0, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(slices.mixing_matrix(40, 4, 1, 1, step(3), 0, torch.float32), first)


def test_coordinates_are_the_hashes_of_plain_integers():
    """By the oracle's restatement, and the numbers themselves: a seed means the same features in every version."""
    dim, k, seed, t = 100, 7, 5, 12345678901
    taken = slices.random_coordinates(dim, k, 2, step(t), seed)
    features = np.arange(dim, dtype=float)[None]
    np.testing.assert_array_equal(taken, np.concatenate(oracle.slices(features, k, 2, "coordinates", seed, t)))
    assert taken.tolist() == [[3, 9, 12, 48, 49, 81, 84], [5, 17, 22, 34, 42, 44, 94]]


def test_key_of_a_traced_step_is_the_hosts():
    """In a graph and on a device the key is computed from tensors."""
    torch._dynamo.reset()
    traced = torch.compile(slices.key, backend="eager", fullgraph=True)
    for t, seed, stream in ((0, 0, 0), (2**31 + 1, 2**32 + 5, 1), (2**40, -(2**40), 2)):
        assert traced(step(t), seed, stream).item() == slices.key(step(t), seed, stream)


def test_dense_mixing_is_standard_normal():
    draws = [slices.mixing_matrix(33, 2000, 1, 1, step(t), 0, torch.float64) for t in range(10)]
    assert draws[0].shape == (2000, 33)
    flat = torch.stack(draws).flatten()
    # Five standard errors of each sample moment.
    for measured, variance in ((flat, 1), (flat**2 - 1, 2), (flat**3, 15), (flat**4 - 3, 96)):
        assert abs(measured.mean()) < 5 * (variance / flat.numel()) ** 0.5
    directions = draws[0]
    correlation = directions.T @ directions / 2000 - torch.eye(33)
    assert correlation.abs().max() < 5 / 2000**0.5


@pytest.mark.parametrize(("dim", "slice_dim", "block_dim"), [(48, 16, 1), (48, 16, 2), (50, 17, 4), (9, 8, 1)])
def test_projection_is_the_kronecker_product(dim, slice_dim, block_dim):
    z = normal(5, dim).detach()
    (projected,) = slices.slice_views([z], slice_dim, 2, block_dim, step(7), 3, torch.float64)
    mixing = slices.mixing_matrix(dim, slice_dim, 2, block_dim, step(7), 3, torch.float64)
    for of_slice, weights in zip(projected, mixing.chunk(2), strict=True):
        kronecker = torch.kron(weights, torch.eye(block_dim, dtype=torch.float64))
        expected = z @ kronecker[:slice_dim, :dim].T
        torch.testing.assert_close(of_slice, expected)
        assert torch.linalg.matrix_rank(expected) == 5
