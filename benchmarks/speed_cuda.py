"""The losses on a CUDA device: first whether the kernels are right, then how long they take and how many they are.

1. Error of every implementation of the default against float64, beside plain torch's in the same dtype. A loss that is
   worse than twice plain torch is not timed.
2. The rate at which this device copies: what a step that reads both inputs and writes both gradients cannot beat.
3. Per shape, dtype and loss: forward and backward by CUDA events, in turns with the cache emptied; the same captured in
   a CUDA graph and replayed; launches by the profiler; peak memory; bytes moved per second over the copy's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightly.loss
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import environment, speed
from benchmarks.losses import LOSSES
from mmi_loss import MMILoss

SHAPES = [(256, 2048), (256, 8192), (1024, 2048), (4096, 8192)]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
COPY_BYTES = 2**30
EVICTION_BYTES = 256 * 2**20

Criterion = Callable[[Tensor, Tensor], Tensor]
COMPILED = {
    "mmi_eager": lambda: MMILoss(impl="eager"),
    "barlow_twins": lightly.loss.BarlowTwinsLoss,
    "vicreg": lightly.loss.VICRegLoss,
}


def criteria(n: int, dim: int) -> dict[str, Callable[[], Criterion]]:
    """Every loss that fits in eager form, and ours and the two main rivals compiled; each is made when it is called."""
    made: dict[str, Callable[[], Criterion]] = {
        "mmi": lambda: MMILoss(impl="triton"),
        "mmi_eager": lambda: MMILoss(impl="eager"),
    }
    for name, factory in LOSSES.items():
        if name not in ("mmi", "mmi_compiled") and speed.fits(name, n, dim):
            made[name] = partial(factory, n, dim)
    for name, compiled_factory in COMPILED.items():
        made[f"{name}-compiled"] = partial(_compiled, compiled_factory)
    return made


def _compiled(factory: Callable[[], torch.nn.Module]) -> Criterion:
    return torch.compile(factory())


def main(options: argparse.Namespace) -> None:
    """Check, measure, append to the CSV files, print the tables."""
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here; nothing was measured")
    warnings.filterwarnings("ignore", message=".*(objective=|lr_scheduler).*")
    out = options.out or environment.RESULTS / "speed-cuda.csv"
    run(options.parsed_shapes or SHAPES, options.losses, options.turns, out, torch.device("cuda"), Console())


def run(
    shapes: list[tuple[int, int]], losses: list[str], turns: int, out: Path, device: torch.device, console: Console
) -> None:
    """The whole measurement. On a CPU, for trying the command out, there are no graphs and no launches."""
    checks_path = out.with_name(f"{out.stem}-checks.csv")
    for path in (out, checks_path):
        path.unlink(missing_ok=True)
    wrong = set()
    for (n, dim), (precision, dtype) in itertools.product(shapes, DTYPES.items()):
        for row in check(n, dim, dtype, device):
            environment.append(checks_path, {"precision": precision, **row, **environment.columns(device.type)})
            if not row["passed"]:
                wrong.add((row["loss"], n, dim, precision))
    _print(environment.read(checks_path), "error against float64", console)
    copy_rate = bytes_per_second_of_a_copy(device)
    console.print(f"measured copy: {copy_rate / 1e9:.0f} GB/s read and written together")
    for (n, dim), (precision, dtype) in itertools.product(shapes, DTYPES.items()):
        made = criteria(n, dim)
        chosen = {name: made[name] for name in made if _is_chosen(name, losses)}
        skipped = [name for name in chosen if (name, n, dim, precision) in wrong]
        for name in skipped:
            console.print(f"[red]{name} at {n}x{dim} {precision} failed its check and is not timed")
            del chosen[name]
        for row in measure(n, dim, dtype, chosen, turns, copy_rate, device, console):
            environment.append(out, {"precision": precision, **row, **environment.columns(device.type)})
        torch.compiler.reset()
    _print(environment.read(out), "forward and backward", console)


def _is_chosen(name: str, losses: list[str]) -> bool:
    return name in ("mmi", "mmi_eager") or name.removesuffix("-compiled") in losses


def _views(n: int, dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(n, dim, generator=generator)
    return [
        (content + 0.5 * torch.randn(n, dim, generator=generator)).to(device, dtype).requires_grad_() for _ in range(2)
    ]


def check(n: int, dim: int, dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    """Relative error of loss and gradient of the default, by implementation, beside plain torch's."""
    pair = [z.detach() for z in _views(n, dim, dtype, device)]

    def of(impl: str, views: list[Tensor]) -> list[Tensor]:
        leaves = [z.clone().requires_grad_() for z in views]
        loss = MMILoss(impl=impl)(*leaves)
        (-1.7 * loss).backward()
        gradients = [z.grad for z in leaves if z.grad is not None]
        return [loss.detach().double(), *(grad.double() for grad in gradients)]

    def error(got: list[Tensor]) -> list[float]:
        return [float((x - true).norm() / true.norm()) for x, true in zip(got, truth, strict=True)]

    truth = of("reference", [z.double() for z in pair])
    plain = error(of("reference", pair))
    rows = []
    for name, impl in (("mmi", "triton"), ("mmi_eager", "eager")):
        errors = error(of(impl, pair))
        tolerance = 5e-6 + (torch.finfo(dtype).eps / 2 if device.type == "cpu" and dtype != torch.float32 else 0.0)
        row: dict[str, Any] = {"loss": name, "n": n, "d": dim}
        for label, ours, theirs in zip(("loss", "grad_a", "grad_b"), errors, plain, strict=True):
            row[f"{label}_error"], row[f"{label}_error_plain"] = f"{ours:.2e}", f"{theirs:.2e}"
        row["passed"] = all(ours <= 2 * theirs + tolerance for ours, theirs in zip(errors, plain, strict=True))
        rows.append(row)
    return rows


