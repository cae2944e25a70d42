"""Accuracy against the learning rate, of every method under one budget: which rate it wants, how far off it may be.

A grid of every task, optimiser and method grows until its best rate is inside; ``--rates`` tries given ones instead.
``demo`` takes its rates from the stored rows (``--out benchmarks/results``), ``compare`` grows grids of its own in the
same way. The score is the mean of kNN and linear accuracy.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import environment, grid, losses, plots, report
from benchmarks.environment import Row
from benchmarks.training import OPTIMIZERS, Cell

Which = tuple[str, ...]
"""A task, an optimiser and a method; or whatever else has a grid of its own."""
METHODS = ("mmi", "mmi_joint_all", "barlow_twins", "vicreg", "visreg", "lejepa", "supervised")
START = {"adamw": (1e-3, 4e-3), "lars": (2.0, 8.0), "sgd": (0.03, 0.12), "sgd-plain": (0.3, 1.2)}
FACTOR, ROUNDS = 4.0, 4
NEAR = 0.02
"""A rate whose score is within this of the best does as well."""


def network_options(parser: argparse.ArgumentParser) -> None:
    """The budget and the network, the same for every method."""
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps per run")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--dim", type=int, default=1024, help="width D of the projector")
    parser.add_argument("--backbone", default="conv", help="conv, tiny, resnet18 or resnet50")
    parser.add_argument("--precision", default="32-true", help="Lightning's: 32-true, 16-mixed, bf16-mixed")


def cell(task: str, method: str, seed: int, rate: float, options: argparse.Namespace, **changes: Any) -> Cell:
    """A run by the network options."""
    settings: dict[str, Any] = {"optimizer": "lars", "evaluations": 6, "own": True}  # its own: times are shown
    settings |= {"backbone": grid.BACKBONES.get(task, options.backbone), "precision": options.precision, **changes}
    sizes = (options.dim, options.batch_size)
    return Cell(task, method, *sizes, seed, rate, options.steps, hidden_dim=options.dim, **settings)


def best(rows: Iterable[Row]) -> float:
    """The rate of the highest score."""
    return max((report.score(row), float(row["learning_rate"])) for row in rows)[1]


def grow(
    tried: dict[Which, list[float]],
    cell: Callable[[Which, float], Cell],
    path: Path,
    means: grid.Means,
    rounds: int = ROUNDS,
    factor: float = FACTOR,
) -> dict[Which, float]:
    """Every grid's best rate; grids whose best is at an edge are continued there, ``rounds`` times at most.

    ``tried`` has the rates to begin with, and afterwards all.
    """

    def measure() -> dict[Which, float]:
        cells = {which: [cell(which, rate) for rate in rates] for which, rates in tried.items()}
        grid.run(list(itertools.chain(*cells.values())), path, means)
        return {which: best(grid.rows_of(path, of_which)) for which, of_which in cells.items()}

    found = measure()
    for _ in range(rounds - 1):
        for which, rates in tried.items():
            if found[which] == min(rates):
                rates.insert(0, min(rates) / factor)
            elif found[which] == max(rates):
                rates.append(max(rates) * factor)
        found = measure()
    return found


def stored(task: str, optimizer: str, fallback: str = "digits") -> dict[str, float]:
    """The best stored rate by method; of ``fallback`` where the task has no grid."""
    files = sorted(environment.RESULTS.rglob("rates.csv"))
    grids = _grids([row for path in files for row in environment.read(path)])

    def of(name: str) -> dict[str, float]:
        return {which[2]: best(found) for which, found in grids.items() if which[:2] == (name, optimizer)}

    return of(task) or of(fallback)


def table(rows: list[Row], *tasks: str) -> str:
    """Every method's best rate, its score, and the rates that come near it; marked where the best is at an edge."""
    lines = []
    for (task, optimizer, method), found in _grids(rows).items():
        if tasks and task not in tasks:
            continue
        scores = {float(row["learning_rate"]): report.score(row) for row in found}
        top = best(found)
        near = [rate for rate, score in scores.items() if score >= scores[top] - NEAR]
        edge = " (edge)" if len(scores) > 1 and top in (min(scores), max(scores)) else ""
        tried = ", ".join(f"{rate:g}: {scores[rate]:.3f}" for rate in sorted(scores))
        within = f"{min(near):g} to {max(near):g}, x {max(near) / min(near):g}"
        lines.append([task, optimizer, losses.title(method), f"{top:g}{edge}", f"{scores[top]:.3f}", within, tried])
    return report.table(["task", "optimiser", "", "best rate", "score", f"within {NEAR:g} of it", "tried"], lines)


def _grids(rows: list[Row]) -> dict[Which, list[Row]]:
    """By task, optimiser and method, in the registry's order."""
    order = report.in_order(row["method"] for row in rows)
    grids: dict[Which, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["task"], row["optimizer"], order.index(row["method"]))):
        grids[row["task"], row["optimizer"], row["method"]].append(row)
    return grids


def draw(rows: list[Row], path: Path) -> Path:
    """Scores over rates, a panel per task and optimiser."""
    panels: dict[str, dict[str, plots.Line]] = defaultdict(dict)
    for (task, optimizer, method), found in _grids(rows).items():
        by_rate: dict[float, list[float]] = defaultdict(list)
        for row in found:
            by_rate[float(row["learning_rate"])].append(report.score(row))
        rates = sorted(by_rate)
        values = list(map(list, zip(*(by_rate[rate] for rate in rates), strict=False)))  # the seeds that all have
        panels[f"{task}, {optimizer}"][losses.title(method)] = plots.Line(rates, values, plots.style(method))
    return plots.lines(panels, path, xlabel="learning rate", ylabel="mean of kNN and linear accuracy", xscale="log")


def main(arguments: list[str]) -> None:
    """Run what is missing, print the table, draw the picture."""
    parser = grid.parser("rates", __doc__, ["digits"], METHODS)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["lars"], metavar="OPTIMIZER")
    parser.add_argument("--rates", nargs="+", type=float, help="in place of grids that grow")
    network_options(parser)
    parser.set_defaults(seeds=1)
    options = parser.parse_args(arguments)
    path, means = options.out / "rates.csv", grid.Means.of(options)
    for seed in range(0 if options.report else options.seeds):
        grids = itertools.product(options.tasks, options.optimizers, options.methods)
        tried: dict[Which, list[float]] = {which: list(options.rates or START[which[1]]) for which in grids}

        def make(which: Which, rate: float, seed: int = seed) -> Cell:
            task, optimizer, method = which
            return cell(task, method, seed, rate, options, optimizer=optimizer, evaluations=1, own=False)

        grow(tried, make, path, means, 1 if options.rates else ROUNDS)
    rows = grid.rows_of(path, task=options.tasks)
    print(table(rows))
    print(f"picture: {draw(rows, options.out / 'rates.png')}")
