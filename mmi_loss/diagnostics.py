"""What a representation holds, measured rather than trained: off the hot path, in float64, without gradient.

Features count by their numerical rank: one that is constant, or a linear map of others, counts nothing. Every function
of samples takes finite floating point tensors (N, D), and raises a TypeError or ValueError for others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def canonical_correlations(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Sample canonical correlations of two views (N, D_a) and (N, D_b), descending, in [0, 1].

    They are the cosines of the principal angles between the spans of the centred features (Bjorck and Golub 1973).

    Returns:
        min(rank of z_a, rank of z_b) correlations, float64; none where a view is constant. Those which rounding cannot
        tell from 1 are 1. With N - 1 below the sum of the ranks, some are 1 for any data.

    Example:
        >>> z = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
        >>> canonical_correlations(z, z @ torch.tensor([[2.0], [1]])).item()
        1.0
    """
    _check(z_a=z_a, z_b=z_b)
    return _cosines(_orthonormal_basis(z_a), _orthonormal_basis(z_b))


def effective_rank(z: Tensor) -> Tensor:
    """Exp of the entropy of the normalised covariance spectrum (Roy and Vetterli 2007): between 0 and min(N - 1, D).

    1 is a line, D an isotropic cloud of (N, D) embeddings; 0 is a constant.

    Example:
        >>> [effective_rank(z).item() for z in (torch.full((9, 4), 0.3), torch.arange(9.0).unsqueeze(1))]
        [0.0, 1.0]
    """
    _check(z=z)
    singular = torch.linalg.svdvals(_centred(z, scaled_over=(0, 1)))
    spectrum = singular[singular > _resolution(singular, z)].square()
    return torch.special.entr(spectrum / spectrum.sum()).sum().exp() * bool(len(spectrum))


def mutual_information(z_a: Tensor, z_b: Tensor, bias_correction: bool = True, shape: float = 1.0) -> Tensor:
    r"""I(Z; Z') of two samples in nats, from second-order statistics, without noise floor.

    .. math:: I = \tfrac12 [\log\det C_{aa} + \log\det C_{bb} - \log\det C_{joint}] = -\tfrac12 \sum_i \log(1-\rho_i^2)

    (Chang et al. 2024, Theorem 1; exact for jointly Gaussian views and for invertible maps of such.)

    Args:
        z_a: (N, D_a), any floating dtype.
        z_b: (N, D_b).
        bias_correction: Subtract the expectation of the estimate's error, exactly known for Gaussian samples of these
            ranks: :func:`spurious_information`. The corrected estimate may be negative.
        shape: Shape s of the generalised Gaussian (Theorem 2); 1 is the Gaussian. It adds
            :func:`generalised_gaussian_constant` of the ranks.

    Returns:
        A float64 scalar: 0 if a view is constant; infinity if a direction of one is, up to rounding, one of the other.

    Raises:
        ValueError: N - 1 is below the sum of the ranks: any so few samples look dependent.

    Example:
        >>> z = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
        >>> noisy = 0.6 * z + 0.8 * z.roll(1, 0)
        >>> f"{mutual_information(z, noisy):.2f} of {-1.5 * math.log(1 - 0.6**2):.2f}"
        '0.68 of 0.67'
    """
    _check(z_a=z_a, z_b=z_b)
    basis_a, basis_b = _orthonormal_basis(z_a), _orthonormal_basis(z_b)
    rank_a, rank_b = basis_a.shape[1], basis_b.shape[1]
    spurious = spurious_information(len(z_a), rank_a, rank_b)
    information = 0.5 * (-torch.log1p(-_cosines(basis_a, basis_b).square())).sum()
    if bias_correction:
        information = information - spurious
    if shape != 1.0:
        information = information + generalised_gaussian_constant(rank_a, rank_b, shape)
    return information


