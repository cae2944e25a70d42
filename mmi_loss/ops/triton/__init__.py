"""Triton kernels of the default loss: two views, the content objective, exact log-determinants.

Kronecker slices and all features of at most MAX_SLICE_DIM are computed in three launches, and two for the gradient.
More features than that are factorised by cuSOLVER, as moments or, from fewer samples, as a Gram matrix.

Triton is imported only when the kernels are called: the package does without it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmi_loss.ops.slices import MIXTURES, _wrap

if TYPE_CHECKING:
    from mmi_loss.ops.covariance import Floor
    from mmi_loss.options import Options

MAX_SLICE_DIM = 128
"""Rows of the largest matrix that one program holds in registers."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusal(views: Sequence[Tensor], options: Options, gathers: bool) -> str | None:
    """Why the kernels cannot compute this loss, or None if they can."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.knobs") is None:
        return "it needs Triton 3.4 or later, of torch 2.8 (pip install triton)"
    device, dim = views[0].device, views[0].shape[1]
    # The interpreter runs the same kernels on the CPU, far too slowly for anything but tests.
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the inputs are on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has compute capability below 8.0"
    if len(views) != 2:
        return f"there are {len(views)} views"
    if views[1].shape[1] != dim:
        return f"the views have {dim} and {views[1].shape[1]} features"
    unsupported = [z.dtype for z in views if z.dtype not in _DTYPES]
    if unsupported:
        return f"an input is {unsupported[0]}"
    if options.objective != "content":
        return f"objective={options.objective!r} is not 'content'"
    if options.logdet != "cholesky":
        return f"logdet={options.logdet!r} is not 'cholesky'"
    if gathers:
        return "gather_distributed=True reduces statistics between ranks"
    slice_dim, slice_kind = options.slice_dim, options.slice_kind
    if slice_dim is not None and slice_dim < dim:
        if slice_kind != "kronecker":
            return f"slice_kind={slice_kind!r} is not 'kronecker'"
        if not 2 * MIXTURES <= slice_dim <= MAX_SLICE_DIM:
            # Of fewer features the blocks are single ones, and the slice is a Gaussian one.
            return f"slice_dim={slice_dim} is not between {2 * MIXTURES} and {MAX_SLICE_DIM}"
    return None


def content_loss(
    z_a: Tensor, z_b: Tensor, step: Tensor, options: Options, floor: Floor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss () of two views (N, D), in nats, and the constants it is made of: log dets (2, S) and noise (S,).

    All are float32. ``step`` is int64 () on the device of the views, ``floor`` two numbers for the noise under the
    features of a determinant (:func:`mmi_loss.ops.covariance.noise_of`).
    """
    from mmi_loss.ops.triton import operators

    slice_dim, num_slices, block_dim = options.slice_dim, options.num_slices, options.block_dim
    if slice_dim is None or slice_dim >= z_a.shape[1]:
        slice_dim, num_slices, block_dim = z_a.shape[1], 1, 0
    # What the seed adds to the random stream's key: see mmi_loss.ops.slices.
    seed_keys = [_wrap(options.seed * 0x9E3779B9), _wrap((options.seed >> 32) * 0xC2B2AE35)]
    coefficients = [weight / (2 * num_slices) for weight in options.row.weights]
    loss, log_dets, noise, *_ = operators.content_loss(
        z_a, z_b, step, seed_keys, slice_dim, num_slices, block_dim, list(floor), coefficients
    )
    return loss, log_dets.detach(), noise.detach()
