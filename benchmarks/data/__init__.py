"""Data sets to pretrain and evaluate on, all as a :class:`Task`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Batch = tuple[list[Tensor], Tensor]
"""Two views (N, C, H, W) of each image and the labels (N,), as lightly's loaders give them."""


@dataclass(frozen=True)
class Task:
    """What pretraining and evaluation need of a data set.

    ``pretrain_batches(batch_size, seed)`` loads one epoch each time it is iterated. ``train`` and ``test`` iterate
    over (images, labels) batches for the evaluators, ``views_per_image`` views of an image in a row (0: images as they
    are, no views).
    """

    name: str
    num_classes: int
    channels: int
    image_size: int
    num_images: int
    pretrain_batches: Callable[[int, int], Iterable[Batch]]
    train: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    test: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    views_per_image: int = 0


Constructor = Callable[[Path, Path | None, bool], Task]
"""Of the folder for drawn views, the folder the data lie in, and whether fewer views will do."""


def _embedded(name: str) -> Constructor:
    """A task that needs no files: ``benchmarks.data.NAME.load``, imported when it is wanted."""
    return lambda cache, folder, quick: importlib.import_module(f"benchmarks.data.{name}").load(cache, quick=quick)


def _from_disk(name: str) -> Constructor:
    def load(cache: Path, folder: Path | None, quick: bool) -> Task:
        from benchmarks.data import folders

        if folder is None:
            raise SystemExit(f"{name} is not embedded: --folder PATH names the folder it lies in")
        return folders.load(name, folder)

    return load


def _noise(cache: Path, folder: Path | None, quick: bool) -> Task:
    """Random images of ImageNet's size, to time a step on: ``demo --tasks noise --steps 20 --backbone resnet50``."""
    from benchmarks.data.views import task

    images = torch.randn(512, 2, 3, 224, 224, generator=torch.Generator().manual_seed(0)).half()
    labels = torch.arange(512) % 2
    return task("noise", images, labels, images[:64], labels[:64], 1)


FOLDERS = {"photographs": "MMI_PHOTOGRAPHS", "glyphs": "MMI_FONTS"}
"""Environment variables of the folders of images or fonts, which worker processes inherit."""
NUM_PHOTOGRAPHS = "MMI_NUM_PHOTOGRAPHS"


def configure(photographs: str | None, num_photographs: int | None, fonts: Sequence[str] | None) -> None:
    """Set the environment variables of the options that are given."""
    given = {
        FOLDERS["photographs"]: photographs,
        NUM_PHOTOGRAPHS: num_photographs and str(num_photographs),
        FOLDERS["glyphs"]: os.pathsep.join(fonts or []),
    }
    os.environ.update({name: value for name, value in given.items() if value})


def variant(name: str) -> str:
    """What the environment says of a task beside its name, without where it lies: results of variants do not mix."""
    if name == "photographs":
        return os.environ.get(NUM_PHOTOGRAPHS, "")
    folders = os.environ.get(FOLDERS.get(name, ""), "").split(os.pathsep)
    return os.pathsep.join(Path(folder).name for folder in folders)


def _folders(name: str, folder: Path | None) -> list[Path]:
    named = str(folder or os.environ.get(FOLDERS[name], ""))
    return [Path(part) for part in named.split(os.pathsep) if part]


def _photographs(cache: Path, folder: Path | None, quick: bool) -> Task:
    from benchmarks.data import photographs

    folders = _folders("photographs", folder)
    num_train = int(os.environ.get(NUM_PHOTOGRAPHS) or photographs.NUM_TRAIN)
    return photographs.load(folders[0] if folders else None, num_train)


def _glyphs(cache: Path, folder: Path | None, quick: bool) -> Task:
    from benchmarks.data import glyphs

    return glyphs.load(_folders("glyphs", folder))


TASKS: dict[str, Constructor] = {
    "digits": _embedded("digits"),
    "clutter": _embedded("clutter"),
    "latent": _embedded("latent"),
    "photographs": _photographs,
    "glyphs": _glyphs,
    "noise": _noise,
    "cifar10": _from_disk("cifar10"),
    "cifar100": _from_disk("cifar100"),
    "imagefolder": _from_disk("imagefolder"),
}


def load(name: str, cache: Path, folder: Path | None = None, quick: bool = False) -> Task:
    """The task of that name, its drawn views from or for ``cache``."""
    return TASKS[name](cache, folder, quick)
