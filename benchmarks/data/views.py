"""Views that are drawn once, kept, and paired at random: what the embedded tasks share.

A batch takes two views per image; drawing them once makes them cost nothing next to training, and every method sees
the same ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.data import Batch, Task

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


def task(name: str, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, per_image: int) -> Task:
    """A task of drawn views (images, views, ...), of which the first ``per_image`` are evaluated."""
    return Task(
        name=name,
        num_classes=int(train_labels.max()) + 1,
        channels=train.shape[2],
        image_size=train.shape[-1] if train.ndim == 5 else 1,
        num_images=len(train),
        pretrain_batches=lambda batch_size, seed: PairsOfViews(train, train_labels, batch_size, seed),
        train=lambda: evaluation_batches(train, train_labels, per_image),
        test=lambda: evaluation_batches(test, test_labels, per_image),
        views_per_image=per_image,
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
            yield self._pair(images, self.generator), self.labels[images]

    def _pair(self, images: Tensor, generator: torch.Generator) -> list[Tensor]:
        first, second = torch.rand(len(images), self.views.shape[1], generator=generator).topk(2, dim=1).indices.T
        return [self.views[images, first].float(), self.views[images, second].float()]
