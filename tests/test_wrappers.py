"""What trains in a group of processes: DDP, FSDP2, HSDP, checkpointing, compilation, groups within a group; and what
must not train, as its ranks differ.

One group of four gloo processes, with other data on every rank, runs all cases and saves what came out. For most that
is how far losses, gradients and parameters are from those of one process on the concatenated batch, in float64. One of
two is compiled. What ends processes has groups of its own.
"""

import contextlib
import functools
import io
import itertools
import math
import multiprocessing
import signal
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

pytest.importorskip("torch", "2.7", reason="the wrappers are tested together, and FSDP2 is complete from torch 2.7 on")
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from mmi_loss import MMILoss, distributed
from tests.test_distributed import counted_collectives

WORLD, IN, HIDDEN = 4, 6, 16
SIZES = [[5, 3, 0, 4], [4, 4, 4, 4], [7, 1, 2, 3]]  # rows on every rank, of the batches that take turns
ROUTES = {  # options, and the width of the embedding
    "kronecker": ({"slice_dim": 16}, 20),
    "gaussian": ({"slice_dim": 5, "slice_kind": "gaussian"}, 20),
    "coordinates": ({"slice_dim": 5, "slice_kind": "coordinates", "num_slices": 2}, 20),
    "all features, covariance": ({"slice_dim": None}, 3),
    "all features, Gram": ({"slice_dim": None}, 64),
}
PATIENCE = 300
"""Seconds after which a group of processes counts as hanging."""


def batch(step, ranks):
    """Two views: the rows of these ranks."""
    sizes, generator = SIZES[step % len(SIZES)], torch.Generator().manual_seed(step)
    content = torch.randn(sum(sizes), IN, generator=generator, dtype=torch.float64) + 1.5
    views = [content + 0.7 * torch.randn(content.shape, generator=generator).double() for _ in range(2)]
    return [torch.cat([z.split(sizes)[rank] for rank in ranks]) for z in views]


