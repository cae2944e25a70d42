"""Time and memory on the CPU of the loss against every rival and against the bytes that must move.

All losses of a shape take turns in one process, each timed call after an untimed one of the same loss and with its
inputs out of the cache; medians and quartiles over the turns. "floor" reads both inputs and writes both gradients: two
copies into new memory, which autograd cannot do without; "floor_reused" copies into memory that is there already.
"floor_gram" and "floor_covariance" are the matrix products that the exact routes cannot do without. Memory is the
allocator's: the peak of what a forward and backward allocate, without the inputs and their gradients. Rows of shapes
that are not measured again stay in the CSV file.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks import environment, plots
from benchmarks.losses import LOSSES, MAX_WMSE_DIM, Criterion, solo_learn

SHAPES = list(itertools.product((64, 256, 1024, 4096), (128, 512, 2048, 8192)))
FLOORS = ("floor", "floor_reused", "floor_gram", "floor_covariance")
SOLO = {"solo_barlow": "barlow", "solo_vicreg": "vicreg"}
ALWAYS_NEW_BYTES = 32 * 2**20
"""glibc takes blocks of this size from the system and gives them back, unless freed ones of other sizes happen to make
room: whether a gradient pays for new pages would be chance. The chance is taken away; all such blocks are new.
"""
EVICTION_BYTES = 256 * 2**20
MAX_MATRIX_BYTES = 1.5 * 2**30
"""A loss is skipped where its largest square matrix exceeds this: it does not fit beside its autograd copies."""
# Rows of the largest square matrix a loss builds.
MATRIX_ROWS: dict[str, Callable[[int, int], int]] = {
    "barlow_twins": lambda n, d: d,
    "solo_barlow": lambda n, d: d,
    "vicreg": lambda n, d: d,
    "solo_vicreg": lambda n, d: d,
    "corinfomax": lambda n, d: d,
    "mmi_naive": lambda n, d: d,
    "frossl": lambda n, d: min(n, d),
    "mmcr": lambda n, d: math.isqrt(n) * d,  # its svd makes a D x D matrix of every sample
    "mmi_all": lambda n, d: min(2 * n, d),
    "mmi_all_exchangeable": lambda n, d: min(2 * n, d),
    "mmi_all_joint": lambda n, d: min(n, 2 * d),
    "mmi_paper": lambda n, d: min(n, 2 * d),
}
SLICE_DIMS = {"mmi_k32": 32, "mmi": 128, "mmi_k512": 512}
SECONDS_PER_LOSS = 3.0
SLOW_SECONDS = 0.5
"""Calls that take longer are not preceded by an untimed one."""
CUBIC_SECONDS = 20.0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks speed", description=__doc__)
    parser.add_argument("--shapes", nargs="+", metavar="NxD", help="such as 256x2048 1024x8192 (default: all)")
    names = [*LOSSES, *SOLO, *FLOORS]
    parser.add_argument("--losses", nargs="+", choices=names, default=names, metavar="LOSS")
    parser.add_argument("--solo-learn", type=Path, metavar="PATH", help="a clone of solo-learn, for its losses")
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bf16-autocast"), default=["float32"])
    parser.add_argument("--turns", type=int, default=11, help="turns of fast losses; slow ones get fewer")
    parser.add_argument("--out", type=Path, help="CSV file (default benchmarks/results/speed-cpu.csv)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Measure, append to the CSV, print the tables, draw the pictures."""
    options = parse(arguments)
    warnings.filterwarnings("ignore", message=".*(objective=|lr_scheduler).*")
    out = options.out or environment.RESULTS / "speed-cpu.csv"
    shapes = [_shape(text) for text in options.shapes] if options.shapes else SHAPES
    console = Console()
    losses = {**LOSSES, **_of_solo_learn(options.solo_learn)}
    _keep_other_shapes(out, shapes, options.precisions)
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=len(shapes) * len(options.precisions))
        for (n, dim), precision in itertools.product(shapes, options.precisions):
            progress.update(bar, description=f"N={n} D={dim} {precision}")
            for row in measure(n, dim, precision, losses, options):
                environment.append(out, row)
            progress.advance(bar)
    report(environment.read(out), console)
    for picture in plots.speed(environment.read(out), out.with_suffix("")):
        console.print(f"picture: {picture}")


def _keep_other_shapes(path: Path, shapes: list[tuple[int, int]], precisions: list[str]) -> None:
    kept = [
        row
        for row in environment.read(path)
        if (int(row["n"]), int(row["d"])) not in shapes or row["precision"] not in precisions
    ]
    path.unlink(missing_ok=True)
    for row in kept:
        environment.append(path, row)


def _shape(text: str) -> tuple[int, int]:
    try:
        n, dim = map(int, text.lower().split("x"))
    except ValueError:
        raise SystemExit(f"--shapes {text}: expected NxD, such as 256x2048") from None
    return n, dim


