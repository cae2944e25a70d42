"""Invariances, bounds and agreements, over drawn shapes, data and options."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mmi_loss.functional import OBJECTIVES, mmi_loss
from tests import oracle

pytestmark = pytest.mark.filterwarnings("ignore:objective=")

sizes = st.tuples(st.integers(2, 40), st.integers(1, 40))
seeds = st.integers(0, 2**31)
objectives = st.sampled_from(list(OBJECTIVES))
slice_options = st.fixed_dictionaries(
    {
        "slice_dim": st.one_of(st.none(), st.integers(1, 45)),
        "num_slices": st.integers(1, 3),
        "slice_kind": st.sampled_from(["kronecker", "gaussian", "coordinates"]),
        "step": st.integers(0, 2**40),
        "seed": st.integers(-(2**40), 2**40),
    }
)


def draw_views(shape, seed, rank=None):
    """Correlated views with arbitrary mean and scale; ``rank`` limits the content's."""
    n, dim = shape
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(n, rank or dim, generator=generator, dtype=torch.float64)
    content = content @ torch.randn(rank or dim, dim, generator=generator, dtype=torch.float64)
    scale = torch.rand(dim, generator=generator, dtype=torch.float64) * 10 + 0.1
    strength = torch.rand((), generator=generator, dtype=torch.float64)
    noise = torch.randn(2, n, dim, generator=generator, dtype=torch.float64)
    return [(content + strength * e + 3) * scale for e in noise]


@given(shape=sizes, seed=seeds, objective=objectives, options=slice_options, snr=st.floats(0.1, 1000))
def test_estimators_agree_with_the_reference(shape, seed, objective, options, snr):
    pair = draw_views(shape, seed)
    values, grads = [], []
    for impl in ("eager", "reference"):
        leaves = [z.clone().requires_grad_() for z in pair]
        value = mmi_loss(*leaves, objective=objective, snr=snr, impl=impl, **options)
        value.backward()
        values.append(value.item())
        grads.append(torch.cat([z.grad for z in leaves]))
    assert values[0] == pytest.approx(values[1], rel=1e-8, abs=1e-9)
    assert (grads[0] - grads[1]).norm() <= 1e-6 * grads[1].norm() + 1e-9


@given(shape=sizes, seed=seeds, objective=objectives, snr=st.floats(0.1, 1000))
def test_all_features_agree_with_numpy(shape, seed, objective, snr):
    pair = draw_views(shape, seed)
    expected = -oracle.mutual_information(*pair, objective, snr=snr)
    assert mmi_loss(*pair, objective=objective, slice_dim=None, snr=snr).item() == pytest.approx(
        expected, rel=1e-8, abs=1e-9
    )


@given(shape=sizes, seed=seeds, objective=objectives, options=slice_options)
def test_symmetric_in_views_and_samples(shape, seed, objective, options):
    z_a, z_b = draw_views(shape, seed)
    value = mmi_loss(z_a, z_b, objective=objective, **options).item()
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    for pair in ((z_b, z_a), (z_a[order], z_b[order])):
        assert mmi_loss(*pair, objective=objective, **options).item() == pytest.approx(value, rel=1e-8, abs=1e-9)


@given(shape=sizes, seed=seeds, objective=objectives, options=slice_options, shift=st.floats(-100, 100))
def test_invariant_to_a_common_scale_and_shift(shape, seed, objective, options, shift):
    z_a, z_b = draw_views(shape, seed)
    value = mmi_loss(z_a, z_b, objective=objective, **options).item()
    moved = mmi_loss(z_a * 0.37 + shift, z_b * 0.37 + shift, objective=objective, **options).item()
    assert moved == pytest.approx(value, rel=1e-6, abs=1e-7)


@given(dim=st.integers(1, 8), seed=seeds, objective=objectives)
def test_affine_invariance_without_noise_floor(dim, seed, objective):
    z_a, z_b = draw_views((10 * dim + 5, dim), seed)
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, dim, dim, generator=generator, dtype=torch.float64)
    assume(torch.linalg.cond(maps).max() < 1e3)
    # Exchangeable views share their map: they come from one network.
    map_a, map_b = maps if objective == "joint" else (maps[0], maps[0])
    options = {"objective": objective, "slice_dim": None, "ridge": 1e-13}
    value = mmi_loss(z_a, z_b, **options).item()
    assert mmi_loss(z_a @ map_a - 2, z_b @ map_b - 2, **options).item() == pytest.approx(value, rel=1e-3, abs=1e-4)


@given(shape=sizes, seed=seeds, snr=st.floats(0.5, 1000))
def test_content_bounds(shape, seed, snr):
    """I(Z;Z') <= I(Z;content) <= I(Z;Z') + k/2 log 2 where the sample cross-covariance is positive semi-definite."""
    n, dim = shape
    content, nuisance = draw_views(shape, seed)
    content = content - content.mean(0)
    # Nuisances orthogonal to the content and opposite in the views, small: S = content - nuisance covariance >= 0.
    basis, _ = torch.linalg.qr(content)
    nuisance = nuisance - nuisance.mean(0)
    assume(n > dim + 1)
    smallest = torch.linalg.svdvals(content)[-1]
    nuisance = 0.9 * smallest * nuisance / torch.linalg.matrix_norm(nuisance, 2)
    nuisance = nuisance - basis @ (basis.T @ nuisance)
    pair = content + nuisance, content - nuisance
    options = {"slice_dim": None, "snr": snr}
    shared = -mmi_loss(*pair, objective="exchangeable", **options).item()
    total = -mmi_loss(*pair, objective="content", **options).item()
    assert shared <= total + 1e-7
    assert total <= shared + dim / 2 * math.log(2) + 1e-7


@given(shape=sizes, seed=seeds, snr=st.floats(0.5, 1000))
def test_exchangeable_is_joint_on_the_doubled_batch(shape, seed, snr):
    z_a, z_b = draw_views(shape, seed)
    doubled = mmi_loss(torch.cat([z_a, z_b]), torch.cat([z_b, z_a]), objective="joint", slice_dim=None, snr=snr)
    single = mmi_loss(z_a, z_b, objective="exchangeable", slice_dim=None, snr=snr)
    assert doubled.item() == pytest.approx(single.item(), rel=1e-8, abs=1e-9)


@given(shape=sizes, seed=seeds, k=st.integers(1, 39), snr=st.floats(0.5, 1000))
def test_coordinates_lose_information(shape, seed, k, snr):
    """Data processing: with the same noise, some of the features never tell more than all of them."""
    pair = draw_views(shape, seed)
    ridge = shape[1] / snr
    for objective in OBJECTIVES:
        some = mmi_loss(*pair, objective=objective, slice_dim=k, ridge=ridge, slice_kind="coordinates").item()
        every = mmi_loss(*pair, objective=objective, slice_dim=None, ridge=ridge).item()
        if objective != "content":
            assert some >= every - 1e-8


@given(
    shape=sizes, seed=seeds, objective=objectives, rank=st.integers(1, 5), dtype=st.sampled_from(["float16", "float32"])
)
def test_never_silent_never_hanging(shape, seed, objective, rank, dtype):
    """Any finite input, however degenerate, gives a finite loss and finite gradients in float32."""
    pair = [z.to(getattr(torch, dtype)).requires_grad_() for z in draw_views(shape, seed, rank)]
    assume(all(z.isfinite().all() for z in pair))
    loss = mmi_loss(*pair, objective=objective, slice_dim=16)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(z.grad.isfinite().all() for z in pair)
