"""Real gloo processes with different data, and different amounts of it, on every rank.

Under DDP the loss must be that of the concatenated batch, the averaged gradient its gradient, and the trained
parameters those of one process. One group of processes per world size runs all cases and saves what came out; every
case is a test that compares its result with a run in this process.
"""

import importlib.util
import itertools
import multiprocessing
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmi_loss import MMILoss, distributed, functional
from mmi_loss.functional import mmi_loss as functional_mmi_loss
from mmi_loss.objectives import OBJECTIVES
from mmi_loss.ops.slices import slice_views
from mmi_loss.options import LOGDETS, SLICE_KINDS, Options

pytestmark = pytest.mark.filterwarnings("ignore:objective=")

# Rows on every rank of the batches that take turns: unequal ones, equal ones, and ranks with one sample or none.
SIZES = {
    2: [[13, 7], [10, 10], [1, 9]],
    3: [[11, 0, 6], [6, 6, 6], [8, 5, 1]],
    4: [[4, 4, 1, 3], [5, 5, 5, 5], [6, 0, 0, 2]],
}
IN, STEPS = 6, 20
WIDE, NARROW = 64, 3  # more features than samples of all views and ranks: the Gram side; fewer: the covariance side


class Case(NamedTuple):
    """What is trained: options of the loss, width of the embedding, number of views, dtype of the model, steps."""

    options: dict[str, Any]
    dim: int = 20
    num_views: int = 2
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    steps: int = 3

    @property
    def is_exact(self):
        """Whether a group of processes differs from one by no more than float64's rounding."""
        return self.dtype == torch.float64


ROUTES = {
    "kronecker": ({"slice_dim": 16}, 20),
    "gaussian": ({"slice_dim": 5, "slice_kind": "gaussian"}, 20),
    "coordinates": ({"slice_dim": 5, "slice_kind": "coordinates"}, 20),
    "3 slices": ({"slice_dim": 8, "num_slices": 3}, 20),
    "fewer features than slice_dim": ({}, NARROW),
    "all features, covariance": ({"slice_dim": None}, NARROW),
    "all features, Gram": ({"slice_dim": None}, WIDE),
}
CASES = {}
for _objective, (_route, (_options, _dim)) in itertools.product(OBJECTIVES, ROUTES.items()):
    for _logdet in LOGDETS:
        _all = {"objective": _objective, "logdet": _logdet, **_options}
        _is_long = _logdet == "cholesky" and _route not in ("3 slices", "fewer features than slice_dim")
        CASES[f"{_objective}, {_route}, {_logdet}"] = Case(_all, _dim, steps=STEPS if _is_long else 3)
    if _route in ("kronecker", "all features, covariance", "all features, Gram"):
        _all = {"objective": _objective, **_options}
        CASES[f"{_objective}, {_route}, 3 views"] = Case(_all, _dim, num_views=3)
        CASES[f"{_objective}, {_route}, float32"] = Case(_all, _dim, dtype=torch.float32, steps=1)
        CASES[f"{_objective}, {_route}, autocast"] = Case(_all, _dim, dtype=torch.float32, steps=1, autocast=True)
    if _route in ("kronecker", "all features, Gram"):
        CASES[f"{_objective}, {_route}, reference"] = Case({**_all, "impl": "reference"}, _dim)
LIGHTNING = [
    "content, kronecker, cholesky",
    "exchangeable, all features, covariance, cholesky",
    "joint, all features, Gram, cholesky",
]
# A step's slices: what random coordinates and projections give for one and several slices.
SLICES = [Options(slice_dim=16, num_slices=count, slice_kind=kind) for kind in SLICE_KINDS for count in (1, 3)]


def batches(sizes, rank=None, dtype=torch.float64):
    """Three views of every batch; ``rank`` takes its rows, None all."""
    drawn = []
    for index, counts in enumerate(sizes):
        generator = torch.Generator().manual_seed(index)
        content = torch.randn(sum(counts), IN, generator=generator, dtype=torch.float64)
        views = [content + 0.7 * torch.randn(content.shape, generator=generator).double() + 1.5 for _ in range(3)]
        rows = slice(None) if rank is None else slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        drawn.append([z[rows].to(dtype) for z in views])
    return drawn


def case_of(name, world):
    """More than every batch once, where training may drift apart, between two ranks alone."""
    return CASES[name] if world == 2 else CASES[name]._replace(steps=min(CASES[name].steps, 3))


def make_model(case):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, 16), nn.Tanh(), nn.Linear(16, case.dim)).to(case.dtype)


def make_criterion(case, gather):
    options = {**case.options, "gather_distributed": gather}
    if case.num_views == 2:
        module = MMILoss(**options)
        return lambda views, step: module(*views)
    return lambda views, step: functional.mmi_loss_multiview(views, step=step, **options)