def fits(name: str, n: int, dim: int) -> bool:
    """Whether a loss can run at a shape, in memory and by its own requirements."""
    if name == "wmse" and not (dim <= MAX_WMSE_DIM and n > dim):
        return False
    if name in ("floor_gram", "floor_covariance"):
        return (2 * n < dim) == (name == "floor_gram")
    rows = MATRIX_ROWS.get(name, lambda n, d: 0)(n, dim)
    return rows**2 * 4 <= MAX_MATRIX_BYTES and _cubic_seconds(name, rows) < CUBIC_SECONDS


def _cubic_seconds(name: str, rows: int) -> float:
    # Factorisations of very large matrices take minutes; products do not.
    return rows**3 * 5e-11 if name in ("mmi_naive", "corinfomax") or name.startswith("mmi_all") else 0.0


def measure(
    n: int, dim: int, precision: str, losses: dict[str, Callable[[int, int], Criterion]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per loss for one shape."""
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(n, dim, generator=generator)
    views = [content + 0.5 * torch.randn(n, dim, generator=generator) for _ in range(2)]
    leaves = [z.requires_grad_() for z in views]
    steps: dict[str, dict[str, Callable[[], Any]]] = {}
    for name in options.losses:
        if name in FLOORS and fits(name, n, dim):
            steps[name] = _floor(name, views)
        elif name in losses and fits(name, n, dim):
            steps[name] = _steps(losses[name](n, dim), leaves, precision)
    eviction = torch.zeros(EVICTION_BYTES // 4)
    times: dict[tuple[str, str], list[float]] = {}
    spent = dict.fromkeys(steps, 0.0)
    latest: dict[tuple[str, str], float] = {}
    for turn in range(options.turns + 1):
        for name, by_kind in steps.items():
            if turn > 2 and spent[name] > SECONDS_PER_LOSS:
                continue
            for kind, step in by_kind.items():
                if latest.get((name, kind), 0.0) < SLOW_SECONDS:
                    # What the allocator holds is then the loss's own, not what a rival has left of it.
                    step()
                for z in leaves:
                    z.grad = None
                eviction.add_(1)
                if leaves[0].nbytes >= ALWAYS_NEW_BYTES:
                    _give_back_freed_memory()
                latest[name, kind] = seconds = _timed(step)
                spent[name] += seconds
                if turn:  # the first turn warms up
                    times.setdefault((name, kind), []).append(seconds)
    rows = []
    for (name, kind), seconds in times.items():
        quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
        peak = _peak_bytes(steps[name][kind], leaves) if name not in FLOORS else 0
        rows.append(
            {
                "loss": name,
                "n": n,
                "d": dim,
                "precision": precision,
                "pass": kind,
                "median_ms": _significant(statistics.median(seconds) * 1e3),
                "q1_ms": _significant(quartiles[0] * 1e3),
                "q3_ms": _significant(quartiles[2] * 1e3),
                "turns": len(seconds),
                "peak_extra_mib": _significant(peak / 2**20),
                "input_mib": _significant(n * dim * 4 / 2**20),
                **environment.columns("cpu"),
            }
        )
    return rows


def _of_solo_learn(checkout: Path | None) -> dict[str, Callable[[int, int], Criterion]]:
    functions = solo_learn(checkout, list(SOLO.values())) if checkout else {}
    return {name: lambda n, dim, f=functions[file]: f for name, file in SOLO.items() if file in functions}


def _steps(criterion: Criterion, leaves: list[Tensor], precision: str) -> dict[str, Any]:
    def forward() -> Tensor:
        is_autocast = precision != "float32"
        context = torch.autocast("cpu", torch.bfloat16) if is_autocast else contextlib.nullcontext()
        with context:
            return criterion(*leaves)

    return {"forward+backward": lambda: forward().backward(), "forward": forward}


def _floor(name: str, views: list[Tensor]) -> dict[str, Any]:
    a, b = (z.detach() for z in views)
    if name == "floor":
        return {"forward+backward": lambda: [z.clone() for z in (a, b)]}
    if name == "floor_reused":
        outputs = [torch.empty_like(z) for z in (a, b)]
        return {"forward+backward": lambda: [out.copy_(z) for out, z in zip(outputs, (a, b), strict=True)]}
    if name == "floor_gram":  # three N x N blocks forward, four products with them backward
        square = torch.zeros(len(a), len(a), device=a.device)
        return {"forward+backward": lambda: [[a @ a.T, a @ b.T, b @ b.T], [square @ a for _ in range(4)]]}
    square = torch.zeros(a.shape[1], a.shape[1], device=a.device)
    return {"forward+backward": lambda: [[a.T @ a, b.T @ b], [a @ square, b @ square]]}


def _give_back_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc's alone
        trim(0)


def _timed(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def _peak_bytes(step: Callable[[], Any], leaves: list[Tensor]) -> int:
    """Peak of what a call allocates, less what outlives it (the gradients)."""
    for z in leaves:
        z.grad = None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports the GPU that it does not find as an error
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    # Grown and shrunk in time order; an allocation that is never freed is a result.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events)
    gradient = leaves[0].nbytes
    live = peak = 0
    kept = [size for size in (gradient, gradient) if any(z.grad is not None for z in leaves)]
    # The gradients are the last allocations of an input's size.
    for index in range(len(changes) - 1, -1, -1):
        if kept and changes[index][1] == gradient:
            kept.pop()
            del changes[index]
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def _significant(value: float) -> float:
    return float(f"{value:.4g}")


def report(rows: list[dict[str, str]], console: Console) -> None:
    """Ratios to ours per shape, and how cost grows."""
    shapes = sorted({(int(row["n"]), int(row["d"])) for row in rows})
    for precision, kind in itertools.product(sorted({r["precision"] for r in rows}), ("forward+backward", "forward")):
        table = Table(title=f"{kind}, {precision}: milliseconds, and in brackets how many times the default's")
        table.add_column("")
        for n, dim in shapes:
            table.add_column(f"{n}x{dim}", justify="right")
        cells = {
            (r["loss"], int(r["n"]), int(r["d"])): r for r in rows if (r["precision"], r["pass"]) == (precision, kind)
        }
        for loss in dict.fromkeys(r["loss"] for r in rows):
            texts = [_cell(cells, loss, n, dim) for n, dim in shapes]
            if any(texts):
                table.add_row(loss, *texts)
        console.print(table)
    memory = Table(title="peak extra memory of forward and backward, gradients excluded, in sizes of one input")
    memory.add_column("")
    for n, dim in shapes:
        memory.add_column(f"{n}x{dim}", justify="right")
    for loss in dict.fromkeys(r["loss"] for r in rows if r["loss"] not in FLOORS):
        peaks = {
            (int(r["n"]), int(r["d"])): float(r["peak_extra_mib"]) / float(r["input_mib"])
            for r in rows
            if (r["loss"], r["pass"], r["precision"]) == (loss, "forward+backward", "float32")
        }
        memory.add_row(loss, *(f"{peaks[s]:.2f}" if s in peaks else "" for s in shapes))
    console.print(memory)
    console.print(_growth(rows))
    console.print(_growth_with_slice_dim(rows))


def _cell(cells: dict[Any, dict[str, str]], loss: str, n: int, dim: int) -> str:
    if (loss, n, dim) not in cells:
        return ""
    median = float(cells[loss, n, dim]["median_ms"])
    ours = cells.get(("mmi", n, dim))
    return f"{median:.3g}" + (f" ({median / float(ours['median_ms']):.3g})" if ours and loss != "mmi" else "")


def _growth(rows: list[dict[str, str]]) -> Table:
    """Exponents of a power law in N and D, by least squares on the logarithms of the larger shapes."""
    table = Table(title="growth of time with N and D: time ~ N^p D^q, least squares over N, D >= 256")
    for column in ("", "p", "q", "shapes"):
        table.add_column(column)
    for loss in dict.fromkeys(r["loss"] for r in rows):
        points = [
            (math.log(int(r["n"])), math.log(int(r["d"])), math.log(float(r["median_ms"])))
            for r in rows
            if (r["loss"], r["pass"], r["precision"]) == (loss, "forward+backward", "float32")
            and int(r["n"]) >= 256
            and int(r["d"]) >= 256
        ]
        if len({p[0] for p in points}) > 1 and len({p[1] for p in points}) > 1:
            logs = np.array(points)
            design = np.column_stack([logs[:, :2], np.ones(len(logs))])
            (p, q, _), *_ = np.linalg.lstsq(design, logs[:, 2], rcond=None)
            table.add_row(loss, f"{p:.2f}", f"{q:.2f}", str(len(points)))
    return table


def _growth_with_slice_dim(rows: list[dict[str, str]]) -> Table:
    """Exponents of a power law in k, where the slice is smaller than D and than N."""
    table = Table(title="growth of ours with the slice's dimension: time ~ k^r")
    for column in ("N x D", "k", "r"):
        table.add_column(column)
    times = {
        (int(r["n"]), int(r["d"]), SLICE_DIMS[r["loss"]]): float(r["median_ms"])
        for r in rows
        if r["loss"] in SLICE_DIMS and (r["pass"], r["precision"]) == ("forward+backward", "float32")
    }
    for n, dim in sorted({key[:2] for key in times}):
        found = sorted((k, ms) for (*shape, k), ms in times.items() if tuple(shape) == (n, dim) and k <= min(n, dim))
        if len(found) > 1:
            slope, _ = np.polyfit(*np.log(np.array(found)).T, 1)
            table.add_row(f"{n} x {dim}", ", ".join(str(k) for k, _ in found), f"{slope:.2f}")
    return table
