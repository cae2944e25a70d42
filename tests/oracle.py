"""Mutual information by numpy in float64, from the definitions: ``slogdet``, an SVD, slices drawn by Python's integers.

It shares nothing with the package.
"""

from itertools import combinations

import numpy as np


def _numpy(z):
    return z if isinstance(z, np.ndarray) else z.detach().double().cpu().numpy()


def information(views, objective="content", ridge=None, snr=None, **series):
    """I in nats of V views (N, D) on all features; of pairs the mean over all. Joint views may differ in width."""
    views = [_numpy(view) for view in views]
    if objective != "content" and len(views) > 2:
        return np.mean([information(pair, objective, ridge, snr, **series) for pair in combinations(views, 2)])
    noises = [ridge or view.shape[1] / min(snr or 64, len(view)) for view in views]
    if objective == "joint":
        pairs = zip(views, noises, strict=True)
        x = np.concatenate([(z - z.mean(0)) / (z.std(0) * noise**0.5) for z, noise in pairs], 1)
        joint, dim = x.T @ x / len(x), views[0].shape[1]
        return half_sum([1, 1, -1], [joint[:dim, :dim], joint[dim:, dim:], joint], **series)
    total, between, within = moments(views)
    noise = noises[0]
    if ridge is snr is None:
        noise = max(noise * within.trace() / len(within), len(within) / len(views[0]) / 4)
    total, between, within = (moment / noise for moment in (total, between, within))
    if objective == "content":
        return half_sum([1, -1], [total, within], **series)
    # The joint covariance of exchangeable views is block diagonal in their sum and their difference.
    return half_sum([2, -1, -1], [total, between, within], **series)


def moments(views):
    """Analysis of variance of V views (N, D), standardised over all: the total covariance; V times that of the images'
    means; and the unbiased one about them.
    """
    z = np.stack([_numpy(view) for view in views])
    x = (z - z.mean((0, 1))) / z.std((0, 1))
    means, samples = x.mean(0), x.shape[1]
    total = np.einsum("vni,vnj->ij", x, x) / (len(x) * samples)
    within = np.einsum("vni,vnj->ij", x - means, x - means) / ((len(x) - 1) * samples)
    return total, len(x) * means.T @ means / samples, within


def half_sum(weights, matrices, order=None, beta=1.0):
    """Half the weighted sum of log det(I + M); with an order by the paper's series, about one scale of all matrices."""
    spectra = [np.linalg.eigvalsh(np.eye(len(matrix)) + matrix) for matrix in matrices]
    if order is None:
        log_dets = [np.linalg.slogdet(np.eye(len(matrix)) + matrix)[1] for matrix in matrices]
    else:
        scale = max((values**4).sum() ** 0.25 for values in spectra) / beta
        series = [-sum(((1 - values / scale) ** m / m).sum() for m in range(1, order + 1)) for values in spectra]
        log_dets = [len(values) * np.log(scale) + sum_ for values, sum_ in zip(spectra, series, strict=True)]
    return 0.5 * np.dot(weights, log_dets)


def canonical_correlations(z_a, z_b):
    """Singular values of the whitened cross-covariance."""
    whitened = []
    for z in (_numpy(z_a), _numpy(z_b)):
        centred = z - z.mean(0)
        values, vectors = np.linalg.eigh(centred.T @ centred)
        whitened.append(centred @ (vectors / np.sqrt(values)))
    return np.linalg.svd(whitened[0].T @ whitened[1], compute_uv=False)


def intraclass_correlations(z_a, z_b):
    """Eigenvalues of C^-1 S of the pooled views."""
    z_a, z_b = _numpy(z_a), _numpy(z_b)
    mean = (z_a.mean(0) + z_b.mean(0)) / 2
    x_a, x_b = z_a - mean, z_b - mean
    total = x_a.T @ x_a + x_b.T @ x_b
    cross = x_a.T @ x_b + x_b.T @ x_a
    return np.linalg.eigvals(np.linalg.solve(total, cross)).real


def slices(z, k, count, kind, seed, step):
    """The step's ``count`` slices (N, k) of (N, D): what any backend has to reproduce."""

    def draw(number, stream):
        low = _scramble(step + seed * 0x9E3779B9)
        high = (step >> 31) * 0x85EBCA6B + (seed >> 32) * 0xC2B2AE35 + stream * 0x27D4EB2F
        return _scramble(np.arange(number).astype(object) + _scramble(low + high))

    z, dim = _numpy(z), z.shape[1]
    if kind == "coordinates":
        return [z[:, np.sort(np.argsort(-_signed(draw(dim, s)))[:k])] for s in range(count)]
    block = 1 if kind == "gaussian" else max(1, k // 4)
    rows, blocks = count * -(-k // block), -(-dim // block)
    if block == 1:
        half = rows * ((blocks + 1) // 2)
        u, v = (((draw(half, s) >> 8).astype(float).reshape(rows, -1) + 0.5) / 2**24 for s in (0, 1))
        radius, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * v
        weights = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1)[:, :blocks]
    else:
        weights = _signed(draw(rows * blocks, 0)).astype(float).reshape(rows, blocks)
    padded = np.pad(z, ((0, 0), (0, blocks * block - dim))).reshape(len(z), blocks, block)
    mixed = np.einsum("rb,nbf->nrf", weights, padded)
    return [of_slice.reshape(len(z), -1)[:, :k] for of_slice in np.split(mixed, count, 1)]


def _scramble(x):
    """Ettinger's lowbias32 of whole numbers, modulo 2^32."""
    x = x % 2**32
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def _signed(x):
    return np.where(x >= 2**31, x - 2**32, x)