def train(case, model, drawn, gather=False):
    """Losses, parameter gradients and gradients at the embeddings of the first batches, and the parameters after."""
    criterion = make_criterion(case, gather)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    result = {"losses": [], "grads": [], "embeddings": [], "embedding_grads": []}
    for step in range(case.steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            embeddings = [model(z) for z in drawn[step % len(drawn)][: case.num_views]]
            loss = criterion(embeddings, step)
        for z in embeddings:
            z.retain_grad()
        optimizer.zero_grad()
        loss.backward()
        if step < len(drawn):
            result["losses"].append(loss.detach())
            result["grads"].append(flat(p.grad for p in model.parameters()))
            result["embeddings"].append([z.detach() for z in embeddings])
            result["embedding_grads"].append([z.grad for z in embeddings])
        optimizer.step()
    return {**result, "parameters": flat(p.detach() for p in model.parameters())}


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def train_by_lightning(case, drawn, folder, **options):
    """The parameters after the batches, by lightly's kind of LightningModule: ours."""
    import pytorch_lightning as pl
    from mmi_loss.integrations.lightly import MMI

    torch.manual_seed(0)
    module = MMI(
        batch_size_per_device=64,  # sets the learning rate alone, which must not depend on the number of devices
        num_classes=2,
        backbone=nn.Linear(IN, 16),
        feature_dim=16,
        projection_head=nn.Sequential(nn.Tanh(), nn.Linear(16, case.dim)),
        criterion=MMILoss(**case.options, gather_distributed=True),
        learning_rate=1.0,
    ).double()
    # The adapter scales its rate with the devices, as a larger batch asks for: here the batch is the same.
    module.learning_rate /= options.get("devices", 1)
    loader = [(views[:2], torch.zeros(len(views[0]), dtype=torch.long)) for views in drawn]
    trainer = pl.Trainer(
        max_epochs=STEPS // len(drawn) + 1,
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, torch.utils.data.DataLoader(loader, batch_size=None))
    assert module.criterion.step == STEPS
    trained = [*module.backbone.parameters(), *module.projection_head.parameters()]
    return {"parameters": flat(p.detach() for p in trained)}


def slices_of_steps():
    """What the first steps' slices make of fixed data: any difference in the random numbers shows."""
    z = torch.linspace(-1, 1, 4 * 40).view(4, 40)
    return [
        slice_views([z], o.slice_dim, o.num_slices, o.block_dim, torch.tensor(step), o.seed, torch.float32)[0]
        for o in SLICES
        for step in range(3)
    ]


def too_few(case, sizes, rank):
    """The loss and the gradient of a batch of fewer than two samples, or the error."""
    z = torch.ones(sizes[rank], case.dim, dtype=torch.float64, requires_grad=True)
    try:
        loss = MMILoss(**case.options, gather_distributed=True)(z, z + 1)
    except ValueError as error:
        return str(error)
    loss.backward()
    return loss.detach(), z.grad


TOO_FEW = {name: case for name, case in CASES.items() if name.endswith(("cholesky", "reference"))}


def run_rank(rank, world, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results = {}
    torch.manual_seed(rank)
    with counted_collectives() as calls:
        results["slices"] = slices_of_steps()
    results["slice_calls"] = len(calls)
    for name in CASES:
        case = case_of(name, world)
        drawn = batches(SIZES[world], rank, case.dtype)
        results[name] = train(case, DistributedDataParallel(make_model(case)), drawn, gather=True)
    results["too few"] = {
        (name, total): too_few(case, [total] + [0] * (world - 1), rank)
        for name, case in TOO_FEW.items()
        for total in (0, 1)
    }
    if world == 2 and has_lightning():
        for name in LIGHTNING:
            results[name, "lightning"] = by_lightning_ddp(CASES[name], rank, world, folder)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


class counted_collectives:  # noqa: N801 (a context manager)
    """Records the names of the collectives called inside."""

    names = ("all_reduce", "all_gather", "broadcast", "reduce", "all_gather_into_tensor", "barrier")

    def __enter__(self):
        self.calls, self.originals = [], {name: getattr(dist, name) for name in self.names}
        for name, original in self.originals.items():

            def counted(*args, _name=name, _original=original, **kwargs):
                self.calls.append(_name)
                return _original(*args, **kwargs)

            setattr(dist, name, counted)
        return self.calls

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(dist, name, original)


def has_lightning():
    return all(importlib.util.find_spec(name) for name in ("lightly", "pytorch_lightning"))


def by_lightning_ddp(case, rank, world, folder):
    from pytorch_lightning.plugins.environments import LightningEnvironment
    from pytorch_lightning.strategies import DDPStrategy

    class Spawned(LightningEnvironment):
        """The processes and their group are there already."""

        creates_processes_externally = True

        def local_rank(self):
            return rank

    environment = Spawned()
    environment.set_global_rank(rank)
    environment.set_world_size(world)
    strategy = DDPStrategy(cluster_environment=environment, process_group_backend="gloo")
    return train_by_lightning(case, batches(SIZES[world], rank), folder, devices=world, strategy=strategy)


@pytest.fixture(scope="module", params=SIZES, ids=lambda world: f"{world}ranks")
def group(request, tmp_path_factory):
    """The world size, and what every rank saved. The ranks fork from a server that has imported torch once."""
    world, folder = request.param, tmp_path_factory.mktemp("group")
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])
    torch.multiprocessing.start_processes(run_rank, args=(world, str(folder)), nprocs=world, start_method="forkserver")
    return world, [torch.load(Path(folder, f"rank{rank}.pt"), weights_only=True) for rank in range(world)]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.is_exact])
