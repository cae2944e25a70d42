"""User errors name the argument, the value or shape, and the remedy."""

import re
import warnings

import pytest
import torch

from mmi_loss import MMILoss
from mmi_loss.functional import mmi_loss, mmi_loss_multiview

Z = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))

BAD_INPUTS = [
    ((Z[:0], Z[:0]), ValueError, r"z_a .*2 samples.*\(0, 6\).*drop_last"),
    ((Z[:1], Z[:1]), ValueError, r"z_a .*2 samples.*\(1, 6\)"),
    ((Z, Z[:, :3]), ValueError, r"z_a and z_b .*\(8, 6\) and \(8, 3\)"),
    ((Z, Z[:4]), ValueError, r"z_a and z_b .*\(8, 6\) and \(4, 6\)"),
    ((Z[0], Z[0]), ValueError, r"z_a .*\(N, D\).*\(6,\)"),
    ((Z, Z[None]), ValueError, r"z_b .*\(N, D\).*\(1, 8, 6\)"),
    ((Z[:, :0], Z[:, :0]), ValueError, r"z_a .*at least one feature.*\(8, 0\)"),
    ((Z.long(), Z.long()), TypeError, r"z_a .*floating point.*int64.*float\(\)"),
    ((Z, Z.to(torch.complex64)), TypeError, r"z_b .*floating point.*complex64"),
    ((Z, Z.numpy()), TypeError, r"z_b must be a torch.Tensor, got ndarray"),
    (([1.0], Z), TypeError, r"z_a must be a torch.Tensor, got list"),
    ((Z.to_sparse(), Z), TypeError, r"z_a must be dense, got layout torch.sparse_coo.*z_a.to_dense\(\)"),
    ((Z, Z.to("meta")), ValueError, r"z_a and z_b .*same device.*cpu and meta"),
]

BAD_OPTIONS = [
    ({"objective": "mutual"}, ValueError, "objective='mutual' is not one of 'content', 'exchangeable', 'joint'"),
    ({"logdet": "lu"}, ValueError, "logdet='lu' is not one of 'cholesky', 'taylor'"),
    ({"impl": "cuda"}, ValueError, "impl='cuda' is not one of 'auto', 'reference', 'eager'"),
    ({"slice_kind": "axis"}, ValueError, "slice_kind='axis' is not one of"),
    ({"slice_dim": 0}, ValueError, "slice_dim must be at least 1, got 0; slice_dim=None takes all features"),
    ({"slice_dim": 2.5}, TypeError, "slice_dim must be an int, got 2.5"),
    ({"num_slices": 0}, ValueError, "num_slices must be at least 1, got 0"),
    ({"order": 0}, ValueError, "order must be at least 1, got 0"),
    ({"seed": "a"}, TypeError, "seed must be an int, got 'a'"),
    ({"snr": 0}, ValueError, "snr must be a positive number, got 0"),
    ({"snr": float("nan")}, ValueError, "snr must be a positive number, got nan"),
    ({"snr": None}, ValueError, "snr must be a positive number, got None"),
    ({"ridge": -1.0}, ValueError, "ridge must be a positive number, got -1.0"),
    ({"ridge": float("inf")}, ValueError, "ridge must be a positive number, got inf"),
    ({"snr": 10.0, "ridge": 0.1}, ValueError, "snr=10.0 and ridge=0.1 set the same noise floor: give only one"),
    ({"snr": "64"}, TypeError, "snr must be a number, got '64'"),
    ({"ridge": True}, TypeError, "ridge must be a number, got True"),
    ({"gather_distributed": "gloo"}, TypeError, "gather_distributed must be True or False, got 'gloo'"),
    ({"beta": 2.0}, ValueError, r"beta must lie in \(0, 2\).*got 2.0"),
]


@pytest.mark.parametrize(("inputs", "error", "message"), BAD_INPUTS)
def test_bad_inputs(inputs, error, message):
    with pytest.raises(error, match=message):
        MMILoss()(*inputs)
    with pytest.raises(error, match=message):
        mmi_loss(*inputs, slice_dim=None)


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


def test_unknown_option():
    with pytest.raises(TypeError, match="slices_dim"):
        mmi_loss(Z, Z, slices_dim=3)


def test_multiview_errors_name_the_view():
    with pytest.raises(ValueError, match="at least 2 views, got 1"):
        mmi_loss_multiview([Z])
    with pytest.raises(ValueError, match=re.escape("views[0] and views[2] must have the same shape")):
        mmi_loss_multiview([Z, Z, Z[:4]])


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
