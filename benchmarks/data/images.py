"""Tasks of small images in memory, by the standard protocol: views are drawn anew for every batch, evaluation sees the
images as they are, in [0, 1], those of training as the bank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data import Task
from benchmarks.data.views import EVALUATION_BATCH, PairsOfViews

Labelled = tuple[Tensor, Tensor]
"""8-bit images (n, C, H, W) and labels (n,)."""


@dataclass(frozen=True)
class Augmentation:
    """Random resized crops (Szegedy et al. 2015), flips, slants, brightness and contrast, in a batch of images at once.

    torchvision draws one crop for a batch; one image at a time it would take longer than a training step here.
    """

    area: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    slant: float = 0.0
    jitter: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A view (n, C, H, W) in [0, 1] of each of the ``images`` (n, C, H, W) in [0, 1]."""
        n = len(images)

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(n, generator=generator)

        area, ratio = uniform(*self.area), uniform(*map(math.log, self.ratio)).exp()
        width, height = ((area * r).sqrt().clamp(max=1) for r in (ratio, 1 / ratio))
        matrix = torch.zeros(n, 2, 3)
        matrix[:, 0, 0] = width * (uniform(-1, 1).sign() if self.flip else 1)
        matrix[:, 1, 1] = height
        matrix[:, 0, 1] = uniform(-self.slant, self.slant)
        matrix[:, 0, 2], matrix[:, 1, 2] = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        views = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        if self.jitter:
            brightness, contrast = (uniform(1 - self.jitter, 1 + self.jitter).view(n, 1, 1, 1) for _ in range(2))
            mean = views.mean((1, 2, 3), keepdim=True)
            views = (((views - mean) * contrast + mean) * brightness).clamp(0, 1)
        return views


class PairsOfCrops(PairsOfViews):
    """Epochs of two views each of 8-bit images (images, C, H, W), drawn anew for every batch."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, seed: int, augment: Augmentation) -> None:
        super().__init__(images, labels, batch_size, seed)
        self.augment = augment

    def _pair(self, images: Tensor, generator: torch.Generator) -> list[Tensor]:
        plain = self.views[images].float() / 255
        return [self.augment(plain, generator) for _ in range(2)]


def _plain_batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for part in torch.arange(len(images)).split(EVALUATION_BATCH):
        yield images[part].float() / 255, labels[part]


def task(name: str, num_classes: int, train: Labelled, test: Labelled, augment: Augmentation) -> Task:
    """The task of learning from views of ``train`` and classifying ``test``."""
    return Task(
        *(name, num_classes, train[0].shape[1], train[0].shape[-1], len(train[0])),
        pretrain_batches=lambda batch_size, seed: PairsOfCrops(*train, batch_size, seed, augment),
        train=lambda: _plain_batches(*train),
        test=lambda: _plain_batches(*test),
    )
