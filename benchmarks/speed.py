"""Time and memory on the CPU of the loss against every rival and against the bytes that must move.

All losses of a shape take turns in one process; medians and quartiles over the turns of forward and backward. "floor"
reads both inputs and writes both gradients: two copies into new memory, which autograd cannot do without;
"floor_reused" copies into memory that is there already. Memory is the allocator's: the peak of what a call allocates,
without the inputs and their gradients. Rows of shapes that are not measured again stay in the CSV file.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from benchmarks import environment, losses, report, timing
from benchmarks.environment import Row
from benchmarks.losses import Criterion
from mmi_loss import MMILoss

SHAPES = list(itertools.product((64, 256, 1024, 4096), (128, 512, 2048, 8192)))
FLOORS = ("floor", "floor_reused")
SLICES = ("slice_kind=gaussian", "slice_kind=coordinates", "num_slices=4", "slice_dim=32", "slice_dim=512")
LOSSES = (*losses.LOSSES, *SLICES, "compiled")
MAX_MATRIX_BYTES = 1.5 * 2**30
"""A loss is skipped where its largest square matrix exceeds this: it does not fit beside its autograd copies."""
MAX_FACTORED_ROWS = 7000
"""Factorisations of larger matrices take minutes; products do not."""


def main(arguments: list[str]) -> None:
    """Measure, write the CSV, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks speed", description=__doc__)
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="NxD", default=SHAPES, help="such as 256x2048")
    parser.add_argument("--losses", nargs="+", default=[*LOSSES, *FLOORS], metavar="LOSS")
    parser.add_argument("--solo-learn", type=Path, metavar="PATH", help="a clone of solo-learn, for its losses")
    parser.add_argument("--precision", choices=("float32", "bf16-autocast"), default="float32")
    parser.add_argument("--turns", type=int, default=11, help="turns of fast losses; slow ones get fewer")
    parser.add_argument("--out", type=Path, default=environment.RUNS / "speed", help="folder for the CSV file")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*(objective=|lr_scheduler).*")
    path, again = options.out / "speed-cpu.csv", {(str(n), str(dim), options.precision) for n, dim in options.shapes}
    kept = [row for row in environment.read(path) if (row["n"], row["d"], row["precision"]) not in again]
    path.unlink(missing_ok=True)
    for row in kept:
        environment.append(path, row)
    of_solo_learn = losses.solo_learn(options.solo_learn) if options.solo_learn else {}
    for n, dim in track(options.shapes):
        for row in measure(n, dim, [*options.losses, *of_solo_learn], of_solo_learn, options):
            environment.append(path, row)
    rows = environment.read(path)
    print(table(rows), table(rows, "memory"), environment.provenance(rows), sep="\n\n")


def _shape(text: str) -> tuple[int, int]:
    try:
        n, dim = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected NxD, such as 256x2048") from None
    return n, dim


def fits(name: str, n: int, dim: int) -> bool:
    """Whether a loss can run at a shape."""
    library, _, solo = name.partition(" ")
    known = losses.find({"barlow": "barlow_twins"}.get(solo, solo) if library == "solo-learn" else name)
    rows = known.square(n, dim) if known else 0
    return rows**2 * 4 <= MAX_MATRIX_BYTES and (known is None or known.options is None or rows <= MAX_FACTORED_ROWS)


def measure(
    n: int, dim: int, names: Sequence[str], of_solo_learn: dict[str, Criterion], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per loss for one shape."""
    leaves = timing.views(n, dim)
    steps: dict[str, timing.Step] = {}
    for name in names:
        if name in FLOORS:
            steps[name] = _floor(name, leaves)
        elif name == "compiled":
            steps[name] = _step(torch.compile(MMILoss()), leaves, options.precision)
        elif fits(name, n, dim):
            criterion = of_solo_learn.get(name) or losses.find(name).criterion()  # type: ignore[union-attr]
            steps[name] = _step(criterion, leaves, options.precision)
    seconds = timing.take_turns(steps, options.turns, leaves)
    rows = []
    for name, step in steps.items():
        peak = "" if name in FLOORS else timing.digits(timing.peak_extra_bytes(step, leaves) / leaves[0].nbytes)
        row = {"loss": name, "n": n, "d": dim, "precision": options.precision, **timing.summary(seconds[name])}
        rows.append({**row, "peak_extra_inputs": peak, **environment.columns("cpu")})
    return rows


def _step(criterion: Criterion, leaves: list[Tensor], precision: str) -> timing.Step:
    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
            loss = criterion(*leaves)
        loss.backward()

    return step


def _floor(name: str, leaves: list[Tensor]) -> timing.Step:
    inputs = [z.detach() for z in leaves]
    if name == "floor":
        return lambda: [z.clone() for z in inputs]
    outputs = [torch.empty_like(z) for z in inputs]
    return lambda: [out.copy_(z) for out, z in zip(outputs, inputs, strict=True)]


def table(rows: list[Row], *arguments: str) -> str:
    """The default's milliseconds and how many times as long the others take, or with ``memory`` the peak in sizes of an
    input; of the shapes ``NxD`` that are named, of all otherwise.
    """
    is_memory = "memory" in arguments
    wanted = [word for word in arguments if word != "memory"]
    rows = [row for row in rows if row["precision"] == "float32"]
    by_cell = {(row["loss"], f"{row['n']}x{row['d']}"): row for row in rows}
    shapes = wanted or [f"{n}x{d}" for n, d in sorted({(int(row["n"]), int(row["d"])) for row in rows})]
    lines = []
    for loss in dict.fromkeys(row["loss"] for row in rows):
        line = []
        for shape in shapes:
            row, ours = by_cell.get((loss, shape)), by_cell.get(("mmi", shape))
            if row is None or (is_memory and not row["peak_extra_inputs"]):
                line.append("")
            elif is_memory:
                line.append(f"{float(row['peak_extra_inputs']):.2g}")
            elif loss == "mmi" or ours is None:
                line.append(f"{float(row['median_ms']):.3g} ms")
            else:
                line.append(f"{float(row['median_ms']) / float(ours['median_ms']):.2g} x")
        if any(line):
            lines.append([losses.title(loss), *line])
    head = "peak extra memory, in inputs" if is_memory else "forward + backward"
    return report.table([f"{head}, N x D", *shapes], lines, bold=losses.title("mmi"))
