"""The truncated series beside the exact log-determinant: its information on real embeddings, its bounds, its time."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Measurement, Timer

from benchmarks import data, environment, grid, training
from mmi_loss import MMILoss
from mmi_loss.functional import mmi_loss
from mmi_loss.objectives import OBJECTIVES
from mmi_loss.options import Options

Row = dict[str, str]
ORDERS = (1, 2, 3, 4, 5, 6)
BETAS = (0.5, 0.75, 1.0, 1.5)
SLICE_DIMS = (32, 128, None)
NUM_SLICES = 4
SIZES = (128, 512)
TURNS = 3
DIM, BATCH_SIZE = 512, 256


class _Recorder(MMILoss):
    """The default loss; it keeps the embeddings of its last batch."""

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        self.views = z_a.detach(), z_b.detach()
        return super().forward(z_a, z_b)


def embeddings(task: str, steps: int, rate: float, cache: Path) -> tuple[Tensor, Tensor]:
    """The last batch's projections, two of (256, 512) in float64, of a run of the default loss."""
    recorder = _Recorder()
    settings = training.Settings(
        steps=steps,
        batch_size=BATCH_SIZE,
        projector_dim=DIM,
        hidden_dim=grid.HIDDEN_DIM,
        backbone=grid.BACKBONES[task],
        optimizer="adamw",
        evaluations=1,
    )
    training.pretrain(data.load(task, None, cache), lambda gather: recorder, rate, 0, settings, accelerator="cpu")
    z_a, z_b = recorder.views
    return z_a.double(), z_b.double()


def is_bound(objective: str, order: int, beta: float) -> bool:
    """Whether the series is never above the exact information, as its remainder r(x) = log(1 + x) - f(x) shows.

    Content, [log det T - log det W] / 2 with T >= W (as for covariances; samples deviate by chance correlations): where
    the slope of r is positive: for even orders everywhere, for odd ones at beta <= 1. Joint and exchangeable, whose
    blocks are a pinching of the whole: where r is concave: at beta <= 1, for odd orders at any beta.
    """
    if objective == "content":
        return order % 2 == 0 or beta <= 1
    return order % 2 == 1 or beta <= 1


def values(z_a: Tensor, z_b: Tensor) -> Iterator[dict[str, Any]]:
    """The information in nats by every objective, on slices and all features, exact and by the series."""
    for objective in OBJECTIVES:
        for slice_dim in SLICE_DIMS:
            options: dict[str, Any] = {"objective": objective, "slice_dim": slice_dim}
            if slice_dim:
                options["num_slices"] = NUM_SLICES
            exact = -float(mmi_loss(z_a, z_b, **options))
            row = {"objective": objective, "features": slice_dim or z_a.shape[1], "exact": exact}
            for order in ORDERS:
                for beta in BETAS:
                    nats = -float(mmi_loss(z_a, z_b, logdet="taylor", order=order, beta=beta, **options))
                    bounded = is_bound(objective, order, beta)
                    yield {**row, "order": order, "beta": beta, "nats": nats, "bound": bounded}


def times(n: int, turns: int = TURNS, seconds: float = 0.2) -> Iterator[dict[str, Any]]:
    """CPU time of two log-determinants of n x n matrices with gradients, by factorisation (order 0) and series.

    The methods take turns, so that all meet the same disturbances; time in which other processes ran does not count.
    """
    x = torch.randn(2, 4 * n, n, generator=torch.Generator().manual_seed(0))
    matrices = torch.stack([torch.corrcoef(samples.T) for samples in x]) * (64 / n) + torch.eye(n)
    methods = {0: Options().log_det, **{p: Options(logdet="taylor", order=p).log_det for p in ORDERS}}
    measured: dict[int, list[Measurement]] = {order: [] for order in methods}
    for _ in range(turns):
        for order, method in methods.items():
            names = {"method": method, "matrices": matrices}
            timer = Timer("method([matrices], [0], (-1.0, 1.0))", globals=names, timer=time.process_time)
            measured[order].append(timer.blocked_autorange(min_run_time=seconds))
    merged = {order: Measurement.merge(several)[0] for order, several in measured.items()}
    for order, timing in merged.items():
        yield {
            "n": n,
            "order": order,
            "median_ms": round(1e3 * timing.median, 4),
            "iqr_ms": round(1e3 * timing.iqr, 4),
            "ratio": round(timing.median / merged[0].median, 3),
            "noisy": bool(timing.has_warnings) or os.getloadavg()[0] > (os.cpu_count() or 1),
        }


def measure_values(tasks: list[str], steps: int, rate: float, path: Path, cache: Path) -> None:
    """Write the information in embeddings of the first batch, before anything is learnt, and of the last."""
    path.unlink(missing_ok=True)
    where = environment.columns()
    for task in tasks:
        for of_steps in (1, steps):
            z_a, z_b = embeddings(task, of_steps, rate, cache)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="objective=")
                for row in values(z_a, z_b):
                    row |= {"exact": round(row["exact"], 6), "nats": round(row["nats"], 6)}
                    environment.append(path, {"task": task, "embedding": f"step {of_steps}", **row, **where})


def measure_times(path: Path) -> None:
    """Write the times, of one thread."""
    path.unlink(missing_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    where = environment.columns()
    for n in SIZES:
        for row in times(n):
            environment.append(path, {**row, **where})
    torch.set_num_threads(threads)


def violations(rows: list[Row]) -> list[Row]:
    """Rows whose series lies above the exact information although it should be a bound."""
    return [row for row in rows if row["bound"] == "True" and float(row["nats"]) > float(row["exact"]) + 1e-5]


def tables(rows: list[Row], time_rows: list[Row]) -> Iterator[Table]:
    """The trained embeddings' information by order and beta, and the times."""
    trained = [row for row in rows if row["embedding"] != "step 1"]
    for task in dict.fromkeys(row["task"] for row in trained):
        table = Table(title=f"{task}, trained: information in nats, exact and by the series (order / beta)")
        columns = [(order, beta) for beta in BETAS for order in (2, 4, 6)]
        for name in ("objective", "features", "exact", *(f"{order} / {beta:g}" for order, beta in columns)):
            table.add_column(name, justify="left" if name == "objective" else "right")
        found = {
            (row["objective"], row["features"], int(row["order"]), float(row["beta"])): row
            for row in trained
            if row["task"] == task
        }
        for objective in OBJECTIVES:
            for features in dict.fromkeys(row["features"] for row in trained):
                line = [found[objective, features, order, beta] for order, beta in columns]
                nats = [f"{float(row['nats']):.2f}" for row in line]
                table.add_row(objective, features, f"{float(line[0]['exact']):.2f}", *nats)
        yield table
    table = Table(title="two log-determinants with gradients, one thread: CPU time of the series over that of Cholesky")
    for name in ("n", "Cholesky, ms", *(f"order {order}" for order in ORDERS), "noisy"):
        table.add_column(name, justify="right")
    for n in dict.fromkeys(row["n"] for row in time_rows):
        line = [row for row in time_rows if row["n"] == n]
        noisy = "yes" if any(row["noisy"] == "True" for row in line) else ""
        table.add_row(n, f"{float(line[0]['median_ms']):.2f}", *(f"{float(r['ratio']):.2f}" for r in line[1:]), noisy)
    yield table
