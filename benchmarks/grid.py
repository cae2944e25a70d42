"""Grids of training runs: cells in, rows of a CSV file out.

Every finished cell is one row, appended at once; cells whose row is there are skipped, so an interrupted grid goes on
where it stopped. Cells run in the order given, in single-threaded worker processes. Put seeds outermost: an early stop
then leaves every other choice measured equally often. A row is a summary; the accuracy over the steps is kept in
``runs/histories``, from where pictures take it.

>>> cells = [Cell("latent", "mmi", 64, 64, seed, 2e-3, steps=2) for seed in (0, 1)]
>>> cells += [Cell("latent", "snr=16.0", 64, 64, 0, 2e-3, steps=2)]
>>> [cell.method for cell in missing(cells, Path("no such file.csv"))]
['mmi', 'mmi', 'snr=16.0']
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import data, environment, losses, plots, training
from benchmarks.training import Cell

Finished = tuple[dict[str, Any], list[dict[str, float]]]
"""The row of a cell and its history."""
BACKBONES = {"latent": "mlp", "photographs": "residual", "glyphs": "residual"}
"""Of tasks that are not the small embedded images; ``pixels`` of the method of that name."""


def parser(name: str, text: str | None, tasks: Sequence[str], methods: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The options that all commands which train a grid have in common."""
    shared = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=text)
    shared.add_argument(
        "--tasks", nargs="+", choices=data.TASKS, default=list(tasks), metavar="TASK", help=", ".join(data.TASKS)
    )
    if methods:
        known = f"{', '.join([*losses.FIXED, *losses.LOSSES, losses.SUPERVISED])}, or options such as snr=256"
        shared.add_argument(
            "--methods", nargs="+", type=losses.method, default=list(methods), metavar="METHOD", help=known
        )
    shared.add_argument("--folder", type=Path, help="where the data of a task that is not embedded lie")
    shared.add_argument("--photographs", metavar="DIR", help="folder of Fashion-MNIST (docs/data.md)")
    shared.add_argument("--num-photographs", type=int, help="of 60,000, to train on (default 12000)")
    shared.add_argument("--fonts", nargs="+", metavar="DIR", help="folders of fonts for glyphs, not matplotlib's")
    shared.add_argument("--seeds", type=int, default=3)
    shared.add_argument("--workers", type=int, default=1, help="processes with a thread each; 1: this one, all threads")
    shared.add_argument("--accelerator", default="cpu", help="Lightning's")
    shared.add_argument("--out", type=Path, default=environment.RUNS / name, help="folder for results and pictures")
    shared.add_argument("--report", action="store_true", help="train nothing: report finished runs")
    return shared


def missing(cells: Sequence[Cell], path: Path) -> list[Cell]:
    """The cells that have no row in the CSV file yet."""
    finished = {row["cell"] for row in environment.read(path)}
    return [cell for cell in cells if cell.key not in finished]


def rows_of(cells: Sequence[Cell], path: Path) -> list[environment.Row]:
    """The finished rows of the cells, in the file's order."""
    wanted = {cell.key for cell in cells}
    return [row for row in environment.read(path) if row["cell"] in wanted]


def history(row: environment.Row) -> list[dict[str, float]]:
    """The points of a row's run, where this machine has it."""
    path = environment.RUNS / "histories" / f"{row['cell']}.json"
    return json.loads(path.read_text()) if path.exists() else []


@dataclass(frozen=True)
class Means:
    """With what a grid is run; nothing of it should change a result.

    ``workers`` is the number of processes (1: this one), ``folder`` where data lie that are not embedded, ``cache``
    that of drawn views; ``quick`` draws fewer of them.
    """

    workers: int = 1
    accelerator: str = "cpu"
    folder: Path | None = None
    quick: bool = False
    cache: Path = environment.RUNS / "cache"

    @classmethod
    def of(cls, options: argparse.Namespace, quick: bool = False) -> Means:
        """As the command line has them. Call it before making cells: folders of data are part of a cell's key."""
        data.configure(options.photographs, options.num_photographs, options.fonts)
        return cls(options.workers, options.accelerator, options.folder, quick)


