"""Diagnostics against closed forms, numpy and simulation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from mmi_loss import diagnostics
from tests import generalised_gaussian, oracle
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
    with pytest.raises(ValueError, match=r"12 samples of 6 \+ 6 independent features.*singular.*use more samples"):
        diagnostics.mutual_information(z, z)
    with pytest.raises(ValueError, match="1 samples of 0"):
        diagnostics.mutual_information(z[:1], z[:1])
    with pytest.raises(ValueError, match=r"12 samples of 6 \+ 6"):
        diagnostics.spurious_information(12, 6, 6)
    assert math.isfinite(diagnostics.mutual_information(torch.randn(12, 6), torch.randn(12, 5)))


def test_effective_rank():
    z = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    assert diagnostics.effective_rank(z).item() == pytest.approx(8, rel=0.01)
    assert diagnostics.effective_rank(z[:, :1] @ torch.ones(1, 5)).item() == pytest.approx(1, abs=1e-6)
    assert diagnostics.effective_rank(torch.ones(9, 4)).item() == 0


def test_gaussian_entropy_is_shape_one():
    for dim in (1, 2, 7):
        expected = dim / 2 * math.log(2 * math.pi * math.e)
        assert generalised_gaussian.generalised_gaussian_entropy(dim, 1.0) == pytest.approx(expected, rel=1e-12)
    assert generalised_gaussian.generalised_gaussian_constant(3, 4, 1.0) == pytest.approx(0, abs=1e-12)


def test_laplace_entropy_is_shape_one_half():
    """In one dimension s = 1/2 is the Laplace distribution: entropy 1 + log(2 b) with variance 2 b^2 = 1."""
    assert generalised_gaussian.generalised_gaussian_entropy(1, 0.5) == pytest.approx(1 + math.log(2 / math.sqrt(2)))


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
    normaliser = surface * integrate.trapezoid(grid ** (dim - 1) * np.exp(-(grid ** (2 * shape)) / 2), grid)
    entropy = np.mean(gamma / 2) + math.log(normaliser)
    standardised = entropy - dim / 2 * math.log(np.mean(radius**2) / dim)
    assert generalised_gaussian.generalised_gaussian_entropy(dim, shape) == pytest.approx(standardised, abs=0.02)


# At collapse


def noisy_constant(dtype):
    """A constant but for the last bit, as the rows of one matrix product may differ."""
    constant = torch.full((64, 8), 0.3, dtype=dtype)
    up = torch.rand(64, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    return torch.where(up, constant.nextafter(torch.ones((), dtype=dtype)), constant)


CONSTANTS = {
    "a third": torch.full((64, 8), 0.3, dtype=torch.float64),
    "a third in float32": torch.full((64, 8), 0.3),
    "a third in bfloat16": torch.full((64, 8), 0.3, dtype=torch.bfloat16),
    "one row repeated": torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).expand(61, 8) * 1e7,
    "zeros": torch.zeros(64, 8),
    "the largest number": torch.full((64, 8), torch.finfo(torch.float64).max, dtype=torch.float64),
    "the smallest number": torch.full((64, 8), 5e-324, dtype=torch.float64),
    "a last bit of noise": noisy_constant(torch.float64),
    "a last bit of noise in float32": noisy_constant(torch.float32),
    "one sample": torch.randn(1, 8),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant_views_hold_nothing(name):
    z = CONSTANTS[name]
    other = torch.randn(len(z), 5, generator=torch.Generator().manual_seed(1))
    assert diagnostics.effective_rank(z).item() == 0
    for pair in ((z, z), (z, other), (other, z)):
        assert diagnostics.canonical_correlations(*pair).shape == (0,)
        if len(z) > 1:
            for options in ({}, {"bias_correction": False}):
                value = diagnostics.mutual_information(*pair, **options).item()
                assert str(value) == "0.0"  # not -0.0


def deficient(z, kind):
    """More features, none of them new."""
    mixing = torch.randn(z.shape[1], 8, dtype=z.dtype, generator=torch.Generator().manual_seed(5))
    return {
        "dead": lambda: torch.cat([z, torch.full((len(z), 30), 0.3, dtype=z.dtype)], 1),
        "duplicated": lambda: torch.cat([z] * 10, 1),
        "rescaled": lambda: torch.cat([z, 3 * z + 1, 1e-3 * z] * 3, 1),
        "combined": lambda: torch.cat([z, z @ mixing] * 4, 1),
    }[kind]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["dead", "duplicated", "rescaled", "combined"])
def test_features_count_by_rank(kind, dtype):
    """More features than samples, four of them independent: all measures are those of the four."""
    z_a, z_b = (z.detach() for z in views(30, 4, dtype))
    wide_a, wide_b = deficient(z_a, kind), deficient(z_b, kind)
    assert wide_a.shape[1] > 30
    torch.testing.assert_close(
        diagnostics.canonical_correlations(wide_a, wide_b),
        diagnostics.canonical_correlations(z_a, z_b),
        rtol=1e-5,
        atol=1e-6,
    )
    for options in ({}, {"bias_correction": False}):
        narrow = diagnostics.mutual_information(z_a, z_b, **options).item()
        assert diagnostics.mutual_information(wide_a, wide_b, **options).item() == pytest.approx(narrow, abs=1e-4)


@pytest.mark.parametrize("kind", ["dead", "duplicated", "combined"])
def test_bias_correction_is_unbiased_of_deficient_views(kind):
    """Independent views with features that count nothing: correcting for their number is off by more than 0.5."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(200):
        z_a = deficient(torch.randn(40, 4, generator=generator), kind)[:, :12]
        values.append(diagnostics.mutual_information(z_a, torch.randn(40, 8, generator=generator)).item())
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values)) < 0.15


