"""Scikit-learn's 1,797 real handwritten digits (Alpaydin and Kaynak 1998), seen under nuisances.

Every view of a digit is moved, rotated, scaled, changed in contrast and polarity, and noisy; so are the images of
the evaluation. A representation is good here if it is invariant to what the views vary: raw pixels and an untrained
network are not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from lightly.transforms import RandomRotateDegrees
from lightly.transforms.multi_view_transform import MultiViewTransform
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.transforms import v2

from benchmarks.data import Task
from benchmarks.data.views import cached, task

SIZE = 16
NUM_VIEWS, QUICK_VIEWS, NUM_EVALUATION_VIEWS = 32, 8, 4

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


def _draw_batch(images: np.ndarray, transform: MultiViewTransform, indices: list[int]) -> Tensor:
    """All views of some images, (len(indices), num_views, 1, SIZE, SIZE)."""
    drawn = []
    for index in indices:
        torch.manual_seed(index)
        image = Image.fromarray(images[index]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        drawn.append(torch.stack(transform(image)).half())
    return torch.stack(drawn)


def _draw(images: np.ndarray, num_views: int, seed: int) -> Tensor:
    draw = functools.partial(_draw_batch, images, MultiViewTransform([VIEW] * num_views))
    return torch.cat(list(DataLoader(range(len(images)), 64, num_workers=2, collate_fn=draw)))  # type: ignore[arg-type]


def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images (8-bit, 8 x 8), test images, training labels, test labels: two thirds and one third."""
    data = load_digits()
    images, labels = (data.images / 16 * 255).astype(np.uint8), data.target
    parts = train_test_split(images, labels, test_size=1 / 3, random_state=0, stratify=labels)
    return parts[0], parts[1], parts[2], parts[3]


def of_views(name: str, draw: Callable[[np.ndarray, int, int], Tensor], num: int, per_image: int, cache: Path) -> Task:
    """Two thirds of the digits for training, in ``num`` views ``draw(images, num, seed)``; one third for testing."""
    train_images, test_images, *labels = split()
    train_views = cached(cache / f"{name}-train-{num}.pt", lambda: draw(train_images, num, 0))
    test_views = cached(cache / f"{name}-test.pt", lambda: draw(test_images, per_image, 1))
    train_labels, test_labels = map(torch.from_numpy, labels)
    return task(name, train_views, train_labels, test_views, test_labels, per_image)


def load(cache: Path, quick: bool = False) -> Task:
    """The digits under nuisances."""
    return of_views("digits", _draw, QUICK_VIEWS if quick else NUM_VIEWS, NUM_EVALUATION_VIEWS, cache)