def bytes_per_second_of_a_copy(device: torch.device) -> float:
    """Bytes read plus bytes written per second by copying a large tensor."""
    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES // 64
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = [_timed(lambda: target.copy_(source), device) for _ in range(11)]
    return 2 * size / statistics.median(seconds[1:])


def measure(
    n: int,
    dim: int,
    dtype: torch.dtype,
    chosen: dict[str, Callable[[], Criterion]],
    turns: int,
    copy_rate: float,
    device: torch.device,
    console: Console,
) -> list[dict[str, Any]]:
    """One row per loss; a loss that fails, for lack of memory say, has a row that says so."""
    leaves = _views(n, dim, dtype, device)
    moved = 2 * sum(z.nbytes for z in leaves)
    steps: dict[str, Callable[[], None]] = {}
    failures: dict[str, str] = {}
    for name, make in chosen.items():
        try:
            step = _step(make(), leaves, device)
            for _ in range(3):
                step()
            steps[name] = step
        except (RuntimeError, ValueError) as error:
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            console.print(f"{name} at {n}x{dim}: {failures[name]}")
    eviction = torch.zeros(EVICTION_BYTES // (4 if device.type == "cuda" else 64), device=device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            eviction.add_(1)
            times[name].append(_timed(step, device))
    rows = []
    for name in chosen:
        row = dict.fromkeys(
            ("median_ms", "q1_ms", "q3_ms", "graph_ms", "launches", "peak_extra_mib", "gb_per_s", "of_copy_rate"), ""
        )
        if name in steps:
            quartiles = statistics.quantiles(times[name], n=4, method="inclusive")
            graph = _graph_seconds(steps[name], turns, device)
            fastest = min(statistics.median(times[name]), graph or float("inf"))
            row = {
                "median_ms": _significant(1e3 * statistics.median(times[name])),
                "q1_ms": _significant(1e3 * quartiles[0]),
                "q3_ms": _significant(1e3 * quartiles[2]),
                "graph_ms": _significant(1e3 * graph) if graph else "",
                "launches": str(_launches(steps[name])) if device.type == "cuda" else "",
                "peak_extra_mib": _significant(_peak_bytes(steps[name], leaves, device) / 2**20),
                # Both inputs read and both gradients written: what a loss has to move at least.
                "gb_per_s": _significant(moved / fastest / 1e9),
                "of_copy_rate": _significant(moved / fastest / copy_rate),
            }
        rows.append({"loss": name, "n": n, "d": dim, **row, "failure": failures.get(name, "")})
    return rows


def _step(criterion: Criterion, leaves: list[Tensor], device: torch.device) -> Callable[[], None]:
    if isinstance(criterion, torch.nn.Module):
        criterion.to(device)

    def step() -> None:
        for z in leaves:
            z.grad = None
        criterion(*leaves).backward()

    return step


def _timed(step: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _graph_seconds(step: Callable[[], None], turns: int, device: torch.device) -> float | None:
    """Median seconds of a replay of the captured step; None where it cannot be captured.

    Twenty replays are timed together: a single one is shorter than what its events resolve.
    """
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:  # a host synchronisation, or memory that depends on data
        torch.cuda.synchronize()
        return None

    def replay() -> None:
        for _ in range(20):
            graph.replay()

    replay()
    return statistics.median(_timed(replay, device) / 20 for _ in range(turns))


def _launches(step: Callable[[], None]) -> int:
    """Kernels, copies and fills of one step on the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(1 for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)


def _peak_bytes(step: Callable[[], None], leaves: list[Tensor], device: torch.device) -> int:
    """Peak of what a step allocates, without the gradients."""
    if device.type != "cuda":
        return 0
    for z in leaves:
        z.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(z.nbytes for z in leaves)


def _significant(value: float) -> str:
    return f"{value:.4g}"


def _print(rows: list[dict[str, str]], title: str, console: Console) -> None:
    if not rows:
        return
    hidden = set(environment.columns())
    names = [name for name in rows[0] if name not in hidden]
    table = Table(title=title, caption=rows[0]["device"])
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(row[name] for name in names))
    console.print(table)
