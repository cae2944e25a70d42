"""Accuracy of frozen features, and what the embeddings hold: information, spectra, latent factors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightly.utils.benchmarking import knn_predict
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from benchmarks.data import Factors, Task
from mmi_loss import diagnostics

Features = tuple[Tensor, Tensor]
KNN_K = 20
KNN_T = 0.1
MEASURED_DIM = 32
"""Mutual information is measured on a fixed random slice: 32 dimensions of several hundred held-out pairs."""
MEASURED_PAIRS = 1024
SPECTRUM = 64


def features_of(backbone: nn.Module, task: Task) -> tuple[Features, Features]:
    """Features and labels of the training and the test images, by the backbone in evaluation mode."""
    was_training = backbone.training
    backbone.eval()
    device = next(backbone.parameters(), torch.empty(0)).device  # raw pixels have no parameters

    @torch.inference_mode()
    def extract(batches: Iterable[tuple[Tensor, Tensor]]) -> Features:
        parts = [(backbone(images.to(device)).flatten(1).float().cpu(), labels) for images, labels in batches]
        features, labels = zip(*parts, strict=True)
        return torch.cat(features), torch.cat(labels)

    both = extract(task.train()), extract(task.test())
    backbone.train(was_training)
    return both


def knn_accuracy(train: Features, test: Features, num_classes: int) -> float:
    """Weighted k-nearest-neighbour accuracy (lightly's ``knn_predict``) on normalised features."""
    bank = F.normalize(train[0], dim=1).T.contiguous()
    correct = 0
    for features, labels in zip(test[0].split(1024), test[1].split(1024), strict=True):
        k = min(KNN_K, bank.shape[1])
        predicted = knn_predict(F.normalize(features, dim=1), bank, train[1], num_classes, knn_k=k, knn_t=KNN_T)
        correct += int((predicted[:, 0] == labels).sum())
    return correct / len(test[1])


def linear_accuracy(train: Features, test: Features) -> float:
    """Accuracy of a logistic regression on standardised features."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300, tol=1e-3))
    probe.fit(train[0].numpy(), train[1].numpy())
    return float(np.mean(probe.predict(test[0].numpy()) == test[1].numpy()))


def information(head: nn.Module, test: Features, task: Task) -> dict[str, float]:
    """Mutual information, in nats, of two views of held-out images in a fixed slice of the projections.

    Plug-in and bias-corrected estimate, and the effective rank of the projections. Nothing where the evaluated images
    are no views.
    """
    if task.views_per_image < 2:
        return {}
    z_a, z_b = _projected_pairs(head, test, task)
    if not (z_a.isfinite().all() and z_b.isfinite().all()):
        return {}
    rank = float(diagnostics.effective_rank(z_a[:512]))
    dim = min(MEASURED_DIM, z_a.shape[1], (len(z_a) - 1) // 4)
    directions = torch.randn(z_a.shape[1], dim, generator=torch.Generator().manual_seed(0))
    slices = z_a @ directions, z_b @ directions
    plug_in, corrected = (float(diagnostics.mutual_information(*slices, bias_correction=c)) for c in (False, True))
    return {"mi": round(plug_in, 4), "mi_corrected": round(corrected, 4), "rank": round(rank, 2)}


def measures(head: nn.Module | None, train: Features, test: Features, task: Task) -> dict[str, Any]:
    """Spectra and effective ranks of features and projections, and which latent factors the features keep."""
    found: dict[str, Any] = {"features": _spectrum(test[0])}
    if head is not None and task.views_per_image > 1:
        found["projections"] = _spectrum(_projected_pairs(head, test, task)[0])
    if task.factors is not None:
        found["factors"] = dict(zip(task.factors.names, _factor_r2(train[0], test[0], task.factors), strict=True))
    return found


@torch.inference_mode()
def _projected_pairs(head: nn.Module, features: Features, task: Task) -> tuple[Tensor, Tensor]:
    """The projections of the first two views of up to MEASURED_PAIRS images, by the head in evaluation mode."""
    per_image = features[0].unflatten(0, (-1, task.views_per_image))[:MEASURED_PAIRS]
    was_training = head.training
    head.eval()
    device = next(head.parameters()).device
    z_a, z_b = (head(per_image[:, view].to(device)).float().cpu() for view in (0, 1))
    head.train(was_training)
    return z_a, z_b


def _spectrum(x: Tensor) -> dict[str, Any]:
    """The largest shares of variance, descending, and the effective rank, from up to 512 samples."""
    x = x[:512]
    variances = torch.linalg.svdvals((x - x.mean(0)).double()).square()
    shares = variances / variances.sum().clamp(min=1e-300)
    return {
        "effective_rank": round(float(diagnostics.effective_rank(x)), 2),
        "shares": [float(f"{share:.3g}") for share in shares[:SPECTRUM]],
    }


def _factor_r2(train: Tensor, test: Tensor, factors: Factors) -> list[float]:
    """R^2, on the test sample, of a linear regression of every factor on the standardised features."""
    regression = make_pipeline(StandardScaler(), Ridge(1.0)).fit(train.numpy(), factors.train.numpy())
    scores = r2_score(factors.test.numpy(), regression.predict(test.numpy()), multioutput="raw_values")
    return [round(float(score), 4) for score in scores]
