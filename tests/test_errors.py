"""User errors name the argument, the value or shape, and the remedy."""

import inspect
import re
import warnings

import pytest
import torch

from mmi_loss import MMILoss
from mmi_loss.functional import mmi_loss, mmi_loss_multiview
from mmi_loss.options import DEFAULTS, Options

Z = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))

BAD_INPUTS = [
    ((Z[:0], Z[:0]), ValueError, r"z_a .*2 samples.*\(0, 6\).*drop_last"),
    ((Z[:1], Z[:1]), ValueError, r"z_a .*2 samples.*\(1, 6\)"),
    (
        (Z, Z[:, :3]),
        ValueError,
        r"z_a and z_b .*\(8, 6\) and \(8, 3\).*objective='joint' takes views of different width",
    ),
    ((Z, Z[:4]), ValueError, r"z_a and z_b .*\(8, 6\) and \(4, 6\)"),
    ((Z[0], Z[0]), ValueError, r"z_a .*\(N, D\).*\(6,\)"),
    ((Z, Z[None]), ValueError, r"z_b .*\(N, D\).*\(1, 8, 6\)"),
    ((Z[:, :0], Z[:, :0]), ValueError, r"z_a .*at least one feature.*\(8, 0\)"),
    ((Z.long(), Z.long()), TypeError, r"z_a .*floating point.*int64.*float\(\)"),
    ((Z, Z.to(torch.complex64)), TypeError, r"z_b .*floating point.*complex64"),
    ((Z.to(torch.float8_e4m3fn), Z), TypeError, r"z_a must be .*float8_e4m3fn"),
    ((Z, Z.numpy()), TypeError, r"z_b must be a torch.Tensor, got ndarray"),
    (([1.0], Z), TypeError, r"z_a must be a torch.Tensor, got list"),
    ((Z.to_sparse(), Z), TypeError, r"z_a must be dense, got layout torch.sparse_coo.*z_a.to_dense\(\)"),
    ((Z, Z.to("meta")), ValueError, r"z_a and z_b .*same device.*cpu and meta"),
]

BAD_OPTIONS = [
    ({"objective": "mutual"}, ValueError, "objective='mutual' is not one of 'content', 'exchangeable', 'joint'"),
    ({"objective": ["joint"]}, ValueError, r"objective=\['joint'\] is not one of 'content'"),
    ({"logdet": "lu"}, ValueError, "logdet='lu' is not one of 'cholesky', 'taylor'"),
    ({"impl": "cuda"}, ValueError, "impl='cuda' is not one of 'auto', 'eager', 'triton', 'reference'"),
    ({"slice_kind": "axis"}, ValueError, "slice_kind='axis' is not one of"),
    ({"slice_dim": 0}, ValueError, "slice_dim must be at least 1, got 0; slice_dim=None takes all features"),
    ({"slice_dim": 2.5}, TypeError, "slice_dim must be an int, got 2.5"),
    ({"num_slices": 0}, ValueError, "num_slices must be at least 1, got 0"),
    ({"order": 0}, ValueError, "order must be at least 1, got 0"),
    ({"seed": "a"}, TypeError, "seed must be an int, got 'a'"),
    ({"snr": 0}, ValueError, "snr must be a positive number, got 0"),
    ({"snr": float("nan")}, ValueError, "snr must be a positive number, got nan"),
    ({"ridge": -1.0}, ValueError, "ridge must be a positive number, got -1.0"),
    ({"ridge": float("inf")}, ValueError, "ridge must be a positive number, got inf"),
    ({"snr": 10.0, "ridge": 0.1}, ValueError, "snr=10.0 and ridge=0.1 set the same noise floor: give only one"),
    ({"snr": "64"}, TypeError, "snr must be a number, got '64'"),
    ({"ridge": True}, TypeError, "ridge must be a number, got True"),
    ({"gather_distributed": "gloo"}, TypeError, "gather_distributed must be True or False, got 'gloo'"),
    ({"beta": 2.0}, ValueError, r"beta must lie in \(0, 2\).*got 2.0"),
    ({"beta": None}, ValueError, r"beta must lie in \(0, 2\).*got None"),
    ({"slice_dim": None, "num_slices": 2}, ValueError, "num_slices=2 has no effect on all features.*slice_dim=128"),
    (
        {"process_group": "dp"},
        TypeError,
        r"process_group must be a torch.distributed.ProcessGroup, got 'dp'.*get_group",
    ),
    ({"slices_dim": 3}, TypeError, r"unknown option 'slices_dim'; known are objective, .*slice_dim"),
]


