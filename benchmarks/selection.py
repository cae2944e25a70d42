"""Which label-free measure picks the better run? Rank correlations of each with kNN and linear accuracy.

Short trainings of every method x learning rate x width x batch size, seeds outermost, on several tasks; of every run
the measures of :mod:`mmi_loss.measures` on 1,024 pairs of views of training images, behind the backbone and behind the
projector, and both accuracies of the backbone's features. Finished runs are kept: the same command goes on where it
stopped. Ends with a table and a picture.

*Within a method* is the question of who tunes a rate: Spearman's rank correlation over the runs of one method and task,
averaged over methods and tasks. *Across methods* is that of who chooses a loss: over all runs of a task, averaged over
tasks. Intervals are of 95 %, by a bootstrap over the runs of each group.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightly.models.modules.heads import VICRegProjectionHead
from rich.progress import track
from scipy.stats import rankdata
from torch import nn

from benchmarks import data, environment, evaluation, grid, losses, plots, report, training
from benchmarks.environment import Row
from mmi_loss.measures import OF_ONE_VIEW, OF_TWO_VIEWS, Measures

METHODS = ("mmi", "vicreg", "barlow_twins", "simclr")
TASKS = ("digits", "clutter", "latent")
RATES = (5e-4, 2e-3, 8e-3, 3.2e-2)
SIZES = ((64, 64), (64, 256), (512, 64), (512, 256))
"""Widths of the projector and batch sizes."""
IMAGES = 128 * 240
"""Seen by a run, whatever the batch size."""
PAIRS = 1024
CHOICES = ("task", "method", "rate", "dim", "batch_size", "seed")
MEASURES = [f"{place}_{name}" for place in ("features", "projections") for name in (*OF_ONE_VIEW, *OF_TWO_VIEWS)]
MEASURES += ["minus_loss"]
ACCURACIES = ("knn", "linear")
TITLES = [report.METRICS[name] for name in ACCURACIES]
QUESTIONS = {"within a method": ("task", "method"), "across methods": ("task",)}
SMALLEST = 5
"""Runs of a group that has a rank correlation worth the name."""
MISLEADING, TRUSTED = 0.0, 0.5
"""A measure whose whole interval is below the first misleads; one whose are above the second can be trusted."""


def main(arguments: list[str]) -> None:
    """Run what is missing, then show the table and draw the picture."""
    parser = grid.parser("selection", __doc__, TASKS, METHODS, one_process=True)
    parser.set_defaults(seeds=1)
    options = parser.parse_args(arguments)
    path, means = options.out / "selection.csv", grid.Means.of(options)
    torch.set_num_threads(1)
    finished = {tuple(row[name] for name in CHOICES) for row in environment.read(path)}
    # Tasks and methods innermost: wherever it stops, each of them has been tried about equally often.
    every = itertools.product(range(options.seeds), SIZES, RATES, options.methods, options.tasks)
    runs = [(task, method, rate, *size, seed) for seed, size, rate, method, task in every]
    todo = [run for run in runs if tuple(map(str, run)) not in finished and not options.report]
    tasks = {name: data.load(name, means.cache, means.folder) for name in options.tasks if todo}
    for run in track(todo):
        found = {name: float(f"{value:.6g}") for name, value in train(tasks[run[0]], *run[1:]).items()}
        environment.append(path, {**dict(zip(CHOICES, run, strict=True)), **found, **environment.columns()})
    rows = grid.rows_of(path, task=options.tasks, method=options.methods)
    print(table(rows), environment.provenance(rows), sep="\n\n")
    print(f"picture: {draw(rows, options.out / 'selection.png')}")


def train(task: data.Task, method: str, rate: float, dim: int, batch_size: int, seed: int) -> dict[str, float]:
    """One run: accuracies and measures; NaN for all if it diverged."""
    torch.manual_seed(seed)
    backbone, features = training.make_backbone(grid.BACKBONES.get(task.name, "tiny"), task.channels, task.image_size)
    head, loss = VICRegProjectionHead(features, dim, dim, 2), losses.find(method)
    if loss is None:
        raise SystemExit(f"{method} has no loss to train with")
    criterion, steps = loss.criterion(), max(1, IMAGES // batch_size)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1)
    epochs = itertools.repeat(task.pretrain_batches(batch_size, seed))
    for views, _ in itertools.islice(itertools.chain.from_iterable(epochs), steps):
        optimizer.zero_grad()
        value = criterion(*head(backbone(torch.cat(views))).chunk(2))
        if not value.isfinite():
            return dict.fromkeys((*ACCURACIES, *MEASURES), math.nan)
        value.backward()
        optimizer.step()
        schedule.step()
    train_set, test_set = evaluation.features_of(backbone, task)
    knn = evaluation.knn_accuracy(train_set, test_set, task.num_classes)
    measured = measure(backbone.eval(), head.eval(), criterion, task)
    return {"knn": knn, "linear": evaluation.linear_accuracy(train_set, test_set), **measured}


@torch.no_grad()
def measure(backbone: nn.Module, head: nn.Module, criterion: nn.Module, task: data.Task) -> dict[str, float]:
    """All measures of pairs of views of training images; NaN for those that are not finite."""
    batches = itertools.islice(task.pretrain_batches(PAIRS // 4, 10_000), 4)
    parts = zip(*([backbone(view).flatten(1) for view in views] for views, _ in batches), strict=True)
    features = [torch.cat(part) for part in parts]
    projections, values = [head(z) for z in features], []
    for views in (features, projections):
        measures = Measures()
        try:
            measures.update(*views)
            found = measures.compute()
        except ValueError:  # not finite
            found = {}
        values += [float(found.get(name, math.nan)) for name in (*OF_ONE_VIEW, *OF_TWO_VIEWS)]
    return dict(zip(MEASURES, [*values, -float(criterion(*projections))], strict=True))


class Correlation(NamedTuple):
    """A measure's rank correlations with the accuracies: means over groups, ends of their intervals, each an array
    (accuracies,); the worst of any group, and which that is.
    """

    measure: str
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    worst: float
    worst_group: str

    @property
    def verdict(self) -> str:
        """In a word: ``trust`` (for both accuracies), ``misleads`` (for one of them), or nothing."""
        return "trust" if (self.low > TRUSTED).all() else "misleads" if (self.high < MISLEADING).any() else ""


def correlations(rows: Sequence[Row], question: str, draws: int = 500) -> list[Correlation]:
    """Those of every measure over runs alike in the question's keys, best first; the loss is compared within a method
    only. Runs that diverged are left out; so are the smallest groups.
    """
    runs: dict[str, list[list[float]]] = defaultdict(list)
    for row in rows:
        if all(math.isfinite(float(row[name])) for name in ACCURACIES):
            values = {name: float(row[name]) for name in (*MEASURES, *ACCURACIES)}
            # The paper's claim is that an exponent near 1 is best.
            values |= {name: -abs(values[name] - 1) for name in values if name.endswith("alpha_req")}
            runs[" ".join(row[key] for key in QUESTIONS[question])].append(list(values.values()))
    groups = {name: np.array(found) for name, found in runs.items() if len(found) >= SMALLEST}
    if not groups:
        return []
    generator = np.random.default_rng(0)
    of_groups = np.array([_spearman(x) for x in groups.values()])
    drawn = [np.nanmean([_spearman(generator.choice(x, len(x))) for x in groups.values()], 0) for _ in range(draws)]
    means = zip(np.nanmean(of_groups, 0), *np.nanquantile(drawn, [0.025, 0.975], 0), strict=True)
    worst = np.nan_to_num(of_groups, nan=np.inf).min(2)  # (groups, measures)
    found = [
        Correlation(name.replace("_", " "), *mean, column.min(), list(groups)[column.argmin()])
        for name, mean, column in zip(MEASURES, means, worst.T, strict=True)
        if "within" in question or name != "minus_loss"
    ]
    return sorted(found, key=lambda one: -one.mean.mean())


def _spearman(x: np.ndarray) -> np.ndarray:
    """Rank correlations (measures, accuracies) of runs (N, measures + accuracies); NaN where all are alike."""
    ranks = rankdata(np.where(np.isfinite(x), x, -np.inf), axis=0)  # what cannot be measured is worst
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(ranks, rowvar=False)[: len(MEASURES), len(MEASURES) :]


def table(rows: list[Row]) -> str:
    """One of each question: correlations with their intervals, the worst of any task or task and method."""
    shown = []
    for question in QUESTIONS:
        lines = []
        for one in correlations(rows, question):
            intervals = zip(one.mean, one.low, one.high, strict=True)
            cells = [f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" for mean, low, high in intervals]
            lines.append([one.measure, *cells, f"{one.worst:+.2f} {one.worst_group}", one.verdict])
        shown.append(report.table([question, *TITLES, "worst group", ""], lines))
    return "\n\n".join(shown)


def draw(rows: list[Row], path: Path) -> Path:
    """Intervals of every measure, a panel per question."""
    panels = {question: {one.measure: one[1:4] for one in correlations(rows, question)} for question in QUESTIONS}
    return plots.intervals(panels, TITLES, path, "rank correlation with accuracy")
