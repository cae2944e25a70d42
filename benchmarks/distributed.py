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
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import environment
from benchmarks.losses import solo_learn as solo_learn_functions
from benchmarks.methods import METHODS
from mmi_loss.functional import mmi_loss_multiview
from mmi_loss.objectives import OBJECTIVES
from mmi_loss.options import LOGDETS

WORLDS, BATCHES, SPLITS = (2, 3, 4), (32, 64, 256), ("equal", "unequal")
IN, HIDDEN, DIM, TRAFFIC_DIM = 32, 64, 128, 2048
TIMEOUT = 300
"""Seconds after which a group of processes counts as hanging."""
Criterion = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss of a list of views, made by ``criterion(gather)``: over all ranks, or of what this process holds."""

    library: str
    criterion: Callable[[bool], Criterion]
    num_views: int = 2


def _ours(num_views: int = 2, **options: Any) -> Loss:
    return Loss(
        "mmi-loss",
        lambda gather: lambda views: mmi_loss_multiview(views, **options, gather_distributed=gather),
        num_views,
    )


def _lightly(method: str) -> Loss:
    def criterion(gather: bool) -> Criterion:
        module = METHODS[method].criterion(gather)
        return lambda views: module(*views)

    return Loss("lightly", criterion)


ROUTES: dict[str, dict[str, Any]] = {
    "kronecker": {"slice_dim": 32},
    "gaussian": {"slice_dim": 32, "slice_kind": "gaussian"},
    "coordinates": {"slice_dim": 32, "slice_kind": "coordinates"},
    "4 slices": {"slice_dim": 32, "num_slices": 4},
    "all features": {"slice_dim": None},
}
LOSSES = {
    f"{objective}, {route}{', series' if logdet == 'taylor' else ''}": _ours(
        objective=objective, logdet=logdet, **options
    )
    for objective, (route, options), logdet in itertools.product(OBJECTIVES, ROUTES.items(), LOGDETS)
}
LOSSES |= {
    f"{objective}, {route}, 3 views": _ours(3, objective=objective, **ROUTES[route])
    for objective, route in itertools.product(OBJECTIVES, ("kronecker", "all features"))
}
LOSSES |= {f"lightly {method}": _lightly(method) for method in ("barlow_twins", "vicreg", "simclr", "lejepa")}
# At the width of traffic the default slice has 128 dimensions.
TRAFFIC = {"default": _ours(), "all features": _ours(slice_dim=None)}
TRAFFIC |= {name: loss for name, loss in LOSSES.items() if loss.library == "lightly"}


def solo_learn(checkout: Path) -> dict[str, Loss]:
    """The Barlow Twins and VICReg losses of a clone of solo-learn."""
    return {
        f"solo-learn {name}": Loss("solo-learn", lambda gather, f=function: lambda views: f(*views))
        for name, function in solo_learn_functions(checkout, ("barlow", "vicreg")).items()
    }


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
    payload_bytes: int = 0
    ring_bytes: int = 0


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Counts the collectives that are called through ``torch.distributed``; gathers send to all others what they hold,
    reductions go round the ring twice.
    """
    traffic, originals = Traffic(), {}

    def wrap(name: str, sent: Callable[..., Tensor], rounds: Callable[[int], float]) -> None:
        original = originals[name] = getattr(dist, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            payload = sent(*args, **kwargs).nbytes
            traffic.calls += 1
            traffic.payload_bytes += payload
            traffic.ring_bytes += round(payload * rounds(dist.get_world_size()))
            return original(*args, **kwargs)

        setattr(dist, name, wrapped)

    def first(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    def second(_: Any, tensor: Tensor, *__: Any, **___: Any) -> Tensor:
        return tensor

    wrap("all_reduce", first, lambda world: 2 * (world - 1) / world)
    wrap("all_gather", second, lambda world: world - 1)
    wrap("all_gather_into_tensor", second, lambda world: world - 1)
    try:
        yield traffic
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks distributed", description=__doc__)
    parser.add_argument("--worlds", nargs="+", type=int, default=WORLDS, help="numbers of processes")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="samples on all ranks together")
    parser.add_argument("--losses", nargs="+", metavar="LOSS", help="names that a loss's must contain one of")
    parser.add_argument("--traffic-dim", type=int, default=TRAFFIC_DIM, help="width at which traffic is counted")
    parser.add_argument("--solo-learn", type=Path, metavar="PATH", help="a clone of solo-learn; without it, no rows")
    parser.add_argument("--out", type=Path, default=environment.RESULTS / "distributed.csv")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Measure what has no row in the CSV yet, then print the tables."""
    options, console = parse(arguments), Console()
    losses = dict(LOSSES)
    if options.solo_learn:
        losses |= solo_learn(options.solo_learn)
    else:
        console.print("solo-learn: skipped, for its losses come from a clone of its repository (--solo-learn PATH)")
    traffic = TRAFFIC | {name: loss for name, loss in losses.items() if loss.library == "solo-learn"}
    if options.losses:
        losses, traffic = (
            {name: loss for name, loss in group.items() if any(part in name for part in options.losses)}
            for group in (losses, traffic)
        )
    finished = {tuple(row[name] for name in Cell.__annotations__) for row in environment.read(options.out)}
    where = environment.columns()
    with Progress(console=console) as progress:
        grid = itertools.product(options.worlds, SPLITS)
        groups = [
            [
                *(Cell(name, world, batch, split) for batch, name in itertools.product(options.batches, losses)),
                *(Cell(name, world, options.batches[-1], split, options.traffic_dim) for name in traffic),
            ]
            for world, split in grid
        ]
        bar = progress.add_task("", total=sum(map(len, groups)))
        for cells in groups:
            progress.update(bar, description=f"{cells[0].world} ranks, {cells[0].split} batches")
            todo = [cell for cell in cells if tuple(map(str, asdict(cell).values())) not in finished]
            progress.advance(bar, len(cells) - len(todo))
            for row in measure(todo, losses | traffic, options.solo_learn):
                library = (losses | traffic)[row["loss"]].library
                environment.append(options.out, {"library": library, **row, **where})
                progress.advance(bar)
    report(environment.read(options.out), console)


def measure(cells: list[Cell], losses: dict[str, Loss], checkout: Path | None) -> Iterator[dict[str, Any]]:
    """One row per cell of one world size; a loss that takes the processes with it is a row too."""
    references = {}
    for cell in cells:
        loss = losses[cell.loss]
        # Here, where there is no process group: solo-learn's losses look for one.
        references[cell] = _gradient(_model(cell), loss.criterion(False), _views(cell, loss.num_views))
    while cells:
        with tempfile.TemporaryDirectory() as folder:
            torch.save([references[cell] for cell in cells], f"{folder}/references.pt")
            failure = _run_group(cells, folder, checkout)
            rows = [json.loads(line) for line in _lines(Path(folder, "rows.jsonl"))]
        for cell, row in zip(cells, rows, strict=False):
            yield {**asdict(cell), **row, "failure": ""}
        cells = cells[len(rows) :]
        if cells and failure:
            yield {**asdict(cells[0]), **dict.fromkeys(MEASURES, ""), "failure": failure}
            cells = cells[1:]


MEASURES = ("loss_error", "gradient_error", "gradient_scale", "calls", "payload_bytes", "ring_bytes")


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


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _views(cell: Cell, num_views: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(cell.batch)
    n = sum(cell.sizes)
    content = torch.randn(n, IN, generator=generator)
    return [(content + 0.5 * torch.randn(n, IN, generator=generator)).to(cell.dtype) for _ in range(num_views)]


def _model(cell: Cell) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, cell.dim)).to(cell.dtype)


def _gradient(model: nn.Module, criterion: Criterion, views: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of all parameters as a vector."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(views[0].dtype)  # solo-learn makes its batch norm in the default
    torch.manual_seed(0)  # for losses with random numbers, the same on all ranks
    try:
        loss = criterion([model(z) for z in views])
        loss.backward()
    finally:
        torch.set_default_dtype(default)
    return loss.detach().to(views[0].dtype), torch.cat([p.grad.flatten() for p in model.parameters()])


def _run_rank(rank: int, cells: list[Cell], folder: str, checkout: Path | None) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    losses = {**LOSSES, **TRAFFIC, **(solo_learn(checkout) if checkout else {})}
    references = torch.load(f"{folder}/references.pt", weights_only=True)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timeout, cells[0].world, rank)
    for cell, reference in zip(cells, references, strict=True):
        loss = losses[cell.loss]
        start = sum(cell.sizes[:rank])
        rows = [z[start : start + cell.sizes[rank]] for z in _views(cell, loss.num_views)]
        model = DistributedDataParallel(_model(cell))
        with counted() as traffic:
            value, gradient = _gradient(model, loss.criterion(True), rows)
        values = [torch.empty_like(value) for _ in range(cell.world)]
        dist.all_gather(values, value)
        if rank == 0:
            row = {**_errors(torch.stack(values), gradient, *reference), **asdict(traffic)}
            with Path(folder, "rows.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
    dist.destroy_process_group()


def _errors(values: Tensor, gradient: Tensor, expected: Tensor, expected_gradient: Tensor) -> dict[str, Any]:
    """Relative errors: of the loss, the worst rank's; the gradient, and how long it is beside the right one."""
    norm = expected_gradient.norm()
    return {
        "loss_error": f"{((values - expected).abs().max() / expected.abs()).item():.2g}",
        "gradient_error": f"{((gradient - expected_gradient).norm() / norm).item():.2g}",
        "gradient_scale": f"{(gradient.norm() / norm).item():.3g}",
    }


def report(rows: list[dict[str, str]], console: Console) -> None:
    """Gradient errors of every loss by batch for each number of ranks, then traffic."""
    shown = [row for row in rows if int(row["dim"]) == DIM]
    columns = list(itertools.product(SPLITS, sorted({int(row["batch"]) for row in shown})))
    for world in sorted({int(row["world"]) for row in shown}):
        title = f"relative error of the gradient, {world} ranks, by samples on all together (u: unequal batches)"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("loss", no_wrap=True)
        for split, batch in columns:
            table.add_column(f"{batch}" if split == "equal" else f"{batch} u", justify="right", no_wrap=True)
        by_cell = {(row["loss"], row["split"], int(row["batch"])): row for row in shown if int(row["world"]) == world}
        for loss in dict.fromkeys(row["loss"] for row in shown):
            cells = [by_cell.get((loss, split, batch)) for split, batch in columns]
            table.add_row(loss, *map(_error, cells))
        console.print(table)
    for failure, losses in _failures(rows).items():
        console.print(f"fails: {', '.join(losses)}: {failure}")
    counted_rows = [row for row in rows if int(row["dim"]) != DIM and row["split"] == "equal"]
    if not counted_rows:
        return
    first = counted_rows[0]
    table = Table(title=f"MB per step and rank, {first['batch']} samples on all ranks together, D={first['dim']}")
    worlds = sorted({int(row["world"]) for row in counted_rows})
    for name in ("loss", *(f"ring of {world}" for world in worlds), "calls"):
        table.add_column(name, justify="left" if name == "loss" else "right")
    for loss in dict.fromkeys(row["loss"] for row in counted_rows):
        by_world = {int(row["world"]): row for row in counted_rows if row["loss"] == loss}
        megabytes = [f"{float(by_world[w]['ring_bytes'] or 'nan') / 1e6:.3g}" if w in by_world else "" for w in worlds]
        table.add_row(loss, *megabytes, next(iter(by_world.values()))["calls"])
    console.print(table)


def _error(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    return f"{float(row['gradient_error']):.1g}" if row["gradient_error"] else "fails"


def _failures(rows: list[dict[str, str]]) -> dict[str, list[str]]:
    failures: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["failure"]:
            failures.setdefault(row["failure"], {})[row["loss"]] = None
    return {failure: list(losses) for failure, losses in failures.items()}
