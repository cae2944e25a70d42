"""The Triton kernels: on a GPU where there is one, else by Triton's interpreter on the CPU, at small shapes.

The interpreter checks what is computed, not how a GPU rounds or orders it; tests/triton_aot.py compiles the kernels for
a GPU without running them. The tests that need a device say so and are skipped without.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with torch's Linux wheels")

from mmi_loss import MMILoss, functional
from mmi_loss.functional import Options, mmi_loss
from mmi_loss.ops import registry, slices
from mmi_loss.ops import triton as kernels
from mmi_loss.ops.triton import launch, operators
from tests.conftest import views

pytestmark = [
    pytest.mark.filterwarnings("ignore:objective="),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # the interpreter's numpy, where NaN is provoked
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
FLOAT32, BFLOAT16, HALF = torch.float32, torch.bfloat16, torch.float16
KERNELS = [name for name in vars(launch) if name.startswith("_") and name.endswith("_kernel")]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised tensors hold NaN: what a kernel leaves unwritten is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The names of the kernels that were launched."""
    names = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            names.append(self.kernel.__name__)
            return self.kernel[grid]

    for name in KERNELS:
        monkeypatch.setattr(launch, name, Recorder(getattr(launch, name)))
    return names


def on_device(pair, dtype=FLOAT32):
    return [z.detach().to(DEVICE, dtype) for z in pair]


def value_and_gradients(pair, impl, scale=-1.7, **options):
    leaves = [z.clone().requires_grad_() for z in pair]
    loss = mmi_loss(*leaves, impl=impl, **options)
    (scale * loss).backward()
    return [loss.detach(), *(z.grad for z in leaves)]


def relative_error(ours, truth):
    return float((ours.double() - truth).norm() / truth.norm().clamp(min=1e-300))


def check_against_float64(pair, launches, **options):
    """Every error with respect to float64 is at most twice that of plain torch in the inputs' dtype."""
    truth = value_and_gradients([z.double() for z in pair], "reference", **options)
    plain = value_and_gradients(pair, "reference", **options)
    del launches[:]
    ours = value_and_gradients(pair, "triton", **options)
    assert launches, "impl='triton' launched no kernel"
    # The interpreter truncates to bfloat16 where devices round to nearest.
    rounding = torch.finfo(BFLOAT16).eps / 2 if DEVICE == "cpu" else 0.0
    for name, got, simple, true in zip(("loss", "z_a", "z_b"), ours, plain, truth, strict=True):
        assert got.dtype == simple.dtype
        assert got.shape == simple.shape
        tolerance = 5e-6 + (rounding if got.dtype == BFLOAT16 else 0.0)
        error, plain_error = relative_error(got, true), relative_error(simple, true)
        assert error <= 2 * plain_error + tolerance, f"{name}: {error:.1e}, plain torch {plain_error:.1e}"


# (n, dim, dtype, options): aligned and ragged, fewer and more samples than features, one tile and several.
CASES = [
    (32, 64, FLOAT32, {"slice_dim": 16}),
    (19, 301, FLOAT32, {"slice_dim": 32, "num_slices": 2}),
    (21, 143, FLOAT32, {"slice_dim": 100, "seed": 2**40 + 7, "step": 2**33 + 5}),
    (5, 40, FLOAT32, {"slice_dim": 7}),
    (2, 5, FLOAT32, {"slice_dim": 1}),
    (33, 90, BFLOAT16, {"slice_dim": 24}),
    (33, 90, HALF, {"slice_dim": 24, "ridge": 0.1}),
    (40, 66, FLOAT32, {"slice_dim": 24, "slice_kind": "gaussian"}),
    (20, 66, FLOAT32, {"slice_dim": 9, "slice_kind": "gaussian", "num_slices": 3, "objective": "exchangeable"}),
    (150, 64, BFLOAT16, {"slice_dim": 16, "objective": "exchangeable"}),
    (40, 6, FLOAT32, {"slice_dim": None}),
    (130, 33, FLOAT32, {"slice_dim": None, "objective": "exchangeable", "ridge": 0.05}),
    (10, 100, BFLOAT16, {"slice_dim": None}),
    # The parts, with matrices factorised by cuSOLVER or LAPACK.
    (70, 40, FLOAT32, {"slice_dim": 16, "objective": "joint"}),
    (70, 40, FLOAT32, {"slice_dim": 16, "objective": "joint", "num_slices": 2, "logdet": "taylor"}),
    (40, 37, HALF, {"slice_dim": None, "objective": "joint"}),
    (70, 35, FLOAT32, {"slice_dim": None, "objective": "exchangeable", "logdet": "taylor"}),
    (70, 131, FLOAT32, {"slice_dim": None}),
    (70, 140, FLOAT32, {"slice_dim": 135}),
    # Gram matrices: one tile and several.
    (20, 150, FLOAT32, {"slice_dim": None}),
    (35, 100, BFLOAT16, {"slice_dim": None, "objective": "joint", "ridge": 0.5}),
    (16, 140, HALF, {"slice_dim": None, "objective": "exchangeable"}),
    (66, 135, FLOAT32, {"slice_dim": None}),
    (7, 140, FLOAT32, {"slice_dim": None, "logdet": "taylor"}),
    (6, 40, FLOAT32, {"slice_dim": 30, "num_slices": 2, "objective": "joint"}),
]


