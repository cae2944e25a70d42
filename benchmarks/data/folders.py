"""CIFAR-10, CIFAR-100 and image folders from disk, with lightly's VICReg views for every method."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightly.transforms import VICRegTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision import transforms as T

from benchmarks.data import Batch, Task

IMAGENET_SIZE = 224
CIFAR_SIZE = 32
NUM_WORKERS = 2


def load(name: str, path: Path) -> Task:
    """CIFAR in torchvision's layout; an image folder with ``train/`` and ``val/`` or ``test/``."""
    size = CIFAR_SIZE if name.startswith("cifar") else IMAGENET_SIZE
    views = VICRegTransform(input_size=size, gaussian_blur=0.0 if size == CIFAR_SIZE else 0.5)
    pretrain = dataset(name, path, True, views)
    plain = T.Compose([T.Resize(size), T.CenterCrop(size), T.ToTensor(), T.Normalize(**IMAGENET_NORMALIZE)])
    splits = [dataset(name, path, is_train, plain) for is_train in (True, False)]

    def pretrain_batches(batch_size: int, seed: int) -> Iterable[Batch]:
        if batch_size > len(pretrain):
            raise SystemExit(f"--batch-size {batch_size} exceeds the {len(pretrain)} training images of {path}")
        return DataLoader(
            pretrain,
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=NUM_WORKERS,
            persistent_workers=NUM_WORKERS > 0,
            generator=torch.Generator().manual_seed(seed),
        )

    return Task(
        name=name,
        num_classes=len(pretrain.classes),
        channels=3,
        image_size=size,
        num_images=len(pretrain),
        pretrain_batches=pretrain_batches,
        train=lambda: DataLoader(splits[0], 256, num_workers=NUM_WORKERS),
        test=lambda: DataLoader(splits[1], 256, num_workers=NUM_WORKERS),
    )


def dataset(name: str, path: Path, is_train: bool, transform: Any) -> Any:
    """A split of ``cifar10``, ``cifar100`` or ``imagefolder`` (``train/`` and ``val/`` or ``test/``) under ``path``."""
    try:
        if name == "imagefolder":
            folders = ["train"] if is_train else ["val", "test"]
            found = [path / folder for folder in folders if (path / folder).is_dir()]
            if not found:
                raise FileNotFoundError(f"{path} has no folder {' or '.join(folders)}")
            return datasets.ImageFolder(str(found[0]), transform)
        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        return kind(str(path), train=is_train, transform=transform)
    except (FileNotFoundError, RuntimeError) as error:
        raise SystemExit(f"{name} in {path}: {error}") from None
