"""Scikit-learn's real handwritten digits in clutter: 32 x 32 RGB scenes.

Every view of a digit is a new scene: the digit at a random position, size, rotation, colour and polarity (lighter or
darker than what is behind it) on a random texture (oriented noise with a power-law spectrum) in random colours. Two
views of a digit share its shape and nothing else. The digits are real, the scenes are synthetic: this is no natural
image data set, it asks for an object in front of distracting structure.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data import Task
from benchmarks.data.digits import split
from benchmarks.data.views import cached, task

SIZE = 32
NUM_VIEWS = 24
QUICK_VIEWS = 8
NUM_EVALUATION_VIEWS = 2
MAX_ROTATION = math.radians(20)


def scenes(digits: Tensor, generator: torch.Generator) -> Tensor:
    """One scene (n, 3, SIZE, SIZE), roughly standardised, of each of the ``digits`` (n, 8, 8) in [0, 1]."""
    n = len(digits)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    angle, share = uniform(-MAX_ROTATION, MAX_ROTATION), uniform(0.7, 1.0)
    position = uniform(-1, 1, 2) * (1.1 - 0.9 * share)[:, None]
    rotation = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], 1).view(n, 2, 2) / share.view(n, 1, 1)
    grid = F.affine_grid(
        torch.cat([rotation, -rotation @ position[..., None]], 2), [n, 1, SIZE, SIZE], align_corners=False
    )
    mask = F.grid_sample(digits[:, None], grid, align_corners=False).clamp(0, 1)

    ground = uniform(0.4, 0.6, 1, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1)
    tint = uniform(0.03, 0.12, 1, 1, 1) + uniform(-0.03, 0.03, 3, 1, 1)
    background = ground + tint * _textures(n, generator)
    polarity = uniform(0, 1, 1, 1, 1).round() * 2 - 1
    ink = ground + polarity * uniform(0.35, 0.6, 1, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1)
    image = background * (1 - mask) + ink * mask + 0.03 * torch.randn(n, 3, SIZE, SIZE, generator=generator)
    return (image.clamp(0, 1) - 0.5) / 0.25


def _textures(n: int, generator: torch.Generator) -> Tensor:
    """Noise (n, 1, SIZE, SIZE) of unit variance: power-law spectra of random slope, stretched in a random direction."""
    fy, fx = torch.meshgrid(torch.fft.fftfreq(SIZE), torch.fft.rfftfreq(SIZE), indexing="ij")
    angle, stretch, slope = torch.rand(3, n, 1, 1, generator=generator)
    along = fx * (math.pi * angle).cos() + fy * (math.pi * angle).sin()
    across = fy * (math.pi * angle).cos() - fx * (math.pi * angle).sin()
    radius = ((along * (1 + 4 * stretch)).square() + across.square()).sqrt()
    amplitude = radius.clamp(min=1 / SIZE) ** -(0.5 + 1.5 * slope)
    amplitude[:, 0, 0] = 0
    white = torch.fft.rfft2(torch.randn(n, SIZE, SIZE, generator=generator))
    noise = torch.fft.irfft2(white * amplitude, s=(SIZE, SIZE))
    return (noise / noise.std((1, 2), keepdim=True))[:, None]


def _draw(images: np.ndarray, num_views: int, seed: int) -> Tensor:
    digits = torch.from_numpy(images).float() / 255
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([scenes(digits, generator).half() for _ in range(num_views)], dim=1)


def load(cache: Path, quick: bool = False) -> Task:
    """The digits' split of training and test images, each seen in scenes of its own."""
    num_views = QUICK_VIEWS if quick else NUM_VIEWS
    train_images, test_images, *labels = split()
    train_views = cached(cache / f"clutter-train-{num_views}.pt", lambda: _draw(train_images, num_views, 0))
    test_views = cached(cache / "clutter-test.pt", lambda: _draw(test_images, NUM_EVALUATION_VIEWS, 1))
    train_labels, test_labels = map(torch.from_numpy, labels)
    return task("clutter", train_views, train_labels, test_views, test_labels, NUM_EVALUATION_VIEWS)
