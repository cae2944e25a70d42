"""Which label-free measure picks the better run? Rank correlations of each with kNN and linear accuracy.

Short trainings of every method x learning rate x width x batch size, seeds outermost, on several tasks; of every run
the measures of :mod:`mmi_loss.measures` on 1,024 pairs of views of training images, behind the backbone and behind the
projector, and both accuracies of the backbone's features. Finished runs are rows of a CSV file and are kept: the same
command goes on where it stopped. Any file with those columns will do: ``--rows FILE --report``.

*Within a method* is the question of who tunes a rate: Spearman's rank correlation over the runs of one method and task,
averaged over methods and tasks. *Across methods* is that of who chooses a loss: over all runs of a task, averaged over
tasks. Intervals are of 95 %, by a bootstrap over the runs of each group.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightly.loss
import matplotlib
import numpy as np
import torch
from lightly.models.modules.heads import VICRegProjectionHead
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from scipy.stats import rankdata
from torch import Tensor, nn

from benchmarks import data, environment, evaluation, training
from mmi_loss import MMILoss
from mmi_loss.measures import OF_ONE_VIEW, OF_TWO_VIEWS, Measures

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "mmi": MMILoss,
    "vicreg": lightly.loss.VICRegLoss,
    "barlow_twins": lightly.loss.BarlowTwinsLoss,
    "simclr": lightly.loss.NTXentLoss,
}
TASKS = ("digits", "clutter", "latent")
RATES = (5e-4, 2e-3, 8e-3, 3.2e-2)
SIZES = ((64, 64), (64, 256), (512, 64), (512, 256))
"""Widths of the projector and batch sizes."""
IMAGES = 128 * 240
"""Seen by a run, whatever the batch size."""
PAIRS = 1024
CHOICES = ("task", "method", "rate", "dim", "batch_size", "seed")
PLACES = ("features", "projections")
MEASURES = [f"{place}_{name}" for place in PLACES for name in (*OF_ONE_VIEW, *OF_TWO_VIEWS)] + ["minus_loss"]
ACCURACIES = ("knn", "linear")
MISLEADING, TRUSTED = 0.0, 0.5
"""A measure whose interval reaches below the first within some question misleads; above the second it can be trusted."""

Row = dict[str, str]


def runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The grid, seeds outermost and tasks innermost: wherever it stops, all have been tried about equally often."""
    grid = itertools.product(range(options.seeds), SIZES, RATES, options.methods, options.tasks)
    for seed, (dim, batch_size), rate, method, task in grid:
        yield dict(zip(CHOICES, (task, method, rate, dim, batch_size, seed), strict=True))


def train(task: data.Task, run: dict[str, Any]) -> dict[str, float]:
    """One run: accuracies and measures; NaN for all if it diverged."""
    torch.manual_seed(run["seed"])
    backbone, features = training.make_backbone("mlp" if task.image_size == 1 else "tiny", task.channels, task.image_size)
    head, criterion = VICRegProjectionHead(features, run["dim"], run["dim"], 2), LOSSES[run["method"]]()
    parameters, steps = [*backbone.parameters(), *head.parameters()], max(1, IMAGES // run["batch_size"])
    optimizer = torch.optim.AdamW(parameters, run["rate"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run["rate"], total_steps=steps + 1)
    pairs = task.pretrain_batches(run["batch_size"], run["seed"])
    for views, _ in itertools.islice(itertools.chain.from_iterable(itertools.repeat(pairs)), steps):
        optimizer.zero_grad()
        loss = criterion(*head(backbone(torch.cat(views))).chunk(2))
        if not loss.isfinite():
            return dict.fromkeys((*ACCURACIES, *MEASURES), math.nan)
        loss.backward()
        optimizer.step()
        schedule.step()
    found = measure(backbone, head, criterion, task)
    train_set, test_set = evaluation.features_of(backbone, task)
    found["knn"] = evaluation.knn_accuracy(train_set, test_set, task.num_classes)
    found["linear"] = evaluation.linear_accuracy(train_set, test_set)
    return found


@torch.no_grad()
def measure(backbone: nn.Module, head: nn.Module, criterion: nn.Module, task: data.Task) -> dict[str, float]:
    """All measures of pairs of views of training images, the networks in evaluation mode."""
    backbone.eval(), head.eval()
    batches = itertools.islice(task.pretrain_batches(PAIRS // 4, 10_000), 4)
    features = [torch.cat(parts) for parts in zip(*([backbone(v).flatten(1) for v in b] for b, _ in batches), strict=True)]
    projections = [head(z) for z in features]
    found = {"minus_loss": -float(criterion(*projections))}
    for place, views in zip(PLACES, (features, projections), strict=True):
        measures = Measures()
        try:
            measures.update(*views)
            values: dict[str, Tensor] = measures.compute()
        except ValueError:  # not finite
            values = {}
        found |= {f"{place}_{name}": float(values.get(name, math.nan)) for name in (*OF_ONE_VIEW, *OF_TWO_VIEWS)}
    return found


def run_missing(options: argparse.Namespace, console: Console) -> None:
    """Append a row for every run of the grid that has none."""
    finished = {tuple(row[name] for name in CHOICES) for row in environment.read(options.rows)}
    todo = [run for run in runs(options) if tuple(str(value) for value in run.values()) not in finished]
    tasks = {name: data.load(name, None, options.cache) for name in options.tasks} if todo else {}
    columns = [TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs")]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=len(todo))
        for run in todo:
            progress.update(bar, description=" ".join(str(value) for value in run.values()))
            found = train(tasks[run["task"]], run)
            found = {name: float(f"{found[name]:.6g}") for name in (*ACCURACIES, *MEASURES)}
            where = environment.columns()
            environment.append(options.rows, {**run, **found, **where, "core": environment.core_digest()})
            progress.update(bar, advance=1)
