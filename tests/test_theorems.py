"""The paper's two theorems as tests of what is measured here.

Theorem 1 promises two things: I(f(Z); g(Z')) = I(Z; Z') for homeomorphisms f and g, one of each view; and, *if* some
f and g make the views jointly Gaussian, covariances of f(Z) and g(Z') are all that is needed. It does not give f and g:
ranks find them where features were bent one by one, a general map must be undone by its inverse.

Theorem 2 promises that under a generalised Gaussian of shape s a constant is added which depends on s and the
dimensions alone.
"""

import functools
import math

import pytest
import torch

from mmi_loss.diagnostics import mutual_information
from tests.generalised_gaussian import generalised_gaussian_constant

SAMPLES = 20_000
CORRELATIONS = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)
TRUTH = float(-0.5 * torch.log1p(-CORRELATIONS.square()).sum())
ERROR = float((CORRELATIONS.square().sum() / SAMPLES).sqrt())
"""Standard deviation of the estimate: that of -1/2 log(1 - r^2) is rho / sqrt(N) to first order."""


@pytest.fixture(scope="module")
def latent():
    """Jointly Gaussian views of known mutual information, features mixed within each view."""
    generator = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, SAMPLES, 3, generator=generator, dtype=torch.float64)
    y = CORRELATIONS * x + (1 - CORRELATIONS.square()).sqrt() * e
    mixing = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64) / 2 + torch.eye(3)
    return x @ mixing[0], y @ mixing[1]


def gaussianise(z):
    """Every feature's ranks to standard normal quantiles: undoes any increasing map of each feature."""
    ranks = z.argsort(0).argsort(0)
    return torch.special.ndtri((ranks + 0.5) / len(z))


def bend(z, seed):
    """A random increasing network of each feature, then a scale, shift and exponential that spread its outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias, out = (torch.randn(16, z.shape[1], generator=generator, dtype=torch.float64) for _ in range(3))
    hidden = torch.tanh(z[:, None] * weight.exp() + bias)
    return (0.2 * z + (hidden * out.exp()).mean(1)).mul(1.5).exp() - 3


class Coupling(torch.nn.Module):
    """RealNVP's affine coupling layer (Dinh et al. 2017) and a fixed rotation: an invertible network of (N, 3)."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).double()
            self.rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]

    def forward(self, z):
        kept, changed = z[:, :1], z[:, 1:]
        scale, shift = self.net(kept).mul(3).chunk(2, dim=1)
        return torch.cat([kept, changed * scale.tanh().exp() + shift], 1) @ self.rotation

    def inverse(self, y):
        y = y @ self.rotation.T
        kept, changed = y[:, :1], y[:, 1:]
        scale, shift = self.net(kept).mul(3).chunk(2, dim=1)
        return torch.cat([kept, (changed - shift) * (-scale.tanh()).exp()], 1)


def test_theorem_1_bent_features(latent):
    """Increasing maps of each feature, undone by ranks: the latent's information to sampling error, and the same
    number as of the latent's own ranks to the last digit. Without Gaussianisation covariances see less.
    """
    bent = [bend(z, seed) for seed, z in enumerate(latent)]
    measured = float(mutual_information(*(gaussianise(z) for z in bent)))
    assert measured == pytest.approx(TRUTH, abs=4 * ERROR)
    assert measured == float(mutual_information(*(gaussianise(z) for z in latent)))
    assert float(mutual_information(*bent)) < TRUTH - 40 * ERROR


def test_theorem_1_by_an_estimator_without_gaussian_assumption():
    """One feature a view: nearest neighbours (Kraskov et al. 2004) find the closed form before and after bending."""
    selection = pytest.importorskip("sklearn.feature_selection", reason="scikit-learn is not installed")
    generator = torch.Generator().manual_seed(1)
    x, e = torch.randn(2, 4000, generator=generator, dtype=torch.float64)
    y = 0.8 * x + 0.6 * e
    expected = -0.5 * math.log(1 - 0.8**2)
    for a, b in ((x, y), (x**3, torch.sinh(y)), (torch.sigmoid(2 * x), -(y + 0.1 * y**3))):
        (found,) = selection.mutual_info_regression(a[:, None].numpy(), b.numpy(), random_state=0)
        assert found == pytest.approx(expected, abs=0.05)
        ranked = mutual_information(gaussianise(a[:, None]), gaussianise(b[:, None]))
        assert float(ranked) == pytest.approx(expected, abs=4 * 0.8 / math.sqrt(4000))


