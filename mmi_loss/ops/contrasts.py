"""Contrasts of V views x_1 .. x_V: what they share, u_0 = their mean, and how they differ,

    u_i = (x_1 + ... + x_i) / i - x_{i+1},    i = 1 .. V - 1.

They are orthogonal combinations of the views (Helmert's, up to their norms), so they hold every second moment of the
views; those that differ are free of the mean, and accurate even where the views nearly agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def squared_norms(num_views: int) -> list[float]:
    """The sums of squares of the weights of the views in each contrast."""
    return [1 / num_views, *((i + 1) / i for i in range(1, num_views))]


def contrasts(views: Sequence[Tensor], mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The contrasts (V, ..., N, k) of views (..., N, k), the shared one less the ``mean`` (..., 1, k), by default its
    own; and a location (..., 1, k) of the features, for their size.
    """
    rows = views[0].new_empty((len(views), *views[0].shape))
    shared, *others = rows.unbind()
    # Relative to any one sample, features keep their digits where the mean is far larger than the deviation.
    origin = views[0][..., :1, :] if mean is None else mean
    torch.sub(views[0], origin, out=shared)
    for i, other in enumerate(others, start=1):
        torch.sub(views[i - 1], views[i], out=other)
        if i > 1:
            other.add_(others[i - 2], alpha=1 - 1 / i)
        shared.sub_(other, alpha=1 / (i + 1))
    if mean is None:
        shared.sub_(shared.mean(-2, keepdim=True))
    return rows, origin


def gradients_of_views(gradients: Tensor) -> list[Tensor]:
    """From the gradients of the contrasts (V, ..., N, k), that of the shared one divided by V as the mean passes it on,
    to those of the views, which take their place in memory.

    The mean that was subtracted counts as a constant: moments about it are stationary in it.
    """
    total, *others = gradients.unbind()
    # A view is subtracted in one contrast and averaged in all after it: from the last to the first.
    for i, other in reversed(list(enumerate(others, start=1))):
        total.add_(other, alpha=1 / i)
        torch.add(total, other, alpha=-1 - 1 / i, out=other)
    return [total, *others]
