"""Mutual information by numpy in float64, from the definitions: ``slogdet`` and an SVD.

It shares nothing with the package.
"""

import numpy as np


def _numpy(z):
    return z.detach().double().cpu().numpy()


def _standardise(z, like):
    return (z - like.mean(0)) / like.std(0)


def _log_det(matrix):
    sign, value = np.linalg.slogdet(matrix)
    assert sign == 1
    return value


def mutual_information(z_a, z_b, objective="content", ridge=None, snr=64.0):
    """I in nats of two (N, D) tensors on all features."""
    z_a, z_b = _numpy(z_a), _numpy(z_b)
    n, dim = z_a.shape
    ridge = dim / min(snr, n) if ridge is None else ridge
    noise = ridge * np.eye(dim)
    if objective == "joint":
        x_a, x_b = _standardise(z_a, z_a), _standardise(z_b, z_b)
        c_aa, c_bb, c_ab = x_a.T @ x_a / n, x_b.T @ x_b / n, x_a.T @ x_b / n
        joint = np.block([[c_aa + noise, c_ab], [c_ab.T, c_bb + noise]])
        return 0.5 * (_log_det(c_aa + noise) + _log_det(c_bb + noise) - _log_det(joint))
    both = np.concatenate([z_a, z_b])
    x_a, x_b = _standardise(z_a, both), _standardise(z_b, both)
    total = (x_a.T @ x_a + x_b.T @ x_b) / (2 * n)
    if objective == "exchangeable":
        cross = (x_a.T @ x_b + x_b.T @ x_a) / (2 * n)
        joint = np.block([[total + noise, cross], [cross, total + noise]])
        return _log_det(total + noise) - 0.5 * _log_det(joint)
    within = (x_a - x_b).T @ (x_a - x_b) / (2 * n)
    return 0.5 * (_log_det(total + noise) - _log_det(within + noise))


def content_information(views, snr=64.0):
    """I(Z; content) in nats of V views (N, D): the analysis of variance with images as groups."""
    z = np.stack([_numpy(view) for view in views])
    num_views, n, dim = z.shape
    x = ((z - z.mean((0, 1))) / z.std((0, 1))).transpose(1, 0, 2)
    total = sum(sample.T @ sample for sample in x) / (num_views * n)
    # The unbiased variance of one view about its image's mean, averaged over images.
    within = sum(np.cov(sample, rowvar=False).reshape(dim, dim) for sample in x) / n
    noise = dim / min(snr, n) * np.eye(dim)
    return 0.5 * (_log_det(total + noise) - _log_det(within + noise))


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
