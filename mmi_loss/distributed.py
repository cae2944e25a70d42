"""Reductions over the process group whose gradients, averaged by DDP, are exact."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmi_loss.ops.autograd import closed_form
from mmi_loss.ops.covariance import Shared

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_active(group: ProcessGroup | None) -> bool:
    """Whether there is more than this process to reduce over."""
    return dist.is_available() and dist.is_initialized() and world_size(group) > 1


def world_size(group: ProcessGroup | None) -> int:
    """The number of ranks of the group."""
    return dist.get_world_size(group)


def sum_constant(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of ``x`` over all ranks of the group, without gradient."""
    x = x.detach().clone()
    dist.all_reduce(x, group=group)
    return x


def share(views: Sequence[Tensor], fingerprints: Sequence[int | Tensor], group: ProcessGroup | None) -> Shared:
    """From the views (..., N, k) of this rank, without gradient, in one reduction.

    ``fingerprints`` are 32-bit integers that must be the same on all ranks, or the ranks compute different losses. With
    the sums travel their bits: where each is set on no rank or on all, all ranks hold the same.

    The count is NaN where it is less than 2, or the ranks disagree: an error would need the host to wait for it; a NaN
    passes it on. On the CPU, where nothing waits, disagreement is a RuntimeError on every rank.
    """
    sums = [z.detach().sum(-2, keepdim=True) for z in views]
    shifts = torch.arange(32, device=views[0].device)
    bits = torch.cat([(fingerprint >> shifts) & 1 for fingerprint in fingerprints])
    sent = [*(x.flatten() for x in sums), sums[0].new_full((1,), views[0].shape[-2]), bits.to(sums[0].dtype)]
    *totals, count, set_bits = sum_constant(torch.cat(sent), group).split([len(x) for x in sent])
    disagree = (set_bits != 0) & (set_bits != world_size(group))
    if views[0].device.type == "cpu" and not torch.compiler.is_compiling() and bool(disagree.any()):
        _raise_disagreement(options_differ=bool(disagree[:32].any()))
    count = count.masked_fill((count < 2) | disagree.any(), float("nan"))
    means = [total.view_as(x) / count for total, x in zip(totals, sums, strict=True)]
    return Shared(count[0], means, partial(sum_constant, group=group))


def _raise_disagreement(options_differ: bool) -> None:
    what, remedy = (
        "step counter or seed",
        (
            "Call the loss equally often on every rank and load one checkpoint on all; loss.step.fill_(n) with one n on all "
            "ranks sets the counters right"
        ),
    )
    if options_differ:
        what, remedy = "options of the loss, or the views' number or width,", "Construct MMILoss alike on every rank"
    raise RuntimeError(f"the {what} differ between ranks, which would train on different losses. {remedy}.")


class _Concatenate(torch.autograd.Function):
    """The rows of all ranks, in rank order. What is differentiated is the sum of all ranks' losses, so the gradient of
    a rank's own rows is summed over all ranks.

    Every rank computes the same loss L, so a rank's gradient is world_size * dL/dz_r, and DDP's average over ranks of
    the parameter gradients is the gradient of L on the concatenated batch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: ProcessGroup | None) -> Tensor:
        ctx.start, ctx.size, ctx.group = sum(sizes[: dist.get_rank(group)]), x.shape[0], group
        padded = x.new_zeros((max(sizes), *x.shape[1:]))
        padded[: x.shape[0]] = x
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=group)
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = sum_constant(grad.contiguous(), ctx.group)
        return total[ctx.start : ctx.start + ctx.size], None, None


def batch_sizes(x: Tensor, fingerprint: int, group: ProcessGroup | None) -> list[int]:
    """The number of rows of every rank. It waits for the device: the sizes of what follows depend on it. A RuntimeError
    says that ``fingerprint`` differs between ranks.
    """
    own = torch.tensor([x.shape[0], fingerprint], device=x.device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    sizes, fingerprints = torch.stack(gathered).T.tolist()
    if any(other != fingerprint for other in fingerprints):
        _raise_disagreement(options_differ=True)
    return sizes


def concatenate(x: Tensor, sizes: list[int], group: ProcessGroup | None) -> Tensor:
    """The rows of all ranks, (sum of sizes, D), for the estimators that need whole embeddings."""
    result: Tensor = _Concatenate.apply(x, sizes, group)
    return result
