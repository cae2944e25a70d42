"""What every choice in the loss is worth: one thing exchanged at a time, under one budget.

Backbone, projector, views and optimiser are those of ``compare``, the learning rate is the one it found for the default
loss, the runs are shorter. Finished runs are kept: the same command goes on where it stopped. Ends with a table per
study and pictures; ``--report`` draws them from finished runs alone. The studies
``series-values`` and ``series-times`` measure the series itself: its information beside the exact one's on embeddings,
and its time beside a Cholesky factorisation's.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks import compare, environment, grid, plots, report, series
from benchmarks.grid import Cell
from mmi_loss.options import Options

TASKS = ("latent", "digits")
DIM, BATCH_SIZE = 512, 256
RATE = 1.6e-2
"""AdamW's: the best of the grid of ``compare`` for the default loss, on all three tasks."""
STEPS = 100
"""Optimiser steps at N = 256; others take 16 / sqrt(N) times as many."""
DEFAULTS = Options().given()


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
    def reference(self) -> Setting:
        """What it is compared with: the default at the same sizes; a default at other sizes, with the default."""
        return Setting(dim=self.dim, batch_size=self.batch_size) if self.options else Setting()

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


def _rule(batch_size: int) -> list[Setting]:
    """The default and what could take its place at a batch size; more directions than samples take a ridge."""
    tried = [DEFAULT]
    tried += [
        _mmi(snr=snr) if snr <= batch_size else _mmi(ridge=DEFAULTS["slice_dim"] / snr)
        for snr in (16.0, 32.0, 64.0, 128.0, 256.0)
        if snr != min(DEFAULTS["snr"], batch_size)
    ]
    tried += [_mmi(slice_dim=k) for k in (64, 256, None)]
    tried += [_mmi(slice_kind="coordinates"), _mmi(num_slices=4)]
    tried += [_estimator("queue", length=3), _estimator("cross_fitted")]
    tried += [_estimator("weighted", within=within) for within in (0.9, 1.1)]
    # Over what every budget has: the shortest is 50 steps.
    moving = [(start, end) for start, end in ((8.0, 64.0), (256.0, 64.0)) if start <= batch_size]
    tried += [_estimator("annealed", start=start, end=end, steps=50) for start, end in moving]
    return [dataclasses.replace(setting, batch_size=batch_size) for setting in tried]


LOW_RIDGE = 0.01
"""In place of the noise floor where shrinkage or nothing at all takes its part."""
MAP = "snr x slice_dim"
"""The study that is drawn as a map."""
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
    "beta": [DEFAULT, *(_mmi(logdet="taylor", beta=beta) for beta in (0.5, 0.75, 1.0, 1.5, 1.75))],
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
    **{f"rule, N={n}": _rule(n) for n in (32, 256, 1024)},
    MAP: [_mmi(snr=snr, slice_dim=k) for snr in (16.0, 64.0, 256.0) for k in (32, 128, None)],
}
"""Each contains the default; what several studies need is run once. In the order of what matters."""
SERIES = ("series-values", "series-times")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ablate", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=(*STUDIES, *SERIES), metavar="STUDY", help="studies to run")
    parser.add_argument("--tasks", nargs="+", choices=compare.TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps at N = 256")
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate")
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="folder for results, pictures and cache")
    parser.add_argument("--report", action="store_true", help="only show the tables and pictures of finished runs")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Run what is missing, then show the tables and draw the pictures."""
    options, console = parse(arguments), Console()
    out = options.out
    wanted = options.only or [*STUDIES, *SERIES]
    studies = [name for name in STUDIES if name in wanted]
    paths = {"series-values": out / "series.csv", "series-times": out / "series-times.csv"}
    if not options.report:
        try:
            grid.run(cells(studies, options), out / "ablate.csv", out / "cache", options.workers, console)
            if "series-values" in wanted:
                series.measure_values(options.tasks, options.steps, options.rate, paths["series-values"], out / "cache")
            if "series-times" in wanted:
                series.measure_times(paths["series-times"])
        except KeyboardInterrupt:
            console.print("\ninterrupted; the same command goes on from the last finished run")
            sys.exit(130)
    results = Results(environment.read(out / "ablate.csv"), options)
    for name in studies:
        console.print(results.table(name))
    panels = results.panels(studies)
    if panels:
        console.print(f"picture: {plots.effects(panels, out / 'ablate.png')}")
    if MAP in studies:
        console.print(f"picture: {plots.heat_maps(results.maps(), out / 'ablate-maps.png')}")
    rows, times = (environment.read(path) for path in paths.values())
    if rows and set(SERIES) & set(wanted):
        for table in series.tables(rows, times):
            console.print(table)
        console.print(f"{len(series.violations(rows))} of {sum(r['bound'] == 'True' for r in rows)} bounds violated")
        console.print(f"picture: {plots.series_gaps(rows, times, out / 'ablate-series.png')}")


def cells(studies: Sequence[str], options: argparse.Namespace) -> list[Cell]:
    """All runs: seeds outermost, so that an early stop leaves every choice measured equally often; then the studies."""
    settings = {setting.title: setting for name in studies for setting in STUDIES[name]}
    return [_untrained(task) for task in options.tasks if studies] + [
        cell(setting, task, seed, options.steps, options.rate)
        for seed in range(options.seeds)
        for setting in settings.values()
        for task in options.tasks
    ]


def cell(setting: Setting, task: str, seed: int, steps: int, rate: float) -> Cell:
    """The run of a setting."""
    budget = compare.steps(task, setting.batch_size, steps)
    return Cell(
        task,
        setting.method,
        setting.dim,
        setting.batch_size,
        seed,
        rate,
        budget,
        evaluations=1,
        options=setting.options,
    )


def _untrained(task: str) -> Cell:
    return Cell(task, grid.UNTRAINED, DIM, BATCH_SIZE, seed=0, learning_rate=0.0, steps=0, evaluations=1)


def _titles(study: str) -> list[str]:
    """The lines of a study's table; with the untrained network where some settings do no better."""
    return [setting.title for setting in STUDIES[study]] + [grid.UNTRAINED] * (study in ("objective", "rescaling"))


