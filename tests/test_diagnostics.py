"""Diagnostics against closed forms, numpy and simulation."""

import math

import numpy as np
import pytest
import torch

from mmi_loss import diagnostics
from tests import oracle
from tests.conftest import views


def test_canonical_correlations_are_the_oracles():
    pair = views(50, 4)
    np.testing.assert_allclose(
        diagnostics.canonical_correlations(*pair).numpy(), oracle.canonical_correlations(*pair), rtol=1e-9
    )


def test_canonical_correlations_of_unequal_and_deficient_views():
    z_a, z_b = views(50, 4)
    deficient = torch.cat([z_a, z_a[:, :1] * 2], 1)
    wide = diagnostics.canonical_correlations(deficient, z_b[:, :2])
    assert wide.shape == (2,)
    torch.testing.assert_close(wide, diagnostics.canonical_correlations(z_a, z_b[:, :2]))
    assert diagnostics.canonical_correlations(torch.ones(9, 3), z_b[:9]).shape == (0,)


def test_invariance_under_invertible_maps():
    z_a, z_b = views(60, 5)
    mixing = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        diagnostics.mutual_information(z_a @ mixing + 3, z_b), diagnostics.mutual_information(z_a, z_b)
    )


@pytest.mark.parametrize("n", [30, 64, 256])
def test_bias_correction_is_unbiased(n):
    """Independent and dependent Gaussian views: the mean over many batches is the truth, without it far off."""
    dim, rho, trials = 6, 0.6, 400
    truth = -dim / 2 * math.log(1 - rho**2)
    generator = torch.Generator().manual_seed(0)
    corrected, plain = [], []
    for _ in range(trials):
        x, e = torch.randn(2, n, dim, generator=generator, dtype=torch.float64)
        pair = x, rho * x + math.sqrt(1 - rho**2) * e
        corrected.append(diagnostics.mutual_information(*pair).item())
        plain.append(diagnostics.mutual_information(*pair, bias_correction=False).item())
    error = np.std(corrected) / math.sqrt(trials)
    assert abs(np.mean(corrected) - truth) < 4 * error
    assert abs(np.mean(plain) - truth) > 10 * error


def test_spurious_information_of_the_design():
    """Simulated figures, nats per dimension: N/D = 256/64: 0.17, 512/64: 0.07, 2048/64: 0.016."""
    for n, expected in ((256, 0.17), (512, 0.07), (2048, 0.016)):
        assert diagnostics.spurious_information(n, 64, 64) / 64 == pytest.approx(expected, rel=0.06)


def test_singular_estimates_are_refused():
    z = torch.randn(12, 6)
    with pytest.raises(ValueError, match=r"12 samples of 6 \+ 6 features.*singular"):
        diagnostics.mutual_information(z, z)
    with pytest.raises(ValueError, match=r"as many rows.*\(12, 6\) and \(6, 6\)"):
        diagnostics.mutual_information(z, z[:6])
    with pytest.raises(ValueError, match=r"z_b must be floating point of shape \(N, D\)"):
        diagnostics.mutual_information(z, z[0])


def test_effective_rank():
    z = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    assert diagnostics.effective_rank(z).item() == pytest.approx(8, rel=0.01)
    assert diagnostics.effective_rank(z[:, :1] @ torch.ones(1, 5)).item() == pytest.approx(1, abs=1e-6)
    assert diagnostics.effective_rank(torch.ones(9, 4)).item() == 0


def test_gaussian_entropy_is_shape_one():
    for dim in (1, 2, 7):
        expected = dim / 2 * math.log(2 * math.pi * math.e)
        assert diagnostics.generalised_gaussian_entropy(dim, 1.0) == pytest.approx(expected, rel=1e-12)
    assert diagnostics.generalised_gaussian_constant(3, 4, 1.0) == pytest.approx(0, abs=1e-12)


def test_laplace_entropy_is_shape_one_half():
    """In one dimension s = 1/2 is the Laplace distribution: entropy 1 + log(2 b) with variance 2 b^2 = 1."""
    assert diagnostics.generalised_gaussian_entropy(1, 0.5) == pytest.approx(1 + math.log(2 / math.sqrt(2)))


@pytest.mark.parametrize("shape", [0.5, 0.8, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_entropy_constant_against_simulation(shape, dim):
    """Sample by radius and direction; the entropy is -E log p with p normalised by numerical integration."""
    rng = np.random.default_rng(0)
    count = 200_000
    gamma = rng.gamma(dim / (2 * shape), 2.0, count)  # (x^T x)^s
    radius = gamma ** (1 / (2 * shape))
    grid = np.linspace(1e-6, radius.max() * 1.5, 400_001)
    surface = 2 * math.pi ** (dim / 2) / math.gamma(dim / 2)
    normaliser = surface * np.trapezoid(grid ** (dim - 1) * np.exp(-(grid ** (2 * shape)) / 2), grid)
    entropy = np.mean(gamma / 2) + math.log(normaliser)
    standardised = entropy - dim / 2 * math.log(np.mean(radius**2) / dim)
    assert diagnostics.generalised_gaussian_entropy(dim, shape) == pytest.approx(standardised, abs=0.02)


def test_shape_adds_the_constant():
    pair = views(60, 3)
    difference = diagnostics.mutual_information(*pair, shape=0.7) - diagnostics.mutual_information(*pair)
    assert difference.item() == pytest.approx(diagnostics.generalised_gaussian_constant(3, 3, 0.7))
    with pytest.raises(ValueError, match="shape must be positive"):
        diagnostics.mutual_information(*pair, shape=0.0)
