"""Fashion-MNIST (Xiao et al. 2017): 28 x 28 grey photographs of ten kinds of clothing.

The folder is the one of Debian's package or torchvision's. Views are random resized crops, flipped, with changes of
brightness and contrast; evaluation sees the test images as they are, with the training images as the bank.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.data import Task
from benchmarks.data.images import Augmentation, Labelled, task

NUM_CLASSES = 10
NUM_TRAIN = 12_000
"""Of 60,000: enough that more would not change the order of methods at some hundred steps."""

DEBIAN = Path("usr/share/datasets/fashion-mnist")
FOLDERS = (Path(), DEBIAN, Path("FashionMNIST/raw"), Path("raw"))
AUGMENTATION = Augmentation(area=(0.5, 1.0), flip=True, jitter=0.4)
REMEDY = """{path} holds no Fashion-MNIST ({missing}). On Debian and Ubuntu it can be had without root by
    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb DIR
and elsewhere by
    python -c "from torchvision.datasets import FashionMNIST; FashionMNIST('DIR', download=True)"
Then name the folder DIR: compare or demo --photographs DIR."""


def read(path: Path) -> Tensor:
    """The array of a file in MNIST's format, gzipped or not: two zeros, the type (8: bytes), the rank, the sizes."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = content[3] if content[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(content[4 : 4 + 4 * rank], ">u4").astype(int)
    if not rank or len(content) != 4 + 4 * rank + shape.prod():
        raise SystemExit(f"{path} is damaged: {len(content)} bytes are no array in MNIST's format; get it again")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy())


def split(path: Path, name: str) -> Labelled:
    """Images (n, 1, 28, 28) and labels (n,) of ``train`` or ``t10k``."""
    found = []
    for kind in ("images-idx3", "labels-idx1"):
        files = [path / folder / f"{name}-{kind}-ubyte{end}" for folder in FOLDERS for end in (".gz", "")]
        existing = [file for file in files if file.is_file()]
        if not existing:
            raise SystemExit(REMEDY.format(path=path, missing=f"no {files[0].name}"))
        found.append(read(existing[0]))
    return found[0][:, None], found[1].long()


def balanced(labels: Tensor, size: int) -> Tensor:
    """Indices, in order, of a fixed random choice of ``size`` images, equally many of each class."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = [shuffled[labels[shuffled] == label][: size // NUM_CLASSES] for label in range(NUM_CLASSES)]
    return torch.cat(chosen).sort().values


def load(path: Path | None, num_train: int = NUM_TRAIN) -> Task:
    """A class-balanced part of the training images, all test images; by default from where Debian installs them."""
    path = path or Path("/") / DEBIAN
    images, labels = split(path, "train")
    chosen = balanced(labels, min(num_train, len(labels)))
    return task("photographs", NUM_CLASSES, (images[chosen], labels[chosen]), split(path, "t10k"), AUGMENTATION)
