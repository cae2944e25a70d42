"""The Triton kernels: on a GPU where there is one, else by Triton's interpreter on the CPU, at small shapes.

The interpreter checks what is computed, not how a GPU rounds or orders it; tests/triton_aot.py compiles the kernels for
GPUs without running them. The tests that need a device say so and are skipped without.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip(
    "triton.knobs", reason="the kernels need Triton 3.4, which comes with the Linux wheels of torch 2.8 and later"
)

from mmi_loss import MMILoss
from mmi_loss.ops import triton as kernels
from mmi_loss.ops.triton import cholesky, launch, operators
from mmi_loss.options import Options
from tests import oracle
from tests.conftest import views

# The interpreter's numpy, where NaN is provoked, and where constant features are divided before they are masked.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
FLOAT32, BFLOAT16, HALF = torch.float32, torch.bfloat16, torch.float16
KERNELS = [name for name in vars(launch) if name.startswith("_") and name.endswith("_kernel")]
# name: (n, dim), slice_dim, launches
ROUTES = {
    "slices": ((20, 60), 16, "project moments factor moments_backward project_backward"),
    "all": ((40, 20), None, "column_sums moments factor moments_backward"),
    "wide": ((70, 131), None, "column_sums moments moments_backward"),
    "gram": ((10, 140), None, "statistics gram gram_backward"),
}
routes = pytest.mark.parametrize("route", ROUTES)
SCALE = -1.7
"""Of the loss, where its gradient is taken: 1 would hide a forgotten factor."""


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
            names.append(self.kernel.__name__.removeprefix("_").removesuffix("_kernel"))
            return self.kernel[grid]

    for name in KERNELS:
        monkeypatch.setattr(launch, name, Recorder(getattr(launch, name)))
    return names


def on_device(pair, dtype=FLOAT32):
    return [z.detach().to(DEVICE, dtype) for z in pair]


def of_route(route):
    """Views and options of a route."""
    (n, dim), slice_dim, _ = ROUTES[route]
    return on_device(views(n, dim)), {"slice_dim": slice_dim}


def content_loss(pair, step=3, ridge=0.25, slice_dim=None, **options):
    step = torch.tensor(step, device=pair[0].device)
    floor = (0.0, ridge) if isinstance(ridge, float) else ridge
    return kernels.content_loss(*pair, step, Options(slice_dim=slice_dim, **options), floor)[0]


def plain_loss(pair, slice_dim=None, num_slices=1, step=3, seed=0, ridge=0.25, dtype=torch.float64):
    """In plain torch. ``ridge`` is the noise; or a factor of what differs between views, and the least."""
    views, (n, dim) = torch.stack([z.to(dtype) for z in pair])[:, None], pair[0].shape
    if slice_dim is not None:
        projections = oracle.slices(np.eye(dim), slice_dim, num_slices, "kronecker", seed, step)
        views = views @ torch.from_numpy(np.stack(projections) / 2.0**31).to(views)
    centred = views - views.mean((0, 2), keepdim=True)
    variance = centred.square().mean((0, 2), keepdim=True)
    a, b = centred / variance.where(variance > 0, math.inf).sqrt()
    moments = torch.stack([a.mT @ a + b.mT @ b, (a - b).mT @ (a - b)]) / (2 * n)
    if not isinstance(ridge, float):
        share = moments[1].diagonal(dim1=-2, dim2=-1).mean(-1).detach()
        ridge = (share * ridge[0]).clamp(min=ridge[1])[:, None, None]
    total, within = torch.logdet(torch.eye(a.shape[-1]).to(a) + moments / ridge)
    return (within - total).mean() / 2


def value_and_gradients(loss_fn, pair, **options):
    leaves = [z.clone().requires_grad_() for z in pair]
    loss = loss_fn(leaves, **options)
    (SCALE * loss).backward()
    return [loss.detach(), *(z.grad for z in leaves)]


def relative_error(ours, truth):
    return float((ours.double() - truth).norm() / truth.norm().clamp(min=1e-300))


def errors(pair, **options):
    """Relative errors of loss and gradients against float64."""
    truth = value_and_gradients(plain_loss, [z.double() for z in pair], **options)
    return [
        relative_error(*both) for both in zip(value_and_gradients(content_loss, pair, **options), truth, strict=True)
    ]


def check_against_float64(pair, **options):
    """Every error with respect to float64 is at most twice that of plain torch in float32 for the same inputs."""
    truth = value_and_gradients(plain_loss, [z.double() for z in pair], **options)
    plain = value_and_gradients(plain_loss, pair, dtype=FLOAT32, **options)
    ours = value_and_gradients(content_loss, pair, **options)
    # The interpreter truncates to bfloat16 where devices round to nearest.
    rounding = torch.finfo(BFLOAT16).eps / 2 if DEVICE == "cpu" else 0.0
    for name, got, simple, true in zip(("loss", "z_a", "z_b"), ours, plain, truth, strict=True):
        assert (got.dtype, got.shape) == (simple.dtype, simple.shape)
        tolerance = 5e-6 + (rounding if got.dtype == BFLOAT16 else 0.0)
        error, plain_error = relative_error(got, true), relative_error(simple, true)
        assert error <= 2 * plain_error + tolerance, f"{name}: {error:.1e}, plain torch {plain_error:.1e}"


# (n, dim, dtype, options): aligned and ragged, fewer and more samples than features, one tile and several.
CASES = [
    (32, 64, FLOAT32, {"slice_dim": 16}),
    (300, 40, FLOAT32, {"slice_dim": 8}),
    (19, 301, FLOAT32, {"slice_dim": 32, "num_slices": 2, "seed": -5, "step": 2**31 - 1}),
    (21, 143, FLOAT32, {"slice_dim": 100, "seed": 2**40 + 7, "step": 2**33 + 5}),
    (5, 40, FLOAT32, {"slice_dim": 9, "num_slices": 3, "seed": 2**63, "step": 2**31}),
    (2, 12, FLOAT32, {"slice_dim": 8}),
    (21, 90, FLOAT32, {"slice_dim": 32, "num_slices": 2, "ridge": (1.5, 0.01)}),
    (90, 23, FLOAT32, {"ridge": (0.4, 0.01)}),
    (16, 20, FLOAT32, {"ridge": (0.4, 0.7)}),
    (70, 131, FLOAT32, {"ridge": (2.0, 0.1)}),
    (20, 150, FLOAT32, {"ridge": (7.0, 0.1)}),
    (33, 90, BFLOAT16, {"slice_dim": 24}),
    (33, 90, HALF, {"slice_dim": 24, "ridge": 0.1}),
    (40, 6, FLOAT32, {}),
    (2, 1, FLOAT32, {}),
    (130, 33, FLOAT32, {"ridge": 0.05}),
    (10, 100, BFLOAT16, {}),
    (70, 131, FLOAT32, {}),
    (70, 135, HALF, {}),
    (20, 150, FLOAT32, {}),
    (66, 135, FLOAT32, {"ridge": 1.0}),
    (16, 140, HALF, {}),
    (35, 144, BFLOAT16, {}),
]


def case_id(case):
    n, dim, dtype, options = case
    return f"{n}x{dim}-{str(dtype).removeprefix('torch.')}-" + "-".join(f"{k}={v}" for k, v in options.items())


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_error_is_no_worse_than_plain_torch(case):
    n, dim, dtype, options = case
    check_against_float64(on_device(views(n, dim), dtype), **options)


@needs_gpu
@pytest.mark.parametrize("shape", [(256, 2048), (4096, 2048), (256, 8192), (4096, 8192), (1000, 999)], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, HALF], ids=str)
@pytest.mark.parametrize(
    "options", [{"slice_dim": 128}, {"slice_dim": 32, "num_slices": 4}, {"slice_dim": 100}, {}], ids=str
)
def test_error_on_the_gpu(shape, dtype, options):
    generator = torch.Generator(DEVICE).manual_seed(0)
    content, *noise = torch.randn(3, *shape, generator=generator, device=DEVICE)
    check_against_float64([(content + e + 1.5).to(dtype) for e in noise], **options)


def test_definition_is_that_of_the_oracle():
    pair = views(40, 20)
    assert plain_loss(pair).item() == pytest.approx(-oracle.information(pair, ridge=0.25))


@pytest.mark.parametrize(
    ("shape", "mean"), [((256, 128), 1e5), ((256, 128), 1e6), ((70, 131), 1e6), ((60, 160), 1e6)], ids=str
)
def test_features_as_given_lose_nothing_to_their_mean(shape, mean):
    """Relative to the first sample they are small: the error is that of centred features."""
    pair = [z.detach() / z.detach().std(0) + mean for z in views(*shape)]
    assert max(errors(on_device(pair), ridge=shape[1] / 64)) < 1e-5


def test_mean_larger_than_the_deviation_of_a_slice():
    check_against_float64(on_device([z.detach() + 100 for z in views(64, 48)]), slice_dim=16)


@pytest.mark.parametrize("scale", [5e3, 1e-4])
def test_scale_of_half_precision(scale):
    pair = on_device([(z.detach() - 1.5) * scale for z in views(33, 60)], HALF)
    assert all(z.isfinite().all() for z in pair)
    check_against_float64(pair, slice_dim=16)


@routes
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_any_scale_of_float32(route, scale):
    pair, options = of_route(route)
    assert max(errors([z * scale for z in pair], **options)) < 1e-5


@routes
def test_variance_beyond_float32_is_not_hidden(route):
    pair, options = of_route(route)
    assert content_loss([z * 1e25 for z in pair], **options).isnan()


@routes
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_non_finite_input_gives_nan_everywhere(route, bad):
    pair, options = of_route(route)
    pair[1][3, -1] = bad
    assert all(x.isnan().all() for x in value_and_gradients(content_loss, pair, **options))


@routes
@pytest.mark.parametrize("value", [0.0, 3.7])
def test_collapsed_embeddings_have_no_information_and_no_gradient(route, value):
    pair, options = of_route(route)
    collapsed = [torch.full_like(z, value) for z in pair]
    assert not any(x.any() for x in value_and_gradients(content_loss, collapsed, **options))


@pytest.mark.parametrize("route", ["all", "wide", "gram"])
def test_constant_feature_is_ignored(route):
    pair, options = of_route(route)
    for z in pair:
        z[:, 1] = 7.1
    check_against_float64(pair, **options)
    assert not any(grad[:, 1].any() for grad in value_and_gradients(content_loss, pair, **options)[1:])


@routes
def test_one_view_may_need_no_gradient(route):
    """An encoder with a stop-gradient: only the gradient that is needed is computed, and it is the same."""
    pair, options = of_route(route)
    both = value_and_gradients(content_loss, pair, **options)[1:]
    for trained in (0, 1):
        leaves = [z.clone().requires_grad_(i == trained) for i, z in enumerate(pair)]
        (SCALE * content_loss(leaves, **options)).backward()
        assert leaves[1 - trained].grad is None
        torch.testing.assert_close(leaves[trained].grad, both[trained], rtol=0, atol=0)
    assert not content_loss(pair, **options).requires_grad


@routes
def test_strides_and_mixed_dtypes(route):
    (z_a, z_b), options = of_route(route)
    z_a, (n, dim) = z_a.bfloat16(), z_a.shape
    wide = torch.randn(n + 3, 2 * dim + 1, device=DEVICE).bfloat16()
    wide[1 : n + 1, 1 : 2 * dim : 2] = z_a
    leaves = [z.detach().requires_grad_() for z in (wide[1 : n + 1, 1 : 2 * dim : 2], z_b.t().contiguous().t())]
    assert not any(z.is_contiguous() for z in leaves)
    (SCALE * content_loss(leaves, **options)).backward()
    for leaf, expected in zip(leaves, value_and_gradients(content_loss, [z_a, z_b], **options)[1:], strict=True):
        assert leaf.grad.dtype == leaf.dtype
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-2 if leaf.dtype == BFLOAT16 else 1e-5, atol=1e-7)


def factorise(moments, location=0.0, block_dim=0):
    """Loss, log dets, gradient matrices and diagonals of moments (2, k, k), by the kernel or by Cholesky."""
    moments, k = moments[:, None].float().to(DEVICE), moments.shape[-1]
    if k > kernels.MAX_SLICE_DIM:
        return cholesky.factorise_moments(moments, (0.0, 0.01), (-0.5, 0.5))
    centre, state = torch.full((2, 1, k), location, device=DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    return launch.factor_kernel(moments[None], centre, state, block_dim, (0.0, 0.01), (-0.5, 0.5))


@pytest.mark.parametrize("k", [3, 40, 128, 129])
def test_factorisation(k):
    """Log dets and gradients of ill conditioned matrices, and NaN for an indefinite one."""
    x = torch.randn(2, k + 5, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    x = x * torch.logspace(0, -2, k, dtype=torch.float64)
    moments, inverse_std = x.mT @ x / k, (x.mT @ x / k)[0].diagonal().rsqrt()
    weight = inverse_std[:, None] * inverse_std / 0.01
    matrices = torch.eye(k, dtype=torch.float64) + moments * weight
    loss, log_dets, _, grad, _ = factorise(moments)
    torch.testing.assert_close(log_dets[:, 0].cpu().double(), torch.logdet(matrices), rtol=1e-5, atol=1e-5)
    expected = torch.linalg.inv(matrices) * weight * torch.tensor([-0.5, 0.5])[:, None, None]
    assert relative_error(grad[:, 0].cpu(), expected) < 1e-4
    # The loss is a small difference of large numbers: it is as accurate as these.
    assert loss.item() == pytest.approx(float(log_dets[1] - log_dets[0]) / 2, abs=1e-6 * float(log_dets.abs().sum()))
    moments[1, k // 2, k // 2] *= -1e4
    loss, log_dets, _, grad, diagonal = factorise(moments)
    assert log_dets[0].isfinite().all()
    assert all(x.isnan().all() for x in (loss, log_dets[1], grad[1], diagonal[1]))


def test_rounding_of_a_projected_feature_is_no_variance():
    """As given, features are exact, and any variance is one."""
    moments = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    for feature, roundings in ((1, 1), (2, 4)):
        moments[:, feature, feature] = (roundings * 1e3 * torch.finfo(FLOAT32).eps) ** 2
    for block_dim, counted in ((2, 3), (0, 4)):
        _, log_dets, _, grad, diagonal = factorise(moments, location=1e3, block_dim=block_dim)
        assert log_dets[0].item() == pytest.approx(counted * math.log(101), rel=1e-5)
        assert [bool(x[:, 0, 1].any()) for x in (grad, diagonal)] == [counted == 4] * 2


@routes
def test_second_derivative_is_refused(route):
    pair, options = of_route(route)
    pair = [z.requires_grad_() for z in pair]
    grads = torch.autograd.grad(content_loss(pair, **options), pair, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        sum(grad.square().sum() for grad in grads).backward()


@routes
def test_compiled_in_one_graph(route, launches):
    pair, options = of_route(route)
    step, settings = torch.tensor(3, device=DEVICE), Options(**options)

    def loss_fn(z_a, z_b):
        return kernels.content_loss(z_a, z_b, step, settings, (0.0, 8 / len(z_a)))[0]

    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    # The last batch is an incomplete one: its size is a symbol of the graph.
    for samples in (len(pair[0]), len(pair[0]) - 3):
        pair = [z[:samples] for z in pair]
        del launches[:]
        ours = value_and_gradients(lambda leaves: compiled(*leaves), pair)
        assert launches
        truth = value_and_gradients(plain_loss, [z.double() for z in pair], ridge=8 / samples, **options)
        assert max(map(relative_error, ours, truth)) < 1e-5
    torch.compiler.reset()


@routes
def test_operator_is_well_formed(route):
    """Schema, fake kernels and autograd registration, by torch's own checks."""
    (z_a, z_b), options = of_route(route)
    slice_dim = options["slice_dim"]
    arguments = (
        torch.tensor(3, device=DEVICE),
        [1, 2],
        slice_dim or z_a.shape[1],
        1,
        (slice_dim or 0) // 4,
        [2.0, 0.5],
    )
    pair = (z_a.requires_grad_(), z_b.requires_grad_())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.content_loss, (*pair, *arguments, [-0.5, 0.5]), test_utils=checks)


