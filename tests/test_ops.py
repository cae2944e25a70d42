"""Every custom Function: gradcheck in float64, second derivatives refused, random streams as promised."""

import numpy as np
import pytest
import torch

from mmi_loss.ops import contrasts, covariance, gram, logdet, slices


def spd(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator, dtype=torch.float64)
    return (x @ x.mT / shape[-1] + 0.5 * torch.eye(shape[-1])).requires_grad_()


def symmetric(matrix):
    return (matrix + matrix.mT) / 2


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def series_of_two_groups(order):
    """Both the matrix that sets the common scale and the others have a gradient."""
    series = logdet.Series(order, 1.3)
    return lambda a, b: logdet.log_dets([symmetric(a), symmetric(b)], series, [2, 0])


FUNCTIONS = {
    "scatter": (covariance.scatter, [normal(2, 5, 3)]),
    "pooled_covariance": (
        lambda *z: covariance.pooled_loss(
            z, [[0.2, 0.1, 0.3, 0.2], [0.0, 0.5, 0.1, 0.7]], (-1, 1.5), 0.7, logdet.Cholesky()
        )[0],
        [normal(2, 5, 3, seed=s) for s in range(4)],
    ),
    "cross_scatter": (covariance.cross_scatter, [normal(2, 5, 3), normal(2, 5, 4, seed=1)]),
    "signal_to_noise": (
        lambda m: symmetric(covariance.signal_to_noise(symmetric(m), torch.ones(2, 4, dtype=torch.float64), 0.7)),
        [spd(2, 4, 4)],
    ),
    "log_dets": (
        lambda a, b: logdet.log_dets([symmetric(a), symmetric(b)], logdet.Cholesky()),
        [spd(2, 3, 4, 4), spd(1, 3, 5, 5)],
    ),
    "joint_log_dets": (lambda a: logdet.joint_log_dets(symmetric(a)), [spd(2, 6, 6)]),
    **{
        f"series_order_{order}": (series_of_two_groups(order), [spd(2, 3, 4, 4), spd(1, 3, 5, 5, seed=1)])
        for order in range(1, 8)
    },
    "pooled_covariance_series": (
        lambda *z: covariance.pooled_loss(z, [[0.25, 0.25], [0.0, 0.5]], (-1, 1), 0.7, logdet.Series(3, 1.2))[0],
        [normal(5, 3, seed=s) for s in range(2)],
    ),
    "pooled_gram_series": (
        lambda *z: gram.pooled_loss(z, [(0, 2, 2), (0, 1, 1), (1, 2, 1)], (-2, 1, 1), 0.7, logdet.Series(4, 1.0))[0],
        [normal(3, 7, seed=s) for s in range(2)],
    ),
    "gram_of_one": (lambda a: gram.standardised_gram(a, 0.3), [normal(3, 6)]),
    "pooled_gram": (
        lambda *z: gram.pooled_loss(z, [(0, 3, 3), (1, 3, 2)], (-1, 1.5), 0.7, logdet.Cholesky())[0],
        [normal(3, 10, seed=s) for s in range(3)],
    ),
    "identity_plus": (lambda a: gram.identity_plus(a), [spd(2, 3, 3)]),
    "take_coordinates": (
        lambda z: slices.take_coordinates(z, torch.tensor([[0, 3], [3, 4]]), torch.float64),
        [normal(3, 5)],
    ),
    "project_dense": (
        lambda *z: slices.project(z, normal(4, 5, seed=3).detach(), 2, 2, 1),
        [normal(3, 5), normal(3, 5, seed=1)],
    ),
    "project_blocks": (
        lambda *z: slices.project(z, normal(4, 3, seed=3).detach(), 3, 2, 2),
        [normal(3, 5), normal(3, 5, seed=1)],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name):
    function, inputs = FUNCTIONS[name]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivative_is_refused(name):
    function, inputs = FUNCTIONS[name]
    outputs = function(*inputs)
    total = sum(o.square().sum() for o in (outputs if isinstance(outputs, (tuple, list)) else (outputs,)))
    grads = torch.autograd.grad(total, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        sum(g.square().sum() for g in grads).backward()


@pytest.mark.parametrize("name", ["pooled_gram", "project_dense", "project_blocks"])
def test_partial_gradients(name):
    function, inputs = FUNCTIONS[name]

    def total(*views):
        outputs = function(*views)
        return sum(o.square().sum() for o in outputs) if isinstance(outputs, list) else outputs

    both = torch.autograd.grad(total(*inputs), inputs)
    (alone,) = torch.autograd.grad(total(*(z.detach() for z in inputs[:-1]), inputs[-1]), inputs[-1:])
    torch.testing.assert_close(alone, both[-1])


@pytest.mark.parametrize("num_views", [1, 2, 3, 5])
def test_contrasts(num_views):
    """Orthogonal, with the norms they say; only the first sees what all share; the backward is the adjoint."""
    weights, _ = contrasts.contrasts(list(torch.eye(num_views, dtype=torch.float64)[:, None]), torch.zeros(1))
    weights = weights[:, 0]
    np.testing.assert_allclose(weights @ weights.mT, np.diag(contrasts.squared_norms(num_views)), atol=1e-15)
    np.testing.assert_allclose(weights.sum(1), [1.0] + [0.0] * (num_views - 1), atol=1e-15)
    gradients = torch.eye(num_views, dtype=torch.float64)[:, None].clone()
    gradients[0] /= num_views
    np.testing.assert_allclose(torch.stack(contrasts.gradients_of_views(gradients))[:, 0], weights.mT, atol=1e-15)


def test_contrasts_of_a_large_mean():
    """Exact for constant features, and no digits lost to the mean beyond those the input has lost."""
    deviations = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0))
    views = list((deviations + 1e4).unbind())
    rows, _ = contrasts.contrasts(views)
    exact, _ = contrasts.contrasts([z.double() for z in views])
    np.testing.assert_allclose(rows, exact, atol=2e-6)
    rows, _ = contrasts.contrasts([torch.full((5, 3), 0.1)] * 3)
    assert not rows.any()


