"""What every choice in the loss is worth: one thing exchanged at a time, under one budget.

Backbone, projector, views and optimiser are those of ``compare``, the learning rate is the one it found for the default
loss, the runs are shorter. Finished runs are kept: the same command goes on where it stopped. Ends with a table per study and
pictures; ``--report`` draws them from finished runs alone. ``--only series-values`` measures the series itself: its
information beside the exact one's, and its time beside a Cholesky factorisation's.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import compare, environment, grid, report
from benchmarks.grid import Cell
from mmi_loss.functional import Options

TASKS = ("latent", "digits")
DIM, BATCH_SIZE = 512, 256
RATES = environment.RESULTS / "compare-rates.csv"
STEPS = 100
"""Optimiser steps at N = 256; others take 16 / sqrt(N) times as many."""
DEFAULTS = vars(Options())


@dataclass(frozen=True)
class Setting:
    """Options that are not the default's, and the sizes."""

    options: dict[str, Any] = field(default_factory=dict)
    dim: int = DIM
    batch_size: int = BATCH_SIZE

    @property
    def method(self) -> str:
        """The same in every study, so that they share the run."""
        words = [str(value) if name == "estimator" else f"{name}={value}" for name, value in self.options.items()]
        return ", ".join(words) or "mmi"

    @property
    def title(self) -> str:
        """The method, and sizes that are not the default's."""
        sizes = [f"D={self.dim}"] * (self.dim != DIM) + [f"N={self.batch_size}"] * (self.batch_size != BATCH_SIZE)
        name = "default" if self.method == "mmi" else self.method
        return ", ".join([name, *sizes]) if name != "default" or not sizes else ", ".join(sizes)


def _mmi(**options: Any) -> Setting:
    """``MMILoss(**options)``; what equals the default is left out."""
    return Setting({name: value for name, value in options.items() if value != DEFAULTS[name]})


def _estimator(name: str, **options: Any) -> Setting:
    return Setting({"estimator": name, **options})


DEFAULT = Setting()
LOW_RIDGE = 0.01
"""In place of the noise floor where shrinkage or nothing at all takes its part."""
STUDIES = {
    "objective": [
        *(_mmi(objective=objective) for objective in ("content", "exchangeable", "joint")),
        *(_mmi(objective=objective, slice_dim=k) for k in (32, None) for objective in ("content", "joint")),
    ],
    "order": [
        DEFAULT,
        *(_mmi(logdet="taylor", order=order) for order in (4, 1, 2, 3, 5, 6)),
        _mmi(objective="joint", slice_dim=32),
        _mmi(objective="joint", slice_dim=32, logdet="taylor"),
    ],
    "rescaling": [
        DEFAULT,
        _mmi(logdet="taylor"),
        *(_estimator("rescaled", scale=scale) for scale in ("matrix", "constant", "detached")),
        _estimator("plain", ridge=LOW_RIDGE),
        _estimator("rescaled", scale="unscaled", ridge=LOW_RIDGE),
    ],
    "beta": [DEFAULT, *(_mmi(logdet="taylor", beta=beta) for beta in (0.5, 0.75, 1.0, 1.5))],
    "snr": [_mmi(snr=snr) for snr in (4.0, 16.0, 64.0, 256.0)],
    "slice_dim": [_mmi(slice_dim=k) for k in (32, 64, 128, 256, None)],
    "slice_kind": [_mmi(slice_kind=kind) for kind in ("kronecker", "gaussian", "coordinates")] + [_mmi(slice_dim=None)],
    "width": [Setting(dim=dim) for dim in (128, 512, 2048)],
    "batch_size": [Setting(batch_size=n) for n in (64, 256, 512)],
    "shrinkage": [
        DEFAULT,
        _estimator("plain", ridge=LOW_RIDGE),
        *(_estimator("shrunk", intensity=name, ridge=LOW_RIDGE) for name in ("oas", "ledoit_wolf")),
        _mmi(objective="joint"),
        _estimator("shrunk", intensity="oas", ridge=LOW_RIDGE, objective="joint"),
    ],
    "momentum": [
        DEFAULT,
        *(_estimator("running", momentum=momentum) for momentum in (0.0, 0.9)),
        _mmi(objective="joint"),
        _estimator("running", momentum=0.9, objective="joint"),
    ],
    "num_slices": [DEFAULT, _mmi(num_slices=4), _mmi(slice_dim=32), _mmi(slice_dim=32, num_slices=4)],
    "snr x slice_dim": [_mmi(snr=snr, slice_dim=k) for snr in (16.0, 64.0, 256.0) for k in (32, 128, None)],
}
"""Each contains the default; what several studies need is run once. In the order of what matters."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ablate", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=(*STUDIES, "series-values"), metavar="STUDY", help="studies to run"
    )
    parser.add_argument("--tasks", nargs="+", choices=compare.TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps at N = 256")
    parser.add_argument("--rate", type=float, help="learning rate, in place of the one compare found for the default")
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="folder for results, pictures and cache")
    parser.add_argument("--report", action="store_true", help="only show the tables and pictures of finished runs")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Run what is missing, then show the tables and draw the pictures."""
    options, console = parse(arguments), Console()
    results = options.out / "ablate.csv"
    if not options.report:
        try:
            grid.run(cells(options), results, options.out / "cache", options.workers, console)
        except KeyboardInterrupt:
            console.print("\ninterrupted; the same command goes on from the last finished run")
            sys.exit(130)


def cells(options: argparse.Namespace) -> list[Cell]:
    """All runs: seeds outermost, so that an early stop leaves every choice measured equally often; then the studies."""
    rates = report.best_rates(environment.read(RATES))
    settings = {setting.title: setting for name in options.only or STUDIES for setting in STUDIES[name]}
    untrained = [Cell(task, grid.UNTRAINED, DIM, BATCH_SIZE, 0, 0.0, 0, 1) for task in options.tasks]
    return untrained + [
        cell(setting, task, seed, options, rates)
        for seed in range(options.seeds)
        for setting in settings.values()
        for task in options.tasks
    ]


def cell(
    setting: Setting, task: str, seed: int, options: argparse.Namespace, rates: dict[tuple[str, str], float]
) -> Cell:
    """The run of a setting."""
    return Cell(
        task,
        setting.method,
        setting.dim,
        setting.batch_size,
        seed,
        options.rate or rates[task, "mmi"],
        compare.steps(task, setting.batch_size, options.steps),
        evaluations=1,
        options=setting.options,
    )
