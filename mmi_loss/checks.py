"""What can be wrong with a call: errors that name argument, value and remedy, and warnings. The hot path asks whether
all is well (:mod:`mmi_loss.functional`); here is found out what is not.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SAMPLES_PER_DIM = 8
"""Joint and exchangeable MI of fewer samples per dimension are mostly spurious; training then fails quietly."""
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def views_of_call(z_a: Any, z_b: Any, local_proj: Any, global_proj: Any) -> list[Any]:
    """The views of a call of the module that is not simply one of two tensors; multi-crop's global ones first. A
    TypeError lists the forms if none fits.
    """
    is_multicrop = local_proj is not None or global_proj is not None
    if is_multicrop and z_a is None and z_b is None:
        stacks = {"global_proj": global_proj, "local_proj": local_proj}
        for name, stack in stacks.items():
            if isinstance(stack, Tensor) and stack.ndim != 3:
                raise ValueError(f"{name} must have shape (V, N, D), got {tuple(stack.shape)}; stack the views first")
        return [z for stack in stacks.values() if stack is not None for z in stack]
    if not is_multicrop and z_a is not None and z_b is not None:
        return [z_a, z_b]
    if not is_multicrop and (isinstance(z_a, (list, tuple)) or (isinstance(z_a, Tensor) and z_a.ndim == 3)):
        return list(z_a)
    got = {"z_a": z_a, "z_b": z_b, "local_proj": local_proj, "global_proj": global_proj}
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in got.items() if value is not None}
    raise TypeError(
        "MMILoss takes two views (z_a, z_b), each (N, D); a list of views; a stacked (V, N, D) tensor; or local_proj= "
        f"and global_proj=, (V, N, D) each. Got {', '.join(f'{n} {shape}' for n, shape in shapes.items()) or 'nothing'}"
    )


def explain(views: Sequence[Any], may_differ_in_width: bool, may_be_few: bool) -> None:
    """Raises what is wrong with the views, if anything is: TypeError for what is no dense floating point tensor,
    ValueError for their number, shapes or devices.
    """
    names = ["z_a", "z_b"] if len(views) == 2 else [f"views[{i}]" for i in range(len(views))]
    if len(views) < 2:
        raise ValueError(f"mutual information needs at least 2 views, got {len(views)}")
    first = views[0]
    for name, z in zip(names, views, strict=True):
        pair = f"{names[0]} and {name} must"
        if not isinstance(z, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(z).__name__}")
        if z.layout != torch.strided:
            raise TypeError(f"{name} must be dense, got layout {z.layout}; convert it with {name}.to_dense()")
        if not z.is_floating_point() or z.dtype.itemsize < 2:
            raise TypeError(
                f"{name} must be floating point of 16 bits or more, got {z.dtype}; convert it with .float()"
            )
        if z.ndim != 2:
            raise ValueError(
                f"{name} must have shape (N, D), got {tuple(z.shape)}; flatten or pool the other dimensions"
            )
        if len(z) != len(first) or (z.shape != first.shape and not may_differ_in_width):
            hint = "row i of every view must come from the same image"
            if len(z) == len(first):
                hint += "; objective='joint' takes views of different width"
            raise ValueError(f"{pair} have the same shape, got {tuple(first.shape)} and {tuple(z.shape)}; {hint}")
        if z.device != first.device:
            raise ValueError(f"{pair} be on the same device, got {first.device} and {z.device}")
        if z.shape[1] < 1:
            raise ValueError(f"{name} must have at least one feature, got shape {tuple(z.shape)}")
    if len(first) < 2 and not may_be_few:
        raise ValueError(
            f"{names[0]} must hold at least 2 samples, got shape {tuple(first.shape)}; statistics over the batch need "
            "more, so drop the last incomplete batch (drop_last=True)"
        )


def check_step(step: Any) -> None:
    """Raises TypeError unless ``step`` is one integer."""
    if isinstance(step, Tensor):
        if step.dtype not in _INTEGERS or step.numel() != 1:
            what = f"a tensor of {step.dtype} and shape {tuple(step.shape)}"
            raise TypeError(f"step must be one integer, got {what}; pass a scalar of dtype int64")
    elif isinstance(step, bool) or not isinstance(step, numbers.Integral):
        raise TypeError(f"step must be an int or an integer tensor, got {step!r}; convert it with int(step)")


def warn_if_starved(objective: str, samples: int, dim: int) -> None:
    """Warns where ``dim`` features from so few samples would mostly measure chance."""
    if samples >= SAMPLES_PER_DIM * dim:
        return
    warnings.warn(
        f"objective={objective!r} estimates mutual information between {dim} dimensions from {samples} samples; below "
        f"{SAMPLES_PER_DIM} samples per dimension most of it is spurious and training is known to fail quietly. Use "
        f"objective='content' (the default), or slice_dim={max(1, samples // SAMPLES_PER_DIM)}, or larger batches.",
        UserWarning,
        stacklevel=2,
    )


def warn_without_slices(num_slices: int, slice_dim: int, dim: int) -> None:
    """Warns that there is nothing to average over."""
    what = f"num_slices={num_slices} has no effect: a slice of slice_dim={slice_dim} holds all {dim} features"
    warnings.warn(f"{what}. Leave it out, or take a slice_dim below {dim}.", UserWarning, stacklevel=2)
