"""The measures of :mod:`mmi_loss.diagnostics`, of more samples than fit at once: batch by batch, over all ranks."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from mmi_loss import diagnostics
from mmi_loss.distributed import Concatenate, is_active

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OF_ONE_VIEW = ("rank_me", "effective_rank", "participation_ratio", "alpha_req")
OF_TWO_VIEWS = ("lidar", "content_information", "mutual_information")


class Measures:
    """Label-free measures of embeddings, accumulated like a torchmetrics metric: ``update``, ``compute``, ``reset``.

    What is kept is a triangular factor of the rows [1, z_a, z_b] seen so far: every measure is a function of their
    second moments, and this form of them loses no digits to squaring. It has at most 1 + 2 D rows, however many samples
    there were; one update costs time in proportion to D^2 N. All is float64, on the device of the samples.

    Args:
        process_group: The ranks whose samples belong together; None: all, where ``torch.distributed`` is initialised.
            Every rank has to call ``compute``, also one that has seen nothing.
        information_dim: Mutual and content information are those of so many fixed random directions where the
            embedding is wider, at most an eighth of the number of samples; the other measures take all features.

    Example:
        >>> z = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
        >>> measures = Measures()
        >>> for z_a, z_b in zip(z.split(64), (z + 0.1).split(64)):
        ...     measures.update(z_a, z_b)
        >>> f"{measures.compute()['rank_me'].item():.3f} is {diagnostics.rank_me(z).item():.3f}"
        '15.931 is 15.931'
    """

    def __init__(self, process_group: ProcessGroup | None = None, information_dim: int = 64) -> None:
        self.process_group, self.information_dim = process_group, information_dim
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self._rows, self._largest, self._origin = torch.zeros(0, 0), torch.zeros(0), torch.zeros(0)
        self._count, self._stored, self._views = 0, 0.0, 0

    @torch.no_grad()
    def update(self, z_a: Tensor, z_b: Tensor | None = None) -> None:
        """Add a batch: embeddings (N, D), and of the same images under another augmentation, if there are any.

        Raises:
            TypeError, ValueError: No finite floating point (N, D), or not as many and as wide as before.
        """
        views = [z_a] if z_b is None else [z_a, z_b]
        diagnostics.check_views(*views)
        x = torch.cat([view.double() for view in views], 1)
        if self._count and (len(views) != self._views or x.shape[1] != len(self._largest)):
            raise ValueError(
                f"{len(views)} views of {z_a.shape[1]} features after {self._views} of "
                f"{len(self._largest) // self._views}: reset() before samples of another kind"
            )
        # About any one sample, rounding makes nothing of features that are constant.
        origin = self._origin if self._count else x[0]
        rows, largest = torch.cat([x.new_ones(len(x), 1), x - origin], 1), x.abs().amax(0)
        if self._count:
            rows, largest = torch.cat([self._rows, rows]), torch.maximum(self._largest, largest)
        self._rows, self._largest, self._origin = _triangular(rows, at_least=2), largest, origin
        self._count, self._views = self._count + len(x), len(views)
        self._stored = max(self._stored, *map(diagnostics.stored, views))

    @torch.no_grad()
    def compute(self) -> dict[str, Tensor]:
        """Every measure of all samples of all ranks, a float64 scalar; NaN where there are too few samples for it.

        Those of one view are of ``z_a``; of the others there are none if ``z_b`` was never given.

        Raises:
            ValueError: No rank has seen a sample.
            RuntimeError: Ranks have seen embeddings of different widths or numbers of views.
        """
        rows, largest, origin, count, stored, views = self._over_ranks()
        if count == 0:
            raise ValueError("no samples yet: call update(z_a, z_b) first")
        rows = _triangular(rows)
        # What rounding makes of a constant: in the samples as they were stored, and in the factorisation.
        constant = (4 * stored + 16 * torch.finfo(rows.dtype).eps) * largest
        # The first row is what the samples have in common: without it they are centred.
        rows[:1, 1:] += rows[:1, :1] * origin
        moments = [
            diagnostics.Moments(view[:1], view[1:], count, of_view)
            for view, of_view in zip(rows[:, 1:].tensor_split(views, 1), constant.tensor_split(views), strict=True)
        ]
        found: dict[str, Callable[[], Tensor]] = {
            name: functools.partial(getattr(diagnostics, name), moments[0]) for name in OF_ONE_VIEW
        }
        if views == 2:
            dim = len(largest) // views
            k = max(1, min(dim, self.information_dim, count // 8))
            directions = torch.randn(dim, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(rows)
            sliced = [m.along(directions) for m in moments] if k < dim else moments
            found |= {
                name: functools.partial(getattr(diagnostics, name), *(moments if name == "lidar" else sliced))
                for name in OF_TWO_VIEWS
            }
        values: dict[str, Tensor] = {}
        for name, measure in found.items():
            values[name] = rows.new_full((), math.nan)
            with contextlib.suppress(ValueError, RuntimeError):  # LinAlgError is one
                values[name] = measure()
        return values

    def _over_ranks(self) -> tuple[Tensor, Tensor, Tensor, int, float, int]:
        """Rows, largest values, origin, number of samples, precision and number of views, of all ranks together."""
        group = self.process_group
        if not is_active(group):
            return self._rows, self._largest, self._origin, self._count, self._stored, self._views
        on_gpu = not self._count and dist.get_backend(group) == "nccl"  # one that has seen nothing takes part
        device = torch.device("cuda") if on_gpu else self._rows.device
        own = torch.tensor(
            [*self._rows.shape, self._count, self._views, self._stored], dtype=torch.float64, device=device
        )
        every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, own, group=group)
        seen = [[float(x) for x in one] for one in every if one[2] > 0]
        if not seen:
            return self._rows, self._largest, self._origin, 0, 0.0, 0
        if len({(columns, views) for _, columns, _, views, _ in seen}) > 1:
            kinds = [f"{int(one[3])} views of {int(one[1] - 1) // max(1, int(one[3]))}" for one in every]
            raise RuntimeError(f"ranks have seen embeddings of different kinds: {', '.join(kinds)} features")
        columns, views = int(seen[0][1]), int(seen[0][3])
        rows = self._rows if self._count else torch.zeros(0, columns, dtype=torch.float64, device=device)
        own_vectors = [self._largest, self._origin] if self._count else [rows.new_zeros(columns - 1)] * 2
        vectors: Tensor = Concatenate.apply(torch.stack(own_vectors)[None], [1] * len(every), group)
        origin = vectors[next(i for i, one in enumerate(every) if one[2] > 0), 1]  # the first one becomes everybody's
        rows = torch.cat([rows[:, :1], rows[:, 1:] + rows[:, :1] * (own_vectors[1] - origin)], 1)
        gathered: Tensor = Concatenate.apply(rows, [int(one[0]) for one in every], group)
        count, stored = int(sum(one[2] for one in seen)), max(one[4] for one in seen)
        return gathered, vectors[:, 0].amax(0), origin, count, stored, views


def _triangular(rows: Tensor, at_least: int = 0) -> Tensor:
    """Rows of the same second moments, as many as columns; less than ``at_least`` times as many stay as they are."""
    return torch.linalg.qr(rows, mode="r").R if len(rows) > at_least * rows.shape[1] else rows
