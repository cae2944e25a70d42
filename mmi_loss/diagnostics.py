"""What a representation holds, measured rather than trained: off the hot path, in float64, without gradient. Features
count by their numerical rank: one that is constant, or a linear map of others, counts nothing. Samples are finite
floating point tensors (N, D), those of several views in the same order; others are a TypeError or ValueError. In their
place all measures take their second moments, as :class:`mmi_loss.measures.Measures` accumulates them.

Which of them predict accuracy was measured by ``python -m benchmarks selection``; ``Measures`` takes them
batch by batch and over ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmi_loss.ops.covariance import noise_floor
from mmi_loss.options import Options


@dataclass(frozen=True)
class Moments:
    """The second moments of samples (N, D), of which all measures are functions, in the form of rows."""

    common: Tensor
    """(1, D): their mean, times the root of N."""
    centred: Tensor
    """(M, D): they about their mean, or other rows of the same second moments."""
    count: int
    """N."""
    constant: Tensor
    """(D,): how far rounding takes the samples of a constant feature from one another."""

    @classmethod
    def of(cls, z: Tensor, scaled_over: tuple[int, ...] = ()) -> Moments:
        """Of samples in units of their largest value over these axes; exactly 0 about the mean of a constant."""
        x = z.detach().double()
        if scaled_over:
            x = x / x.abs().amax(scaled_over, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        centred = x - x[:1]  # a mean of equal numbers may be off by a rounding error
        mean = centred.mean(0, keepdim=True)
        return cls((x[:1] + mean) * math.sqrt(len(x)), centred - mean, len(x), stored(z) * x.abs().amax(0))

    def along(self, directions: Tensor) -> Moments:
        """Of the samples in these directions (D, K)."""
        constant = (self.constant.square() @ directions.square()).sqrt()
        return Moments(self.common @ directions, self.centred @ directions, self.count, constant)

    def spectrum(self) -> Tensor:
        """Eigenvalues of the covariance, up to a factor, descending, as many as the numerical rank."""
        return _spectrum(self.centred, self.rounding())

    def basis(self) -> Tensor:
        """An orthonormal basis (M, rank) of the centred features."""
        left, singular, _ = torch.linalg.svd(self.centred, full_matrices=False)
        return left[:, _above(singular, self.centred, self.rounding())]

    def rounding(self) -> float:
        """The largest singular value that rounding makes: of independent errors (Bai and Yin 1993)."""
        return float(self.constant.max()) * (math.sqrt(self.count) + math.sqrt(len(self.constant)))


def canonical_correlations(z_a: Tensor | Moments, z_b: Tensor | Moments) -> Tensor:
    """Sample canonical correlations of two views (N, D_a) and (N, D_b), descending, in [0, 1], float64.

    They are the cosines of the principal angles between the spans of the centred features (Bjorck and Golub 1973), as
    many as the smaller rank; none where a view is constant. Those which rounding cannot tell from 1 are 1. With N - 1
    below the sum of the ranks, some are 1 for any data.

    Example:
        >>> z = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
        >>> canonical_correlations(z, z @ torch.tensor([[2.0], [1]])).item()
        1.0
    """
    return _cosines(*(moments.basis() for moments in _moments((0,), z_a=z_a, z_b=z_b)))


def effective_rank(z: Tensor | Moments) -> Tensor:
    """Exp of the entropy of the normalised covariance spectrum (Roy and Vetterli 2007): between 0 and min(N - 1, D).

    1 is a line, D an isotropic cloud of (N, D) embeddings; 0 is a constant.

    Example:
        >>> [effective_rank(z).item() for z in (torch.full((9, 4), 0.3), torch.arange(9.0).unsqueeze(1))]
        [0.0, 1.0]
    """
    return _entropy_rank(_moments((0, 1), z=z)[0].spectrum())


def rank_me(z: Tensor | Moments, epsilon: float = 1e-7) -> Tensor:
    """RankMe: exp of the entropy of the singular values of (N, D) embeddings, which are not centred.

    With p_k = s_k / sum(s) + epsilon it is exp(-sum p_k log p_k), between 1 and about min(N, D); embeddings far from
    the origin have one large s. Source: Garrido et al. 2022, https://arxiv.org/abs/2210.02885, whose ``epsilon`` is the
    default; stable-pretraining's callback takes 1e-5.

    Example:
        >>> [f"{rank_me(z).item():.3f}" for z in (torch.eye(4), torch.ones(9, 4))]
        ['4.000', '1.000']
    """
    moments = _moments((0, 1), z=z)[0]
    rows = torch.cat([moments.common, moments.centred])
    singular = torch.linalg.svdvals(rows / rows.abs().max().clamp(min=torch.finfo(rows.dtype).tiny))[: moments.count]
    return torch.special.entr(singular / singular.sum().clamp(min=1e-300) + epsilon).sum().exp()


def participation_ratio(z: Tensor | Moments) -> Tensor:
    """(sum l)^2 / sum l^2 of the covariance's eigenvalues l of (N, D) embeddings: between 0, of a constant, and
    min(N - 1, D). It counts what varies most, where :func:`effective_rank` also hears what varies little.

    Source: Gao et al. 2017, A theory of multineuronal dimensionality, https://doi.org/10.1101/214262

    Example:
        >>> f"{participation_ratio(torch.eye(5)).item():.3f}"
        '4.000'
    """
    spectrum = _moments((0, 1), z=z)[0].spectrum()
    shares = spectrum / spectrum.sum()
    return shares.sum() / shares.square().sum() if len(spectrum) else spectrum.sum()


def alpha_req(z: Tensor | Moments, first: int = 11, last: int = 100) -> Tensor:
    r"""alpha-ReQ: the exponent :math:`\alpha` by which the covariance's eigenvalues fall, :math:`l_k \sim k^{-\alpha}`.

    A line through log l_k over log k for the ranks k = ``first`` ... ``last``, weighted by 1/k, as the authors' code
    fits it. NaN with fewer than two such eigenvalues. Near 1 is the paper's claim of a good representation, larger is
    collapsed, smaller noisy. Source: Agrawal et al. 2022, https://arxiv.org/abs/2202.05808

    Example:
        >>> f"{alpha_req(torch.diag(torch.arange(1.0, 500).pow(-0.5))).item():.1f}"
        '1.0'
    """
    spectrum = _moments((0, 1), z=z)[0].spectrum()
    ranks = torch.arange(first, min(last, len(spectrum)) + 1).to(spectrum)
    x, y, weights = ranks.log(), spectrum[first - 1 : last].log(), 1 / ranks
    x = x - (weights * x).sum() / weights.sum()
    return -(weights * x * y).sum() / (weights * x.square()).sum()  # 0 / 0 where there is no line


def lidar(z_a: Tensor | Moments, z_b: Tensor | Moments, *more: Tensor | Moments, delta: float = 1e-4) -> Tensor:
    r"""LiDAR: exp of the entropy of the linear discriminants' spectrum, images as classes and their views as samples.

    The eigenvalues are those of :math:`W^{-1/2} B W^{-1/2}` with B the covariance of the images' means and W that of
    the V >= 2 views (N, D) about them, both unbiased, plus ``delta``. Between 0, at collapse, and min(N - 1, D).
    Source: Thilak et al. 2023, https://arxiv.org/abs/2312.04000; they use 50 views of 1,000 images.

    Example:
        >>> z = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        >>> f"{lidar(z, z + 0.1 * z.roll(1, 0)).item():.1f}"
        '8.0'
    """
    between, within, n, rounding, _ = _between_and_within(z_a, z_b, *more)
    if len(between) + len(within) < between.shape[1]:  # what the rows do not span holds nothing
        span = torch.linalg.qr(torch.cat([between, within]).mT).Q
        between, within = between @ span, within @ span
    factor = torch.linalg.cholesky(within.mT @ within / n + delta * torch.eye(within.shape[1]).to(within))
    whitened = torch.linalg.solve_triangular(factor, between.mT, upper=False)
    return _entropy_rank(_spectrum(whitened, rounding / math.sqrt(delta)))


def content_information(
    z_a: Tensor | Moments, z_b: Tensor | Moments, *more: Tensor | Moments, snr: float | None = None
) -> Tensor:
    r"""I(Z; content) in nats of V >= 2 views (N, D): what one tells about what all share, :class:`mmi_loss.MMILoss`
    without its minus and without a slice.

    :math:`\tfrac12 \log\det(C + r) - \tfrac12 \log\det(W + r)` of standardised features, with the loss's noise floor
    r (:func:`mmi_loss.ops.covariance.noise_floor`). It is not corrected for chance, which the floor limits: unrelated
    views of 64 features show 0.5 nats in 256 samples. Source: Chang et al. 2024, https://arxiv.org/abs/2409.04747,
    Theorem 1; the floor and the content are our reading.

    Example:
        >>> from mmi_loss import MMILoss
        >>> z = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
        >>> bool((content_information(z, z.roll(1, 0)) + MMILoss()(z, z.roll(1, 0))).abs() < 1e-5)
        True
    """
    between, within, n, _, constant = _between_and_within(z_a, z_b, *more)
    inner, views = within.mT @ within / n, 2 + len(more)
    total = between.mT @ between / n + inner * (views - 1) / views
    deviation = total.diagonal().sqrt()
    weight = torch.where(deviation > constant, 1 / deviation, 0.0)  # a constant adds nothing to either determinant
    factor, least = noise_floor(Options(snr=snr), len(total), n, total.dtype)
    noise = (factor * (inner.diagonal() * weight.square()).mean()).clamp(min=least)
    signal = torch.outer(weight, weight) / noise
    log_dets = [torch.linalg.slogdet(torch.eye(len(m)).to(m) + m * signal).logabsdet for m in (total, inner)]
    return (log_dets[0] - log_dets[1]) / 2


def mutual_information(z_a: Tensor | Moments, z_b: Tensor | Moments, bias_correction: bool = True) -> Tensor:
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
    a, b = _moments((0,), z_a=z_a, z_b=z_b)
    bases = a.basis(), b.basis()
    spurious = spurious_information(a.count, *(basis.shape[1] for basis in bases))
    information = 0.5 * (-torch.log1p(-_cosines(*bases).square())).sum()
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


def check(**samples: Tensor) -> None:
    """A TypeError or ValueError unless all are samples, as many each."""
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


def check_views(*views: Tensor) -> None:
    """The same of views, which have to be as wide."""
    check(**{f"z_{name}": view for name, view in zip("abcdefghijklmnopqrstuvwxyz", views, strict=False)})
    if len({view.shape[1] for view in views}) > 1:
        raise ValueError(f"the views must be as wide, one network's, got {[tuple(view.shape) for view in views]}")


def stored(z: Tensor) -> float:
    """The rounding of samples: halves count as exact."""
    return torch.finfo(torch.float64 if z.dtype == torch.float64 else torch.float32).eps


def _moments(scaled_over: tuple[int, ...], **samples: Tensor | Moments) -> list[Moments]:
    check(**{name: z for name, z in samples.items() if not isinstance(z, Moments)})
    return [z if isinstance(z, Moments) else Moments.of(z, scaled_over) for z in samples.values()]


def _between_and_within(*views: Tensor | Moments) -> tuple[Tensor, Tensor, int, float, Tensor]:
    """Rows of the images' means, centred, and rows whose second moment, per image, is the variance about those; the
    number of images; the singular value and the standard deviations (D,) that rounding makes.
    """
    check_views(*(z for z in views if not isinstance(z, Moments)))
    moments = [z if isinstance(z, Moments) else Moments.of(z) for z in views]
    x = torch.stack([torch.cat([m.common, m.centred]) for m in moments])
    means = x[0] + (x - x[0]).mean(0)  # a mean of equal numbers may be off by a rounding error
    within = ((x - means) / math.sqrt(len(views) - 1)).flatten(0, 1)
    constant = torch.stack([m.constant for m in moments]).amax(0)
    return means[1:], within, moments[0].count, max(m.rounding() for m in moments), constant


def _above(singular: Tensor, rows: Tensor, rounding: float) -> Tensor:
    """Which singular values rounding has not made: that of the entries, and that of the decomposition."""
    return singular > rounding + singular[:1] * max(rows.shape) * torch.finfo(singular.dtype).eps


def _spectrum(rows: Tensor, rounding: float) -> Tensor:
    singular = torch.linalg.svdvals(rows)
    return singular[_above(singular, rows, rounding)].square()


def _entropy_rank(spectrum: Tensor) -> Tensor:
    """Exp of the entropy of the shares in the sum; 0 of nothing."""
    return torch.special.entr(spectrum / spectrum.sum()).sum().exp() * bool(len(spectrum))


def _cosines(basis_a: Tensor, basis_b: Tensor) -> Tensor:
    cosines = torch.linalg.svdvals(basis_a.mT @ basis_b)
    return torch.where(cosines > 1 - 4 * len(basis_a) * torch.finfo(cosines.dtype).eps, 1.0, cosines)
