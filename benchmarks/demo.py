"""MMI beside Barlow Twins and VICReg on real images: one budget, one network, the same views, each method's best
learning rate of a grid. Ends with a table and a picture. Finished runs are kept, so an interrupted demo goes on
where it stopped; ``--fresh`` starts over.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import data, environment, plots, training
from benchmarks.methods import METHODS

ROWS = ("untrained", "mmi_joint_all", "barlow_twins", "vicreg", "mmi", "supervised")
SUPERVISED_LEARNING_RATE = 8.0
OTHER_TITLES = {"untrained": "untrained backbone", "supervised": "supervised (with labels)"}
QUICK = {"steps": 60, "projector_dim": 512, "evaluations": 3}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's options."""
    default = training.Settings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks demo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and few steps: does it run?")
    parser.add_argument(
        "--data",
        nargs="+",
        default=["digits"],
        metavar=("NAME", "PATH"),
        help="digits (embedded), or cifar10, cifar100 or imagefolder and the folder it lies in",
    )
    parser.add_argument("--methods", nargs="+", choices=[*ROWS, *METHODS], default=list(ROWS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help=f"optimiser steps per run (default {default.steps})")
    parser.add_argument("--backbone", choices=("conv", "resnet18", "resnet50"), default=default.backbone)
    parser.add_argument(
        "--projector-dim", type=int, help=f"width D of the embeddings (default {default.projector_dim})"
    )
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="samples per device")
    parser.add_argument("--devices", type=int, default=default.devices)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default=default.precision, help="Lightning's: 32-true, 16-mixed, bf16-mixed")
    parser.add_argument(
        "--optimizer", choices=("lars", "adamw"), default=default.optimizer, help="adamw: one rate for all"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for results, picture and cache")
    parser.add_argument("--fresh", action="store_true", help="forget finished runs")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Run what is missing, then show the table and draw the picture."""
    options = parse(arguments)
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # with --devices, Lightning starts this command once per rank
    console = Console(quiet=not is_first)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|objective=|treespec|lr_scheduler).*")
    chosen: dict[str, Any] = {"steps": options.steps, "projector_dim": options.projector_dim}
    chosen = {**(QUICK if options.quick else {}), **{name: value for name, value in chosen.items() if value}}
    settings = dataclasses.replace(
        training.Settings(**chosen),
        batch_size=options.batch_size,
        backbone=options.backbone,
        devices=options.devices,
        precision=options.precision,
        optimizer=options.optimizer,
    )
    seeds = range(1 if options.quick else options.seeds)
    name, path = options.data[0], options.data[1] if len(options.data) > 1 else None
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / f"{name}-{_key([name, path, options.quick, dataclasses.asdict(settings)])}.csv"
    if options.fresh:
        results.unlink(missing_ok=True)
    with console.status("loading data (digits: drawing their views, once)"):
        task = data.load(name, path, options.out / "cache", options.quick)
    console.print(
        f"{task.name}: {task.num_images} training images; {settings.steps} steps of {settings.batch_size} x 2 views, "
        f"backbone {settings.backbone}, D = {settings.projector_dim}, {len(seeds)} seed(s). Results: {results}"
    )
    try:
        _train_missing(task, settings, options, list(seeds), results, console)
    except KeyboardInterrupt:
        console.print("\ninterrupted; the same command goes on from the last finished run")
        sys.exit(130)
    if not is_first:
        return
    rows = [row for row in environment.read(results) if row["method"] in options.methods]
    console.print(_table(rows, options.methods, settings))
    picture = plots.accuracy_over_steps(rows, _titles(options.methods), results.with_suffix(".png"))
    console.print(f"picture: {picture}")


def _titles(methods: list[str]) -> dict[str, str]:
    return {name: OTHER_TITLES[name] if name in OTHER_TITLES else METHODS[name].title for name in methods}


def _key(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def _train_missing(
    task: data.Task,
    settings: training.Settings,
    options: argparse.Namespace,
    seeds: list[int],
    results: Path,
    console: Console,
) -> None:
    finished = {(row["method"], int(row["seed"])) for row in environment.read(results)}
    # Seeds outermost: an early stop leaves every method measured equally often.
    missing = [(m, seed) for seed in seeds for m in options.methods if (m, seed) not in finished]
    steps = {m: 0 if m == "untrained" else settings.steps for m in options.methods}
    columns = [
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(elapsed_when_finished=False),
    ]
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        bar = progress.add_task("", total=sum(steps[m] for m, _ in missing))
        titles = _titles(options.methods)
        for method, seed in missing:
            progress.update(bar, description=f"{titles[method]}, seed {seed}")
            known = METHODS.get(method)
            outcome = training.pretrain(
                task,
                known.criterion if known else None,
                _learning_rate(method, settings.optimizer),
                seed,
                dataclasses.replace(settings, steps=steps[method]),
                lambda: progress.advance(bar),
                options.accelerator,
            )
            row = {
                "method": method,
                "seed": seed,
                "knn": round(outcome.knn, 4),
                "linear": round(outcome.linear, 4),
                "loss_ms": round(outcome.loss_ms, 3),
                "step_ms": round(outcome.step_ms, 2),
                "history": json.dumps(outcome.history),
                "data": task.name,
                **dataclasses.asdict(settings),
                **environment.columns("cuda" if torch.cuda.is_available() and options.accelerator != "cpu" else "cpu"),
            }
            if os.environ.get("LOCAL_RANK", "0") == "0":
                environment.append(results, row)


def _learning_rate(method: str, optimizer: str) -> float:
    if optimizer == "adamw":
        return training.ADAMW_RATE
    return METHODS[method].learning_rate if method in METHODS else SUPERVISED_LEARNING_RATE


def _spread(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _table(rows: list[dict[str, str]], methods: list[str], settings: training.Settings) -> Table:
    table = Table(title=f"accuracy under nuisances, mean ± standard deviation over seeds, D = {settings.projector_dim}")
    for column in ("", "kNN", "linear probe", "loss, ms per step", "share of the step"):
        table.add_column(column, justify="right" if column else "left")
    for method, title in _titles(methods).items():
        of_method = [row for row in rows if row["method"] == method]
        if not of_method:
            continue
        values = {k: [float(row[k]) for row in of_method] for k in ("knn", "linear", "loss_ms", "step_ms")}
        is_timed = all(value == value for value in values["loss_ms"])
        loss_ms, step_ms = statistics.median(values["loss_ms"]), statistics.median(values["step_ms"])
        timing = (f"{loss_ms:.1f}", f"{loss_ms / step_ms:.0%}") if is_timed else ("", "")
        style = "bold" if method == "mmi" else None
        table.add_row(title, _spread(values["knn"]), _spread(values["linear"]), *timing, style=style)
    return table
