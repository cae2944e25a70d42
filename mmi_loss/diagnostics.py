"""What a representation holds, measured rather than trained: off the hot path, in float64, without gradient. Features
count by their numerical rank: one that is constant, or a linear map of others, counts nothing. Samples are finite
floating point tensors (N, D); others are a TypeError or ValueError.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def canonical_correlations(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Sample canonical correlations of two views (N, D_a) and (N, D_b), descending, in [0, 1], float64.

    They are the cosines of the principal angles between the spans of the centred features (Bjorck and Golub 1973), as
    many as the smaller rank; none where a view is constant. Those which rounding cannot tell from 1 are 1. With N - 1
    below the sum of the ranks, some are 1 for any data.

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


def mutual_information(z_a: Tensor, z_b: Tensor, bias_correction: bool = True) -> Tensor:
    r"""I(Z; Z') in nats of two samples (N, D_a) and (N, D_b), from second-order statistics, without noise floor:

    .. math:: I = \tfrac12 [\log\det C_{aa} + \log\det C_{bb} - \log\det C_{joint}] = -\tfrac12 \sum_i \log(1-\rho_i^2)

    (Chang et al. 2024, Theorem 1; exact for jointly Gaussian views and for invertible maps of such.) A float64 scalar:
    0 if a view is constant; infinity if a direction of one is, up to rounding, one of the other.

    ``bias_correction`` subtracts the expectation of the estimate's error, exactly known for Gaussian samples of these
    ranks (:func:`spurious_information`); the corrected estimate may be negative. A ValueError says that N - 1 is below
    the sum of the ranks: any so few samples look dependent.

    Example:
        >>> z = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
        >>> noisy = 0.6 * z + 0.8 * z.roll(1, 0)
        >>> f"{mutual_information(z, noisy):.2f} of {-1.5 * math.log(1 - 0.6**2):.2f}"
        '0.68 of 0.67'
    """
    _check(z_a=z_a, z_b=z_b)
    basis_a, basis_b = _orthonormal_basis(z_a), _orthonormal_basis(z_b)
    spurious = spurious_information(len(z_a), basis_a.shape[1], basis_b.shape[1])
    information = 0.5 * (-torch.log1p(-_cosines(basis_a, basis_b).square())).sum()
    return information - spurious if bias_correction else information


def spurious_information(n: int, dim_a: int, dim_b: int) -> float:
    """Expected excess, in nats, of the plug-in Gaussian mutual information of n samples over the true value.

    ``dim_a`` and ``dim_b`` count linearly independent features. The log det of a sample covariance is that of a Wishart
    matrix: E log det S = log det Sigma + sum_{i<d} digamma((n - 1 - i) / 2) + d log(2/n) for the population-normalised
    covariance S of d features; the last terms cancel. A ValueError says that n samples are too few to estimate it.

    Example:
        >>> f"{spurious_information(256, 64, 64):.1f}, {spurious_information(4096, 64, 64):.1f}"
        '11.0, 0.5'
    """
    if n - 1 < max(1, dim_a + dim_b):
        raise ValueError(
            f"{n} samples of {dim_a} + {dim_b} independent features: the joint covariance is singular and the estimate "
            "infinite for any data; use more samples or fewer features (a random slice, for example)"
        )
    digamma = torch.digamma((n - 1 - torch.arange(dim_a + dim_b, dtype=torch.float64)) / 2)
    return 0.5 * float(digamma[:dim_a].sum() + digamma[:dim_b].sum() - digamma.sum())


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
