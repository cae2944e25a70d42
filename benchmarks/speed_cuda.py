"""What ``impl="auto"`` should be on a GPU, by one run of under ten minutes: ``python -m benchmarks.speed_cuda``.

1. Every kernel of the default loss, and of the same on all features, against float64: the error may be twice that of
   plain torch in the same dtype. Kernels that fail are not timed.
2. Ours, eager and by the kernels, and lightly's losses: forward and backward as they are, by ``torch.compile``, and
   captured in a CUDA graph and replayed. Launches, peak memory, bytes per second over those of a measured copy.
3. The ratios that the decision rests on.

Rows are appended to the CSV as they come, and a run continues where the last one on this card, commit and torch ended.
``--dry-run`` needs no GPU: it runs the checks, small, by Triton's interpreter, compiles all kernels for GPUs that are
not there, and times nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, timing
from mmi_loss import MMILoss

SHAPES = [(256, 8192), (4096, 8192), (256, 2048), (4096, 2048)]
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32, "fp16": torch.float16}
TIMED_DTYPES = ("bf16", "float32")
RIVALS = ("barlow_twins", "vicreg", "lejepa", "visreg", "simclr")
NAMES = ("mmi_triton", "mmi_eager", *RIVALS)
# (samples, features, options): aligned and ragged slices; all features in one program, as moments, as a Gram matrix.
ALL: dict[str, Any] = {"slice_dim": None}
CHECKS = [
    (256, 8192, {}), (4096, 2048, {}), (1000, 999, {}), (512, 1024, {"num_slices": 4}), (4096, 128, ALL),
    (333, 77, ALL), (1024, 512, ALL), (700, 301, ALL), (256, 2048, ALL), (99, 999, ALL),
]  # fmt: skip
SMALL_CHECKS = [(16, 256, {}), (19, 150, {}), (32, 16, ALL), (17, 13, ALL), (70, 131, ALL), (10, 143, ALL)]
PROBLEMS = ["256x2048", "256x8192-bf16", "4096x2048-all", "256x2048-all"]
"""Of tests/triton_aot.py: between them they launch every kernel."""
TURNS = 30
REPLAYS = 20
"""Of a graph, timed together: a single one is shorter than what its events resolve."""
COPY_BYTES = 2**30

MODES = ("plain", "graph", "compiled")
MEASURES = ("median_ms", "q1_ms", "q3_ms", "turns", "launches", "peak_extra_mib", "gb_per_s", "of_copy_rate", "failure")


def main(arguments: list[str]) -> None:
    """Check, measure, append to the CSV files, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed_cuda", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: check and compile, time nothing")
    parser.add_argument("--minutes", type=float, default=9.0, help="then stop; the next run continues")
    parser.add_argument("--out", type=Path, default=environment.RUNS / "speed-cuda.csv", help="CSV file")
    options = parser.parse_args(arguments)
    out, has_gpu = options.out, torch.cuda.is_available()
    if not has_gpu and not options.dry_run:
        raise SystemExit("torch sees no CUDA device; nothing was measured. --dry-run checks the kernels without one")
    warnings.filterwarnings("ignore", message=".*(lr_scheduler|deterministic|invalid value|divide by zero).*")
    device = torch.device("cuda" if has_gpu else "cpu")
    if not has_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    place = environment.columns(device.type)
    place |= {name: importlib.metadata.version(name) for name in ("triton", "lightly")}
    deadline = time.monotonic() + 60 * options.minutes
    checks = check(CHECKS if has_gpu else SMALL_CHECKS, device)
    for row in checks:
        environment.append(out.with_name(f"{out.stem}-checks.csv"), {**row, **place})
    _print(checks, "relative error to float64, and that of plain torch")
    failed = [row for row in checks if not row["passed"]]
    if options.dry_run:
        compile_ahead_of_time()
        print("not measured: no GPU" if not has_gpu else "not measured: --dry-run")
    else:
        names = [name for name in NAMES if name != "mmi_triton" or not failed]
        measure_all(names, deadline, place, out, device)
        _print(decision(_done_here(out, place)), "how many times as long as the kernels")
    if failed:
        raise SystemExit(f"{len(failed)} of {len(checks)} checks of the kernels failed: they must not be the default")


