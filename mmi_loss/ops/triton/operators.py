"""The loss as a torch operator: shapes for tracing, a gradient for autograd, opaque to the compiler.

It never waits for the device, and all its allocations depend on shapes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmi_loss.ops.autograd import closed_form
from mmi_loss.ops.triton import MAX_SLICE_DIM, cholesky, launch


def _takes_gram(samples: int, features: int) -> bool:
    """Whether both views' samples are fewer than the features, and these too many for one program."""
    return features > max(2 * samples, MAX_SLICE_DIM)


@torch.library.custom_op(  # before torch 2.6 no schema is inferred from annotations that are strings
    "mmi_loss::content_loss",
    mutates_args=(),
    schema="(Tensor z_a, Tensor z_b, Tensor step, int[] seed_keys, int slice_dim, int num_slices, int block_dim, "
    "float[] floor, float[] coefficients) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def content_loss(
    z_a: Tensor, z_b: Tensor, step: Tensor, seed_keys: Sequence[int],
    slice_dim: int, num_slices: int, block_dim: int, floor: Sequence[float], coefficients: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum of ``coefficients`` times log dets (), log dets (2, S) and noise (S,), then what the backward pass takes.

    That is the slices (2, S, N, k), statistics of their features, gradients of the matrices and of their diagonals,
    empty where there is none, and the state. ``block_dim=0`` takes the features as they are.
    """
    slices, diagonal = launch.new(z_a, 0), launch.new(z_a, 0)
    if _takes_gram(len(z_a), slice_dim):
        gram, statistics = launch.gram_kernel(z_a, z_b)
        loss, log_dets, noise, grad = cholesky.factorise_gram(gram, slice_dim, floor, coefficients)
        return loss, log_dets, noise, slices, statistics, grad, diagonal, launch.new_state(z_a)
    if block_dim:
        slices, sums, state = launch.project_kernel(z_a, z_b, step, seed_keys, slice_dim, num_slices, block_dim)
        moments, statistics = launch.moments_kernel(slices[0], slices[1], sums, block_dim)
    else:
        sums, state = launch.column_sums_kernel(z_a, z_b)
        moments, statistics = launch.moments_kernel(z_a[None], z_b[None], sums, block_dim)
    if slice_dim <= MAX_SLICE_DIM:
        solved = launch.factor_kernel(moments, statistics, state, block_dim, floor, coefficients)
    else:
        solved = cholesky.factorise_moments(moments[0], floor, coefficients)
    loss, log_dets, noise, grad, diagonal = solved
    return loss, log_dets, noise, slices, statistics, grad, diagonal, state


@content_loss.register_fake
def _(z_a: Tensor, z_b: Tensor, step: Tensor, keys: Sequence[int], k: int, s: int, block_dim: int, *_: Any) -> Any:
    n = len(z_a)
    shapes: list[tuple[int, ...]] = [(2, s, n, k) if block_dim else (0,), (2, s, k), (2, s, k, k), (2, s, k)]
    if _takes_gram(n, k):
        shapes = [(0,), (3, k), (2 * n, 2 * n), (0,)]
    return *(launch.new(z_a, *shape) for shape in ((), (2, s), (s,), *shapes)), launch.new_state(z_a)


@torch.library.custom_op(
    "mmi_loss::content_loss_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor z_a, Tensor z_b, Tensor slices, Tensor statistics, Tensor grad, Tensor diagonal, "
    "Tensor state, int block_dim, bool need_a, bool need_b) -> (Tensor, Tensor)",
)
def content_loss_backward(
    upstream: Tensor, z_a: Tensor, z_b: Tensor, slices: Tensor, statistics: Tensor, grad: Tensor, diagonal: Tensor,
    state: Tensor, block_dim: int, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of both views (N, D) in their dtypes; empty where not needed, for an operator returns tensors."""
    grads = _gradients(z_a, z_b, need_a, need_b)
    outs = _if_needed(grads, (need_a, need_b))
    saved = statistics, grad, diagonal, upstream
    if block_dim:
        grad_slices = torch.empty_like(slices)
        launch.moments_backward_kernel(slices[0], slices[1], *saved, _if_needed(grad_slices, (need_a, need_b)))
        launch.project_backward_kernel(grad_slices, state, outs, block_dim)
    elif _takes_gram(*z_a.shape):
        launch.gram_backward_kernel(z_a, z_b, statistics, grad, upstream, outs)
    else:
        launch.moments_backward_kernel(z_a[None], z_b[None], *saved, outs)
    return grads


@content_loss_backward.register_fake
def _(upstream: Tensor, z_a: Tensor, z_b: Tensor, *saved: Any) -> tuple[Tensor, Tensor]:
    return _gradients(z_a, z_b, *saved[-2:])


def _gradients(z_a: Tensor, z_b: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor]:
    return z_a.new_empty(z_a.shape if need_a else (0,)), z_b.new_empty(z_b.shape if need_b else (0,))


def _if_needed(grads: Sequence[Tensor] | Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    return [grad if is_needed else None for grad, is_needed in zip(grads, needed, strict=True)]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.block_dim = inputs[6]
    ctx.save_for_backward(*inputs[:2], *output[3:])


@closed_form
def _backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
    needed = ctx.needs_input_grad[:2]
    grads = content_loss_backward(upstream, *ctx.saved_tensors, ctx.block_dim, *needed)
    return *_if_needed(grads, needed), *[None] * 7


content_loss.register_autograd(_backward, setup_context=_setup_context)
