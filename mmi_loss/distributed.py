"""Reductions over the process group whose gradients, averaged by DDP, are exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmi_loss.ops.autograd import closed_form


def is_active() -> bool:
    """Whether there is more than this process to reduce over."""
    return dist.is_available() and dist.is_initialized() and world_size() > 1


def world_size() -> int:
    """The number of ranks of the default process group."""
    return dist.get_world_size()


def sum_constant(x: Tensor) -> Tensor:
    """The sum of ``x`` over all ranks, without gradient."""
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


class Shared(NamedTuple):
    """What is known of a batch that processes share: its samples, a scalar, and the mean (..., 1, k) of each view."""

    samples: Tensor
    means: list[Tensor]


def share(views: Sequence[Tensor]) -> Shared:
    """From the views (..., N, k) of this rank, without gradient, in one reduction.

    The count is NaN where it is less than 2: an error would need the host to wait for it; a NaN passes it on.
    """
    sums = [z.detach().sum(-2, keepdim=True) for z in views]
    own_count = sums[0].new_full((1,), views[0].shape[-2])
    sent = [*(x.flatten() for x in sums), own_count]
    *totals, count = sum_constant(torch.cat(sent)).split([len(x) for x in sent])
    count = count.masked_fill(count < 2, float("nan"))
    return Shared(count[0], [total.view_as(x) / count for total, x in zip(totals, sums, strict=True)])


class _Sum(torch.autograd.Function):
    """y = sum_r x_r on every rank. What is differentiated is the sum of all ranks' losses, so dx = sum_r dy_r.

    Every rank computes the same loss L from y, so a rank's gradient is world_size * dL/dz_r, and DDP's average
    over ranks of the parameter gradients is the gradient of L on the concatenated batch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_constant(x)

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return sum_constant(grad.contiguous())


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of ``x`` over all ranks; its gradient is summed over all ranks too."""
    result: Tensor = _Sum.apply(x)
    return result


class _Concatenate(torch.autograd.Function):
    """The rows of all ranks, in rank order; the gradient of a rank's own rows is summed over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.start, ctx.size = sum(sizes[: dist.get_rank()]), x.shape[0]
        padded = x.new_zeros((max(sizes), *x.shape[1:]))
        padded[: x.shape[0]] = x
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_constant(grad.contiguous())[ctx.start : ctx.start + ctx.size], None


def batch_sizes(x: Tensor) -> list[int]:
    """The number of rows of every rank. It waits for the device: the sizes of what follows depend on it."""
    size = torch.tensor([x.shape[0]], device=x.device)
    sizes = [torch.empty_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    return [int(s) for s in torch.cat(sizes).tolist()]


def concatenate(x: Tensor, sizes: list[int]) -> Tensor:
    """The rows of all ranks, (sum of sizes, D), for the estimators that need whole embeddings."""
    result: Tensor = _Concatenate.apply(x, sizes)
    return result
