"""Latent variables with known ground truth: 8 factors of content, which the views of an image share, and 24 of
nuisance, which every view draws anew, seen through a fixed random two-layer map as 64 numbers.

Content is one of 16 cluster centres (the labels) plus variation within the cluster; its factors fade from strong
(c1) to weak (c8). Nothing here is an image; everything about it is known.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.data import Task
from benchmarks.data.views import cached, task

NUM_TRAIN, NUM_TEST = 2048, 1024
NUM_VIEWS = 24
NUM_EVALUATION_VIEWS = 2
NUM_CLUSTERS = 16
CONTENT_DIM, NUISANCE_DIM, HIDDEN_DIM, OBSERVED_DIM = 8, 24, 128, 64
CONTENT_SCALES = torch.linspace(1.5, 0.4, CONTENT_DIM)
WITHIN_CLUSTER = 0.5
OBSERVATION_NOISE = 0.05


class Sample(NamedTuple):
    """Views (images, views, OBSERVED_DIM), labels (images,) and factors (images, views, content + nuisance)."""

    views: Tensor
    labels: Tensor
    factors: Tensor


def draw(num_images: int, num_views: int, seed: int) -> Sample:
    """A sample; centres and map are the same for every seed."""
    world = torch.Generator().manual_seed(20240907)
    centres = torch.randn(NUM_CLUSTERS, CONTENT_DIM, generator=world)
    inner = torch.randn(CONTENT_DIM + NUISANCE_DIM, HIDDEN_DIM, generator=world) / (CONTENT_DIM + NUISANCE_DIM) ** 0.5
    outer = torch.randn(HIDDEN_DIM, OBSERVED_DIM, generator=world) / HIDDEN_DIM**0.5

    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLUSTERS, (num_images,), generator=generator)
    content = centres[labels] + WITHIN_CLUSTER * torch.randn(num_images, CONTENT_DIM, generator=generator)
    nuisance = torch.randn(num_images, num_views, NUISANCE_DIM, generator=generator)
    factors = torch.cat([content[:, None].expand(-1, num_views, -1), nuisance], 2)
    scales = torch.cat([CONTENT_SCALES, torch.ones(NUISANCE_DIM)])
    observed = torch.tanh(1.5 * (factors * scales) @ inner) @ outer
    views = observed + OBSERVATION_NOISE * torch.randn(observed.shape, generator=generator)
    return Sample(views, labels, factors)


def load(cache: Path, quick: bool = False) -> Task:
    """A training and a test sample; labels are clusters."""
    train, test = draw(NUM_TRAIN, NUM_VIEWS, seed=0), draw(NUM_TEST, NUM_EVALUATION_VIEWS, seed=1)
    train_views = cached(cache / "latent-train.pt", lambda: train.views.half())
    test_views = cached(cache / "latent-test.pt", lambda: test.views.half())
    return task("latent", train_views, train.labels, test_views, test.labels, NUM_EVALUATION_VIEWS)
