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
SMALLEST = 5
"""Runs of a group that has a rank correlation worth the name."""
MISLEADING, TRUSTED = 0.0, 0.5
"""A measure whose whole interval is below the first misleads; one whose is above the second can be trusted."""

Row = dict[str, str]


def runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The grid, seeds outermost and tasks innermost: wherever it stops, all have been tried about equally often."""
    grid = itertools.product(range(options.seeds), SIZES, RATES, options.methods, options.tasks)
    for seed, (dim, batch_size), rate, method, task in grid:
        yield dict(zip(CHOICES, (task, method, rate, dim, batch_size, seed), strict=True))


def train(task: data.Task, run: dict[str, Any]) -> dict[str, float]:
    """One run: accuracies and measures; NaN for all if it diverged."""
    torch.manual_seed(run["seed"])
    backbone, features = training.make_backbone(
        "mlp" if task.image_size == 1 else "tiny", task.channels, task.image_size
    )
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
    features = [
        torch.cat(parts) for parts in zip(*([backbone(v).flatten(1) for v in b] for b, _ in batches), strict=True)
    ]
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


# What the rows say


def correlations(rows: Sequence[Row], keys: Sequence[str], draws: int = 500) -> list[dict[str, Any]]:
    """Of every measure and accuracy the mean over groups of runs alike in ``keys`` of Spearman's correlation, with a
    bootstrap interval, and the worst group. Runs that diverged are left out; so are the smallest groups.
    """
    names = [*MEASURES, *ACCURACIES]
    values = np.array([[float(row[name]) for name in names] for row in rows])
    # The paper's claim is that an exponent near 1 is best.
    for index in [i for i, name in enumerate(names) if name.endswith("alpha_req")]:
        values[:, index] = -abs(values[:, index] - 1)
    groups: dict[tuple[str, ...], list[int]] = {}
    for index in np.flatnonzero(np.isfinite(values[:, -len(ACCURACIES) :]).all(1)):
        groups.setdefault(tuple(rows[index][key] for key in keys), []).append(int(index))
    members = {key: values[indices] for key, indices in groups.items() if len(indices) >= SMALLEST}
    if not members:
        return []
    generator = np.random.default_rng(0)
    point = np.array([_spearman(x) for x in members.values()])
    drawn = [
        np.nanmean([_spearman(x[generator.integers(len(x), size=len(x))]) for x in members.values()], 0)
        for _ in range(draws)
    ]
    low, high = np.nanquantile(drawn, [0.025, 0.975], 0)
    found = []
    for (i, measure), (j, accuracy) in itertools.product(enumerate(MEASURES), enumerate(ACCURACIES)):
        worst = int(np.nanargmin(point[:, i, j])) if np.isfinite(point[:, i, j]).any() else 0
        found.append(
            {
                "measure": measure,
                "accuracy": accuracy,
                "runs": sum(map(len, members.values())),
                "groups": len(members),
                "correlation": float(np.nanmean(point[:, i, j])),
                "low": float(low[i, j]),
                "high": float(high[i, j]),
                "worst": float(point[worst, i, j]),
                "worst_group": " ".join(list(members)[worst]),
            }
        )
    return found


def _spearman(x: np.ndarray) -> np.ndarray:
    """Rank correlations (measures, accuracies) of runs (N, measures + accuracies); NaN where all are alike."""
    ranks = rankdata(np.where(np.isfinite(x), x, -np.inf), axis=0)  # what cannot be measured is worst
    ranks = ranks - ranks.mean(0)
    size = np.sqrt((ranks**2).sum(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        all_pairs = ranks.T @ ranks / np.outer(size, size)
    return all_pairs[: len(MEASURES), len(MEASURES) :]


def verdict(found: Sequence[dict[str, Any]]) -> str:
    """In a word, of both accuracies: ``trust``, ``misleads``, or nothing."""
    if all(one["low"] > TRUSTED for one in found):
        return "trust"
    return "misleads" if any(one["high"] < MISLEADING for one in found) else ""


QUESTIONS = {"within a method": ("task", "method"), "across methods": ("task",)}


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Both questions, measures in the order of their mean correlation; the loss is compared within a method only."""
    summary = []
    for question, keys in QUESTIONS.items():
        found = [one for one in correlations(rows, keys) if "within" in question or one["measure"] != "minus_loss"]
        pairs = [(found[i : i + len(ACCURACIES)]) for i in range(0, len(found), len(ACCURACIES))]
        pairs.sort(key=lambda pair: -np.mean([one["correlation"] for one in pair]))
        summary += [{"question": question, "verdict": verdict(pair), **one} for pair in pairs for one in pair]
    return summary


def tables(summary: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """One of each question."""
    for question in QUESTIONS:
        rows = [one for one in summary if one["question"] == question]
        if not rows:
            continue
        table = Table(title=f"Spearman's rank correlation with accuracy {question}: {rows[0]['runs']} runs, 95 %")
        for column in ("measure", *ACCURACIES, "worst group", ""):
            table.add_column(column)
        for i in range(0, len(rows), len(ACCURACIES)):
            pair = rows[i : i + len(ACCURACIES)]
            cells = [f"{one['correlation']:+.2f} ({one['low']:+.2f} to {one['high']:+.2f})" for one in pair]
            worst = min(pair, key=lambda one: one["worst"])
            table.add_row(
                pair[0]["measure"], *cells, f"{worst['worst']:+.2f} {worst['worst_group']}", pair[0]["verdict"]
            )
        yield table


def draw(summary: Sequence[dict[str, Any]], path: Path) -> None:
    """Intervals of every measure, one panel per question."""
    figure, axes = plt.subplots(1, len(QUESTIONS), figsize=(12, 5.5), sharex=True)
    for axis, question in zip(axes, QUESTIONS, strict=True):
        rows = [one for one in summary if one["question"] == question]
        names = list(dict.fromkeys(one["measure"] for one in rows))[::-1]
        if not names:
            continue
        for offset, accuracy in zip((0.15, -0.15), ACCURACIES, strict=True):
            of_accuracy = {one["measure"]: one for one in rows if one["accuracy"] == accuracy}
            centre = np.array([of_accuracy[name]["correlation"] for name in names])
            reach = np.abs([[of_accuracy[name][end] for name in names] for end in ("low", "high")] - centre)
            axis.errorbar(centre, np.arange(len(names)) + offset, xerr=reach, fmt="o", capsize=2, label=accuracy)
        axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(title=question, xlabel="rank correlation with accuracy", xlim=(-1, 1))
    axes[-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    """Run what is missing, then show and write the summary and draw it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks selection", description=__doc__)
    parser.add_argument("--rows", type=Path, default=environment.RESULTS / "selection.csv", help="CSV file of the runs")
    parser.add_argument("--report", action="store_true", help="only report finished runs")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="folder of the tasks' drawn views")
    options, console = parser.parse_args(arguments), Console()
    torch.set_num_threads(1)
    if not options.report:
        run_missing(options, console)
    rows = environment.read(options.rows)
    if not rows:
        raise SystemExit(f"{options.rows} has no finished runs to report")
    summary = summarise(rows)
    for table in tables(summary):
        console.print(table)
    path = options.rows.with_name(f"{options.rows.stem}-summary.csv")
    path.unlink(missing_ok=True)
    for one in summary:
        rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in one.items()}
        environment.append(path, rounded)
    draw(summary, options.rows.with_suffix(".png"))
    console.print(f"summary: {path}; picture: {options.rows.with_suffix('.png')}")