@pytest.mark.parametrize("size", [65, 130, 201])
def test_log_det_by_halves(size):
    matrices = spd(2, size, size)
    log_dets = logdet.log_dets([matrices], logdet.Cholesky())
    log_dets.sum().backward()
    expected = matrices.detach().numpy()
    np.testing.assert_allclose(log_dets.detach(), np.linalg.slogdet(expected)[1], rtol=1e-12)
    np.testing.assert_allclose(matrices.grad @ matrices.detach(), np.eye(size)[None].repeat(2, 0), atol=1e-11)
    for row in (0, size - 1):  # indefinite in the first half, in the last
        matrices = spd(2, size, size).detach()
        matrices[0, row, row] = -1
        matrices.requires_grad_()
        log_dets = logdet.log_dets([matrices], logdet.Cholesky())
        log_dets.sum().backward()
        assert log_dets[0].isnan()
        assert log_dets[1].isfinite()
        assert matrices.grad[0].isnan().any()
        assert matrices.grad[1].isfinite().all()


def test_log_det_of_an_indefinite_matrix_is_nan_with_nan_gradient():
    matrices = torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, -1.0, 2.0]))]).requires_grad_()
    log_dets = logdet.log_dets([matrices], logdet.Cholesky())
    log_dets.sum().backward()
    assert log_dets[0] == 0
    assert log_dets[1].isnan()
    assert matrices.grad[0].isfinite().all()
    assert matrices.grad[1].isnan().all()
    joint = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0])).requires_grad_()
    assert logdet.joint_log_dets(joint).isnan().all()


def series_information(groups, weights, order, beta):
    return (torch.tensor(weights) / 2 * logdet.log_dets(groups, logdet.Series(order, beta))).sum()


def exact_information(groups, weights):
    exact = logdet.log_dets(groups, logdet.Cholesky())
    return (torch.tensor(weights) / 2 * exact).sum()


