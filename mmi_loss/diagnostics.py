"""What a representation holds, measured rather than trained: off the hot path, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def canonical_correlations(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Sample canonical correlations of two views, descending, in [0, 1].

    Args:
        z_a: (N, D_a), any floating dtype.
        z_b: (N, D_b).

    Returns:
        min(rank of z_a, rank of z_b) correlations, float64. With N - 1 <= D_a + D_b some of them are 1 for any data.
    """
    basis_a, basis_b = _orthonormal_basis(z_a), _orthonormal_basis(z_b)
    return torch.linalg.svdvals(basis_a.mT @ basis_b).clamp(max=1)


def effective_rank(z: Tensor) -> Tensor:
    """Exp of the entropy of the normalised covariance spectrum (Roy and Vetterli 2007): between 0 and D.

    1 is a line, D an isotropic cloud of (N, D) embeddings; 0 is a constant.
    """
    spectrum = torch.linalg.svdvals(_centre(z)).square()
    share = spectrum / spectrum.sum().clamp(min=torch.finfo(spectrum.dtype).tiny)
    rank = torch.exp(-torch.special.xlogy(share, share).sum())
    return torch.where(spectrum.sum() > 0, rank, torch.zeros_like(rank))


def mutual_information(z_a: Tensor, z_b: Tensor, bias_correction: bool = True, shape: float = 1.0) -> Tensor:
    r"""I(Z; Z') of two samples in nats, from second-order statistics, without noise floor.

    .. math:: I = \tfrac12 [\log\det C_{aa} + \log\det C_{bb} - \log\det C_{joint}] = -\tfrac12 \sum_i \log(1-\rho_i^2)

    (Chang et al. 2024, Theorem 1; exact for jointly Gaussian views and for invertible maps of such.)

    Args:
        z_a: (N, D_a), any floating dtype.
        z_b: (N, D_b).
        bias_correction: Subtract the expectation of the estimate's error, exactly known for Gaussian samples: the
            log det of a sample covariance is that of a Wishart matrix. The corrected estimate may be negative.
        shape: Shape s of the generalised Gaussian (Theorem 2); 1 is the Gaussian. It adds
            :func:`generalised_gaussian_constant`.

    Returns:
        A float64 scalar.

    Raises:
        ValueError: N - 1 < D_a + D_b: the sample joint covariance is singular and every batch looks dependent.

    Example:
        >>> z = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
        >>> noisy = 0.6 * z + 0.8 * z.roll(1, 0)
        >>> f"{mutual_information(z, noisy):.2f} of {-1.5 * math.log(1 - 0.6**2):.2f}"
        '0.68 of 0.67'
    """
    for name, z in (("z_a", z_a), ("z_b", z_b)):
        if z.ndim != 2 or not z.is_floating_point():
            raise ValueError(f"{name} must be floating point of shape (N, D), got {z.dtype} {tuple(z.shape)}")
    if len(z_a) != len(z_b):
        raise ValueError(f"z_a and z_b must have as many rows, got {tuple(z_a.shape)} and {tuple(z_b.shape)}")
    n, dim_a, dim_b = len(z_a), z_a.shape[1], z_b.shape[1]
    if n - 1 < dim_a + dim_b:
        raise ValueError(
            f"{n} samples of {dim_a} + {dim_b} features: the joint covariance is singular and the estimate infinite "
            "for any data; use more samples or fewer features (a random slice, for example)"
        )
    information = -0.5 * torch.log1p(-canonical_correlations(z_a, z_b).square()).sum()
    if bias_correction:
        information = information - spurious_information(n, dim_a, dim_b)
    if shape != 1.0:
        information = information + generalised_gaussian_constant(dim_a, dim_b, shape)
    return information


def spurious_information(n: int, dim_a: int, dim_b: int) -> float:
    """Expected excess, in nats, of the plug-in Gaussian mutual information of n samples over the true value.

    With n - 1 degrees of freedom, E log det S = log det Sigma + sum_{i<d} digamma((n - 1 - i) / 2) + d log(2 / n)
    for the population-normalised covariance S of d features; the last terms cancel between blocks and joint.
    It does not depend on the true covariance.
    """

    def expected_log_det(dim: int) -> float:
        half_degrees = (n - 1 - torch.arange(dim, dtype=torch.float64)) / 2
        return float(torch.digamma(half_degrees).sum())

    return 0.5 * (expected_log_det(dim_a) + expected_log_det(dim_b) - expected_log_det(dim_a + dim_b))


def generalised_gaussian_constant(dim_a: int, dim_b: int, shape: float) -> float:
    """What Theorem 2 adds to the Gaussian expression under a generalised Gaussian of shape s, in nats.

    Our reading: both views and their joint vector follow the multivariate generalised Gaussian
    ``p(x) ~ exp(-(x^T M^-1 x)^s / 2)``, whose entropy is half the log det of its covariance plus a term of shape
    and dimension only. Marginals of such a joint law are not themselves of this family unless s = 1: the constant
    takes the theorem's premise as given, and is negative for s != 1. What a joint law adds with its own marginals is
    a positive number, as independent of the covariance (``tests/test_theorems.py`` has both).
    """
    return (
        generalised_gaussian_entropy(dim_a, shape)
        + generalised_gaussian_entropy(dim_b, shape)
        - generalised_gaussian_entropy(dim_a + dim_b, shape)
    )


def generalised_gaussian_entropy(dim: int, shape: float) -> float:
    """Differential entropy, in nats, of the ``dim``-variate generalised Gaussian with identity covariance.

    The radius is ``R = G^{1/(2s)}`` with G/2 ~ Gamma(d/(2s)), which gives the normaliser, E[G]/2 and E[R^2] below
    (Gomez, Gomez-Villegas and Marin 1998).
    """
    if not shape > 0:
        raise ValueError(f"shape must be positive, got {shape}")
    power = dim / (2 * shape)
    log_normaliser = (
        math.log(shape) + math.lgamma(dim / 2) - dim / 2 * math.log(math.pi) - math.lgamma(power) - power * math.log(2)
    )
    # Covariance = M * E[R^2] / d; the entropy is invariant up to the log det of the rescaling to unit covariance.
    log_second_moment = math.log(2) / shape + math.lgamma((dim + 2) / (2 * shape)) - math.lgamma(power)
    return -log_normaliser + power - dim / 2 * (log_second_moment - math.log(dim))


def _centre(z: Tensor) -> Tensor:
    z = z.detach().double()
    return z - z.mean(0)


def _orthonormal_basis(z: Tensor) -> Tensor:
    """An orthonormal basis (N, rank) of the centred columns."""
    centred = _centre(z)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    tolerance = singular[:1] * max(centred.shape) * torch.finfo(centred.dtype).eps
    return left[:, singular > tolerance]
