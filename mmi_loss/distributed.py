"""Reductions over the process group whose gradients, averaged by DDP, are exact."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmi_loss.ops.autograd import closed_form
from mmi_loss.ops.covariance import Shared

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_active(group: ProcessGroup | None) -> bool:
    """Whether there is more than this process to reduce over."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def sum_constant(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of ``x`` over all ranks of the group, without gradient."""
    x = x.detach().clone()
    dist.all_reduce(x, group=group)
    return x


HEAD = 2**14
"""Bytes of the first reduction, whatever is computed: where ranks compute different losses, reductions of different
sizes would hang, end the process or mix what does not belong together.
"""
HOSTS = ("cpu",)
"""Devices on which nothing waits for results."""
_agreed: set[tuple[str, int, int]] = set()
"""The group, options and call of what was waited for once, on other devices."""
_DISAGREEMENTS = (
    ("options of the loss", "Construct MMILoss alike on every rank"),
    (
        "number or width of the views, or whether they need a gradient,",
        "Give every rank the like; evaluate on all of them, or without gather_distributed",
    ),
    (
        "step counters",
        "Call the loss equally often on every rank and load one checkpoint on all; loss.step.fill_(n) with one n on "
        "all ranks sets the counters right",
    ),
)


def share(
    views: Sequence[Tensor], widths: Sequence[int],
    options: int, step: Tensor, group: ProcessGroup | None, few: float | None,
) -> tuple[Shared | None, list[int]]:  # fmt: skip
    """What ranks share of their views (..., N, k), without gradient. And, unless ``few`` is None, the samples of every
    rank, for which it waits: in steps of fewer on all ranks the caller takes the rows, and nothing more is shared.

    It is one reduction, and another if the sums do not fit into :data:`HEAD`. With them travel the bits of what must be
    the same on all ranks, or they compute different losses: the fingerprint of the options, that of the call (how many
    views, their ``widths`` before they were sliced, whether there is a gradient: ranks that evaluate cannot meet ranks
    that train), and the step. Where each bit is set on no rank or on all, all ranks hold the same.

    Disagreement is a RuntimeError on every rank where nothing waits for it, on the CPU; where the caller waits; and for
    the first of equal calls, as the size of the next reductions depends on the options. Elsewhere it is a count of NaN,
    and so a NaN loss; as are fewer than 2 samples, a ValueError if it waits.
    """
    call = 2 * len(views) + (torch.is_grad_enabled() and any(z.requires_grad for z in views))
    for width in widths:  # not a hash, which tracing could not follow
        call = (call * 0x01000193 + width) % 2**32
    sums, device = [z.detach().sum(-2, keepdim=True) for z in views], views[0].device
    world = dist.get_world_size(group)
    shifts, like = torch.arange(64, device=device), sums[0].new_empty(())
    bits = torch.cat([(options >> shifts[:32]) & 1, (call >> shifts[:32]) & 1, (step >> shifts) & 1]).to(like)
    counts = like.new_full((), views[0].shape[-2]) * (torch.arange(world, device=device) == dist.get_rank(group))
    sent, room = [bits, counts, *(x.flatten() for x in sums)], max(HEAD, 16 * world) // like.itemsize
    lengths = [len(x) for x in sent]
    is_one = sum(lengths) <= room
    head = torch.cat(sent if is_one else sent[:2])
    head = sum_constant(F.pad(head, (0, room - len(head))), group)
    set_bits, counts, rest = head.split([*lengths[:2], room - sum(lengths[:2])])
    disagree, known = (set_bits != 0) & (set_bits != world), (group.group_name if group else "", options, call)
    if not torch.compiler.is_compiling() and (few is not None or device.type in HOSTS or known not in _agreed):
        if bool(disagree.any()):
            parts = zip(disagree.split([32, 32, 64]), _DISAGREEMENTS, strict=True)
            what, remedy = next(texts for part, texts in parts if part.any())
            raise RuntimeError(f"the {what} differ between ranks, which would train on different losses. {remedy}.")
        if device.type not in HOSTS:
            _agreed.add(known)
    sizes = [] if few is None else [int(size) for size in counts.tolist()]
    if few is not None and sum(sizes) < 2:
        raise ValueError(
            f"z_a must hold at least 2 samples on all ranks together, got {sizes} on ranks 0 to {len(sizes) - 1}; "
            "drop the last incomplete batch (drop_last=True)"
        )
    if few is not None and sum(sizes) < few:
        return None, sizes
    count = counts.sum()
    count = count.masked_fill((count < 2) | disagree.any(), float("nan"))
    totals = rest[: sum(lengths[2:])] if is_one else sum_constant(torch.cat(sent[2:]), group)
    means = [total.view_as(x) / count for total, x in zip(totals.split(lengths[2:]), sums, strict=True)]
    return Shared(count, means, partial(sum_constant, group=group)), sizes


class Concatenate(torch.autograd.Function):
    """The rows of all ranks (sum of sizes, D), in rank order. What is differentiated is the sum of all ranks' losses,
    which are all the same L: a rank's gradient is world_size * dL/dz_r, and DDP's average over ranks that of L.
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
