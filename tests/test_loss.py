"""The module: its state, its life in a training script, compilation and export."""

import copy
import functools
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmi_loss
from mmi_loss import MMILoss
from mmi_loss.functional import mmi_loss as functional_mmi_loss
from mmi_loss.functional import mmi_loss_multiview
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


class Run(nn.Module):
    """A model that keeps its criterion, as Lightning modules do."""

    def __init__(self, criterion, dims=(2, 2)):
        super().__init__()
        self.net, self.criterion = nn.Linear(*dims), criterion

    def forward(self, x, y):
        return self.criterion(self.net(x), self.net(y))


def saved(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_module_is_the_function_of_its_counter():
    pair, loss_fn = views(20, 300), MMILoss()
    for step in range(3):
        assert loss_fn(*pair).item() == functional_mmi_loss(*pair, step=step).item()
    assert loss_fn.step == 3
    assert loss_fn(z_a=pair[0], z_b=pair[1]).item() == functional_mmi_loss(*pair, step=3).item()
    assert loss_fn.forward_components(*pair).loss.item() == functional_mmi_loss(*pair, step=4).item()
    assert loss_fn.step == 5


@pytest.mark.parametrize("options", [VARIANTS[name] for name in ("default", "joint", "exchangeable")], ids=str)
def test_more_views(options):
    """Every form of a call that criteria of multi-crop methods know is a function of the same views."""
    stacked = torch.stack([z.detach() for seed in (0, 1) for z in views(20, 140, seed=seed)])
    expected = mmi_loss_multiview(list(stacked), step=0, **options)
    forms = {
        "list": ((list(stacked),), {}),
        "stacked": ((stacked,), {}),
        "local and global": ((), {"local_proj": stacked[2:], "global_proj": stacked[:2]}),
        "global alone": ((), {"global_proj": stacked}),
    }
    for arguments, keywords in forms.values():
        for call in ("forward", "forward_components"):
            loss_fn = MMILoss(**options)
            loss = getattr(loss_fn, call)(*arguments, **keywords)
            assert (loss if call == "forward" else loss.loss) == expected
            assert loss_fn.step == 1


def test_a_call_is_short():
    """From the call to torch: what a reader has to follow, and the interpreter."""
    loss_fn, (z_a, z_b) = MMILoss(), torch.randn(2, 256, 2048, requires_grad=True).unbind()
    loss_fn(z_a, z_b)
    package, files = Path(mmi_loss.__file__).parent, []

    def profile(frame, event, _):
        is_ours = event == "call" and Path(frame.f_code.co_filename).is_relative_to(package)
        if is_ours and frame.f_code.co_name != "<listcomp>":  # no call since Python 3.12
            files.append(frame.f_code.co_filename)

    sys.setprofile(profile)
    loss_fn(z_a, z_b)
    sys.setprofile(None)
    assert 0 < len(files) <= 20
    assert len(set(files)) <= 4


def test_slices_are_fresh_in_training_and_fixed_in_evaluation():
    pair, loss_fn = views(20, 300), MMILoss()
    assert loss_fn(*pair) != loss_fn(*pair)
    loss_fn.eval()
    assert loss_fn(*pair) == loss_fn(*pair)
    assert loss_fn.step == 2


def test_resumed_run_goes_on_where_it_stopped():
    pair, loss_fn = views(20, 300), MMILoss()
    loss_fn(*pair)
    state = saved(loss_fn)
    expected = loss_fn(*pair)
    resumed = MMILoss()
    resumed.load_state_dict(state)
    assert resumed(*pair) == expected


def test_checkpoints_load_strictly_whatever_the_criterion():
    """In both directions between criteria with and without state; a counter that was not saved stays as it is."""
    model, other = Run(MMILoss()), Run(nn.MSELoss())
    model.criterion.step.fill_(5)
    state = saved(model)
    assert set(state) == set(other.state_dict())
    other.load_state_dict(state)
    for counterless in (saved(other), dict(state)):  # a copy into a dict loses the metadata
        model.load_state_dict(counterless)
        assert model.criterion.step == 5
    # The counter of older checkpoints was a tensor of its own.
    for given, step in ((state, 5), ({**state, "criterion.step": torch.tensor(9)}, 9)):
        resumed, keys = Run(MMILoss()), set(given)
        resumed.load_state_dict(given)
        assert resumed.criterion.step == step
        assert set(given) == keys


def test_counter_survives_moves():
    with torch.device("meta"):
        model = Run(MMILoss())
    assert model.to_empty(device="cpu").criterion.step == 0
    model.criterion.step.fill_(7)
    for move in (lambda m: m.to_empty(device="cpu"), lambda m: m.to("cpu", torch.float64), lambda m: m.half()):
        loss_fn = move(model).criterion
        assert loss_fn.step == 7
        assert loss_fn.step.dtype == torch.int64


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_recomputed_forwards_take_their_steps_again(use_reentrant, calls):
    """Activation checkpointing around network and criterion: one backward, in which each call is run again."""
    inputs, net, loss_fn = [z.detach() for z in views(32, 20)], nn.Linear(20, 200).double(), MMILoss()

    def gradient(loss):
        net.zero_grad()
        sum(3**i * loss(i) for i in range(calls)).backward()
        return net.weight.grad

    def plain(a, b, step):
        return functional_mmi_loss(net(a), net(b), step=step)

    for start in (0, calls):  # two steps of training
        expected = gradient(lambda i, start=start: plain(*inputs, step=start + i))
        leaves = [z.clone().requires_grad_() for z in inputs]
        run = gradient(
            lambda _, leaves=leaves: checkpoint(
                lambda a, b: loss_fn(net(a), net(b)), *leaves, use_reentrant=use_reentrant
            )
        )
        torch.testing.assert_close(run, expected)
    assert loss_fn.step == 2 * calls


def _backward_of_first(run, loss_fn, a, b, other):
    first, second = run(a, b), run(a, other)
    return [(first, 0, b), (second, 1, other)]


def _plain_call_between(run, loss_fn, a, b, other):
    first, second = run(a, b), loss_fn(a, b)
    return [(second, 1, b), (first, 0, b)]


def _no_grad_between(run, loss_fn, a, b, other):
    first = run(a, b)
    with torch.no_grad():
        loss_fn(a, other)
    return [(first, 0, b)]


def _eval_between(run, loss_fn, a, b, other):
    first = run(a, b)
    loss_fn.eval()(a, b)
    return [(first, 0, b)]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("between", [_backward_of_first, _plain_call_between, _no_grad_between, _eval_between])
@pytest.mark.parametrize(
    "options", [{}, {"slice_kind": "coordinates"}, {"impl": "reference"}], ids=["default", "coordinates", "reference"]
)
def test_recomputed_forwards_whatever_comes_between(use_reentrant, between, options):
    a, b = views(32, 200)
    loss_fn = MMILoss(**options)
    run = functools.partial(checkpoint, loss_fn, use_reentrant=use_reentrant)
    # Mirrored features have the same sum: it takes more than that to tell calls apart.
    for loss, step, second in between(run, loss_fn, a, b, b.detach().flip(1)):
        a.grad = None
        loss.backward()
        (expected,) = torch.autograd.grad(functional_mmi_loss(a, second.detach(), step=step, **options), a)
        torch.testing.assert_close(a.grad, expected)


def test_a_recomputed_forward_of_a_forgotten_call_is_nan():
    a, b = views(32, 200)
    loss_fn = MMILoss()
    first = checkpoint(loss_fn, a, b, use_reentrant=True)
    with torch.no_grad():
        for i in range(16):
            loss_fn(a + 1 + i, b)
    first.backward()
    assert a.grad.isnan().all()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_behave_alike(clone):
    pair, loss_fn = views(20, 300), MMILoss(seed=3)
    loss_fn(*pair)
    copied = clone(loss_fn)
    assert copied(*pair) == loss_fn(*pair)
    assert copied.options.given() == loss_fn.options.given()


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


@pytest.mark.parametrize(
    "options", [{}, {"slice_dim": None}, {"objective": "exchangeable"}, {"snr": 9.0}, {"objective": "joint"}], ids=str
)
def test_frozen_at_has_the_gradient_and_is_the_function_of_it(options):
    """On the slice of the next call; the value is the same there and another elsewhere."""
    loss_fn = MMILoss(**{"slice_dim": 6, **options})
    loss_fn.step.fill_(3)
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(12, 9, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    frozen = loss_fn.frozen_at(*pair)
    assert loss_fn.step == frozen.step == 3
    fixed = frozen.eval()(*pair)
    ours = loss_fn.eval()(*pair)
    assert ours.item() == pytest.approx(fixed.item(), rel=1e-12)
    for ours_, fixed_ in zip(torch.autograd.grad(ours, pair), torch.autograd.grad(fixed, pair), strict=True):
        torch.testing.assert_close(ours_, fixed_)
    assert torch.autograd.gradcheck(frozen, pair)
    with pytest.raises(ValueError, match="frozen_at takes one slice"):
        MMILoss(num_slices=2, slice_dim=6).frozen_at(*pair)


def test_repr_shows_what_applies():
    for loss_fn, shown, hidden in (
        (
            MMILoss(slice_dim=32),
            ("objective='content'", "slice_dim=32"),
            ("snr", "ridge", "beta", "process_group"),
        ),
        (MMILoss.paper(ridge=0.1), ("objective='joint'", "slice_dim=None", "beta=1.0", "ridge=0.1"), ("snr",)),
    ):
        assert all(option in repr(loss_fn) for option in shown)
        assert not any(option in repr(loss_fn) for option in hidden)


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


@pytest.mark.parametrize("name", ["default", "all_gram"])
def test_compiles_for_changing_batch_sizes(name):
    """As in a training loop: the graph of the first size, and one for each route, whose size is a symbol."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, module = MMILoss(**VARIANTS[name]), MMILoss(**VARIANTS[name])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for samples in (24, 20, 30, 31, 62, 65, 90, 150, 151, 300):
        assert_same(compiled, eager, samples)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="before torch 2.7 the loss cannot know that it is exported"
)
@pytest.mark.parametrize("name", VARIANTS)
def test_exports_with_its_network(name):
    """One program for all batch sizes, which counts its calls and has the eager gradients."""
    torch.manual_seed(0)
    model, example = Run(MMILoss(**VARIANTS[name]), (20, 200)), (torch.randn(16, 20), torch.randn(16, 20))
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(copy.deepcopy(model), example, dynamic_shapes=(batch, batch)).module()
    for samples in (3, 16, 40, 300):
        results = []
        inputs = [torch.randn(samples, 20) for _ in range(2)]
        for run in (program, model):
            run.zero_grad()
            loss = run(*inputs)
            loss.backward()
            results.append([loss.detach(), run.net.weight.grad, run.net.bias.grad])
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    assert dict(program.named_buffers())["criterion.step"] == model.criterion.step == 4


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
