"""Data sets to pretrain and evaluate on, all as a :class:`Task`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

Batch = tuple[list[Tensor], Tensor]
"""Two views (N, C, H, W) of each image and the labels (N,), as lightly's loaders give them."""


@dataclass(frozen=True)
class Factors:
    """Names of the latent factors, and their values (images, factors) in the order of ``train()`` and ``test()``."""

    names: list[str]
    train: Tensor
    test: Tensor


@dataclass(frozen=True)
class Task:
    """What pretraining and evaluation need of a data set.

    ``pretrain_batches(batch_size, seed)`` loads one epoch each time it is iterated. ``train`` and ``test`` iterate
    over (images, labels) batches for the evaluators, ``views_per_image`` views of an image in a row (0: images as they
    are, no views). ``factors`` holds the ground truth of every evaluated image, where it is known.
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
    factors: Factors | None = None


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


def load(name: str, path: str | None, cache: Path, quick: bool = False) -> Task:
    """``digits``, ``clutter``, ``latent``, ``glyphs`` (embedded), or ``photographs``, ``cifar10``, ``cifar100``,
    ``imagefolder`` from ``path``; for photographs and glyphs :data:`FOLDERS` may name it.
    """
    if name == "digits":
        from benchmarks.data import digits

        return digits.load(cache, num_views=8 if quick else digits.NUM_VIEWS)
    if name == "clutter":
        from benchmarks.data import clutter

        return clutter.load(cache, num_views=8 if quick else clutter.NUM_VIEWS)
    if name == "latent":
        from benchmarks.data import latent

        return latent.load(cache)
    given = [Path(part) for part in (path or os.environ.get(FOLDERS.get(name, ""), "")).split(os.pathsep) if part]
    if name == "photographs":
        from benchmarks.data import photographs

        num_train = int(os.environ.get(NUM_PHOTOGRAPHS, photographs.NUM_TRAIN))
        return photographs.load(given[0] if given else None, num_train)
    if name == "glyphs":
        from benchmarks.data import glyphs

        return glyphs.load(given)
    from benchmarks.data import folders

    if path is None:
        raise SystemExit(f"--data {name} needs the folder it lies in: --data {name} PATH")
    return folders.load(name, Path(path))
