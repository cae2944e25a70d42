"""Grids of training runs: cells in, rows of a CSV file out.

A cell is one pretraining and its evaluation. Every finished cell is one row, appended at once; cells whose row is
there are skipped, so an interrupted grid goes on where it stopped. Cells run in the order given, in single-threaded
worker processes. Put seeds outermost: an early stop then leaves every other choice measured equally often.

>>> cells = [Cell("latent", "mmi", 64, 64, seed, 2e-3, steps=2) for seed in (0, 1)]
>>> cells += [Cell("latent", "mmi, snr 16", 64, 64, 0, 2e-3, steps=2, options={"snr": 16.0})]
>>> [cell.method for cell in missing(cells, Path("no such file.csv"))]
['mmi', 'mmi', 'mmi, snr 16']
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from benchmarks import data, environment, training
from benchmarks.estimators import ESTIMATORS
from benchmarks.methods import METHODS
from mmi_loss import MMILoss

HIDDEN_DIM = 512
BACKBONES = {"digits": "tiny", "clutter": "tiny", "latent": "mlp", "photographs": "residual", "glyphs": "residual"}
UNTRAINED, PIXELS, SUPERVISED = "untrained", "pixels", "supervised"
FIXED = (UNTRAINED, PIXELS)
"""Without training."""


@dataclass(frozen=True)
class Cell:
    """One run: a task, a method, and all that decides its outcome.

    ``method`` is a name of :data:`benchmarks.methods.METHODS`, ``"untrained"``, ``"pixels"`` or ``"supervised"``; with
    ``options``, any label of ``MMILoss(**options)``, or of the one of :data:`benchmarks.estimators.ESTIMATORS` that the
    option ``estimator`` names. ``learning_rate`` is AdamW's.
    """

    task: str
    method: str
    projector_dim: int
    batch_size: int
    seed: int
    learning_rate: float
    steps: int
    evaluations: int = 3
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names the cell in the CSV file; it changes with any of its fields."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True) + data.variant(self.task)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def criterion(self) -> Callable[[bool], nn.Module] | None:
        """What makes the criterion; None trains with labels."""
        if "estimator" in self.options:
            options = dict(self.options)
            estimator = ESTIMATORS[options.pop("estimator")]
            return lambda gather: estimator(**options)
        if self.options:
            return lambda gather: MMILoss(**self.options, gather_distributed=gather)
        if self.method == SUPERVISED:
            return None
        return METHODS["mmi" if self.method in FIXED else self.method].criterion


def missing(cells: Sequence[Cell], path: Path) -> list[Cell]:
    """The cells that have no row in the CSV file yet."""
    finished = {row["cell"] for row in environment.read(path)}
    return [cell for cell in cells if cell.key not in finished]


def run(cells: Sequence[Cell], path: Path, cache: Path, workers: int = 2, console: Console | None = None) -> None:
    """Run the cells that have no row in ``path`` yet, ``workers`` at a time (1: in this process).

    Args:
        cells: In the order they are to run.
        path: CSV file the rows are appended to.
        cache: Folder of the tasks' drawn views.
        workers: Processes, each with one thread.
        console: Where progress is shown.

    Raises:
        RuntimeError: Some cells failed; the others have their rows.
    """
    console = console or Console(quiet=True)
    todo = missing(cells, path)
    if not todo:
        return
    for name in {cell.task for cell in todo}:  # before the workers would draw the same views at once
        data.load(name, None, cache)
    columns = [TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TextColumn("cells")]
    columns += [TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(elapsed_when_finished=False)]
    failed: list[str] = []
    with Progress(*columns, console=console, speed_estimate_period=1800) as progress:
        bar = progress.add_task("", total=len(todo))

        def finished(cell: Cell, result: Callable[[], dict[str, Any]]) -> None:
            try:
                environment.append(path, result())
            except Exception as error:  # one cell must not take the others with it
                failed.append(f"{_label(cell)}: {type(error).__name__}: {error}")
                console.print(f"failed: {failed[-1]}")
            progress.update(bar, advance=1, description=_label(cell))

        if workers <= 1:
            for cell in todo:
                finished(cell, functools.partial(_run, cell, cache))
        else:
            # Spawned, not forked: torch's threads do not survive a fork.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, context, _start_worker) as pool:
                try:
                    _collect(pool, todo, cache, finished)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(todo)} cells failed:\n" + "\n".join(failed))


def _collect(
    pool: ProcessPoolExecutor,
    todo: Sequence[Cell],
    cache: Path,
    finished: Callable[[Cell, Callable[[], dict[str, Any]]], None],
) -> None:
    running: dict[Future[dict[str, Any]], Cell] = {pool.submit(_run, cell, cache): cell for cell in todo}
    while running:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            finished(running.pop(future), future.result)


def _label(cell: Cell) -> str:
    return f"{cell.task}, {cell.method}, D={cell.projector_dim}, N={cell.batch_size}, seed {cell.seed}"


def _start_worker() -> None:
    torch.set_num_threads(1)


@functools.lru_cache
def _task(name: str, cache: Path) -> data.Task:
    return data.load(name, None, cache)


# The commit of the code in memory, not of later ones made while the grid runs.
_environment = functools.lru_cache(environment.columns)


def _run(cell: Cell, cache: Path) -> dict[str, Any]:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|objective=|treespec|lr_scheduler).*")
    where = _environment()
    settings = training.Settings(
        steps=0 if cell.method in FIXED else cell.steps,
        batch_size=cell.batch_size,
        projector_dim=cell.projector_dim,
        hidden_dim=HIDDEN_DIM,
        backbone=PIXELS if cell.method == PIXELS else BACKBONES[cell.task],
        optimizer="adamw",
        evaluations=cell.evaluations,
    )
    outcome = training.pretrain(
        _task(cell.task, cache),
        cell.criterion(),
        cell.learning_rate,
        cell.seed,
        settings,
        accelerator="cpu",
        measure=True,
    )
    return {
        "cell": cell.key,
        **dataclasses.asdict(cell),
        "options": json.dumps(cell.options, sort_keys=True),
        "knn": round(outcome.knn, 4),
        "linear": round(outcome.linear, 4),
        "loss_ms": round(outcome.loss_ms, 3),
        "step_ms": round(outcome.step_ms, 2),
        "history": json.dumps(_rounded(outcome.history)),
        "measures": json.dumps(outcome.measures),
        "backbone": settings.backbone,
        "hidden_dim": HIDDEN_DIM,
        **where,
    }


def _rounded(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: round(value, 4) for name, value in point.items()} for point in history]
