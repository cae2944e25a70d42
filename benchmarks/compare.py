"""Methods x projector widths x batch sizes x seeds on small tasks, embedded ones or real images, under one budget.

Every method gets the same backbone, projector, views, steps and optimiser (AdamW), its loss with its library's
published settings, and the best learning rate of a grid of its own (one cell per task, a seed that is not compared).
Baselines far behind the best of a cell in the first seed are not repeated there. Finished runs are kept: the same
command goes on where it stopped. Ends with tables, a map of the differences to the best baseline, and a self-contained
HTML report; ``--report`` draws them from finished runs alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from rich.console import Console

from benchmarks import data, environment, grid, report
from benchmarks.grid import Cell

TASKS = ("digits", "clutter", "latent")
REAL_TASKS = ("photographs", "glyphs")
DIMS = (64, 128, 512, 2048, 8192)
BATCH_SIZES = (32, 64, 128, 256, 512, 1024)
CORE = ("mmi", "vicreg_fast", "barlow_twins_fast", "simclr", "lejepa")
SECONDARY = ("mmi_exchangeable", "mmi_joint", "mmi_joint_all", "mmi_paper", "frossl", "wmse")
METHODS = (grid.UNTRAINED, *CORE, *SECONDARY)
REFERENCES = (grid.UNTRAINED, grid.PIXELS, grid.SUPERVISED)
"""What does not depend on the loss, once per task."""

RIVALS = ("visreg", "visreg_09", "simclr_02", "simclr_01", "mmcr")
"""Methods on demand, in every cell."""
SECONDARY_CELLS = ((512, 256), (2048, 64))
WMSE_CELLS = ((128, 256), (128, 512))
STEPS = {"digits": 150, "clutter": 150, "latent": 200, "photographs": 300, "glyphs": 300}
"""Optimiser steps at N = 256; others take 16 / sqrt(N) times as many, between equal steps and equal epochs."""

BEHIND = 0.05
"""A baseline whose first seed is this much below the best of its cell is not the best in the mean: seeds differ by .01
to .02. It runs once there.
"""
RATES = (4e-3, 1.6e-2)
RATE_FACTOR = 4.0
MAX_RATE_ROUNDS = 3
TUNING_SEED = 100
TUNING_CELL = (512, 256)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=(*TASKS, *REAL_TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(dict.fromkeys((*METHODS, *REFERENCES, *RIVALS))),
        default=list(METHODS),
        metavar="METHOD",
    )
    parser.add_argument("--dims", nargs="+", type=int, default=list(DIMS), help="widths D of the projector")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=list(BATCH_SIZES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="optimiser steps at N = 256, in place of each task's own")
    parser.add_argument(
        "--rates", nargs="+", type=float, metavar="RATE", help="try these in place of the grids, report each one's best"
    )
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder for results, report and cache")
    parser.add_argument("--report", action="store_true", help="only draw the report of finished runs")
    parser.add_argument("--photographs", metavar="DIR", help="folder of Fashion-MNIST (docs/data.md)")
    parser.add_argument("--num-photographs", type=int, help="of 60,000, to train on (default 12000)")
    parser.add_argument("--fonts", nargs="+", metavar="DIR", help="folders of fonts for glyphs, not matplotlib's")
    options = parser.parse_args(arguments)
    data.configure(options.photographs, options.num_photographs, options.fonts)
    return options


def main(arguments: list[str]) -> None:
    """Tune, run what is missing, then show the tables and write the report."""
    options, console = parse(arguments), Console()
    results, rates = options.out / "compare.csv", options.out / "compare-rates.csv"
    chosen = {} if options.rates else report.best_rates(environment.read(rates))
    if not options.report:
        try:
            chosen = {} if options.rates else tune(options, rates, console)
            for seeds in range(1, options.seeds + 1):
                todo = contenders(cells(options, chosen, seeds), environment.read(results))
                grid.run(todo, results, options.out / "cache", options.workers, console)
        except KeyboardInterrupt:
            console.print("\ninterrupted; the same command goes on from the last finished run")
            sys.exit(130)
    # Rows of a rate that a larger grid has overtaken are kept in the file, not compared.
    wanted = {cell.key for cell in cells(options, chosen, options.seeds)}
    rows = [row for row in environment.read(results) if row["cell"] in wanted]
    if not rows:
        raise SystemExit(f"{results} has no finished runs to report")
    rows = report.at_best_rates(rows)
    for table in report.tables(rows):
        console.print(table)
    console.print(
        f"map: {report.draw_map(rows, results.with_name('compare-map.png')) or 'no baseline to compare with'}"
    )
    console.print(f"accuracy over steps: {report.draw_steps(rows, results.with_name('compare-steps.png'))}")
    console.print(f"report: {report.write(rows, environment.read(rates), results.with_suffix('.html'))}")


def steps(task: str, batch_size: int, at_256: int | None = None) -> int:
    """The budget of a run in optimiser steps."""
    return max(1, round((at_256 or STEPS[task]) * (256 / batch_size) ** 0.5))


def cells(options: argparse.Namespace, rates: dict[tuple[str, str], float], seeds: int) -> list[Cell]:
    """The comparison in the order of what matters: the core across the middle sizes, then in the corners, then the
    other methods on some cells; seeds outermost.
    """
    every = [(dim, batch_size) for dim in options.dims for batch_size in options.batch_sizes]
    across = [size for size in every if size[0] == TUNING_CELL[0] or size[1] == TUNING_CELL[1]]
    corners = [size for size in every if size not in across]
    core = [m for m in options.methods if m in (*CORE, *RIVALS)]
    others = [m for m in options.methods if m in SECONDARY]
    fixed = [m for m in options.methods if m in grid.FIXED]
    supervised = [m for m in options.methods if m == grid.SUPERVISED]
    passes = [
        (fixed, every[:1]),
        (supervised, across[:1] or every[:1]),
        (core, across),
        (core, corners),
        (others, every),
    ]
    chosen = []
    for seed in range(seeds):
        for methods, sizes in passes:
            for dim, batch_size in sizes:
                for method in methods:
                    if method in SECONDARY and (dim, batch_size) not in _cells_of_secondary(method):
                        continue
                    for task in options.tasks:
                        budget = steps(task, batch_size, options.steps)
                        tries = [] if method in grid.FIXED else options.rates
                        for rate in tries or [rates.get((task, method), 0.0)]:
                            chosen.append(Cell(task, method, dim, batch_size, seed, rate, budget))
    return chosen


def contenders(chosen: list[Cell], rows: list[report.Row]) -> list[Cell]:
    """The cells without the further seeds of baselines that are far behind the best one in their first."""
    first = {(_size(c), c.method, c.learning_rate): c.key for c in chosen if c.seed == 0}
    scores = {row["cell"]: (float(row["knn"]) + float(row["linear"])) / 2 for row in rows}
    best: dict[tuple[str, int, int], float] = {}
    for (size, method, _), key in first.items():
        score = scores.get(key, math.nan)
        if method in report.BASELINES and not math.isnan(score):
            best[size] = max(best.get(size, 0.0), score)

    def is_behind(cell: Cell) -> bool:
        score = scores.get(first[_size(cell), cell.method, cell.learning_rate], math.inf)
        return not score >= best.get(_size(cell), 0.0) - BEHIND  # divergence is a NaN

    return [c for c in chosen if c.seed == 0 or c.method not in report.BASELINES or not is_behind(c)]


def _size(cell: Cell) -> report.CellName:
    return cell.task, cell.projector_dim, cell.batch_size


def _cells_of_secondary(method: str) -> tuple[tuple[int, int], ...]:
    # W-MSE whitens with the D x D covariance of a batch: the library demands N >= 2 D.
    return WMSE_CELLS if method == "wmse" else SECONDARY_CELLS


def tune(options: argparse.Namespace, path: Path, console: Console) -> dict[tuple[str, str], float]:
    """The best learning rate of every task and method.

    A coarse grid grows until it brackets the best one. The baselines are then tried at half and at twice theirs; our
    own losses are left at the coarse grid, so that what the search leaves to chance is to the baselines' advantage.
    """
    tried = {
        (task, method): list(RATES) for method in options.methods for task in options.tasks if method not in grid.FIXED
    }

    def measure() -> dict[tuple[str, str], float]:
        todo = [_tuning_cell(options, *which, rate) for which, tries in tried.items() for rate in tries]
        grid.run(todo, path, options.out / "cache", options.workers, console)
        return report.best_rates(environment.read(path), todo)

    best = measure()
    for _ in range(MAX_RATE_ROUNDS - 1):
        for which, tries in tried.items():
            if best[which] == min(tries):
                tries.insert(0, min(tries) / RATE_FACTOR)
            elif best[which] == max(tries):
                tries.append(max(tries) * RATE_FACTOR)
        best = measure()
    for (task, method), tries in tried.items():
        if method in report.BASELINES:
            tries += [best[task, method] / 2, best[task, method] * 2]
    return measure()


def _tuning_cell(options: argparse.Namespace, task: str, method: str, rate: float) -> Cell:
    dim, batch_size = WMSE_CELLS[0] if method == "wmse" else TUNING_CELL
    budget = steps(task, batch_size, options.steps)
    return Cell(task, method, dim, batch_size, TUNING_SEED, rate, budget, evaluations=1)
