"""How much of a training step the loss takes: backbone, projector, loss, backward and optimiser, on random images.

A step's time is split where the loss begins and ends: forward from the projections to the scalar, backward from the
scalar to the arrival of the gradient at the projections. Accuracy is not the subject: the images are noise.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lightly.models.modules.heads import VICRegProjectionHead
from rich.console import Console
from rich.table import Table

from benchmarks import environment
from benchmarks.methods import METHODS
from benchmarks.training import make_backbone

WARMUP_STEPS = 3


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks step", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["mmi", "barlow_twins", "vicreg"])
    parser.add_argument(
        "--backbones", nargs="+", choices=("conv", "resnet18", "resnet50"), default=["resnet18", "resnet50"]
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--projector-dims", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16", help="bf16: autocast")
    parser.add_argument("--image-size", type=int, default=224, help="32 takes the CIFAR stem of ResNet-18")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after a warm-up")
    parser.add_argument("--out", type=Path, help="CSV file (default benchmarks/results/step-DEVICE.csv)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Measure every combination, append to the CSV, print the table."""
    options = parse(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here; nothing was measured")
    out = options.out or environment.RESULTS / f"step-{options.device}.csv"
    out.unlink(missing_ok=True)
    console = Console()
    grid = itertools.product(options.backbones, options.batch_sizes, options.projector_dims, options.methods)
    for backbone, batch_size, projector_dim, method in grid:
        row = {
            "backbone": backbone,
            "image_size": options.image_size,
            "batch_size": batch_size,
            "projector_dim": projector_dim,
            "precision": options.precision,
            "method": method,
        }
        try:
            row |= measure(backbone, batch_size, projector_dim, method, options, device)
        except torch.OutOfMemoryError:
            row |= {**dict.fromkeys(MEASURES, ""), "failure": "out of memory"}
            torch.cuda.empty_cache()
        console.print(" ".join(f"{name}={value}" for name, value in row.items() if value != ""))
        environment.append(out, {**row, **environment.columns(options.device)})
    report(environment.read(out), console)


MEASURES = ("step_ms", "step_q1_ms", "step_q3_ms", "loss_ms", "loss_share", "steps", "peak_mib")


class _Clock:
    """Marks on the device's time line, read after the steps are over."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """Now, on the device: an event in its queue."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two marks that have passed."""
        return float(start.elapsed_time(end)) if self.device.type == "cuda" else 1e3 * (end - start)


def measure(
    backbone_name: str,
    batch_size: int,
    projector_dim: int,
    method: str,
    options: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Medians over the steps of one combination."""
    torch.manual_seed(0)
    backbone, features = make_backbone(backbone_name, 3, options.image_size)
    head = VICRegProjectionHead(features, projector_dim, projector_dim, num_layers=3)
    model = torch.nn.Sequential(backbone, head).to(device, memory_format=torch.channels_last)
    criterion = METHODS[method].criterion(False).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(2 * batch_size, 3, options.image_size, options.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    is_autocast = options.precision == "bf16"
    clock, marks = _Clock(device), []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARMUP_STEPS + options.steps):
        start = clock.mark()
        context = torch.autocast(device.type, torch.bfloat16) if is_autocast else contextlib.nullcontext()
        arrived: list[Any] = []
        with context:
            z = model(images)
            # The hook runs when the whole gradient has arrived.
            z.register_hook(lambda grad, arrived=arrived: arrived.append(clock.mark()))
            before = clock.mark()
            loss = criterion(*z.chunk(2))
            after = clock.mark()
        optimizer.zero_grad(set_to_none=True)
        begin = clock.mark()
        loss.backward()
        optimizer.step()
        marks.append((start, before, after, begin, arrived[0], clock.mark()))
    if device.type == "cuda":
        torch.cuda.synchronize()
    timed = marks[WARMUP_STEPS:]
    step_ms = [clock.milliseconds(m[0], m[5]) for m in timed]
    loss_ms = [clock.milliseconds(m[1], m[2]) + clock.milliseconds(m[3], m[4]) for m in timed]
    quartiles = statistics.quantiles(step_ms, n=4, method="inclusive") if len(step_ms) > 1 else step_ms * 3
    median_step, median_loss = statistics.median(step_ms), statistics.median(loss_ms)
    return {
        "step_ms": f"{median_step:.4g}",
        "step_q1_ms": f"{quartiles[0]:.4g}",
        "step_q3_ms": f"{quartiles[2]:.4g}",
        "loss_ms": f"{median_loss:.4g}",
        "loss_share": f"{median_loss / median_step:.3g}",
        "steps": len(step_ms),
        "peak_mib": f"{torch.cuda.max_memory_allocated() / 2**20:.0f}" if device.type == "cuda" else "",
        "failure": "",
    }


def report(rows: list[dict[str, str]], console: Console) -> None:
    """Share of the step, methods side by side."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    table = Table(title=f"loss, ms (share of the step), {rows[0]['precision']}", caption=rows[0]["device"])
    for name in ("backbone", "batch", "projector", *methods):
        table.add_column(name, justify="right")
    keys = list(dict.fromkeys((row["backbone"], row["batch_size"], row["projector_dim"]) for row in rows))
    by_key = {(row["backbone"], row["batch_size"], row["projector_dim"], row["method"]): row for row in rows}
    for key in keys:
        cells = []
        for method in methods:
            row = by_key[(*key, method)]
            cells.append(row["failure"] or f"{row['loss_ms']} ({100 * float(row['loss_share']):.2g}%)")
        table.add_row(*key, *cells)
    console.print(table)
