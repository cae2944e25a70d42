"""Accuracy of frozen features."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from lightly.utils.benchmarking import knn_predict
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from benchmarks.data import Task

Features = tuple[Tensor, Tensor]
KNN_K = 20
KNN_T = 0.1


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