@pytest.mark.parametrize(("order", "beta"), [(1, 1.0), (2, 1.9), (3, 0.7), (3, 1.0), (4, 1.0), (4, 1.9), (6, 1.9)])
def test_series_is_a_lower_bound_of_content_information(order, beta):
    """T >= W: even orders at any beta, odd ones at beta <= 1; and above zero, where the slope is positive."""
    for seed in range(20):
        nuisance, content = spd(6, 6, seed=seed).detach(), 20 ** (seed % 3) * spd(6, 6, seed=99 + seed).detach()
        groups = [torch.stack([content + nuisance, nuisance])]
        assert 0 < series_information(groups, [1, -1], order, beta) < exact_information(groups, [1, -1])


@pytest.mark.parametrize(("order", "beta"), [(2, 1.0), (3, 1.9), (4, 0.5), (4, 1.0), (5, 1.9), (7, 1.9)])
def test_series_is_a_lower_bound_of_joint_information(order, beta):
    """Odd orders at any beta, even ones at beta <= 1; even orders are never negative."""
    for seed in range(20):
        joint = spd(8, 8, seed=seed).detach() * torch.linspace(0.1, 1 + seed, 8).outer(torch.linspace(0.1, 1 + seed, 8))
        groups = [torch.stack([joint[:4, :4], joint[4:, 4:]]), joint[None]]
        approximate = series_information(groups, [1, 1, -1], order, beta)
        assert approximate < exact_information(groups, [1, 1, -1])
        if order % 2 == 0:
            assert approximate > 0


def test_series_does_not_reward_collapse():
    """Pushing one large eigenvalue up at the cost of the small ones, the trace fixed, must not pay: it did, with a
    scale for each matrix.
    """
    small, large = torch.full((31,), 1.0), torch.tensor([40.0])
    total = torch.diag(torch.cat([large, small])).requires_grad_()
    groups = [torch.stack([total, torch.eye(32)])]
    series_information(groups, [1, -1], order=4, beta=1.0).backward()
    slopes = total.grad.diagonal()
    assert (slopes[1:] > slopes[0]).all()


def test_series_survives_large_eigenvalues_in_float32():
    matrices = (spd(1, 4, 4).detach() * 1e12).float()
    approximate, exact = (logdet.log_dets([matrices], m) for m in (logdet.Series(60, 1.0), logdet.Cholesky()))
    assert approximate.item() == pytest.approx(exact.item(), rel=0.02)


def step(value):
    return torch.tensor(value, dtype=torch.int64)


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
    first = slices.gaussian_matrix(10, 4, step(3), 0, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(slices.gaussian_matrix(10, 4, step(3), 0, torch.float32), first)


def test_coordinates_are_the_hashes_of_plain_integers():
    """The generator restated with Python's integers: what any other backend has to reproduce."""

    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    dim, k, seed, t, stream = 100, 7, 5, 12345678901, 1
    key = mix((t + seed * 0x9E3779B9) % 2**32)
    key = mix((key + (t >> 31) * 0x85EBCA6B + stream * 0x27D4EB2F) % 2**32)
    ranks = [mix((i + key) % 2**32) for i in range(dim)]
    signed = [r - 2**32 if r >= 2**31 else r for r in ranks]
    expected = sorted(sorted(range(dim), key=lambda i: -signed[i])[:k])
    assert slices.random_coordinates(dim, k, 2, step(t), seed)[stream].tolist() == expected


def test_gaussian_matrix_is_standard_normal():
    draws = [slices.gaussian_matrix(2000, 33, step(t), 0, torch.float64) for t in range(10)]
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
    mixing = slices.mixing_matrix(dim, slice_dim, 2, block_dim, step(7), 3, torch.float64)
    (projected,) = slices.project([z], mixing, slice_dim, 2, block_dim)
    rows = mixing.shape[0] // 2
    for s in range(2):
        kronecker = torch.kron(mixing[s * rows : (s + 1) * rows], torch.eye(block_dim, dtype=torch.float64))
        expected = z @ kronecker[:slice_dim, :dim].T
        torch.testing.assert_close(projected[s], expected)
        assert torch.linalg.matrix_rank(expected) == 5