@pytest.mark.parametrize(("inputs", "error", "message"), BAD_INPUTS)
def test_bad_inputs(inputs, error, message):
    with pytest.raises(error, match=message):
        MMILoss()(*inputs)
    with pytest.raises(error, match=message):
        mmi_loss(*inputs, slice_dim=None, impl="reference")


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=str)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        MMILoss(**options)
    with pytest.raises(error, match=message):
        mmi_loss(Z, Z, **options)


@pytest.mark.parametrize("step", [1.5, None, "1", True, torch.tensor(1.5), torch.tensor([1, 2])], ids=str)
def test_bad_step(step):
    with pytest.raises(TypeError, match=r"step must be .*(int\(step\)|int64)"):
        mmi_loss(Z, Z, step=step)


def test_options_are_keyword_only_and_immutable():
    for call in (
        lambda: MMILoss("joint"),
        lambda: Options("joint"),
        lambda: mmi_loss(Z, Z, 3),
        lambda: MMILoss.paper(3),
    ):
        with pytest.raises(TypeError, match="positional argument"):
            call()
    with pytest.raises(AttributeError, match=r"make a new MMILoss\(snr=...\) instead"):
        MMILoss().options.snr = 3.0
    assert Options(**Options(ridge=0.1, seed=3).given()).given() == Options(ridge=0.1, seed=3).given()
    assert (Options().snr, Options(snr=7).snr, Options(ridge=0.1).snr) == (None, 7.0, None)


def test_signatures_list_the_options():
    """What ``help``, editors and configuration frameworks read."""
    shown = []
    for function in (MMILoss, mmi_loss, mmi_loss_multiview):
        parameters = inspect.signature(function).parameters.values()
        shown.append([p for p in parameters if p.name not in ("z_a", "z_b", "views", "step")])
        assert {p.name: p.default for p in shown[-1]} == DEFAULTS
        assert {p.kind for p in shown[-1]} == {inspect.Parameter.KEYWORD_ONLY}
    assert shown[0] == shown[1] == shown[2]
    kinds = {getattr(p.annotation, "__name__", p.annotation) for p in shown[0]}
    assert kinds == {"str", "int", "int | None", "float", "float | None", "bool", "ProcessGroup | None"}


BAD_CALLS = [
    (lambda f: f(Z), {}, TypeError, r"two views \(z_a, z_b\).*local_proj= and global_proj=.*z_a.*\(8, 6\)"),
    (lambda f: f(), {}, TypeError, "two views.*Got nothing"),
    (lambda f: f(Z, Z, global_proj=Z[None]), {}, TypeError, "two views.*global_proj"),
    (lambda f: f(global_proj=Z), {}, ValueError, r"global_proj must have shape \(V, N, D\), got \(8, 6\)"),
    (lambda f: f([Z]), {}, ValueError, "at least 2 views, got 1"),
    (lambda f: f([]), {}, ValueError, "at least 2 views, got 0"),
    (lambda f: f([Z, Z, Z[:4]]), {}, ValueError, r"views\[0\] and views\[2\] must have the same shape"),
    (lambda f: f([Z, Z, Z[:, :4]]), {"objective": "exchangeable"}, ValueError, r"views\[2\].*objective='joint' takes"),
    (lambda f: f(Z, Z[:4, :4]), {"objective": "joint"}, ValueError, r"\(8, 6\) and \(4, 4\); row i of every view"),
]


@pytest.mark.parametrize(("call", "options", "error", "message"), BAD_CALLS)
def test_bad_calls(call, options, error, message):
    loss_fn = MMILoss(**options)
    for function in (loss_fn, loss_fn.forward_components):
        with pytest.raises(error, match=message):
            call(function)
    assert loss_fn.step == 0


def test_slices_that_hold_all_features_warn_at_every_call():
    loss_fn = MMILoss(slice_dim=6, num_slices=3)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"num_slices=3 has no effect.*slice_dim=6.*slice_dim below 6"):
            loss_fn(Z, Z)


@pytest.mark.parametrize("objective", ["joint", "exchangeable"])
def test_quiet_failure_warns_once(objective):
    loss_fn = MMILoss(objective=objective, slice_dim=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            loss_fn(Z, Z)
    assert len(caught) == 1
    assert caught[0].category is UserWarning
    assert re.search(r"6 dimensions from 8 samples.*objective='content'.*slice_dim=1", str(caught[0].message))


def test_no_warning_where_nothing_is_known_to_fail():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MMILoss()(Z, Z)
        plenty = Z.repeat(6, 1)
        MMILoss(objective="joint", slice_dim=None)(plenty, plenty)
        MMILoss(objective="joint", slice_dim=1)(Z, Z)