@pytest.mark.parametrize("n", [9, 40, 512])
def test_dependent_views_have_infinite_information(n):
    """The mathematical value, and not what the rounding of 1 - rho^2 leaves of it."""
    dim = min(4, (n - 1) // 2)
    z = torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) + 2
    mixing = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for other in (z, z.float(), -3 * z, z @ mixing):
        if other.dtype == torch.float64:
            assert diagnostics.canonical_correlations(z, other).tolist() == [1.0] * dim
            assert diagnostics.mutual_information(z, other).item() == math.inf
        same = other.clone()
        assert diagnostics.mutual_information(other, same).item() == math.inf
    near = z + 1e-5 * torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    assert 9 * dim < diagnostics.mutual_information(z, near, bias_correction=False) < 14 * dim


def test_features_of_any_scale_and_place_count():
    """Neither small features nor ones far from the origin are taken for constant."""
    z_a, z_b = (z.detach() for z in views(60, 4))
    scale = torch.tensor([1e-300, 1e-9, 1, 1e300], dtype=torch.float64)
    expected = diagnostics.mutual_information(z_a, z_b)
    torch.testing.assert_close(diagnostics.mutual_information(z_a * scale, z_b), expected)
    for offset, tolerance in ((1e4, 0.01), (1e6, 0.5)):  # 1e6 leaves float32 some four bits
        far = diagnostics.mutual_information((z_a + offset).float(), (z_b - offset).float())
        torch.testing.assert_close(far, expected, rtol=0, atol=tolerance)
    for factor in (1e-320, 1e-200, 1e200, 1e300):
        spread = torch.randn(60, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        ratio = diagnostics.effective_rank(spread * factor) / diagnostics.effective_rank(spread)
        assert ratio.item() == pytest.approx(1, abs=0.01)


# Input that fits nothing

FUNCTIONS = {
    "effective_rank": {"z": diagnostics.effective_rank},
    "canonical_correlations": {
        "z_a": lambda z: diagnostics.canonical_correlations(z, torch.randn(12, 2)),
        "z_b": lambda z: diagnostics.canonical_correlations(torch.randn(12, 2), z),
    },
    "mutual_information": {
        "z_a": lambda z: diagnostics.mutual_information(z, torch.randn(12, 2)),
        "z_b": lambda z: diagnostics.mutual_information(torch.randn(12, 2), z),
    },
}
ARGUMENTS = [(function, argument) for function, arguments in FUNCTIONS.items() for argument in arguments]
BAD_INPUT = {
    "one axis": (torch.randn(12), ValueError, r"shape \(N, D\), not empty, got \(12,\); unsqueeze\(1\)"),
    "three axes": (torch.randn(12, 2, 2), ValueError, r"got \(12, 2, 2\); .*flatten\(1\)"),
    "no samples": (torch.randn(0, 2), ValueError, r"not empty, got \(0, 2\)"),
    "no features": (torch.randn(12, 0), ValueError, r"not empty, got \(12, 0\)"),
    "integers": (
        torch.ones(12, 2, dtype=torch.int64),
        TypeError,
        r"floating point tensor, got torch.int64; use .*float",
    ),
    "complex": (torch.ones(12, 2, dtype=torch.complex64), TypeError, "floating point tensor, got torch.complex64"),
    "an array": (np.ones((12, 2)), TypeError, "floating point tensor, got ndarray; use torch.as_tensor"),
    "NaN": (torch.randn(12, 2).index_fill(0, torch.tensor([3]), math.nan), ValueError, "NaN or infinite.*leave"),
    "infinity": (torch.full((12, 2), -math.inf), ValueError, "has NaN or infinite values: leave those samples out"),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
@pytest.mark.parametrize(("function", "argument"), ARGUMENTS)
def test_errors_name_argument_and_remedy(function, argument, kind):
    z, error, message = BAD_INPUT[kind]
    with pytest.raises(error, match=f"^{argument} .*{message}"):
        FUNCTIONS[function][argument](z)


@pytest.mark.parametrize("function", [diagnostics.canonical_correlations, diagnostics.mutual_information])
def test_rows_must_match(function):
    with pytest.raises(ValueError, match=r"z_a and z_b must have as many rows.*\(12, 6\), \(6, 5\)"):
        function(torch.randn(12, 6), torch.randn(6, 5))


# Properties

seeds = st.integers(0, 2**31)


def drawn(n, dim, seed):
    """Two views of some shared content, with mean and scale of their own."""
    generator = torch.Generator().manual_seed(seed)
    content, e_a, e_b, mixing = (
        torch.randn(*shape, dim, generator=generator, dtype=torch.float64) for shape in ((n,), (n,), (n,), (dim,))
    )
    return (content @ mixing + e_a) * 3 - 1, content + 0.5 * e_b + 2


def rotation(dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q


@given(
    n=st.integers(1, 40),
    dim=st.integers(1, 40),
    rank=st.integers(0, 40),
    seed=seeds,
    shift=st.floats(-1e3, 1e3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_effective_rank_is_bounded_and_invariant(n, dim, rank, seed, shift, dtype):
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, rank), (rank, dim))]
    z = (factors[0] @ factors[1]).to(dtype)
    value = diagnostics.effective_rank(z).item()
    assert 0 <= value <= min(n - 1, dim) * (1 + 1e-12)
    assert value == 0 or value >= 1 - 1e-12
    if rank == 0 or n == 1:
        assert value == 0
    z = z.double()
    exact = diagnostics.effective_rank(z).item()
    moved = z @ rotation(dim, seed) + shift * torch.randn(dim, generator=generator, dtype=torch.float64)
    assert diagnostics.effective_rank(moved).item() == pytest.approx(exact, rel=1e-6)
    padded = torch.cat([z, torch.full((n, 3), shift, dtype=torch.float64)], 1)
    assert diagnostics.effective_rank(padded[torch.randperm(n, generator=generator)]).item() == pytest.approx(exact)


@given(
    dims=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=seeds,
    constant=st.floats(-1e6, 1e6),
    shift=st.floats(-1e3, 1e3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_measures_ignore_features_that_add_nothing(dims, seed, constant, shift, dtype):
    z_a, z_b = (z[:, :dim].to(dtype) for z, dim in zip(drawn(20, max(dims), seed), dims, strict=True))
    correlations = diagnostics.canonical_correlations(z_a, z_b)
    information = diagnostics.mutual_information(z_a, z_b)
    assert len(correlations) == min(dims)
    constants = torch.full((20, 2), constant, dtype=dtype)
    for other in (
        torch.cat([z_a, constants], 1),
        torch.cat([constants[:, :1], z_a, z_a, constants], 1),
        torch.cat([z_a, -2 * z_a.flip(1)], 1),
    ):
        for pair in ((other, z_b), (other, torch.cat([z_b, z_b], 1))):
            torch.testing.assert_close(diagnostics.canonical_correlations(*pair), correlations, rtol=0, atol=1e-9)
            torch.testing.assert_close(diagnostics.mutual_information(*pair), information, rtol=1e-7, atol=1e-7)
    moved = z_a.double() @ rotation(dims[0], seed) + shift
    torch.testing.assert_close(diagnostics.canonical_correlations(moved, z_b), correlations, rtol=0, atol=1e-9)
    torch.testing.assert_close(diagnostics.mutual_information(moved, z_b), information, rtol=1e-7, atol=1e-7)


@given(n=st.integers(2, 40), dims=st.tuples(st.integers(1, 12), st.integers(1, 12)), seed=seeds)
def test_canonical_correlations_are_the_cosines_of_numpys_bases(n, dims, seed):
    """By QR of the centred features; wide views span all n - 1 dimensions, whose basis is the first n - 1 columns."""
    pair = [z[:, :dim] for z, dim in zip(drawn(n, max(dims), seed), dims, strict=True)]
    bases = [np.linalg.qr((z - z.mean(0)).numpy())[0][:, : n - 1] for z in pair]
    expected = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    found = diagnostics.canonical_correlations(*pair)
    assert len(found) == min(*dims, n - 1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)
    certain = max(0, min(dims[0], n - 1) + min(dims[1], n - 1) - (n - 1))
    assert (found[:certain] == 1).all()
