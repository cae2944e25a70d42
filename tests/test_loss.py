"""The module: its state, its life in a training script, compilation."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import mmi_loss
from mmi_loss import MMILoss
from mmi_loss.functional import mmi_loss as functional_mmi_loss
from tests.conftest import views

pytestmark = pytest.mark.filterwarnings("ignore:objective=")

VARIANTS = {
    "default": {},
    "all_gram": {"slice_dim": None},
    "gaussian": {"slice_kind": "gaussian", "slice_dim": 16, "num_slices": 2},
    "coordinates": {"slice_kind": "coordinates", "slice_dim": 16},
    "joint": {"objective": "joint", "slice_dim": 8},
    "joint_gram": {"objective": "joint", "slice_dim": None},
    "exchangeable": {"objective": "exchangeable", "slice_dim": 8},
    "taylor": {"logdet": "taylor", "slice_dim": 32},
    "paper": {"objective": "joint", "slice_dim": None, "logdet": "taylor"},
}


def test_module_is_the_function_of_its_counter():
    pair, loss_fn = views(20, 300), MMILoss()
    for step in range(3):
        assert loss_fn(*pair).item() == functional_mmi_loss(*pair, step=step).item()
    assert loss_fn.step == 3
    assert loss_fn(z_a=pair[0], z_b=pair[1]).item() == functional_mmi_loss(*pair, step=3).item()
    assert loss_fn.forward_components(*pair).loss.item() == functional_mmi_loss(*pair, step=4).item()


def test_slices_are_fresh_in_training_and_fixed_in_evaluation():
    pair, loss_fn = views(20, 300), MMILoss()
    assert loss_fn(*pair) != loss_fn(*pair)
    loss_fn.eval()
    assert loss_fn(*pair) == loss_fn(*pair)
    assert loss_fn.step == 2


def test_resumed_run_goes_on_where_it_stopped():
    pair, loss_fn = views(20, 300), MMILoss()
    loss_fn(*pair)
    file = io.BytesIO()
    torch.save(loss_fn.state_dict(), file)
    file.seek(0)
    expected = loss_fn(*pair)
    resumed = MMILoss()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed(*pair) == expected


def test_checkpoint_of_a_criterion_without_state_loads():
    class Model(nn.Module):
        def __init__(self, criterion):
            super().__init__()
            self.layer, self.criterion = nn.Linear(2, 2), criterion

    model = Model(MMILoss())
    model.criterion.step += 5
    checkpoint = Model(nn.MSELoss()).state_dict()
    keys = set(checkpoint)
    model.load_state_dict(checkpoint)
    assert model.criterion.step == 5
    assert set(checkpoint) == keys


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_behave_alike(clone):
    pair, loss_fn = views(20, 300), MMILoss(seed=3)
    loss_fn(*pair)
    copied = clone(loss_fn)
    assert copied(*pair) == loss_fn(*pair)
    assert copied.options == loss_fn.options


def test_counter_survives_inference_mode():
    pair = views(20, 300)
    with torch.inference_mode():
        created = MMILoss()
        inside = created(*pair)
        other = MMILoss()
    assert inside == functional_mmi_loss(*pair, step=0)
    created(*pair).backward()
    with torch.inference_mode():
        created(*pair)
    assert created.step == 3
    other.load_state_dict(created.state_dict())
    assert other(*pair) == created(*pair)


def test_paper():
    loss_fn = MMILoss.paper()
    assert (loss_fn.options.objective, loss_fn.options.slice_dim) == ("joint", None)
    assert (loss_fn.options.logdet, loss_fn.options.order) == ("taylor", 4)
    assert MMILoss.paper(beta=0.5).options.beta == 0.5


def test_repr_shows_what_applies():
    assert repr(MMILoss(slice_dim=32)).startswith("MMILoss(objective='content', slice_dim=32")
    assert "beta" not in repr(MMILoss())
    assert "beta" in repr(MMILoss.paper())


def test_learning_decorrelates_and_aligns():
    """Twenty steps of gradient descent must raise the information, on every variant; measured exactly also
    where the loss is the series.
    """
    for options in VARIANTS.values():
        torch.manual_seed(0)
        layer, loss_fn = nn.Linear(40, 64), MMILoss(**options)
        loss_fn.eval()
        optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
        pair = [z.float().detach() for z in views(32, 40)]
        losses = []
        for _ in range(20):
            loss = loss_fn(*(layer(z) for z in pair))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            exact = functional_mmi_loss(*(layer(z) for z in pair), **{**options, "logdet": "cholesky"})
            losses.append(exact.item())
        assert losses[-1] < losses[0] - 0.1, options


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_whole(name):
    torch._dynamo.reset()  # one recompilation limit per variant
    options = VARIANTS[name]
    eager, module = MMILoss(**options), MMILoss(**options)
    compiled = torch.compile(module, fullgraph=True)
    for _ in range(2):
        assert_same(compiled, eager, samples=24)
    assert module.step == eager.step == 2


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_for_changing_batch_sizes(name):
    """A last, incomplete batch: from the second size on, the size is a symbol of the graph."""
    torch._dynamo.reset()
    eager, module = MMILoss(**VARIANTS[name]), MMILoss(**VARIANTS[name])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for samples in (24, 20, 30, 150):
        assert_same(compiled, eager, samples)


def assert_same(ours, expected, samples):
    results = []
    for function in (ours, expected):
        leaves = [z.detach().float().requires_grad_() for z in views(samples, 140)]
        loss = function(*leaves)
        loss.backward()
        results.append([loss.detach(), *(z.grad for z in leaves)])
    for value, other in zip(*results, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)


def test_compiled_step_has_no_host_synchronisation():
    """Fake tensors hold no data: any read of a value, as ``.item()`` or ``if tensor``, would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for options in VARIANTS.values():
        with FakeTensorMode():
            loss_fn = MMILoss(**options)
            leaves = [torch.randn(24, 140, requires_grad=True) for _ in range(2)]
            loss_fn(*leaves).backward()
            assert leaves[0].grad.shape == (24, 140)


def test_import_is_cheap():
    code = "import sys, mmi_loss; assert 'torch' not in sys.modules; mmi_loss.MMILoss; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = mmi_loss.no_such_thing
    assert mmi_loss.functional.mmi_loss is functional_mmi_loss
    assert mmi_loss.diagnostics.mutual_information is mmi_loss.functional.mutual_information
