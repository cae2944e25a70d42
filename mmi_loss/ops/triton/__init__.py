"""Triton kernels of the loss. Imported only when they are selected: the package needs triton.

``sliced_loss`` is the default loss in three launches and two for the gradient; ``project``, ``moments`` and ``gram``
are the parts that other objectives and sizes are put together from, with batched Choleskys by cuSOLVER.
"""

from __future__ import annotations

from mmi_loss.ops.slices import _wrap
from mmi_loss.ops.triton.operators import gram, moments, project, sliced_loss
from mmi_loss.ops.triton.standardise import signal_to_noise

__all__ = ["gram", "moments", "project", "seed_keys", "signal_to_noise", "sliced_loss"]


def seed_keys(seed: int) -> list[int]:
    """What the seed adds to the random streams' keys, as signed 32-bit integers: see :mod:`mmi_loss.ops.slices`."""
    high = (seed >> 32) * 0xC2B2AE35
    return [_wrap(seed * 0x9E3779B9), _wrap(high), _wrap(high + 0x27D4EB2F)]