class Model(nn.Module):
    """Two views to their embeddings, or with a criterion inside to the loss."""

    def __init__(self, dim, criterion=None, unused=False, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(IN, HIDDEN).double(), nn.Linear(HIDDEN, dim).double()
        self.criterion, self.reentrant = criterion, reentrant
        if unused:
            self.unused = nn.Linear(3, 3).double()

    def embed(self, *views):
        return [self.last(self.first(z).tanh()) for z in views]

    def forward(self, *views):
        if self.criterion is None:
            return self.embed(*views)
        if self.reentrant is None:
            return self.criterion(*self.embed(*views))
        views = [z.requires_grad_() for z in views]  # reentrant checkpointing asks for it
        return checkpoint(lambda *z: self.criterion(*self.embed(*z)), *views, use_reentrant=self.reentrant)


def criterion_of(route, **options):
    return MMILoss(**{"gather_distributed": True, **ROUTES[route][0], **options})


def flat(tensors):
    """One vector; of shards, the whole."""
    return torch.cat([(t.full_tensor() if hasattr(t, "full_tensor") else t).detach().flatten() for t in tensors])


def train(loss_of, parameters, ranks, steps=range(3), accumulate=1, no_sync=contextlib.nullcontext, batch_of=batch):
    """The losses; then gradients and parameters of every step, which is of some batches."""
    parameters, losses, results = list(parameters), [], []
    optimizer = torch.optim.SGD(parameters, 0.05)
    for step in steps:
        optimizer.zero_grad()
        for part in range(accumulate):
            with no_sync() if part < accumulate - 1 else contextlib.nullcontext():
                loss = loss_of(*batch_of(accumulate * step + part, ranks))
                loss.backward()
            losses.append(loss.detach())
        results.append(flat([p.grad for p in parameters if p.grad is not None]))
        optimizer.step()
        results.append(flat(parameters))
    return [torch.stack(losses), *results]


def alone(route, ranks=range(WORLD), start=0, **settings):
    """The same in one process on the concatenated batch."""
    model, criterion = Model(ROUTES[route][1]), criterion_of(route, gather_distributed=False)
    criterion.step.fill_(start)
    return train(lambda *views: criterion(*model(*views)), model.parameters(), ranks, **settings)


def error(ours, expected):
    """The largest relative difference, in norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, expected, strict=True))


def error_of(route, model, criterion, rank, parameters=None, no_sync=contextlib.nullcontext, **settings):
    """The error of a wrapped model, with the criterion outside of it if there is one."""
    loss_of = model if criterion is None else lambda *views: criterion(*model(*views))
    ours = train(loss_of, parameters or model.parameters(), [rank], no_sync=no_sync, **settings)
    return error(ours, alone(route, **settings))


CASES = {}


def case(name, *arguments, **keywords):
    """One case for every route, of a function of it."""

    def register(function):
        for route in ROUTES:
            CASES[f"{name}, {route}"] = functools.partial(function, route, *arguments, **keywords)
        return function

    return register


@case("DDP", False)
@case("DDP, static graph", False, static_graph=True)
@case("DDP, buckets", False, gradient_as_bucket_view=True)
@case("DDP around the criterion", True)
@case("DDP around the criterion, static graph", True, static_graph=True)
@case("DDP around the criterion, buckets", True, gradient_as_bucket_view=True)
def ddp(route, is_inside, rank, **settings):
    criterion = criterion_of(route)
    model = DistributedDataParallel(Model(ROUTES[route][1], criterion if is_inside else None), **settings)
    return error_of(route, model, None if is_inside else criterion, rank)


@case("DDP, unused parameters")
def ddp_unused(route, rank):
    model = Model(ROUTES[route][1], criterion_of(route), unused=True)
    model = DistributedDataParallel(model, find_unused_parameters=True)
    return error_of(route, model, None, rank, [p for name, p in model.named_parameters() if "unused" not in name])


@case("DDP, no_sync", False)
@case("DDP around the criterion, no_sync", True)
def ddp_no_sync(route, is_inside, rank):
    criterion = criterion_of(route)
    model = DistributedDataParallel(Model(ROUTES[route][1], criterion if is_inside else None))
    return error_of(route, model, None if is_inside else criterion, rank, accumulate=2, no_sync=model.no_sync)


@case("DDP, checkpointing", False)
@case("DDP, reentrant checkpointing", True)
def ddp_checkpointing(route, reentrant, rank):
    model = DistributedDataParallel(Model(ROUTES[route][1], criterion_of(route), reentrant=reentrant))
    return error_of(route, model, None, rank)


@case("DDP broadcasts a counter")
def ddp_broadcast(route, rank):
    """The counters differ before the forward, not in it."""
    model = DistributedDataParallel(Model(ROUTES[route][1], criterion_of(route)))
    model.module.criterion.step.fill_(rank)
    return error_of(route, model, None, rank)


@case("DDP, resumed")
def resumed(route, rank):
    """From what torch.save wrote, the same slices go on."""

    def made():
        model = DistributedDataParallel(Model(ROUTES[route][1], criterion_of(route)))
        return model, functools.partial(train, model, list(model.parameters()), [rank])

    (whole, go_on), (fresh, go_on_resumed) = made(), made()
    go_on()
    torch.save(whole.state_dict(), file := io.BytesIO())
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh.module.criterion.step == 3
    return error(go_on_resumed(steps=range(3, 6)), go_on(steps=range(3, 6)))


def sharded(model, is_hybrid=False):
    for part in (model.first, model.last, model):
        fully_shard(part, mesh=meshes()[is_hybrid])
    return model


@functools.cache
def meshes():
    """Of all ranks, and two by two."""
    return init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


@case("FSDP2", False, False)
@case("FSDP2 around the criterion", True, False)
@case("HSDP", False, True)
@case("HSDP around the criterion", True, True)
def fsdp(route, is_inside, is_hybrid, rank):
    criterion = criterion_of(route)
    model = sharded(Model(ROUTES[route][1], criterion if is_inside else None), is_hybrid)
    return error_of(route, model, None if is_inside else criterion, rank)


@case("FSDP2 from meta")
def fsdp_from_meta(route, rank):
    """Memory of to_empty holds what it held: here the largest integer."""
    with torch.device("meta"):
        model = sharded(Model(ROUTES[route][1], criterion_of(route)))
    torch.use_deterministic_algorithms(True)  # fills empty memory
    model.to_empty(device="cpu")
    torch.use_deterministic_algorithms(False)
    assert model.criterion.step == 0
    for parameter, initial in zip(model.parameters(), Model(ROUTES[route][1]).parameters(), strict=True):
        parameter.data.copy_(distribute_tensor(initial, parameter.device_mesh, parameter.placements))
    return error_of(route, model, None, rank)


@case("two jobs in one world")
def two_jobs(route, rank):
    """Of two ranks each; their counters and their data differ."""
    group, ranks = meshes()[1].get_group("shard"), [rank // 2 * 2, rank // 2 * 2 + 1]
    criterion = criterion_of(route, process_group=group, gather_distributed=False)
    criterion.step.fill_(rank // 2)
    model = DistributedDataParallel(Model(ROUTES[route][1]), process_group=group)
    ours = train(lambda *views: criterion(*model(*views)), model.parameters(), [rank])
    return error(ours, alone(route, ranks, rank // 2))


@case("HSDP, statistics of every replica")
def statistics_of_replicas(route, rank):
    """Their losses differ; the gradient is that of the mean."""
    criterion = criterion_of(route, process_group=meshes()[1].get_group("shard"))
    model = sharded(Model(ROUTES[route][1]), is_hybrid=True)
    ours = train(lambda *views: criterion(*model(*views)), model.parameters(), [rank])
    model, criteria = Model(ROUTES[route][1]), [criterion_of(route, gather_distributed=False) for _ in range(2)]
    expected = train(
        lambda *jobs: sum(loss(*model(*views)) for loss, views in zip(criteria, jobs, strict=True)) / 2,
        model.parameters(),
        [[0, 1], [2, 3]],
        batch_of=lambda step, jobs: [batch(step, ranks) for ranks in jobs],
    )
    return error(ours[1:], expected[1:])


@case("sums that do not fit into the first reduction")
def large_sums(route, rank):
    distributed.HEAD = 1100  # in float64 the bits and the counts
    try:
        return ddp(route, False, rank)
    finally:
        distributed.HEAD = 2**14


REDUCTIONS = {}
for _route in ROUTES:
    _forward, _backward = ["all_reduce"] * 2, ["all_reduce"]
    if "Gram" in _route:
        _forward, _backward = ["all_reduce", "all_gather", "all_gather"], ["all_reduce"] * 2
    REDUCTIONS[f"reductions, {_route}"] = _route, [_forward, _backward]


def reductions(route, rank):
    model, criterion = Model(ROUTES[route][1]), criterion_of(route)
    with counted_collectives() as forward:
        loss = criterion(*model(*batch(0, [rank])))
    with counted_collectives() as backward:
        loss.backward()
    return [forward, backward]


CHANGES = {  # on rank 1, and what the error names
    "counter": ({"step": 1}, "step counters"),
    "high bits of the counter": ({"step": 2**40}, "step counters"),
    "seed": ({"seed": 1}, "options"),
    "snr": ({"snr": 8}, "options"),
    "ridge": ({"ridge": 0.5}, "options"),
    "objective": ({"objective": "joint"}, "options"),
    "series": ({"logdet": "taylor"}, "options"),
    "implementation": ({"impl": "reference"}, "options"),
    "wider slice": ({"slice_dim": 17}, "options"),
    "many slices": ({"slice_dim": 40, "num_slices": 64, "dim": 512}, "options"),
    "all features": ({"slice_dim": None, "num_slices": 1}, "options"),
    "width": ({"dim": 4000}, "number or width of the views"),
    "views": ({"num_views": 3}, "number or width of the views"),
    "evaluation": ({"has_gradient": False}, "whether they need a gradient"),
    "dtype": ({"dtype": torch.float32}, "differ between ranks"),
}
LOUD = {
    f"{change}, {route}": (route, change)
    for route, change in itertools.product(ROUTES, CHANGES)
    if not (change == "all features" and "all features" in route)
}


def outcome(call, *arguments):
    """A loss, or why there is none; and the collectives it took."""
    with counted_collectives() as calls:
        try:
            return call(*arguments).item(), calls
        except RuntimeError as raised:
            return str(raised), calls


def changed(route, change, rank, dim=None, num_views=2, dtype=torch.float64, has_gradient=True, step=0, **options):
    """What comes of it that rank 1 computes something else."""
    if rank != 1:
        dim, num_views, dtype, has_gradient, step, options = None, 2, torch.float64, True, 0, {}
    criterion = criterion_of(route, **options)
    criterion.step.fill_(step)
    views = [torch.randn(6, dim or ROUTES[route][1]).to(dtype).requires_grad_() for _ in range(num_views)]
    with torch.set_grad_enabled(has_gradient):
        return outcome(criterion, views)


def first_call_waits(route, rank):
    """As on a GPU: the first of equal calls waits for the others, or reductions of different sizes would hang."""
    distributed.HOSTS, views = (), [torch.randn(6, ROUTES[route][1]) for _ in range(2)]
    try:
        different = criterion_of(route, snr=8 + (rank == 1))
        results, criterion = [outcome(different, views)[0]], criterion_of(route)
        results.append(outcome(criterion, views)[0])
        criterion.step.fill_(rank)
        return [*results, outcome(criterion, views)[0]]
    finally:
        distributed.HOSTS = ("cpu",)


WRAPS = {
    "DDP after no_grad": (DistributedDataParallel, lambda model: torch.no_grad()),
    "DDP after no_sync": (DistributedDataParallel, lambda model: model.no_sync()),
    "DDP without broadcasts": (functools.partial(DistributedDataParallel, broadcast_buffers=False), None),
    "FSDP2": (sharded, None),
    "HSDP": (functools.partial(sharded, is_hybrid=True), None),
}


def wrapped_counter(route, wrap, rank):
    """Rank 1 counted once too often in a pass after which no wrapper broadcasts; the next step is the first one."""
    wrapper, before = WRAPS[wrap]
    model = wrapper(Model(ROUTES[route][1], criterion_of(route)))
    with before(model) if before else contextlib.nullcontext():
        loss = model(*batch(0, [rank]))
        if loss.requires_grad:
            loss.backward()
    criterion = next(module for module in model.modules() if isinstance(module, MMILoss))
    criterion.step.add_(rank == 1)
    return outcome(model, *batch(1, [rank]))


def initialise(rank, world, folder, seconds=60):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    store = dist.FileStore(f"{folder}/store", world)
    store.set(f"rank {rank}", "ready")
    store.wait(
        [f"rank {other}" for other in range(world)], timedelta(seconds=PATIENCE)
    )  # the timeout is not about this
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds))


def group_of_four(rank, world, folder):
    initialise(rank, world, folder)
    calls = dict(CASES)
    calls |= {name: functools.partial(reductions, route) for name, (route, _) in REDUCTIONS.items()}
    calls |= {name: functools.partial(changed, route, c, **CHANGES[c][0]) for name, (route, c) in LOUD.items()}
    for route in ROUTES:
        calls[f"waits, {route}"] = functools.partial(first_call_waits, route)
        calls |= {f"counter, {route}, {wrap}": functools.partial(wrapped_counter, route, wrap) for wrap in WRAPS}
    results = {}
    for name, call in calls.items():
        try:
            results[name] = call(rank=rank)
        except Exception:  # what follows would meet other calls of the other ranks
            results[name] = traceback.format_exc()
            break
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


COMPILED = {
    f"{objective}, {route}": {"objective": objective, **ROUTES[route][0]}
    for objective, route in [  # every objective and every route
        ("content", "kronecker"),
        ("content", "all features, Gram"),
        ("exchangeable", "gaussian"),
        ("joint", "coordinates"),
        ("joint", "all features, Gram"),
    ]
}
PAIRS = [(30 + 13 * i % 271, 300 - 29 * i % 271) for i in range(20)]  # rows on two ranks


def compiled(options, rank):
    """The number of graphs for 20 batch sizes; the error; loss and gradient where counters, then options differ."""
    torch._dynamo.reset()
    counters.clear()
    criterion, eager = MMILoss(gather_distributed=True, **options), MMILoss(**options)
    call, worst = torch.compile(criterion, fullgraph=True, backend="aot_eager"), 0.0
    for step, sizes in enumerate(PAIRS):
        generator = torch.Generator().manual_seed(step)
        whole = [torch.randn(sum(sizes), 20, generator=generator).double().requires_grad_() for _ in range(2)]
        own = [z.detach().split(sizes)[rank].requires_grad_() for z in whole]
        loss, expected = call(*own), eager(*whole)
        loss.backward()
        expected.backward()
        ours = [loss.detach(), *(z.grad / 2 for z in own)]  # DDP divides by the number of ranks
        worst = max(worst, error(ours, [expected.detach(), *(z.grad.split(sizes)[rank] for z in whole)]))
    graphs = counters["stats"]["unique_graphs"]
    criterion.step.fill_(rank)
    return graphs, worst, is_nan(call, own)


def is_nan(call, views):
    """Of the loss and of every gradient."""
    leaves = [z.detach().requires_grad_() for z in views]
    loss = call(*leaves)
    loss.backward()
    return loss.isnan().item() and all(z.grad.isnan().any().item() for z in leaves)


def group_of_two(rank, world, folder):
    initialise(rank, world, folder)
    results = {}
    try:
        results = {name: compiled(options, rank) for name, options in COMPILED.items()}
        different = torch.compile(criterion_of("kronecker", snr=8 + rank), fullgraph=True, backend="aot_eager")
        results["options"] = is_nan(different, [torch.randn(30, 20) for _ in range(2)])
    except Exception:
        results["error"] = traceback.format_exc()
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def start(target, world, folder, *arguments):
    """Ranks that fork from a server that has imported torch once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    ranks = [context.Process(target=target, args=(rank, world, str(folder), *arguments)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    return ranks


def wait(ranks):
    """Their exit codes, once all have ended."""
    deadline = time.monotonic() + PATIENCE
    for rank in ranks:
        rank.join(max(0, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert None not in codes, "a rank hangs"
    return codes


def results_of(target, world, folder):
    wait(start(target, world, folder))
    return [torch.load(Path(folder, f"rank{rank}.pt"), weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return results_of(group_of_four, WORLD, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_concatenated_batch(four, name):
    for results in four:
        assert results.get(name, "not run") == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(four, name):
    for results in four:
        assert results[name] == REDUCTIONS[name][1]


@pytest.mark.parametrize("name", LOUD)
def test_ranks_that_differ_get_an_error(four, name):
    """After the one reduction of a size that does not depend on what differs."""
    for results in four:
        message, calls = results[name]
        assert "differ between ranks" in message
        assert CHANGES[LOUD[name][1]][1] in message
        assert calls == ["all_reduce"]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("route", ROUTES)
def test_counters_that_differ_get_an_error_under_wrappers(four, route, wrap):
    for results in four:
        message, calls = results[f"counter, {route}, {wrap}"]
        assert "step counters differ between ranks" in message
        assert calls == ["all_reduce"]


@pytest.mark.parametrize("route", ROUTES)
def test_first_of_equal_calls_waits_for_the_device(four, route):
    for results in four:
        different, agreed, later = results[f"waits, {route}"]
        assert "options of the loss differ" in different
        assert math.isfinite(agreed)
        if "all features" in route:  # whose route depends on the number of samples, so that they wait
            assert "step counters differ" in later
        else:
            assert math.isnan(later)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return results_of(group_of_two, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_for_changing_batch_sizes(two, name):
    for results in two:
        assert "error" not in results, results["error"]
        graphs, worst, is_loud = results[name]
        assert graphs <= 3
        assert worst < 1e-12
        assert is_loud


def test_compiled_with_options_that_differ(two):
    assert all(results["options"] for results in two)


ENDINGS = [("join", route) for route in ROUTES] + [
    ("join, throwing", "kronecker"),
    ("evaluation while others wait", "kronecker"),
    ("compiled, wider slice", "kronecker"),
    ("compiled, other objective", "kronecker"),
]


def group_that_ends(rank, world, folder, ending, route):
    """Writes the losses of its steps, line by line, and what ends it."""
    initialise(rank, world, folder, seconds=3 if "wait" in ending else 60)
    criterion = criterion_of(route)
    model = DistributedDataParallel(Model(ROUTES[route][1]))

    def write(line):
        with Path(folder, f"rank{rank}.txt").open("a") as file:
            file.write(str(line).replace("\n", " ") + "\n")

    def step(number):
        loss = criterion(*model(*batch(number, [rank])))
        write(loss.item())
        if loss.requires_grad:
            loss.backward()

    try:
        if "join" in ending:
            with model.join(throw_on_early_termination="throwing" in ending):
                for number in range(3 if rank == 0 else 2):
                    step(number)
        else:
            step(0)
            step(1)
        if "evaluation" in ending:
            with torch.no_grad():
                step(2) if rank == 0 else dist.barrier()
        if "compiled" in ending:
            options = {"slice_dim": 17} if "slice" in ending else {"objective": "joint"}
            criterion = criterion_of(route, **(options if rank == 1 else {}))
            criterion = torch.compile(criterion, fullgraph=True, backend="aot_eager")
            step(2)
        write("went on")
    except RuntimeError as raised:
        write(f"RuntimeError: {raised}")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Exit codes and what the ranks wrote, of all endings at once."""
    folders = [tmp_path_factory.mktemp("ended") for _ in ENDINGS]
    groups = [start(group_that_ends, 2, folder, *ending) for folder, ending in zip(folders, ENDINGS, strict=True)]
    results = {}
    for group, folder, ending in zip(groups, folders, ENDINGS, strict=True):
        codes = wait(group)
        results[ending] = [
            (code, Path(folder, f"rank{r}.txt").read_text().splitlines()) for r, code in enumerate(codes)
        ]
    return results


@pytest.mark.parametrize(("ending", "route"), ENDINGS)
def test_ranks_that_part_end(ended, ending, route):
    """Every rank by an error, or by gloo's abort; none with a number for the step in which they part."""
    (code, lines), (other_code, other_lines) = ended[ending, route]
    assert lines[:2] == other_lines[:2]
    assert all(math.isfinite(float(line)) for line in lines[:2])
    for exit_code, rest in ((code, lines[2:]), (other_code, other_lines[2:])):
        assert exit_code == -signal.SIGABRT or (len(rest) == 1 and rest[0].startswith("RuntimeError")), rest
        assert "throwing" not in ending or "exhausted" in rest[0]
        assert "wait" not in ending or exit_code == 0