def spurious_information(n: int, dim_a: int, dim_b: int) -> float:
    """Expected excess, in nats, of the plug-in Gaussian mutual information of n samples over the true value.

    ``dim_a`` and ``dim_b`` count linearly independent features. The log det of a sample covariance is that of a Wishart
    matrix: with n - 1 degrees of freedom, E log det S = log det Sigma + sum_{i<d} digamma((n - 1 - i) / 2) + d log(2/n)
    for the population-normalised covariance S of d features; the last terms cancel between blocks and joint.
    It does not depend on the true covariance. A ValueError says that n samples are too few to estimate it.

    Example:
        >>> f"{spurious_information(256, 64, 64):.1f}, {spurious_information(4096, 64, 64):.1f}"
        '11.0, 0.5'
    """
    if n - 1 < max(1, dim_a + dim_b):
        raise ValueError(
            f"{n} samples of {dim_a} + {dim_b} independent features: the joint covariance is singular and the estimate "
            "infinite for any data; use more samples or fewer features (a random slice, for example)"
        )

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

    Example:
        >>> f"{generalised_gaussian_constant(1, 1, 0.5):.3f}"
        '-0.046'
    """
    separate = generalised_gaussian_entropy(dim_a, shape) + generalised_gaussian_entropy(dim_b, shape)
    return separate - generalised_gaussian_entropy(dim_a + dim_b, shape)


def generalised_gaussian_entropy(dim: int, shape: float) -> float:
    """Differential entropy, in nats, of the ``dim``-variate generalised Gaussian with identity covariance.

    The radius is ``R = G^{1/(2s)}`` with G/2 ~ Gamma(d/(2s)), which gives the normaliser, E[G]/2 and E[R^2] below
    (Gomez, Gomez-Villegas and Marin 1998). No features have entropy 0. ValueError: ``shape`` is not positive.

    Example:
        >>> f"Laplace {generalised_gaussian_entropy(1, 0.5):.3f}, normal {generalised_gaussian_entropy(1, 1.0):.3f}"
        'Laplace 1.347, normal 1.419'
    """
    if not 0 < shape < math.inf:
        raise ValueError(f"shape must be positive and finite, got {shape}; 1 is the Gaussian, 0.5 the Laplace law")
    if dim == 0:
        return 0.0
    power = dim / (2 * shape)
    log_normaliser = (
        math.log(shape) + math.lgamma(dim / 2) - dim / 2 * math.log(math.pi) - math.lgamma(power) - power * math.log(2)
    )
    # Covariance = M * E[R^2] / d; the entropy is invariant up to the log det of the rescaling to unit covariance.
    log_second_moment = math.log(2) / shape + math.lgamma((dim + 2) / (2 * shape)) - math.lgamma(power)
    return -log_normaliser + power - dim / 2 * (log_second_moment - math.log(dim))


def _check(**samples: Tensor) -> None:
    for name, z in samples.items():
        if not isinstance(z, Tensor) or not z.is_floating_point():
            kind = z.dtype if isinstance(z, Tensor) else type(z).__name__
            raise TypeError(f"{name} must be a floating point tensor, got {kind}; use torch.as_tensor or .float()")
        if z.ndim != 2 or z.numel() == 0:
            hint = "unsqueeze(1) makes one feature of (N,), flatten(1) features of further axes"
            raise ValueError(f"{name} must have shape (N, D), not empty, got {tuple(z.shape)}; {hint}")
        if not z.isfinite().all():
            raise ValueError(f"{name} has NaN or infinite values: leave those samples out, of every view")
    shapes = [tuple(z.shape) for z in samples.values()]
    if len({rows for rows, _ in shapes}) > 1:
        raise ValueError(f"{' and '.join(samples)} must have as many rows, one per sample, got {shapes}")


def _centred(z: Tensor, scaled_over: tuple[int, ...]) -> Tensor:
    """``z`` in units of its largest value over these axes, about its mean: exactly 0 where a feature is constant."""
    z = z.detach().double()
    z = z / z.abs().amax(scaled_over, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    z = z - z[:1]  # a mean of equal numbers may be off by a rounding error
    return z - z.mean(0)


def _resolution(singular: Tensor, z: Tensor) -> Tensor:
    """The singular values that rounding makes: of (N, D) entries, below eps each, and of the decomposition."""
    stored = torch.finfo(torch.float64 if z.dtype == torch.float64 else torch.float32).eps  # halves count as exact
    of_entries = stored * (math.sqrt(len(z)) + math.sqrt(z.shape[1]))  # of independent errors (Bai and Yin 1993)
    return of_entries + singular[0] * max(z.shape) * torch.finfo(singular.dtype).eps


def _orthonormal_basis(z: Tensor) -> Tensor:
    """An orthonormal basis (N, rank) of the centred features."""
    left, singular, _ = torch.linalg.svd(_centred(z, scaled_over=(0,)), full_matrices=False)
    return left[:, singular > _resolution(singular, z)]


def _cosines(basis_a: Tensor, basis_b: Tensor) -> Tensor:
    cosines = torch.linalg.svdvals(basis_a.mT @ basis_b)
    return torch.where(cosines > 1 - 4 * len(basis_a) * torch.finfo(cosines.dtype).eps, 1.0, cosines)
