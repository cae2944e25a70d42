"""Theorem 2 of the paper in our reading: what a generalised Gaussian adds to the Gaussian expression."""

from __future__ import annotations

import math


def generalised_gaussian_constant(dim_a: int, dim_b: int, shape: float) -> float:
    """What Theorem 2 adds to the Gaussian expression under a generalised Gaussian of shape s, in nats.

    Our reading: both views and their joint vector follow the multivariate generalised Gaussian
    ``p(x) ~ exp(-(x^T M^-1 x)^s / 2)``, whose entropy is half the log det of its covariance plus a term of shape
    and dimension only. Marginals of such a joint law are not themselves of this family unless s = 1: the constant
    takes the theorem's premise as given, and is negative for s != 1. What a joint law adds with its own marginals is
    a positive number, as independent of the covariance (``tests/test_theorems.py`` has both).
    """
    separate = generalised_gaussian_entropy(dim_a, shape) + generalised_gaussian_entropy(dim_b, shape)
    return separate - generalised_gaussian_entropy(dim_a + dim_b, shape)


def generalised_gaussian_entropy(dim: int, shape: float) -> float:
    """Differential entropy, in nats, of the ``dim``-variate generalised Gaussian with identity covariance.

    The radius is ``R = G^{1/(2s)}`` with G/2 ~ Gamma(d/(2s)), which gives the normaliser, E[G]/2 and E[R^2] below
    (Gomez, Gomez-Villegas and Marin 1998). No features have entropy 0. ValueError: ``shape`` is not positive.
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