def check(cases: list[tuple[int, int, dict[str, Any]]], device: torch.device) -> list[dict[str, Any]]:
    """A row per case and dtype: errors of loss and gradients by the kernels, and by plain torch in float32."""
    rows = []
    for (n, dim, options), (precision, dtype) in itertools.product(cases, DTYPES.items()):
        pair = timing.views(n, dim, dtype, device)
        truth = _value_and_gradients("reference", [z.detach().double() for z in pair], options)
        # The interpreter truncates to bfloat16 where devices round to nearest.
        tolerance = 5e-6 + (torch.finfo(dtype).eps / 2 if device.type == "cpu" and precision == "bf16" else 0.0)
        errors = []
        for impl in ("triton", "reference"):
            found = _value_and_gradients(impl, pair, options)
            errors.append([float((x - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)])
        row: dict[str, Any] = {"n": n, "d": dim, "options": json.dumps(options), "precision": precision}
        for name, ours, plain in zip(("loss", "grad_a", "grad_b"), *errors, strict=True):
            row |= {f"{name}_error": f"{ours:.1e}", f"{name}_plain": f"{plain:.1e}"}
        row["passed"] = all(ours <= 2 * plain + tolerance for ours, plain in zip(*errors, strict=True))
        rows.append(row)
    return rows


def _value_and_gradients(impl: str, views: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    leaves = [z.detach().clone().requires_grad_() for z in views]
    # What a kernel leaves unwritten is then NaN.
    torch.use_deterministic_algorithms(impl == "triton", warn_only=True)
    try:
        loss = MMILoss(impl=impl, **options)(*leaves)
        (-1.7 * loss).backward()  # 1 would hide a forgotten factor
    finally:
        torch.use_deterministic_algorithms(False)
    return [loss.detach().double(), *(z.grad.double() for z in leaves if z.grad is not None)]


def compile_ahead_of_time() -> None:
    """Every kernel to machine code, by tests/triton_aot.py in a process of its own: there they are not interpreted."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, root = [sys.executable, "-m", "tests.triton_aot", *PROBLEMS], Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=root)
    if done.returncode:
        raise SystemExit(f"a kernel does not compile:\n{done.stderr}")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    _print([row for row in rows if "kernel" in row], "compiled for GPUs that are not here")


def measure_all(names: list[str], deadline: float, place: dict[str, Any], out: Path, device: torch.device) -> None:
    """A row per loss, mode, shape and dtype, ours first and compiling last, until the time is up."""
    done = {_key(row) for row in _done_here(out, place)}
    copy_rate = bytes_per_second_of_a_copy()
    print(f"measured copy: {copy_rate / 1e9:.0f} GB/s read and written together")
    cells = list(itertools.product(MODES, names, SHAPES, TIMED_DTYPES))
    for index, (mode, name, (n, dim), precision) in enumerate(cells):
        key = {"loss": name, "mode": mode, "n": n, "d": dim, "precision": precision}
        if _key(key) in done:
            continue
        if time.monotonic() > deadline:
            print(f"time is up; {len(cells) - index} rows are left: run the command again")
            return
        row = {**key, **measure(name, mode, n, dim, DTYPES[precision], copy_rate, device)}
        environment.append(out, {**row, "copy_gb_per_s": timing.digits(copy_rate / 1e9), **place})
        print(" ".join(f"{column}={value}" for column, value in row.items() if value != ""))


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("loss", "mode", "n", "d", "precision"))


def _done_here(out: Path, place: dict[str, Any]) -> list[dict[str, str]]:
    """The rows of this card, commit and these versions."""
    names = [name for name in place if name not in ("date", "threads")]
    return [row for row in environment.read(out) if all(row[name] == str(place[name]) for name in names)]


def measure(
    name: str, mode: str, n: int, dim: int, dtype: torch.dtype, copy_rate: float, device: torch.device
) -> dict[str, str]:
    """Forward and backward of one loss. One that fails, for lack of memory say, has a row that says so."""
    row = dict.fromkeys(MEASURES, "")
    leaves = timing.views(n, dim, dtype, device)
    torch.compiler.reset()  # or the second shape would be compiled for all shapes
    try:
        with device:  # buffers of criteria that are wrapped in functions
            criterion = _criterion(name)
        called = torch.compile(criterion) if mode == "compiled" else criterion

        def step() -> None:
            for z in leaves:
                z.grad = None
            called(*leaves).backward()

        for _ in range(3):
            step()
        if mode == "graph":
            seconds = [value / REPLAYS for value in _times(_captured(step))]
        else:
            row |= _launches_and_memory(step, leaves)
            seconds = _times(step)
    except Exception as error:  # whatever a compiler or a capture raises
        row["failure"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
        if device.type == "cuda":
            torch.cuda.synchronize()
        return row
    row |= timing.summary(seconds)
    # Both inputs read and both gradients written: what a loss has to move at least.
    rate = 2 * sum(z.nbytes for z in leaves) / statistics.median(seconds)
    return row | {"gb_per_s": timing.digits(rate / 1e9), "of_copy_rate": timing.digits(rate / copy_rate)}


def _criterion(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name.startswith("mmi_"):
        return MMILoss(impl=name.removeprefix("mmi_"))
    from benchmarks.losses import LOSSES  # it imports lightly, and that triton

    return LOSSES[name].criterion()


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """Replays of the captured step. A host synchronisation, or memory that depends on data, raises."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> None:
        for _ in range(REPLAYS):
            graph.replay()

    return replay


def _times(step: timing.Step) -> list[float]:
    return timing.take_turns({"": step}, TURNS, device="cuda")[""]


def bytes_per_second_of_a_copy() -> float:
    """Bytes read plus bytes written per second by copying a large tensor."""
    source = torch.ones(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(_times(lambda: target.copy_(source)))


def _launches_and_memory(step: Callable[[], None], leaves: list[Tensor]) -> dict[str, str]:
    """Kernels, copies and fills of one step on the device, and the peak of what it allocates beside the gradients."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    launches = sum(1 for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return {"launches": str(launches), "peak_extra_mib": timing.digits(timing.peak_extra_bytes(step, leaves) / 2**20)}


def decision(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Per mode, shape and dtype: the times of the others over that of the kernels. Above 1 the kernels win."""
    cells: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row["median_ms"]:
            cells.setdefault(_key(row)[1:], {})[row["loss"]] = float(row["median_ms"])
    ratios = []
    for (mode, *shape), times in cells.items():
        if "mmi_triton" in times:
            row = {"mode": mode, "n x d, dtype": " ".join(shape), "mmi_triton ms": times["mmi_triton"]}
            of = {name: f"{times[name] / times['mmi_triton']:.3g}" if name in times else "" for name in NAMES[1:]}
            fastest = min((name for name in RIVALS if name in times), key=times.__getitem__, default="")
            ratios.append({**row, **of, "fastest rival": fastest})
    return ratios


def _print(rows: list[dict[str, Any]], title: str) -> None:
    from benchmarks.report import table  # it imports lightly, and that triton

    print(f"\n{title}\n", table(list(rows[0]), [row.values() for row in rows]) if rows else "nothing", sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
