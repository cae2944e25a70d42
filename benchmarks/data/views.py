"""Pairs of views: drawn once, kept and paired at random, or drawn anew for every batch of images.

Views that are slow to draw are drawn once, so that they cost nothing next to training. Random crops of small images
are drawn for a whole batch at once, in some hundredths of a second. Either way every method sees the same ones.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Batch = tuple[list[Tensor], Tensor]
EVALUATION_BATCH = 512


def cached(path: Path, draw: Callable[[], Tensor]) -> Tensor:
    """``draw()``, from the file ``path`` if it was drawn before. Processes that read it share its pages."""
    if not path.exists():
        views = draw()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")  # ranks may draw at once: the last one stays
        torch.save(views, partial)
        partial.replace(path)
    return torch.load(path, weights_only=True, mmap=True)


def evaluation_batches(views: Tensor, labels: Tensor, per_image: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first ``per_image`` views of every image, those of one image in a row, with its label."""
    images = views[:, :per_image].flatten(0, 1)
    repeated = labels.repeat_interleave(per_image)
    for part in torch.arange(len(images)).split(EVALUATION_BATCH):
        yield images[part].float(), repeated[part]


class PairsOfViews(Iterable[Batch]):
    """Epochs of shuffled batches of two random distinct views per image; the last incomplete batch is dropped."""

    def __init__(self, views: Tensor, labels: Tensor, batch_size: int, seed: int) -> None:
        if batch_size > len(views):
            raise SystemExit(f"--batch-size {batch_size} exceeds the {len(views)} training images")
        self.views, self.labels, self.batch_size = views, labels, batch_size
        self.seed = seed
        self.generator: torch.Generator | None = None

    def __len__(self) -> int:
        return len(self.views) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        if self.generator is None:  # every rank draws its own samples
            rank = dist.get_rank() if dist.is_initialized() else 0
            self.generator = torch.Generator().manual_seed(self.seed + 1_000_003 * rank)
        order = torch.randperm(len(self.views), generator=self.generator)
        for images in order.split(self.batch_size)[: len(self)]:
            yield self._pair(images, self.generator), self.labels[images]

    def _pair(self, images: Tensor, generator: torch.Generator) -> list[Tensor]:
        first, second = torch.rand(len(images), self.views.shape[1], generator=generator).topk(2, dim=1).indices.T
        return [self.views[images, first].float(), self.views[images, second].float()]


@dataclass(frozen=True)
class Augmentation:
    """Random resized crops (Szegedy et al. 2015), flips, brightness and contrast; one draw for every image of a batch.

    torchvision draws once for a batch: one image at a time, two views of 256 cost it more than a training step here.
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
    """The same of 8-bit images (images, C, H, W), augmented anew for every batch."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, seed: int, augment: Augmentation) -> None:
        super().__init__(images, labels, batch_size, seed)
        self.augment = augment

    def _pair(self, images: Tensor, generator: torch.Generator) -> list[Tensor]:
        plain = self.views[images].float() / 255
        return [self.augment(plain, generator) for _ in range(2)]


def plain_batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """8-bit images as they are, in [0, 1], with their labels."""
    for part in torch.arange(len(images)).split(EVALUATION_BATCH):
        yield images[part].float() / 255, labels[part]