AXES = {"step": "optimiser steps", "seconds": "seconds of training"}


def draw(rows: Sequence[environment.Row], path: Path, x: Sequence[str] = ("step",)) -> Path | None:
    """KNN accuracy as lines, one per method: a panel per task, size and ``x``. None where no run was made here."""
    runs: dict[tuple[str, str, str, str], list[list[dict[str, float]]]] = defaultdict(list)
    for row in rows:
        points = history(row)
        if points:
            runs[row["task"], row["projector_dim"], row["batch_size"], row["method"]].append(points)
    panels: dict[str, dict[str, plots.Line]] = defaultdict(dict)
    for (task, dim, n, method), found in runs.items():
        values = [[point["knn"] for point in points] for points in found]
        for across in x:
            steps = [sum(points[i][across] for points in found) / len(found) for i in range(len(found[0]))]
            title = f"{task}, D = {dim}, N = {n}\nkNN accuracy over {AXES[across]}"
            level = [] if method in losses.FIXED else steps
            panels[title][losses.title(method)] = plots.Line(level, values, plots.style(method))
    return plots.lines(panels, path) if panels else None


def run(cells: Sequence[Cell], path: Path, means: Means | None = None) -> None:
    """Run the cells that have no row in ``path`` yet.

    Raises:
        RuntimeError: Some cells failed; the others have their rows.
        SystemExit: Interrupted.
    """
    todo, means = missing(cells, path), means or Means()
    if not todo:
        return
    console = Console()
    for name in {cell.task for cell in todo}:  # before the workers would draw the same views at once
        console.print(f"data: {name}")
        _task(name, means)
    names = [TextColumn("{task.description:52}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps")]
    clocks = [TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(elapsed_when_finished=False)]
    failed: list[str] = []
    with Progress(*names, *clocks, console=console, speed_estimate_period=300) as progress:
        bar = progress.add_task("", total=sum(cell.steps for cell in todo))

        def finished(cell: Cell, result: Callable[[], Finished]) -> None:
            try:
                row, points = result()
            except Exception as error:  # one cell must not take the others with it
                failed.append(f"{cell.label}: {type(error).__name__}: {error}")
                console.print(f"failed: {failed[-1]}")
                return
            kept = environment.RUNS / "histories" / f"{cell.key}.json"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(points))
            environment.append(path, row)

        try:
            if means.workers <= 1:
                for cell in todo:
                    progress.update(bar, description=cell.label)
                    on_step = functools.partial(progress.advance, bar)
                    finished(cell, functools.partial(_run, cell, means, on_step))
            else:
                # Spawned, not forked: torch's threads do not survive a fork.
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(means.workers, context, _start_worker) as pool:
                    running: dict[Future[Finished], Cell] = {pool.submit(_run, cell, means): cell for cell in todo}
                    try:
                        while running:
                            for future in wait(running, return_when=FIRST_COMPLETED).done:
                                cell = running.pop(future)
                                finished(cell, future.result)
                                progress.update(bar, advance=cell.steps, description=cell.label)
                    except BaseException:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise
        except KeyboardInterrupt:
            console.print("\ninterrupted; the same command goes on from the last finished run")
            sys.exit(130)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(todo)} cells failed:\n" + "\n".join(failed))


def _start_worker() -> None:
    torch.set_num_threads(1)


@functools.lru_cache
def _task(name: str, means: Means) -> data.Task:
    return data.load(name, means.cache, means.folder, means.quick)


def _run(cell: Cell, means: Means, on_step: Callable[[], None] = lambda: None) -> Finished:
    is_cpu = means.accelerator == "cpu" or not torch.cuda.is_available()
    where = environment.columns("cpu" if is_cpu else "cuda")
    outcome = training.pretrain(_task(cell.task, means), cell, on_step, means.accelerator)
    measured = {
        "knn": round(outcome.knn, 4),
        "linear": round(outcome.linear, 4),
        "loss_ms": round(outcome.loss_ms, 3),
        "step_ms": round(outcome.step_ms, 2),
    }
    return {"cell": cell.key, **dataclasses.asdict(cell), **measured, **where}, outcome.history
