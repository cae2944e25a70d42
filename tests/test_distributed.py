"""Real gloo processes with different data, and different amounts of it, on every rank.

Under DDP the loss must be that of the concatenated batch, and the averaged parameter gradient its gradient. One
group of processes per world size runs all cases; the tests compare what it saved.
"""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmi_loss import MMILoss, distributed
from mmi_loss.functional import OBJECTIVES
from tests.conftest import views

pytestmark = pytest.mark.filterwarnings("ignore:objective=")

SIZES = {2: [13, 7], 3: [11, 0, 6], 4: [4, 4, 1, 3]}
IN, OUT, STEPS = 6, 20, 20
CASES = {
    f"{objective}-{name}": {"objective": objective, **options}
    for objective in OBJECTIVES
    for name, options in {
        "coordinates": {"slice_dim": 5, "num_slices": 2, "slice_kind": "coordinates"},
        "kronecker": {"slice_dim": 16},
        "gaussian": {"slice_dim": 5, "slice_kind": "gaussian"},
        "all": {"slice_dim": None},
        "narrow": {},
        "series": {"slice_dim": 5, "logdet": "taylor"},
        "reference": {"slice_dim": 5, "impl": "reference"},
    }.items()
}


def make_layer(dim=OUT):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, 16), nn.Tanh(), nn.Linear(16, dim)).double()


def width(name):
    """Three features for the covariance route of all features, twenty for the Gram route and slices."""
    return 3 if "narrow" in name else OUT


def train(model, loss_fn, pair):
    """The first loss and gradient, and the parameters after some steps of the optimiser."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    first = None
    for _ in range(STEPS):
        loss = loss_fn(*(model(z) for z in pair))
        optimizer.zero_grad()
        loss.backward()
        if first is None:
            first = loss.detach(), [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    return *first, [p.detach().clone() for p in model.parameters()]


def run_rank(rank, sizes, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    world = len(sizes)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    start = sum(sizes[:rank])
    pair = [z.detach()[start : start + sizes[rank]] for z in views(sum(sizes), IN)]
    results = {}
    for name, options in CASES.items():
        model = DistributedDataParallel(make_layer(width(name)))
        results[name] = train(model, MMILoss(**options, gather_distributed=True), pair)
    # Autocast: half precision projections, statistics in float32.
    model = DistributedDataParallel(make_layer().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projections = [model(z.float()) for z in pair]
        loss = MMILoss(slice_dim=5, gather_distributed=True)(*projections)
    loss.backward()
    results["autocast"] = loss.detach(), [p.grad for p in model.parameters()], projections
    results["sizes"] = distributed.batch_sizes(pair[0])
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=SIZES, ids=lambda world: f"{world}ranks")
def group(request, tmp_path_factory):
    sizes = SIZES[request.param]
    folder = tmp_path_factory.mktemp("group")
    mp.spawn(run_rank, args=(sizes, str(folder)), nprocs=len(sizes))
    return sizes, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(len(sizes))]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_concatenated_batch(group, name):
    sizes, ranks = group
    pair = [z.detach() for z in views(sum(sizes), IN)]
    loss, grads, parameters = train(make_layer(width(name)), MMILoss(**CASES[name]), pair)
    for rank_loss, rank_grads, rank_parameters in (results[name] for results in ranks):
        assert rank_loss.item() == pytest.approx(loss.item(), rel=1e-9)
        for grad, expected in zip(rank_grads, grads, strict=True):
            assert (grad - expected).norm() <= 1e-6 * max(g.norm() for g in grads)
        for parameter, expected in zip(rank_parameters, parameters, strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-8)


def test_autocast(group):
    _, ranks = group
    gathered = [torch.cat([results["autocast"][2][v] for results in ranks]) for v in range(2)]
    expected = MMILoss(slice_dim=5)(*(z.double() for z in gathered))
    for loss, grads, _ in (results["autocast"] for results in ranks):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert all(grad.isfinite().all() for grad in grads)


def test_sizes_are_known_everywhere(group):
    sizes, ranks = group
    assert all(results["sizes"] == sizes for results in ranks)


def test_without_a_group_it_is_one_process():
    pair = views(20, 12)
    assert not distributed.is_active()
    for options in ({}, {"slice_dim": None}, {"slice_dim": 5}):
        assert MMILoss(gather_distributed=True, **options)(*pair) == MMILoss(**options)(*pair)
    with pytest.raises(ValueError, match="at least 2 samples"):
        MMILoss(gather_distributed=True)(pair[0][:1], pair[1][:1])
