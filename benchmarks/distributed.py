"""Are the losses exact under DDP, and what do they send? Ours by every route, lightly's and solo-learn's, beside each
other in real gloo processes.

Every rank holds other images. The reference of a loss is the same loss without gathering, in one process, on the
concatenated batch; compared are the loss and the gradient of a small network's parameters, averaged by DDP. "equal"
batches have as many samples on every rank, "unequal" ones a quarter as many on the last rank as on the others. All in
float64 at D = 128, so an error is not rounding. Traffic is counted at D = 2048 in float32: the tensors that go into
the collectives of torch.distributed in a forward and a backward, and what a ring sends for them per rank:
2 (W - 1) / W of an all-reduced tensor, W - 1 times a gathered one. DDP's own averaging of the parameters' gradients is
the same for all and is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import multiprocessing
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import environment, losses, report
from benchmarks.environment import Row
from mmi_loss.objectives import OBJECTIVES
from mmi_loss.options import LOGDETS

WORLDS, BATCHES, SPLITS = (2, 3, 4), (32, 64, 256), ("equal", "unequal")
IN, HIDDEN, DIM, TRAFFIC_DIM = 32, 64, 128, 2048
TIMEOUT = 300
"""Seconds after which a group of processes counts as hanging."""
SLICES = ("", ",slice_kind=gaussian", ",slice_kind=coordinates", ",num_slices=4")
ROUTES = ("slice_dim=None", *(f"slice_dim=32{kind}" for kind in SLICES))
LOSSES = [
    f"objective={objective},logdet={logdet},{route}"
    for objective, logdet, route in itertools.product(OBJECTIVES, LOGDETS, ROUTES)
]
RIVALS = ["barlow_twins", "vicreg", "simclr", "lejepa", "visreg"]
TRAFFIC = ["mmi", "mmi_all"]
"""Ours at the width of traffic, where the default slice has 128 dimensions."""
MEASURES = ("loss_error", "gradient_error", "gradient_scale", "calls", "ring_bytes")


def criterion(name: str, gather: bool, checkout: Path | None) -> losses.Criterion:
    """A loss of the registry or of a clone of solo-learn, which gathers where there are processes."""
    if name.startswith("solo-learn") and checkout:
        return losses.solo_learn(checkout)[name]
    return losses.find(name).criterion(gather)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Cell:
    """One measurement: a loss on batches of certain sizes."""

    loss: str
    world: int
    batch: int
    split: str
    dim: int = DIM

    @property
    def sizes(self) -> list[int]:
        """Samples on every rank."""
        if self.split == "equal":
            return [self.batch // self.world] * self.world
        last = max(2, self.batch // (4 * self.world - 3))  # losses that want two samples on a rank get them
        rest, ranks = self.batch - last, self.world - 1
        return [rest // ranks + (rank < rest % ranks) for rank in range(ranks)] + [last]

    @property
    def dtype(self) -> torch.dtype:
        """Single precision where only the size of what travels is the question."""
        return torch.float64 if self.dim == DIM else torch.float32


@dataclass
class Traffic:
    """What a rank put into collectives."""

    calls: int = 0
    ring_bytes: int = 0


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Counts the collectives that are called through ``torch.distributed``; gathers send to all others what they hold,
    reductions go round the ring twice.
    """
    # Which argument is sent, and how many times its size in a group of W.
    kinds: dict[str, tuple[int, Callable[[int], float]]] = {
        "all_reduce": (0, lambda world: 2 * (world - 1) / world),
        "all_gather": (1, lambda world: world - 1),
        "all_gather_into_tensor": (1, lambda world: world - 1),
    }
    traffic, originals = Traffic(), {name: getattr(dist, name) for name in kinds}

    def wrap(name: str) -> Callable[..., Any]:
        position, rounds = kinds[name]

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            traffic.calls += 1
            traffic.ring_bytes += round(args[position].nbytes * rounds(dist.get_world_size()))
            return originals[name](*args, **kwargs)

        return wrapped

    try:
        for name in kinds:
            setattr(dist, name, wrap(name))
        yield traffic
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def main(arguments: list[str]) -> None:
    """Measure what has no row in the CSV yet, then print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks distributed", description=__doc__)
    parser.add_argument("--worlds", nargs="+", type=int, default=WORLDS, help="numbers of processes")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="samples on all ranks together")
    parser.add_argument("--losses", nargs="+", metavar="LOSS", default=[""], help="words that a name must hold one of")
    parser.add_argument("--traffic-dim", type=int, default=TRAFFIC_DIM, help="width at which traffic is counted")
    parser.add_argument("--solo-learn", type=Path, metavar="PATH", help="a clone of solo-learn; without it, no rows")
    parser.add_argument("--out", type=Path, default=environment.RUNS / "distributed", help="folder for the CSV file")
    options = parser.parse_args(arguments)
    if not options.solo_learn:
        print("solo-learn: skipped, for its losses come from a clone of its repository (--solo-learn PATH)")
    of_solo_learn = [*losses.solo_learn(options.solo_learn)] if options.solo_learn else []
    named = [*LOSSES, *TRAFFIC, *RIVALS, *of_solo_learn]
    chosen = [name for name in named if any(part in name for part in options.losses)]
    path = options.out / "distributed.csv"
    finished = {tuple(row[name] for name in Cell.__annotations__) for row in environment.read(path)}
    groups = []
    for world, split in itertools.product(options.worlds, SPLITS):
        exact = [Cell(n, world, b, split) for b, n in itertools.product(options.batches, chosen) if n not in TRAFFIC]
        counts = [
            Cell(name, world, options.batches[-1], split, options.traffic_dim) for name in chosen if name not in LOSSES
        ]
        groups.append([c for c in (*exact, *counts) if tuple(map(str, asdict(c).values())) not in finished])
    with Progress() as progress:
        bar = progress.add_task("", total=sum(map(len, groups)))
        for cells in filter(None, groups):
            progress.update(bar, description=f"{cells[0].world} ranks, {cells[0].split} batches")
            for row in measure(cells, options.solo_learn):
                environment.append(path, {**row, **environment.columns()})
                progress.advance(bar)
    rows = environment.read(path)
    for world in sorted({row["world"] for row in rows}):
        print(f"\nrelative error of the gradient, {world} ranks\n", table(rows, world), sep="\n")
    for failure in dict.fromkeys(row["failure"] for row in rows if row["failure"]):
        print(f"fails: {', '.join(dict.fromkeys(r['loss'] for r in rows if r['failure'] == failure))}: {failure}")
    print("\nMB sent per step and rank\n", table(rows, "traffic"), environment.provenance(rows), sep="\n")


def measure(cells: list[Cell], checkout: Path | None) -> Iterator[dict[str, Any]]:
    """One row per cell of one world size; a loss that takes the processes with it is a row too."""
    # Here, where there is no process group: solo-learn's losses look for one.
    references = {cell: _gradient(_model(cell), criterion(cell.loss, False, checkout), _views(cell)) for cell in cells}
    while cells:
        with tempfile.TemporaryDirectory() as folder:
            torch.save([references[cell] for cell in cells], f"{folder}/references.pt")
            failure = _run_group(cells, folder, checkout)
            path = Path(folder, "rows.jsonl")
            rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for cell, row in zip(cells, rows, strict=False):
            yield {**asdict(cell), **row, "failure": ""}
        cells = cells[len(rows) :]
        if cells and failure:
            yield {**asdict(cells[0]), **dict.fromkeys(MEASURES, ""), "failure": failure}
            cells = cells[1:]


def _run_group(cells: list[Cell], folder: str, checkout: Path | None) -> str:
    """Run the cells in as many processes as they have ranks; why it ended early, or nothing."""
    # Processes fork from a server that has imported everything once, and has no threads.
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])
    try:
        torch.multiprocessing.start_processes(
            _run_rank, (cells, folder, checkout), nprocs=cells[0].world, start_method="forkserver"
        )
    except torch.multiprocessing.ProcessRaisedException as error:
        return str(error).strip().splitlines()[-1]
    except torch.multiprocessing.ProcessExitedException as error:
        return f"process ended by {error.signal_name or f'exit code {error.exit_code}'}"
    return ""


def _views(cell: Cell) -> list[Tensor]:
    generator = torch.Generator().manual_seed(cell.batch)
    n = sum(cell.sizes)
    content = torch.randn(n, IN, generator=generator)
    return [(content + 0.5 * torch.randn(n, IN, generator=generator)).to(cell.dtype) for _ in range(2)]


def _model(cell: Cell) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, cell.dim)).to(cell.dtype)


def _gradient(model: nn.Module, criterion: losses.Criterion, views: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of all parameters as a vector."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(views[0].dtype)  # solo-learn makes its batch norm in the default
    torch.manual_seed(0)  # for losses with random numbers, the same on all ranks
    try:
        loss = criterion(*(model(z) for z in views))
        loss.backward()
    finally:
        torch.set_default_dtype(default)
    return loss.detach().to(views[0].dtype), torch.cat([p.grad.flatten() for p in model.parameters()])


def _run_rank(rank: int, cells: list[Cell], folder: str, checkout: Path | None) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    references = torch.load(f"{folder}/references.pt", weights_only=True)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timeout, cells[0].world, rank)
    for cell, (expected, expected_gradient) in zip(cells, references, strict=True):
        start = sum(cell.sizes[:rank])
        shard = [z[start : start + cell.sizes[rank]] for z in _views(cell)]
        model = DistributedDataParallel(_model(cell))
        with counted() as traffic:
            value, gradient = _gradient(model, criterion(cell.loss, True, checkout), shard)
        values = [torch.empty_like(value) for _ in range(cell.world)]
        dist.all_gather(values, value)
        if rank == 0:
            # Relative: of the loss, the worst rank's; of the gradient, and how long it is beside the right one.
            norm, worst = expected_gradient.norm(), (torch.stack(values) - expected).abs().max()
            row = {
                "loss_error": f"{(worst / expected.abs()).item():.2g}",
                "gradient_error": f"{((gradient - expected_gradient).norm() / norm).item():.2g}",
                "gradient_scale": f"{(gradient.norm() / norm).item():.3g}",
                **asdict(traffic),
            }
            with Path(folder, "rows.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
    dist.destroy_process_group()


def table(rows: list[Row], which: str = "4") -> str:
    """Gradient errors with ``which`` ranks, by samples on all together, ours as the worst of them; or ``traffic``."""
    cells: dict[tuple[str, ...], str] = {}
    if which == "traffic":
        for row in rows:
            if int(row["dim"]) != DIM and row["split"] == "equal":
                megabytes = f"{float(row['ring_bytes']) / 1e6:.3g}" if row["ring_bytes"] else "fails"
                cells[losses.title(row["loss"]), f"MB, ring of {row['world']}"] = megabytes
    else:
        rows = [row for row in rows if int(row["dim"]) == DIM and row["world"] == which]
        ours = f"MMI, worst of {len({row['loss'] for row in rows if '=' in row['loss']})}"
        for row in sorted(rows, key=lambda row: ("=" not in row["loss"], float(row["gradient_error"] or 0))):
            error = f"{float(row['gradient_error']):.1g}" if row["gradient_error"] else "fails"
            name = ours if "=" in row["loss"] else losses.title(row["loss"])
            cells[name, f"{row['batch']} samples, {row['split']}"] = error
    columns = sorted({cell[1] for cell in cells}, key=lambda name: ("unequal" in name, int(re.search(r"\d+", name)[0])))
    lines = [
        [name, *(cells.get((name, column), "") for column in columns)] for name in dict.fromkeys(c[0] for c in cells)
    ]
    return report.table(["", *columns], lines)
