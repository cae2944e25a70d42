"""Scikit-learn's 1,797 real handwritten digits (Alpaydin and Kaynak 1998), seen under nuisances.

Every view of a digit is moved, rotated, scaled, changed in contrast and polarity, and noisy; so are the images of
the evaluation. A representation is good here if it is invariant to what the views vary: raw pixels and an untrained
network are not. The views of each image are drawn once and kept, so that the views, of which a batch draws two per
image, cost nothing next to training, and all methods see the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from lightly.transforms import RandomRotateDegrees
from lightly.transforms.multi_view_transform import MultiViewTransform
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.transforms import v2

from benchmarks.data import Batch, Task

SIZE = 16
NUM_VIEWS = 32
NUM_EVALUATION_VIEWS = 4
BATCH = 512

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
    if not cache.exists():
        loader = DataLoader(_Views(images, num_views), batch_size=64, num_workers=2)
        views = torch.cat(list(loader))
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".partial")
        torch.save(views, partial)
        partial.replace(cache)
    return torch.load(cache, weights_only=True)


def load(cache: Path, num_views: int = NUM_VIEWS) -> Task:
    """Two thirds of the digits for training, one third for testing."""
    data = load_digits()
    images, labels = (data.images / 16 * 255).astype(np.uint8), data.target
    split = train_test_split(images, labels, test_size=1 / 3, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = split
    train_views = _draw_views(train_images, num_views, cache / f"digits-train-{num_views}.pt")
    test_views = _draw_views(test_images, NUM_EVALUATION_VIEWS, cache / "digits-test.pt")
    train_labels, test_labels = torch.from_numpy(train_labels), torch.from_numpy(test_labels)

    def evaluation_batches(views: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        images = views[:, :NUM_EVALUATION_VIEWS].flatten(0, 1)
        repeated = labels.repeat_interleave(NUM_EVALUATION_VIEWS)
        for part in torch.arange(len(images)).split(BATCH):
            yield images[part].float(), repeated[part]

    return Task(
        name="digits",
        num_classes=10,
        channels=1,
        image_size=SIZE,
        num_images=len(train_views),
        pretrain_batches=lambda batch_size, seed: PairsOfViews(train_views, train_labels, batch_size, seed),
        train=lambda: evaluation_batches(train_views, train_labels),
        test=lambda: evaluation_batches(test_views, test_labels),
    )


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
            scores = torch.rand(len(images), self.views.shape[1], generator=self.generator)
            first, second = scores.topk(2, dim=1).indices.T
            yield [self.views[images, first].float(), self.views[images, second].float()], self.labels[images]