def case_id(case):
    n, dim, dtype, options = case
    return f"{n}x{dim}-{str(dtype).removeprefix('torch.')}-" + "-".join(f"{k}={v}" for k, v in options.items())


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_error_is_no_worse_than_plain_torch(case, launches):
    n, dim, dtype, options = case
    check_against_float64(on_device(views(n, dim), dtype), launches, **{"step": 3, **options})


@pytest.mark.parametrize(
    ("shape", "options"),
    [((64, 48), {"slice_dim": 16}), ((64, 20), {"slice_dim": None}), ((30, 131), {"slice_dim": None})],
    ids=str,
)
def test_mean_far_larger_than_the_deviation(shape, options, launches):
    pair = on_device([z.detach() + 100 for z in views(*shape)])
    check_against_float64(pair, launches, **options)


@pytest.mark.parametrize("objective", functional.OBJECTIVES)
def test_features_as_given_lose_nothing_to_their_mean(objective):
    """Relative to the first sample they are small: the error is that of centred features."""
    pair = on_device([z.detach() + 300 for z in views(40, 20)])
    options = {"objective": objective, "slice_dim": None}
    truth = value_and_gradients([z.double() for z in pair], "reference", **options)
    for got, true in zip(value_and_gradients(pair, "triton", **options), truth, strict=True):
        assert relative_error(got, true) < 2e-6


@pytest.mark.parametrize("scale", [5e3, 1e-4])
def test_scale_of_half_precision(scale, launches):
    pair = on_device([(z.detach() - 1.5) * scale for z in views(33, 60)], HALF)
    assert all(z.isfinite().all() for z in pair)
    check_against_float64(pair, launches, slice_dim=16)


@needs_gpu
@pytest.mark.parametrize("shape", [(256, 2048), (1024, 2048), (256, 8192), (4096, 8192), (1000, 999)], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, HALF], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"objective": "exchangeable"}, {"objective": "joint"}, {"slice_dim": 32, "num_slices": 4},
     {"slice_kind": "gaussian"}, {"slice_dim": 512}, {"slice_dim": 100}],
    ids=str,
)  # fmt: skip
def test_large_slices_on_the_gpu(shape, dtype, options, launches):
    generator = torch.Generator(DEVICE).manual_seed(0)
    content, *noise = torch.randn(3, *shape, generator=generator, device=DEVICE)
    check_against_float64([(content + e + 1.5).to(dtype) for e in noise], launches, **options)


@needs_gpu
@pytest.mark.parametrize("shape", [(4096, 512), (2048, 1000), (256, 2048), (100, 8192)], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, HALF], ids=str)
@pytest.mark.parametrize("objective", functional.OBJECTIVES)
def test_all_features_on_the_gpu(shape, dtype, objective, launches):
    generator = torch.Generator(DEVICE).manual_seed(0)
    content, *noise = torch.randn(3, *shape, generator=generator, device=DEVICE)
    pair = [(content + e + 1.5).to(dtype) for e in noise]
    check_against_float64(pair, launches, slice_dim=None, objective=objective)