@routes
def test_through_the_module(route, launches):
    """The module takes the kernels it is told to take, draws the same slices as eager, and counts its steps."""
    pair, options = of_route(route)
    loss_fn = MMILoss(impl="triton", seed=4, **options).to(DEVICE)
    leaves = [z.clone().requires_grad_() for z in pair]
    losses = [loss_fn(*leaves) for _ in range(3)]  # the counter has moved on when the first gradient is taken
    del launches[: 2 * len(launches) // 3]
    (SCALE * losses[1]).backward()
    assert launches == ROUTES[route][2].split()
    eager = MMILoss(impl="eager", seed=4, **options).to(DEVICE)
    eager.step.fill_(1)
    expected = value_and_gradients(lambda leaves: eager(*leaves), pair)
    for got, other in zip([losses[1].detach(), *(z.grad for z in leaves)], expected, strict=True):
        assert relative_error(got, other.double()) < 1e-5
    eager.step.copy_(loss_fn.step)
    parts, eager_parts = (module.forward_components(*pair) for module in (loss_fn, eager))
    for got, other in zip(parts, eager_parts, strict=True):
        assert got.item() == pytest.approx(other.item(), rel=1e-5)


@needs_gpu
@pytest.mark.parametrize("options", [{}, {"slice_dim": None}], ids=str)
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
        assert relative_error(loss, expected.double()) < 1e-5
        for z, leaf in zip(pair, leaves, strict=True):
            assert relative_error(z.grad, leaf.grad.double()) < 1e-5


WIDE = [torch.zeros(8, 2000, device=DEVICE)] * 2
REFUSALS = [
    ({"views": [*WIDE, *WIDE]}, "there are 4 views"),
    ({"views": [torch.zeros(8, dim, device=DEVICE) for dim in (20, 30)]}, "the views have 20 and 30 features"),
    ({"views": [z.double() for z in WIDE]}, "an input is torch.float64"),
    ({"gathers": True}, "gather_distributed=True reduces statistics between ranks"),
    ({"objective": "joint"}, "objective='joint' is not 'content'"),
    ({"logdet": "taylor"}, "logdet='taylor' is not 'cholesky'"),
    ({"slice_kind": "gaussian"}, "slice_kind='gaussian' is not 'kronecker'"),
    ({"slice_dim": 129}, "slice_dim=129 is not between 8 and 128"),
    ({"slice_dim": 7}, "slice_dim=7 is not between 8 and 128"),
    ({}, None),
    ({"slice_dim": None}, None),
    ({"slice_dim": 2000, "slice_kind": "gaussian"}, None),
]


def refusal(views=WIDE, gathers=False, **options):
    return kernels.refusal(views, Options(**options), gathers)


@pytest.mark.parametrize(("change", "reason"), REFUSALS, ids=lambda x: str(x)[:40])
def test_refusal_names_the_reason(change, reason):
    assert refusal(**change) == reason


def test_refusal_of_machines(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
        assert "needs Triton 3.4" in refusal()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert refusal([z.cpu() for z in WIDE]) == "the inputs are on cpu"

    class OnGPU(torch.Tensor):
        device = torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    on_a_gpu = [z.as_subclass(OnGPU) for z in WIDE]
    assert refusal(on_a_gpu) == "an old GPU has compute capability below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert refusal(on_a_gpu) is None


def test_triton_is_imported_only_when_the_kernels_are_called():
    code = "import sys, mmi_loss.ops.triton; print([name for name in sys.modules if name.split('.')[0] == 'triton'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def has_assembler():
    from triton import knobs

    try:
        return Path(knobs.nvidia.ptxas.path).exists()
    except RuntimeError:
        return False


@pytest.mark.skipif(not has_assembler(), reason="needs ptxas: it comes with triton's Linux wheels")
def test_kernels_compile_for_gpus():
    """To machine code at real shapes, without a device, on tensor cores, hardly spilling."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton_aot", "256x2048", "4096x2048-all", "256x2048-all"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    compiled = [row for row in rows if "kernel" in row]
    # Sums over columns are the only kernels without a matrix product.
    no_product = {"_column_sums_kernel", "_statistics_kernel"}
    assert {(row["kernel"], row["arch"]) for row in compiled} == {
        (name, arch) for name in KERNELS for arch in (90, 100)
    }
    for row in compiled:
        assert row["tensor_cores"] == (row["kernel"] not in no_product), row
        assert row["shared"] <= 227 * 1024, row
        assert row["stack"] <= 256, row
    assert {row["problem"]: len(row["launches"]) for row in rows if "launches" in row}["256x2048"] == 5
