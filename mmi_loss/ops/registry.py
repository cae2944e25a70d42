"""The implementations: which there are, where they run, what they cannot do. Nothing here imports a backend."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_FUSED_DIM = 128
"""Rows of the largest matrix that one program of the Triton kernels holds in registers."""
MAX_SLICE_DIM = 1024
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Implementation:
    """A way to compute the loss: its name for ``impl=``, the module that does it, where it runs, its limits."""

    name: str
    module: str
    devices: str
    limits: str

    def __str__(self) -> str:
        return f"{self.name!r} on {self.devices} ({self.limits})"


IMPLEMENTATIONS = {
    record.name: record
    for record in (
        Implementation("reference", "mmi_loss.reference", "any device", "slow: for checking"),
        Implementation("eager", "mmi_loss.functional", "any device", "no limits"),
        Implementation(
            "triton",
            "mmi_loss.ops.triton",
            "cuda, compute capability 8.0 or later",
            "two views of float32, float16 or bfloat16; slices 'kronecker' or 'gaussian' of at most "
            f"{MAX_SLICE_DIM} features; no gather_distributed",
        ),
    )
}


def triton_refusal(views: Sequence[Tensor], slice_dim: int | None, slice_kind: str, gather: bool) -> str | None:
    """Why the Triton kernels cannot compute this loss, or None if they can."""
    device, dim = views[0].device, views[0].shape[1]
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    # The interpreter runs the same kernels on the CPU, far too slowly for anything but tests.
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the inputs are on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has compute capability below 8.0"
    if len(views) != 2:
        return f"there are {len(views)} views"
    unsupported = [z.dtype for z in views if z.dtype not in _TRITON_DTYPES]
    if unsupported:
        return f"an input is {unsupported[0]}"
    if gather:
        return "gather_distributed=True reduces statistics between ranks"
    if slice_dim is not None and slice_dim < dim:
        if slice_kind == "coordinates":
            return "slice_kind='coordinates' selects features instead of projecting them"
        if slice_dim > MAX_SLICE_DIM:
            return f"slice_dim={slice_dim} is larger than {MAX_SLICE_DIM}"
    return None


def refuse(name: str, reason: str) -> ValueError:
    """The error of a choice that cannot be followed: an explicit one is never replaced by another."""
    known = "; ".join(map(str, IMPLEMENTATIONS.values()))
    return ValueError(f"impl={name!r} cannot compute this loss: {reason}. Known implementations: {known}")