@torch.no_grad()
def test_theorem_1_invertible_networks(latent):
    """A network mixes features: its inverse makes the views Gaussian again and covariances suffice. Ranks of single
    features do not, which is what "if they can be mapped to jointly Gaussian variables" excludes.
    """
    networks = [[Coupling(10 * view + layer) for layer in range(3)] for view in (0, 1)]
    pushed, undone = [], []
    for z, layers in zip(latent, networks, strict=True):
        for layer in layers:
            z = layer(z)
        pushed.append(z)
        for layer in reversed(layers):
            z = layer.inverse(z)
        undone.append(z)
    torch.testing.assert_close(undone, list(latent), rtol=1e-8, atol=1e-8)
    assert float(mutual_information(*undone)) == pytest.approx(TRUTH, abs=4 * ERROR)
    assert abs(float(mutual_information(*(gaussianise(z) for z in pushed))) - TRUTH) > 20 * ERROR


@functools.cache
def monte_carlo_entropy(dim, shape, samples=100_000, batches=20):
    """Entropy in nats of exp(-(x^T x)^s / 2) scaled to unit covariance, and its standard error: normaliser and moments
    by importance sampling from Student's t, so that nothing of the closed form is used.
    """
    generator = torch.Generator().manual_seed(dim)
    degrees, found = 4, []
    scale = (dim / shape) ** (1 / shape) / dim  # about the law's own variance, so that the weights vary little
    for _ in range(batches):
        normal = torch.randn(samples // batches, dim, generator=generator, dtype=torch.float64)
        chi = torch.randn(samples // batches, degrees, generator=generator, dtype=torch.float64)
        square = scale * degrees * normal.square().sum(1) / chi.square().sum(1)
        log_proposal = (
            math.lgamma((degrees + dim) / 2)
            - math.lgamma(degrees / 2)
            - dim / 2 * math.log(scale * degrees * math.pi)
            - (degrees + dim) / 2 * torch.log1p(square / (scale * degrees))
        )
        weight = (-square.pow(shape) / 2 - log_proposal).exp()
        exponent, second = ((weight * moment).sum() / weight.sum() for moment in (square.pow(shape), square))
        entropy = weight.mean().log() + exponent / 2 - dim / 2 * (second / dim).log()
        found.append(float(entropy))
    values = torch.tensor(found)
    return float(values.mean()), float(values.std() / math.sqrt(batches))


@pytest.mark.parametrize("shape", [0.5, 0.8, 1.0, 2.0])
@pytest.mark.parametrize("dims", [(1, 1), (2, 3), (4, 4)])
def test_theorem_2_constant_against_monte_carlo_entropies(dims, shape):
    """Our reading: views and joint vector each follow the family, h(d_a) + h(d_b) - h(d_a + d_b)."""
    (h_a, e_a), (h_b, e_b), (h_joint, e_joint) = (
        monte_carlo_entropy(dim, shape) for dim in (dims[0], dims[1], sum(dims))
    )
    error = math.sqrt(e_a**2 + e_b**2 + e_joint**2)
    assert error < 0.005
    assert generalised_gaussian_constant(*dims, shape) == pytest.approx(h_a + h_b - h_joint, abs=5 * error)


def information_by_integration(rho, shape):
    """I(X; Y) in nats of a bivariate exp(-(x^T M^-1 x)^s / 2) with correlation rho, on a grid."""
    # Equal steps of t in x = sinh t: fine at the cusp of small shapes, far in their tails.
    t = torch.linspace(-6, 6, 601, dtype=torch.float64)
    x, jacobian = t.sinh(), t.cosh() * (t[1] - t[0])
    square = (x[:, None] ** 2 - 2 * rho * x[:, None] * x + x**2) / (1 - rho**2)
    density = (-square.pow(shape) / 2).exp()
    weight = jacobian[:, None] * jacobian
    density = density / (density * weight).sum()
    marginals = (density * jacobian).sum(1)[:, None] * (density * jacobian[:, None]).sum(0)
    return float((torch.special.xlogy(density, density / marginals.clamp(min=1e-300)) * weight).sum())


@pytest.mark.parametrize("shape", [0.5, 1.0, 3.0])
def test_theorem_2_constant_does_not_depend_on_covariance(shape):
    """Exact by integration: what a joint law of the family adds to the Gaussian expression is one number per shape."""
    added = [information_by_integration(rho, shape) + 0.5 * math.log(1 - rho**2) for rho in (0.0, 0.5, 0.8)]
    assert added == pytest.approx([added[0]] * 3, abs=1e-6)
    # The number is ours at the Gaussian alone. A joint law's own marginals leave the family, and uncorrelated views
    # share information (> 0); the reading that all three stay in it adds a negative number, so it is no law's MI.
    if shape == 1:
        assert added[0] == pytest.approx(generalised_gaussian_constant(1, 1, shape), abs=1e-6)
    else:
        assert added[0] > 0.01 > 0 > generalised_gaussian_constant(1, 1, shape)