@needs_gpu
@pytest.mark.parametrize("options", [{}, {"objective": "joint"}, {"slice_dim": None}], ids=str)
def test_captured_graph_replays_with_fresh_slices(options):
    loss_fn, expected_fn = (MMILoss(impl=impl, **options).to(DEVICE) for impl in ("triton", "eager"))
    pair = [z.requires_grad_() for z in on_device(views(256, 512))]

    def step():
        for z in pair:
            z.grad = None
        loss = loss_fn(*pair)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for _ in range(3):
        expected_fn.step.copy_(loss_fn.step)
        graph.replay()
        leaves = [z.detach().clone().requires_grad_() for z in pair]
        expected = expected_fn(*leaves)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        for z, leaf in zip(pair, leaves, strict=True):
            assert relative_error(z.grad, leaf.grad.double()) < 1e-5


def test_default_is_three_launches_and_two(launches):
    pair = [z.requires_grad_() for z in on_device(views(30, 140))]
    loss = MMILoss(impl="triton").to(DEVICE)(*pair)
    assert launches == ["_project_kernel", "_moments_kernel", "_factor_kernel"]
    loss.backward()
    assert launches[3:] == ["_moments_backward_kernel", "_project_backward_kernel"]


@pytest.mark.parametrize(
    ("dim", "slice_dim", "num_slices", "block_dim", "seed", "step"),
    [
        (48, 16, 1, 2, 0, 0),
        (301, 128, 1, 16, 3, 7),
        (50, 9, 3, 1, -5, 2**31 - 1),
        (90, 100, 1, 12, 2**63, 2**31),
        (64, 20, 2, 2, 2**40 + 1, 2**45 + 12345),
    ],
)
def test_same_numbers_as_on_the_cpu(dim, slice_dim, num_slices, block_dim, seed, step):
    """The projection of the identity is the projection matrix."""
    counter = torch.tensor(step, device=DEVICE)
    identity = torch.eye(dim, device=DEVICE)
    keys = kernels.seed_keys(seed)
    ours, _ = kernels.project(identity, 2 * identity, counter, keys, slice_dim, num_slices, block_dim)
    mixing = slices.mixing_matrix(dim, slice_dim, num_slices, block_dim, counter.cpu(), seed, torch.float64)
    (expected,) = slices.project([torch.eye(dim, dtype=torch.float64)], mixing, slice_dim, num_slices, block_dim)
    torch.testing.assert_close(ours[0].cpu().double(), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(ours[1].cpu().double(), 2 * expected, rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize(
    "options",
    [{"slice_dim": 16}, {"slice_dim": None}, {"slice_dim": 16, "objective": "joint"}],
    ids=str,
)
@pytest.mark.parametrize("shape", [(70, 36), (6, 130)], ids=str)
def test_one_view_may_be_constant(shape, options):
    """An encoder with a stop-gradient: only the gradient that is needed is computed, and it is the same."""
    pair = on_device(views(*shape))
    both = value_and_gradients(pair, "triton", **options)[1:]
    for trained in (0, 1):
        leaves = [z.clone().requires_grad_(i == trained) for i, z in enumerate(pair)]
        (-1.7 * mmi_loss(*leaves, impl="triton", **options)).backward()
        assert leaves[1 - trained].grad is None
        torch.testing.assert_close(leaves[trained].grad, both[trained], rtol=0, atol=0)
    with torch.no_grad():
        assert not mmi_loss(*pair, impl="triton", **options).requires_grad


@pytest.mark.parametrize("options", [{"slice_dim": 16}, {"slice_dim": None}], ids=str)
@pytest.mark.parametrize("shape", [(70, 36), (6, 130)], ids=str)
def test_strides_and_mixed_dtypes(shape, options):
    n, dim = shape
    z_a, z_b = on_device(views(n, dim), BFLOAT16)
    wide = torch.randn(n + 3, 2 * dim + 1, device=DEVICE, dtype=BFLOAT16)
    wide[1 : n + 1, 1 : 2 * dim : 2] = z_a
    strided = [wide[1 : n + 1, 1 : 2 * dim : 2], z_b.t().contiguous().t().float()]
    assert not strided[0].is_contiguous()
    plain = value_and_gradients([z_a, z_b.float()], "triton", **options)
    leaves = [z.detach().requires_grad_() for z in strided]
    (-1.7 * mmi_loss(*leaves, impl="triton", **options)).backward()
    for leaf, expected in zip(leaves, plain[1:], strict=True):
        assert leaf.grad.dtype == leaf.dtype
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-2 if leaf.dtype == BFLOAT16 else 1e-5, atol=1e-7)


FAMILIES = {
    "fused": ((20, 60), {"slice_dim": 16}),
    "fused_exchangeable": ((20, 60), {"slice_dim": 16, "objective": "exchangeable"}),
    "fused_all": ((40, 20), {"slice_dim": None}),
    "joint": ((40, 20), {"slice_dim": 8, "objective": "joint"}),
    "covariance": ((70, 131), {"slice_dim": None}),
    "gram": ((10, 140), {"slice_dim": None}),
    "gram_joint": ((10, 140), {"slice_dim": None, "objective": "joint"}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_input_gives_nan_everywhere(family, bad):
    shape, options = FAMILIES[family]
    pair = on_device(views(*shape))
    pair[1][3, -1] = bad
    loss, *grads = value_and_gradients(pair, "triton", **options)
    assert loss.isnan()
    assert all(grad.isnan().all() for grad in grads)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [0.0, 3.7])
def test_collapsed_embeddings_are_finite(family, value):
    shape, options = FAMILIES[family]
    pair = [torch.full(shape, value, device=DEVICE) for _ in range(2)]
    loss, *grads = value_and_gradients(pair, "triton", **options)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_dead_feature_is_ignored(family):
    shape, options = FAMILIES[family]
    if (options.get("slice_dim", 128) or shape[1]) < shape[1]:
        pytest.skip("a projection of the features has no constant among them")
    pair = on_device(views(*shape))
    for z in pair:
        z[:, 1] = 7.1
    loss, *grads = value_and_gradients(pair, "triton", **options)
    expected, *expected_grads = value_and_gradients(pair, "eager", **options)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-4)
        assert not grad[:, 1].any()


@pytest.mark.parametrize("k", [3, 16, 40, 128])
def test_factorisation(k):
    """Log det, inverse and gradient of well and ill conditioned matrices, and NaN for an indefinite one."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(2, k + 5, k, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -2, k, dtype=torch.float64)
    total, within = (x.mT @ x / k).unbind()
    moments = torch.stack([total, within])[None, :, None].float()
    mean, counter = torch.zeros(2, 1, k), torch.zeros(1, dtype=torch.int32)
    inputs = [t.to(DEVICE) for t in (moments, mean, counter)]
    loss, values, grad, _ = launch.factor_kernel(*inputs, 0.01, "content")
    scale = total.diagonal().rsqrt()
    weight = scale[:, None] * scale / 0.01
    matrices = torch.eye(k, dtype=torch.float64) + torch.stack([total, within]) * weight
    torch.testing.assert_close(values[:, 0].cpu().double(), torch.logdet(matrices), rtol=1e-5, atol=1e-5)
    expected = torch.linalg.inv(matrices) * weight * torch.tensor([-0.5, 0.5])[:, None, None]
    assert relative_error(grad[:, 0].cpu(), expected) < 1e-4
    # The loss is a small difference of large numbers: it is as accurate as these.
    expected_loss = (torch.logdet(matrices)[1] - torch.logdet(matrices)[0]) / 2
    assert loss.item() == pytest.approx(float(expected_loss), abs=1e-6 * float(values.abs().sum()))
    indefinite = inputs[0].clone()
    indefinite[0, 1, 0, k // 2, k // 2] = -9 * float(total[k // 2, k // 2])
    inputs[2].zero_()
    loss, values, grad, diagonal = launch.factor_kernel(indefinite, *inputs[1:], 0.01, "content")
    assert loss.isnan()
    assert values[1].isnan().all()
    assert values[0].isfinite().all()
    assert grad[1].isnan().all()
    assert diagonal[1].isnan().all()


def test_module_counts_and_backward_draws_the_forwards_slice():
    pair = [z.requires_grad_() for z in on_device(views(20, 60))]
    loss_fn = MMILoss(slice_dim=16, seed=4, impl="triton").to(DEVICE)
    losses = [loss_fn(*pair) for _ in range(3)]  # the counter has moved on when the first gradient is taken
    losses[1].backward()
    expected = value_and_gradients([z.detach() for z in pair], "eager", scale=1.0, slice_dim=16, seed=4, step=1)
    assert losses[1].item() == pytest.approx(expected[0].item(), rel=1e-5)
    for z, grad in zip(pair, expected[1:], strict=True):
        assert relative_error(z.grad, grad.double()) < 1e-5


@pytest.mark.parametrize("options", [{"slice_dim": 16}, {"slice_dim": 16, "objective": "exchangeable"}], ids=str)
def test_components(options):
    pair = [z.requires_grad_() for z in on_device(views(40, 60))]
    ours = functional.components(pair, 2, Options(impl="triton", **options))
    eager = functional.components(pair, 2, Options(impl="eager", **options))
    for got, expected in zip(ours, eager, strict=True):
        assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    assert ours.loss.requires_grad
    assert not any(part.requires_grad for part in ours[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_second_derivative_is_refused(family):
    shape, options = FAMILIES[family]
    pair = [z.requires_grad_() for z in on_device(views(*shape))]
    grads = torch.autograd.grad(mmi_loss(*pair, impl="triton", **options), pair, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        sum(grad.square().sum() for grad in grads).backward()


@pytest.mark.parametrize("family", ["fused", "joint", "gram"])
def test_compiled_in_one_graph(family, launches):
    shape, options = FAMILIES[family]
    loss_fn = MMILoss(impl="triton", **options).to(DEVICE)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    pair = on_device(views(*shape))
    # The last batch is an incomplete one: its size is a symbol of the graph.
    for step, samples in enumerate((len(pair[0]), len(pair[0]), len(pair[0]) - 3)):
        pair = [z[:samples] for z in pair]
        leaves = [z.clone().requires_grad_() for z in pair]
        del launches[:]
        (-1.7 * compiled(*leaves)).backward()
        assert launches
        expected = value_and_gradients(pair, "eager", step=step, **options)
        for leaf, grad in zip(leaves, expected[1:], strict=True):
            assert relative_error(leaf.grad, grad.double()) < 1e-5
    assert loss_fn.step == 3
    torch.compiler.reset()


def test_operators_are_well_formed():
    """Schemas, fake kernels and autograd registrations, by torch's own checks."""
    z_a, z_b = (z.requires_grad_() for z in on_device(views(12, 24)))
    step, keys = torch.tensor(3, device=DEVICE), kernels.seed_keys(1)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for arguments in (
        (operators.sliced_loss, (z_a, z_b, step, keys, 8, 1, 1, 0.5, "content")),
        (operators.sliced_loss, (z_a, z_b, step, keys, 24, 1, 0, 0.5, "exchangeable")),
        (operators.project, (z_a, z_b, step, keys, 8, 2, 2)),
        (operators.moments, (z_a[None], z_b[None], "joint")),
        (operators.gram, (z_a, z_b)),
        (operators.gram, (z_a, None)),
    ):
        torch.library.opcheck(*arguments, test_utils=checks)


REFUSALS = [
    ({"slice_kind": "coordinates", "slice_dim": 4}, "slice_kind='coordinates' selects features"),
    ({"slice_dim": 1025}, "slice_dim=1025 is larger than 1024"),
    ({"dtype": torch.float64}, "an input is torch.float64"),
    ({"views": 3}, "there are 3 views"),
    ({"gather": True}, "gather_distributed=True reduces statistics"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSALS, ids=lambda x: str(x)[:30])
def test_refusal_names_the_reason_and_the_alternatives(change, reason, monkeypatch):
    options = {name: value for name, value in change.items() if name.startswith("slice")}
    z = torch.zeros(8, 2000, dtype=change.get("dtype", FLOAT32), device=DEVICE)
    if "gather" in change:
        monkeypatch.setattr(functional.distributed, "is_active", lambda: True)
        options["gather_distributed"] = True
    with pytest.raises(ValueError, match=f"impl='triton' cannot compute this loss: {reason}") as error:
        functional.loss([z] * change.get("views", 2), 0, Options(impl="triton", **options))
    for record in registry.IMPLEMENTATIONS.values():
        assert str(record) in str(error.value)


def test_refused_on_the_cpu_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    z = torch.randn(8, 6)
    with pytest.raises(ValueError, match="impl='triton' cannot compute this loss: the inputs are on cpu"):
        mmi_loss(z, z, impl="triton")


def test_refused_without_triton(monkeypatch):
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    z = torch.randn(8, 6, device=DEVICE)
    with pytest.raises(ValueError, match="triton is not installed"):
        mmi_loss(z, z, impl="triton")


def test_registry_names_what_there_is():
    assert ("auto", *registry.IMPLEMENTATIONS) == functional.IMPLS
    for name, record in registry.IMPLEMENTATIONS.items():
        assert record.name == name
        assert registry.importlib.util.find_spec(record.module) is not None


def test_an_explicit_choice_is_never_replaced(monkeypatch):
    """A kernel that fails is an error, not another implementation's result."""

    class Broken:
        __name__ = "broken"

        def __getitem__(self, grid):
            raise RuntimeError("broken kernel")

    for name in KERNELS:
        monkeypatch.setattr(launch, name, Broken())
    for shape, options in FAMILIES.values():
        with pytest.raises(RuntimeError, match="broken kernel"):
            mmi_loss(*on_device(views(*shape)), impl="triton", **options)


def test_choice_of_auto(monkeypatch):
    """On the CPU never; on a GPU for the default objective alone, and not before it has been measured there."""
    pair = [torch.zeros(8, 200)] * 2
    assert not functional._takes_triton(pair, Options(), False)

    class OnGPU(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda", 0)

    pair = [z.as_subclass(OnGPU) for z in pair]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    takes = functional._takes_triton
    assert not takes(pair, Options(), False)
    monkeypatch.setattr(functional, "AUTO_TRITON", True)
    assert takes(pair, Options(), False)
    assert takes(pair, Options(slice_dim=64, num_slices=4), False)
    assert takes(pair, Options(objective="joint", impl="triton"), False)
    for options in (
        {"objective": "joint"},
        {"objective": "exchangeable"},
        {"slice_dim": None},
        {"logdet": "taylor"},
        {"slice_kind": "gaussian"},
        {"slice_kind": "coordinates"},
        {"impl": "eager"},
        {"impl": "reference"},
    ):
        assert not takes(pair, Options(**options), False)
    assert not takes(pair, Options(), True)
    assert not takes([z.double() for z in pair], Options(), False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    assert not takes(pair, Options(), False)
    with pytest.raises(ValueError, match=r"an old GPU has compute capability below 8\.0"):
        takes(pair, Options(impl="triton"), False)


def test_kernels_are_imported_only_when_selected():
    code = (
        "import sys, torch; from mmi_loss import MMILoss; MMILoss()(torch.eye(4), torch.eye(4));"
        "print([m for m in sys.modules if m.startswith('mmi_loss.ops.triton')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def has_assembler():
    from triton import knobs

    try:
        return Path(knobs.nvidia.ptxas.path).exists()
    except RuntimeError:
        return False


@pytest.mark.skipif(not has_assembler(), reason="needs ptxas: it comes with triton's Linux wheels")
def test_kernels_compile_for_a_gpu():
    """To machine code for compute capability 9.0 at real shapes, without a device, on tensor cores, hardly spilling."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    problems = ["256x2048", "4096x8192-bf16", "1024x2048-joint", "256x2048-gram"]
    command = [sys.executable, "-m", "tests.triton_aot", *problems]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    compiled = [row for row in rows if "kernel" in row]
    # Sums over columns are the only kernels without a matrix product.
    no_product = {"_column_sums_kernel", "_statistics_kernel"}
    assert {row["kernel"] for row in compiled} == set(KERNELS)
    for row in compiled:
        assert row["tensor_cores"] == (row["kernel"] not in no_product), row
        assert row["shared"] <= 227 * 1024, row
        assert row["spill_stores"] + row["spill_loads"] <= 1024, row
    default = next(row for row in rows if row["problem"] == "256x2048" and "launches" in row)
    assert len(default["launches"]) == 5
