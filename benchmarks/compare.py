"""Methods x projector widths x batch sizes x seeds on several tasks, under one budget.

Every method gets the same backbone, projector, views, steps and optimiser (AdamW), its loss with its library's
published settings, and the best learning rate of a grid of its own (one cell per task, a seed that is not compared).
Finished runs are kept: the same command goes on where it stopped. Ends with tables, a map of the differences to the
best rival, and accuracy over the steps. A smaller comparison of everything is ``--dims 512 --batch-sizes 256``.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

from benchmarks import environment, grid, plots, rates, report
from benchmarks.environment import Row
from benchmarks.losses import FIXED, PIXELS, SUPERVISED, UNTRAINED, is_rival, title
from benchmarks.report import METRICS, Results
from benchmarks.training import Cell

TASKS = ("digits", "clutter", "latent")
METHODS = (UNTRAINED, "mmi", "vicreg", "barlow_twins", "simclr", "lejepa", "visreg")
DIMS = (64, 128, 512, 2048, 8192)
BATCH_SIZES = (32, 64, 128, 256, 512, 1024)
STEPS = {"latent": 200, "photographs": 300, "glyphs": 300}
"""Optimiser steps at N = 256, where they are not 150; others take 16 / sqrt(N) times as many."""
RATES = (4e-3, 1.6e-2)
TUNING_SEED = 100
TUNING_SIZE = (512, 256)


def main(arguments: list[str]) -> None:
    """Tune, run what is missing, then show the tables and draw the pictures."""
    parser = grid.parser("compare", __doc__, TASKS, METHODS)
    parser.add_argument("--dims", nargs="+", type=int, default=list(DIMS), help="widths D of the projector")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=list(BATCH_SIZES))
    parser.add_argument("--steps", type=int, help="optimiser steps at N = 256, in place of each task's own")
    parser.add_argument("--rates", nargs="+", type=float, help="try these instead of the grids, report each one's best")
    options = parser.parse_args(arguments)
    path, means = options.out / "compare.csv", grid.Means.of(options)
    rows = environment.read(path)
    if not options.report:
        chosen = {} if options.rates else tune(options, options.out / "rates.csv", means)
        wanted = cells(options, chosen)
        grid.run(wanted, path, means)
        rows = grid.rows_of(wanted, path)  # without those of a rate that a larger grid has overtaken
    rows = [row for row in at_best_rates(rows) if row["task"] in options.tasks and row["method"] in options.methods]
    if not rows:
        raise SystemExit(f"{path} has no finished runs to report")
    print(table(rows), environment.provenance(rows), sep="\n\n")
    for dim, batch_size in sorted({cell[1:] for cell in Results(rows).cells}):
        print(f"\n{table(rows, str(dim), str(batch_size))}")
    # At the width in the middle: all of them would be a wall.
    dims = sorted({row["projector_dim"] for row in rows}, key=int)
    middle = [row for row in rows if row["projector_dim"] == dims[len(dims) // 2]]
    pictures = draw_map(rows, path.with_name("compare-map.png")), grid.draw(middle, path.with_name("compare-steps.png"))
    print(*(f"picture: {picture}" for picture in pictures if picture), sep="\n")


def steps(task: str, batch_size: int, at_256: int | None = None) -> int:
    """The budget of a run in optimiser steps."""
    return max(1, round((at_256 or STEPS.get(task, 150)) * (256 / batch_size) ** 0.5))


def cell(
    task: str, method: str, size: tuple[int, int], seed: int, rate: float, at_256: int | None, points: int
) -> Cell:
    """A run of the comparison."""
    budget, backbone = steps(task, size[1], at_256), PIXELS if method == PIXELS else grid.BACKBONES.get(task, "tiny")
    return Cell(task, method, *size, seed, rate, budget, evaluations=points, backbone=backbone)


def cells(options: argparse.Namespace, chosen: dict[rates.Which, float]) -> list[Cell]:
    """The comparison, seeds outermost, then sizes, those that share a side with the tuned one first."""
    every = [(dim, batch_size) for dim in options.dims for batch_size in options.batch_sizes]
    every.sort(key=lambda size: size[0] != TUNING_SIZE[0] and size[1] != TUNING_SIZE[1])
    return [
        cell(task, method, size, seed, rate, options.steps, 3)
        for seed in range(options.seeds)
        for size in every
        for method in options.methods
        for task in options.tasks
        for rate in (options.rates if options.rates and method not in FIXED else [chosen.get((task, method), 0.0)])
        if method not in (*FIXED, SUPERVISED) or size == every[0]  # it is the same at all sizes
    ]


def tune(options: argparse.Namespace, path: Path, means: grid.Means) -> dict[rates.Which, float]:
    """The best learning rate of every task and method.

    A coarse grid grows until it brackets the best one. The rivals are then tried at half and at twice theirs; our own
    losses are left at the coarse grid, so that what the search leaves to chance is to the rivals' advantage.
    """

    def make(which: rates.Which, rate: float) -> Cell:
        return cell(*which, TUNING_SIZE, TUNING_SEED, rate, options.steps, 1)  # type: ignore[arg-type]

    methods = [method for method in options.methods if method not in FIXED]
    tried: dict[rates.Which, list[float]] = {(t, m): list(RATES) for m in methods for t in options.tasks}
    found = rates.grow(tried, make, path, means)
    for which, of_which in tried.items():
        of_which += [found[which] / 2, found[which] * 2] if is_rival(which[1]) else []
    return rates.grow(tried, make, path, means, rounds=1)


def at_best_rates(rows: list[Row]) -> list[Row]:
    """The rows of each task's and method's best rate in the first seed, where several were tried."""
    by_method: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        by_method[row["task"], row["method"]].append(row)
    kept = {}
    for which, found in by_method.items():
        first = min(int(row["seed"]) for row in found)
        kept[which] = rates.best(row for row in found if int(row["seed"]) == first)
    return [row for row in rows if float(row["learning_rate"]) == kept[row["task"], row["method"]]]


def table(rows: list[Row], dim: str = "", batch_size: str = "") -> str:
    """Accuracy of every method at one size; without a size, ours against the best rival of every cell."""
    results = Results(at_best_rates(rows))
    if dim:
        lines = []
        for method in results.methods:
            line = [title(method)]
            for task in results.tasks:
                of = [results.of((task, int(dim), int(batch_size)), method, metric) for metric in ("knn", "linear")]
                line.append(" / ".join(f"{statistics.fmean(values.values()):.3f}" for values in of if values))
            if any(line[1:]):
                lines.append(line)
        heads = [f"{task}: kNN / linear" for task in results.tasks]
        return report.table([f"D = {dim}, N = {batch_size}", *heads], lines, bold=title("mmi"))
    lines = []
    for found in results.cells:
        best = [results.against_best(found, metric) for metric in METRICS]
        if any(best):
            shown = [f"{pair[1]} ({title(pair[0])}, {pair[1].seeds})" if pair else "" for pair in best]
            lines.append([f"{found[0]}, D = {found[1]}, N = {found[2]}", *shown])
    return report.table(["MMI less the best rival (seeds)", *METRICS.values()], lines)


def draw_map(rows: list[Row], path: Path) -> Path | None:
    """The picture of ours against the best rival of every cell; none where there is no such pair."""
    results = Results(rows)
    maps: dict[tuple[str, str], dict[tuple[int, int], plots.Patch]] = defaultdict(dict)
    for metric, name in METRICS.items():
        for found in results.cells:
            best = results.against_best(found, metric)
            if best:
                rival, difference = best
                patch = plots.Patch(difference.mean, difference.is_clear, difference.seeds, title(rival))
                maps[name, found[0]][found[1:]] = patch
    return plots.difference_maps(maps, path) if maps else None
