"""Under torch.compile the batch size is a symbol: few graphs do for all of them, and compute what eager mode does.

"aot_eager" traces and differentiates as "inductor" does, without its compiler, which :mod:`tests.test_loss` has.
"""

import itertools

import pytest
import torch
from torch._dynamo.utils import counters

from mmi_loss import MMILoss
from mmi_loss.objectives import OBJECTIVES

pytestmark = pytest.mark.filterwarnings("ignore:objective=")

DIM = 128
# On both sides of every switch between covariance and Gram matrices: where one view, or two, has as many samples as a
# slice, or as all features, of one view or of both.
SIZES = [30, 300, 49, 50, 51, 63, 64, 65, 99, 100, 101, 127, 128, 129, 31, 299, 47, 88, 200, 256]
KINDS = {
    "kronecker": {"slice_dim": 100},
    "gaussian": {"slice_dim": 100, "slice_kind": "gaussian"},
    "coordinates": {"slice_dim": 100, "slice_kind": "coordinates"},
    "all features": {"slice_dim": None},
}
SERIES = [("content", "kronecker"), ("exchangeable", "all features"), ("joint", "all features")]
CASES = [(*pair, "cholesky") for pair in itertools.product(OBJECTIVES, KINDS)] + [(*pair, "taylor") for pair in SERIES]


@pytest.mark.parametrize(("objective", "kind", "logdet"), CASES)
def test_two_graphs_do_for_twenty_batch_sizes(objective, kind, logdet):
    torch._dynamo.reset()
    counters.clear()
    options = {"objective": objective, "logdet": logdet, **KINDS[kind]}
    eager, module = MMILoss(**options), MMILoss(**options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for samples in SIZES:
        generator = torch.Generator().manual_seed(samples)
        pair = [torch.randn(samples, DIM, generator=generator, dtype=torch.float64) for _ in range(2)]
        results = []
        for loss_fn in (compiled, eager):
            leaves = [z.clone().requires_grad_() for z in pair]
            for leaf in leaves:  # from the first size on: automatically it is from the second, which is a graph more
                torch._dynamo.mark_dynamic(leaf, 0)
            loss = loss_fn(*leaves)
            loss.backward()
            results.append([loss.detach(), *(z.grad for z in leaves)])
        for ours, expected in zip(*results, strict=True):
            assert (ours - expected).norm() <= 1e-10 * expected.norm()
    assert module.step == eager.step == len(SIZES)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("options", [{}, {"slice_dim": None}, {"objective": "joint"}], ids=str)
def test_without_gradients_as_in_validation(options):
    torch._dynamo.reset()
    pair = [torch.randn(40, DIM, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1)]
    with torch.no_grad():
        compiled = torch.compile(MMILoss(**options), fullgraph=True, backend="aot_eager")(*pair)
    torch.testing.assert_close(compiled, MMILoss(**options)(*pair))
