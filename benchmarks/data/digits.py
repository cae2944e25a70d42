"""Scikit-learn's 1,797 real handwritten digits (Alpaydin and Kaynak 1998), seen under nuisances.

Every view of a digit is moved, rotated, scaled, changed in contrast and polarity, and noisy; so are the images of
the evaluation. A representation is good here if it is invariant to what the views vary: raw pixels and an untrained
network are not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lightly.transforms import RandomRotateDegrees
from lightly.transforms.multi_view_transform import MultiViewTransform
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.transforms import v2

from benchmarks.data import Task
from benchmarks.data.views import cached, task

SIZE = 16
NUM_VIEWS = 32
QUICK_VIEWS = 8
NUM_EVALUATION_VIEWS = 4

VIEW = T.Compose(
    [
        RandomRotateDegrees(prob=1.0, degrees=35),
        T.RandomAffine(0, translate=(0.2, 0.2), scale=(0.7, 1.2), interpolation=T.InterpolationMode.BILINEAR),
        T.ColorJitter(brightness=0.4, contrast=0.4),
        T.RandomInvert(p=0.5),
        T.ToTensor(),
        v2.GaussianNoise(sigma=0.1),
        T.Normalize(0.5, 0.5),
    ]
)


class _Views(Dataset[Tensor]):
    """All views of one image, (num_views, 1, SIZE, SIZE), by lightly's multi-view transform."""

    def __init__(self, images: np.ndarray, num_views: int) -> None:
        self.images = images
        self.transform = MultiViewTransform([VIEW] * num_views)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.fromarray(self.images[index]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        torch.manual_seed(index)
        return torch.stack(self.transform(image)).half()


def _draw_views(images: np.ndarray, num_views: int, cache: Path) -> Tensor:
    """(len(images), num_views, 1, SIZE, SIZE), from the cache if they were drawn before."""
    return cached(cache, lambda: torch.cat(list(DataLoader(_Views(images, num_views), batch_size=64, num_workers=2))))


def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images (8-bit, 8 x 8), test images, training labels, test labels: two thirds and one third."""
    data = load_digits()
    images, labels = (data.images / 16 * 255).astype(np.uint8), data.target
    parts = train_test_split(images, labels, test_size=1 / 3, random_state=0, stratify=labels)
    return parts[0], parts[1], parts[2], parts[3]


def load(cache: Path, quick: bool = False) -> Task:
    """Two thirds of the digits for training, one third for testing."""
    num_views = QUICK_VIEWS if quick else NUM_VIEWS
    train_images, test_images, *labels = split()
    train_views = _draw_views(train_images, num_views, cache / f"digits-train-{num_views}.pt")
    test_views = _draw_views(test_images, NUM_EVALUATION_VIEWS, cache / "digits-test.pt")
    train_labels, test_labels = map(torch.from_numpy, labels)
    return task("digits", train_views, train_labels, test_views, test_labels, NUM_EVALUATION_VIEWS)
