"""The kernels as torch operators: shapes for tracing, gradients for autograd, opaque to the compiler.

* ``mmi_loss::sliced_loss``: the whole loss in three launches, its gradient in two (one where nothing is projected).
* ``mmi_loss::project``, ``mmi_loss::moments``, ``mmi_loss::gram``: the parts, for matrices that need cuSOLVER.

No operator waits for the device, and all allocations depend on shapes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmi_loss.ops.triton import launch

_NO_SECOND_DERIVATIVE = (
    "the MMI loss has no second derivative: its gradient is a closed form that autograd does not see. "
    "Use impl='reference' where a gradient of the gradient is needed"
)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(_NO_SECOND_DERIVATIVE)


def _empty_like(z: Tensor, is_needed: bool) -> Tensor:
    """A contiguous gradient of ``z``, or nothing: an operator returns tensors in any case."""
    return torch.empty(z.shape if is_needed else (0,), dtype=z.dtype, device=z.device)


def _if_needed(grads: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Both views' gradients, None for one that is not needed."""
    (grad_a, grad_b), (need_a, need_b) = grads, needed
    return grad_a if need_a else None, grad_b if need_b else None


def _chunks(n: int) -> int:
    """Parts into which the samples of a small moment matrix are divided, for as many programs at work."""
    return max(1, min(16, n // 64))


@torch.library.custom_op("mmi_loss::sliced_loss", mutates_args=())
def sliced_loss(
    z_a: Tensor,
    z_b: Tensor,
    step: Tensor,
    seed_keys: Sequence[int],
    slice_dim: int,
    num_slices: int,
    block_dim: int,
    ridge: float,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss () and log dets (m, S), then what the backward pass needs: slices, mean, gradients, diagonals, keys.

    ``block_dim=0`` takes the features as they are.
    """
    if block_dim:
        slices, sums, keys, counter = launch.project_kernel(z_a, z_b, step, slice_dim, num_slices, block_dim, seed_keys)
        a, b = slices
    else:
        sums, counter = launch.column_sums_kernel(z_a, z_b, objective)
        slices, keys = sums.new_empty(0), counter.new_empty(0)
        a, b = z_a[None], z_b[None]
    moments, mean = launch.moments_kernel(a, b, sums, objective, _chunks(z_a.shape[0]), not block_dim)
    loss, values, grad, diagonal = launch.factor_kernel(moments, mean, counter, ridge, objective)
    return loss, values, slices, mean, grad, diagonal, keys


@sliced_loss.register_fake
def _(
    z_a: Tensor,
    z_b: Tensor,
    step: Tensor,
    seed_keys: Sequence[int],
    slice_dim: int,
    num_slices: int,
    block_dim: int,
    ridge: float,
    objective: str,
) -> tuple[Tensor, ...]:
    def new(*shape: Any) -> Tensor:
        return z_a.new_empty(shape, dtype=torch.float32)

    n, m, k = z_a.shape[0], launch.MATRICES[objective], slice_dim
    sliced = new(2, num_slices, n, k) if block_dim else new(0)
    keys = z_a.new_empty(2 if block_dim else 0, dtype=torch.int32)
    return (
        new(),
        new(m, num_slices),
        sliced,
        new(2, num_slices, k),
        new(m, num_slices, k, k),
        new(m, num_slices, k),
        keys,
    )


@torch.library.custom_op("mmi_loss::sliced_loss_backward", mutates_args=())
def sliced_loss_backward(
    upstream: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    slices: Tensor,
    mean: Tensor,
    grad: Tensor,
    diagonal: Tensor,
    keys: Tensor,
    dim: int,
    block_dim: int,
    objective: str,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of both views (N, dim) in their dtypes. Projected views themselves are not needed: empty tensors do."""
    if not block_dim:
        grad_a, grad_b = _empty_like(z_a, need_a), _empty_like(z_b, need_b)
        out_a, out_b = _if_needed((grad_a, grad_b), (need_a, need_b))
        launch.moments_backward_kernel(
            z_a[None], z_b[None], mean, grad, diagonal, upstream, out_a, out_b, objective, True
        )
        return grad_a, grad_b
    grad_a = z_a.new_empty((slices.shape[2], dim) if need_a else (0,))
    grad_b = z_b.new_empty((slices.shape[2], dim) if need_b else (0,))
    of_slices = torch.empty_like(slices)
    out_a, out_b = _if_needed((of_slices[0], of_slices[1]), (need_a, need_b))
    launch.moments_backward_kernel(slices[0], slices[1], mean, grad, diagonal, upstream, out_a, out_b, objective, False)
    out_a, out_b = _if_needed((grad_a, grad_b), (need_a, need_b))
    launch.project_backward_kernel(of_slices, keys, out_a, out_b, block_dim)
    return grad_a, grad_b


@sliced_loss_backward.register_fake
def _(
    upstream: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    slices: Tensor,
    mean: Tensor,
    grad: Tensor,
    diagonal: Tensor,
    keys: Tensor,
    dim: int,
    block_dim: int,
    objective: str,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    n = slices.shape[2] if block_dim else z_a.shape[0]
    return z_a.new_empty((n, dim) if need_a else (0,)), z_b.new_empty((n, dim) if need_b else (0,))


def _sliced_loss_context(ctx: Any, inputs: Any, output: Any) -> None:
    z_a, z_b, _, _, _, _, ctx.block_dim, _, ctx.objective = inputs
    _, _, slices, mean, grad, diagonal, keys = output
    ctx.dim = z_a.shape[1]
    if ctx.block_dim:  # the projection is linear: its backward pass needs the views' dtypes alone
        z_a, z_b = z_a.new_empty(0), z_b.new_empty(0)
    ctx.save_for_backward(z_a, z_b, slices, mean, grad, diagonal, keys)


def _sliced_loss_backward(ctx: Any, upstream: Tensor, *unused: Any) -> Any:
    need = ctx.needs_input_grad[:2]
    grads = sliced_loss_backward(upstream, *ctx.saved_tensors, ctx.dim, ctx.block_dim, ctx.objective, *need)
    return (*_if_needed(grads, need), *[None] * 7)


sliced_loss.register_autograd(_sliced_loss_backward, setup_context=_sliced_loss_context)
sliced_loss_backward.register_autograd(_refuse)


@torch.library.custom_op("mmi_loss::project", mutates_args=())
def project(
    z_a: Tensor,
    z_b: Tensor,
    step: Tensor,
    seed_keys: Sequence[int],
    slice_dim: int,
    num_slices: int,
    block_dim: int,
) -> tuple[Tensor, Tensor]:
    """(N, D) views to their slices (2, S, N, k), float32, and the streams' keys (2,)."""
    slices, _, keys, _ = launch.project_kernel(z_a, z_b, step, slice_dim, num_slices, block_dim, seed_keys)
    return slices, keys


@project.register_fake
def _(
    z_a: Tensor,
    z_b: Tensor,
    step: Tensor,
    seed_keys: Sequence[int],
    slice_dim: int,
    num_slices: int,
    block_dim: int,
) -> tuple[Tensor, Tensor]:
    slices = z_a.new_empty((2, num_slices, z_a.shape[0], slice_dim), dtype=torch.float32)
    return slices, z_a.new_empty(2, dtype=torch.int32)


@torch.library.custom_op("mmi_loss::project_backward", mutates_args=())
def project_backward(
    grad: Tensor, keys: Tensor, z_a: Tensor, z_b: Tensor, block_dim: int, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor]:
    """The slices' gradient (2, S, N, k) to those of the views."""
    grads = _empty_like(z_a, need_a), _empty_like(z_b, need_b)
    out_a, out_b = _if_needed(grads, (need_a, need_b))
    launch.project_backward_kernel(grad.contiguous(), keys, out_a, out_b, block_dim)
    return grads


@project_backward.register_fake
def _(
    grad: Tensor, keys: Tensor, z_a: Tensor, z_b: Tensor, block_dim: int, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor]:
    return _empty_like(z_a, need_a), _empty_like(z_b, need_b)


def _project_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1], inputs[0], inputs[1])
    ctx.block_dim = inputs[6]


def _project_backward(ctx: Any, grad: Tensor, *unused: Any) -> Any:
    need = ctx.needs_input_grad[:2]
    grads = project_backward(grad, *ctx.saved_tensors, ctx.block_dim, *need)
    return (*_if_needed(grads, need), *[None] * 5)


project.register_autograd(_project_backward, setup_context=_project_context)
project_backward.register_autograd(_refuse)


@torch.library.custom_op("mmi_loss::moments", mutates_args=())
def moments(a: Tensor, b: Tensor, objective: str) -> tuple[Tensor, Tensor]:
    """Views (S, N, k), any strides, to the objective's moments (m, S, K, K) and means (2, S, K), float32: relative to
    the first sample and absolute.
    """
    num_slices, n, k = a.shape
    flat_a, flat_b = (x.transpose(0, 1).reshape(n, num_slices * k) for x in (a, b))
    sums, _ = launch.column_sums_kernel(flat_a, flat_b, objective)
    chunks = _chunks(n) if k <= 128 else 1
    parts, mean = launch.moments_kernel(a, b, sums, objective, chunks, True)
    return (parts.view(parts.shape[1:]) if chunks == 1 else parts.sum(0)), mean


@moments.register_fake
def _(a: Tensor, b: Tensor, objective: str) -> tuple[Tensor, Tensor]:
    num_slices, _, k = a.shape
    size = 2 * k if objective == "joint" else k
    shape = (launch.MATRICES[objective], num_slices, size, size)
    return a.new_empty(shape, dtype=torch.float32), a.new_empty((2, num_slices, size), dtype=torch.float32)


@torch.library.custom_op("mmi_loss::moments_backward", mutates_args=())
def moments_backward(
    grad: Tensor, mean: Tensor, a: Tensor, b: Tensor, objective: str, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor]:
    """The moments' gradient (m, S, K, K) to those of the views."""
    symmetric = ((grad + grad.mT) / 2).contiguous()
    grads = _empty_like(a, need_a), _empty_like(b, need_b)
    out_a, out_b = _if_needed(grads, (need_a, need_b))
    launch.moments_backward_kernel(
        a, b, mean, symmetric, None, grad.new_ones(()), out_a, out_b, objective, shifted=True
    )
    return grads


@moments_backward.register_fake
def _(
    grad: Tensor, mean: Tensor, a: Tensor, b: Tensor, objective: str, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor]:
    return _empty_like(a, need_a), _empty_like(b, need_b)


def _moments_context(ctx: Any, inputs: Any, output: Any) -> None:
    a, b, ctx.objective = inputs
    ctx.save_for_backward(output[1], a, b)


def _moments_backward(ctx: Any, grad: Tensor, *unused: Any) -> Any:
    need = ctx.needs_input_grad[:2]
    grads = moments_backward(grad, *ctx.saved_tensors, ctx.objective, *need)
    return (*_if_needed(grads, need), None)


moments.register_autograd(_moments_backward, setup_context=_moments_context)
moments_backward.register_autograd(_refuse)


@torch.library.custom_op("mmi_loss::gram", mutates_args=())
def gram(z_a: Tensor, z_b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """One view or two (N, D) to the Gram matrix of :func:`mmi_loss.ops.gram.standardised_gram`, mean and 1 / std."""
    return launch.gram_kernel(z_a, z_b)


@gram.register_fake
def _(z_a: Tensor, z_b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, dim = z_a.shape[0] * (1 if z_b is None else 2), z_a.shape[1]
    return tuple(z_a.new_empty(shape, dtype=torch.float32) for shape in ((rows, rows), (dim,), (dim,)))  # type: ignore[return-value]


@torch.library.custom_op("mmi_loss::gram_backward", mutates_args=())
def gram_backward(
    grad: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    z_a: Tensor,
    z_b: Tensor | None,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    """The Gram matrix's gradient to those of the views."""
    symmetric = (grad + grad.mT).contiguous()
    grads = _empty_like(z_a, need_a), _empty_like(z_a if z_b is None else z_b, need_b)
    outs = _if_needed(grads, (need_a, need_b))
    launch.gram_backward_kernel(z_a, z_b, mean, inverse_std, symmetric, *outs)
    return grads


@gram_backward.register_fake
def _(
    grad: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    z_a: Tensor,
    z_b: Tensor | None,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_like(z_a, need_a), _empty_like(z_a if z_b is None else z_b, need_b)


def _gram_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1], output[2], *inputs)


def _gram_backward(ctx: Any, grad: Tensor, *unused: Any) -> Any:
    need = ctx.needs_input_grad[:2]
    grads = gram_backward(grad, *ctx.saved_tensors, *need)
    return tuple(_if_needed(grads, need))


gram.register_autograd(_gram_backward, setup_context=_gram_context)
gram_backward.register_autograd(_refuse)