def test_equals_the_concatenated_batch(group, name):
    world, ranks = group
    case = case_of(name, world)
    expected = train(case, make_model(case), batches(SIZES[world]))
    for result in (results[name] for results in ranks):
        for ours, loss in zip(result["losses"], expected["losses"], strict=True):
            assert ours.item() == pytest.approx(loss.item(), rel=1e-9)
        for ours, grad in zip(result["grads"], expected["grads"], strict=True):
            assert (ours - grad).norm() <= 1e-6 * grad.norm()
        torch.testing.assert_close(result["parameters"], expected["parameters"], rtol=1e-6, atol=1e-8)
        assert (result["parameters"] - flat(make_model(case).parameters())).norm() > 1e-3


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.is_exact])
def test_equals_the_concatenated_batch_in_less_precision(group, name):
    """Against the same arithmetic in one process, and on the very embeddings of the ranks in float64."""
    world, ranks = group
    case, rank_results = CASES[name], [results[name] for results in ranks]
    tolerance = 2e-2 if case.autocast else 1e-4
    embeddings = [torch.cat(rows).double() for rows in zip(*(r["embeddings"][0] for r in rank_results), strict=True)]
    leaves = [z.requires_grad_() for z in embeddings]
    exact = functional_mmi_loss(*leaves, **case.options)
    exact.backward()
    single = train(case, make_model(case), batches(SIZES[world], dtype=case.dtype))
    for result in rank_results:
        assert result["losses"][0].dtype == torch.float32
        assert result["losses"][0].item() == pytest.approx(exact.item(), rel=1e-4)
        assert (result["grads"][0] - single["grads"][0]).norm() <= tolerance * single["grads"][0].norm()
    for view, leaf in enumerate(leaves):
        # DDP divides by the number of ranks.
        rows = torch.cat([result["embedding_grads"][0][view] for result in rank_results]) / world
        assert rows.dtype == (torch.bfloat16 if case.autocast else torch.float32)
        assert (rows.double() - leaf.grad).norm() <= tolerance * leaf.grad.norm()


@pytest.mark.parametrize("name", LIGHTNING)
def test_lightning_equals_the_concatenated_batch(group, name, tmp_path):
    world, ranks = group
    if not has_lightning():
        pytest.skip("lightly is not installed: pip install mmi-loss[lightly]")
    if world != 2:
        pytest.skip("two ranks show what Lightning adds")
    expected = train_by_lightning(CASES[name], batches(SIZES[world]), tmp_path, devices=1)["parameters"]
    for results in ranks:
        torch.testing.assert_close(results[name, "lightning"]["parameters"], expected, rtol=1e-6, atol=1e-8)


def test_slices_are_the_same_everywhere_without_communication(group):
    _, ranks = group
    here = slices_of_steps()
    assert len({tuple(z.flatten().tolist()) for z in here}) == len(here)
    for results in ranks:
        assert results["slice_calls"] == 0
        assert all(map(torch.equal, results["slices"], here))


@pytest.mark.parametrize("total", [0, 1])
@pytest.mark.parametrize("name", TOO_FEW)
def test_fewer_than_two_samples_on_all_ranks(group, name, total):
    """Never a number: an error where the sizes are known, NaN on slices, where they stay on the device."""
    _, ranks = group
    options, dim = TOO_FEW[name].options, TOO_FEW[name].dim
    for result in (results["too few"][name, total] for results in ranks):
        if (options.get("slice_dim", 128) or dim) >= dim or options.get("impl") == "reference":
            assert "at least 2 samples on all ranks together" in result
        else:
            loss, grad = result
            assert loss.isnan()
            assert grad.isnan().any() or not len(grad)  # of coordinates, those in the slice


@pytest.mark.parametrize("route", ROUTES)
def test_without_a_group_it_is_one_process(route):
    options, dim = ROUTES[route]
    pair = [torch.randn(20, dim, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    assert not distributed.is_active(None)
    assert MMILoss(gather_distributed=True, **options)(*pair) == MMILoss(**options)(*pair)
    with pytest.raises(ValueError, match="at least 2 samples"):
        MMILoss(gather_distributed=True, **options)(pair[0][:1], pair[1][:1])