class Effect(NamedTuple):
    """Mean difference to the default over the seeds both have, and half of its 95 % interval."""

    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f}" + (f" ± {self.half:.3f}" if not math.isnan(self.half) else "")

    @property
    def style(self) -> str:
        """Of the table's cell."""
        return "" if not abs(self.mean) > self.half else "green" if self.mean > 0 else "red"


class Results:
    """Finished runs by setting, task and seed. The score is the mean of kNN and linear accuracy.

    Differences are paired: the same seed starts from the same network and sees the same batches. Two or three of them
    tell little about their own spread; so it is pooled over all settings of a task, weighted by degrees of freedom.
    """

    def __init__(self, rows: list[dict[str, str]], options: argparse.Namespace) -> None:
        self.tasks: list[str] = options.tasks
        by_key = {row["cell"]: row for row in rows}
        # By setting and task: kNN and linear accuracy by seed.
        self.accuracies: dict[tuple[str, str], dict[int, tuple[float, float]]] = defaultdict(dict)
        self.scores: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
        settings = {setting.title: setting for settings in STUDIES.values() for setting in settings}
        self.references = {title: setting.reference.title for title, setting in settings.items()}
        for task in self.tasks:
            wanted = [(grid.UNTRAINED, 0, _untrained(task))]
            for title, setting in settings.items():
                for seed in range(options.seeds):
                    wanted.append((title, seed, cell(setting, task, seed, options.steps, options.rate)))
            for title, seed, run in wanted:
                if run.key in by_key:
                    row = by_key[run.key]
                    # A run that diverged knows nothing.
                    knn, linear = (0.0 if math.isnan(v) else v for v in (float(row["knn"]), float(row["linear"])))
                    self.accuracies[title, task][seed] = knn, linear
                    self.scores[title, task][seed] = (knn + linear) / 2
        self.spread = {task: self._pooled_spread(list(settings), task) for task in self.tasks}

    def differences(self, title: str, task: str) -> list[float]:
        """By seed, to the default at the same sizes."""
        ours, default = self.scores[title, task], self.scores[self.references.get(title, DEFAULT.title), task]
        return [ours[seed] - default[seed] for seed in sorted(ours.keys() & default.keys())]

    def _pooled_spread(self, titles: Sequence[str], task: str) -> tuple[float, int]:
        """Standard deviation of a paired difference, and its degrees of freedom."""
        samples = [self.differences(title, task) for title in titles if title != DEFAULT.title]
        samples = [sample for sample in samples if len(sample) > 1]
        freedom = sum(len(sample) - 1 for sample in samples)
        squares = sum(statistics.variance(sample) * (len(sample) - 1) for sample in samples)
        return (math.sqrt(squares / freedom) if freedom else math.nan), freedom

    def effect(self, title: str, task: str) -> Effect | None:
        """The difference to the default; None where there is none."""
        found = self.differences(title, task)
        if not found or title == DEFAULT.title:
            return None
        deviation, freedom = self.spread[task]
        half = float(stats.t.ppf(0.975, freedom)) * deviation / len(found) ** 0.5 if freedom else math.nan
        return Effect(statistics.fmean(found), half, len(found))

    def table(self, study: str) -> Table:
        """Accuracies, mean and standard deviation over seeds, and the difference to the default's score."""
        table = Table(title=study, title_justify="left")
        table.add_column("setting", overflow="fold")
        for task in self.tasks:
            for name in ("kNN / linear", "to default"):
                table.add_column(f"{task}\n{name}", justify="right")
        for title in _titles(study):
            line = [title]
            for task in self.tasks:
                accuracies = self.accuracies[title, task].values()
                line.append("\n".join(report.spread(values) for values in zip(*accuracies, strict=True)))
                effect = self.effect(title, task)
                line.append(f"[{effect.style}]{effect}[/]" if effect and effect.style else str(effect or ""))
            table.add_row(*line)
        return table

    def panels(self, studies: Sequence[str]) -> dict[str, plots.Panel]:
        """Per study and setting, per task: the differences by seed and the half interval of their mean.

        Studies of which nothing is finished are left out.
        """
        return {
            study: {
                title: {
                    task: (self.differences(title, task), effect.half if effect else 0.0)
                    for task in self.tasks
                    for effect in [self.effect(title, task)]
                }
                for title in _titles(study)
            }
            for study in studies
            if study != MAP and any(self.scores[title, task] for title in _titles(study) for task in self.tasks)
        }

    def maps(self) -> dict[str, plots.Map]:
        """Mean scores over the noise floor and the slice, per task."""
        found: dict[str, plots.Map] = {}
        for task in self.tasks:
            for setting in STUDIES[MAP]:
                options = {**DEFAULTS, **setting.options}
                scores = self.scores[setting.title, task].values()
                place = f"{options['snr']:g}", str(options["slice_dim"] or f"all {DIM}")
                found.setdefault(task, {})[place] = statistics.fmean(scores) if scores else math.nan
        return found
