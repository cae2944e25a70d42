"""The losses whose cost is compared: ours by every estimator and route, lightly's, those of a clone of solo-learn, and
two relatives written from their papers.

Every entry makes a criterion of two (N, D) views. Rivals keep their published settings.
"""

from __future__ import annotations

import ast
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import lightly.loss
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmi_loss import MMILoss

Criterion = Callable[[Tensor, Tensor], Tensor]
MAX_WMSE_DIM = 512
"""W-MSE inverts the D x D covariance of the samples: it needs N > D."""


class NaiveMMI(nn.Module):
    """The content objective as one would first write it: covariances, ``torch.logdet``, autograd."""

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        z = torch.cat([z_a, z_b])
        mean, std = z.mean(0), z.std(0)
        x_a, x_b = (z_a - mean) / std, (z_b - mean) / std
        total = (x_a.T @ x_a + x_b.T @ x_b) / len(z)
        within = (x_a - x_b).T @ (x_a - x_b) / len(z)
        noise = z.shape[1] / 64 * torch.eye(z.shape[1], device=z.device)
        return 0.5 * (torch.logdet(within + noise) - torch.logdet(total + noise))


class MEC(nn.Module):
    """Maximum entropy coding (Liu et al. 2022, eq. 5 and 6), written from the paper: fourth-order series, eps^2 = 0.06.

    The smaller of the N x N and D x D forms, as the paper's algorithm takes it.
    """

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        n, dim = z_a.shape
        z_a, z_b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
        product = z_a @ z_b.T if n < dim else z_a.T @ z_b
        c = dim / (n * 0.06) * product
        power, series = c, torch.zeros_like(c)
        for order in range(1, 5):
            series = series + (-1) ** (order + 1) / order * power
            power = power @ c
        return -(n + dim) / 2 * torch.trace(series) / n


class CorInfoMax(nn.Module):
    """CorInfoMax (Ozsoy et al. 2022, eq. 6), written from the paper: running covariances, log det, attraction.

    Forgetting factor 0.01, regulariser 1e-8 I grown to 1e-4 for float32, attraction weight 500.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("covariances", torch.eye(dim).repeat(2, 1, 1))
        self.register_buffer("means", torch.zeros(2, dim))

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        n, dim = z_a.shape
        z_a, z_b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
        entropy = torch.zeros((), device=z_a.device)
        for view, z in enumerate((z_a, z_b)):
            mean = 0.99 * self.means[view] + 0.01 * z.mean(0)
            x = z - mean
            covariance = 0.99 * self.covariances[view] + 0.01 * x.T @ x / n
            entropy = entropy + torch.logdet(covariance + 1e-4 * torch.eye(dim, device=z.device)) / dim
            self.means[view], self.covariances[view] = mean.detach(), covariance.detach()
        return 500 * F.mse_loss(z_a, z_b) - entropy


def _of(criterion: nn.Module, arguments: Callable[[Tensor, Tensor], tuple[Any, ...]]) -> Criterion:
    return lambda z_a, z_b: criterion(*arguments(z_a, z_b))


def _multi_view(criterion: nn.Module) -> Criterion:
    """LeJEPA and VISReg take stacks of local and of global views: here one of each."""

    def of_stack(z_a: Tensor, z_b: Tensor) -> Tensor:
        return criterion(local_proj=z_a[None], global_proj=z_b[None])

    return of_stack


def _wmse(n: int, dim: int) -> Criterion:
    criterion = lightly.loss.WMSELoss(embedding_dim=dim, w_size=n)
    return lambda z_a, z_b: criterion(torch.cat([z_a, z_b]))


LOSSES: dict[str, Callable[[int, int], Criterion]] = {
    "mmi": lambda n, dim: MMILoss(),
    "mmi_compiled": lambda n, dim: torch.compile(MMILoss()),
    "mmi_gaussian": lambda n, dim: MMILoss(slice_kind="gaussian"),
    "mmi_coordinates": lambda n, dim: MMILoss(slice_kind="coordinates"),
    "mmi_4_slices": lambda n, dim: MMILoss(num_slices=4),
    "mmi_k32": lambda n, dim: MMILoss(slice_dim=32),
    "mmi_k512": lambda n, dim: MMILoss(slice_dim=512),
    "mmi_exchangeable": lambda n, dim: MMILoss(objective="exchangeable"),
    "mmi_joint": lambda n, dim: MMILoss(objective="joint"),
    "mmi_all": lambda n, dim: MMILoss(slice_dim=None),
    "mmi_all_exchangeable": lambda n, dim: MMILoss(objective="exchangeable", slice_dim=None),
    "mmi_all_joint": lambda n, dim: MMILoss(objective="joint", slice_dim=None),
    "mmi_paper": lambda n, dim: MMILoss.paper(),
    "mmi_naive": lambda n, dim: NaiveMMI(),
    "barlow_twins": lambda n, dim: lightly.loss.BarlowTwinsLoss(),
    "vicreg": lambda n, dim: lightly.loss.VICRegLoss(),
    "frossl": lambda n, dim: _of(lightly.loss.FroSSLLoss(), lambda a, b: ([a, b],)),
    "mmcr": lambda n, dim: _of(lightly.loss.MMCRLoss(), lambda a, b: (a[:, None], b[:, None])),
    "wmse": _wmse,
    "lejepa": lambda n, dim: _multi_view(lightly.loss.LeJEPALoss()),
    "visreg": lambda n, dim: _multi_view(lightly.loss.VISRegLoss()),
    "simclr": lambda n, dim: lightly.loss.NTXentLoss(),
    "mec": lambda n, dim: MEC(),
    "corinfomax": lambda n, dim: CorInfoMax(dim),
}


def solo_learn(checkout: Path, names: Sequence[str]) -> dict[str, Callable[..., Tensor]]:
    """Loss functions of a clone of solo-learn, such as ``barlow``, by their own files.

    ``solo.utils.misc`` imports timm and more, of which the losses need nothing: only what gathers is taken from it.

    Raises:
        FileNotFoundError: The folder is no clone of solo-learn.
    """
    paths = {name: checkout / "solo" / "losses" / f"{name}.py" for name in names}
    utils = checkout / "solo" / "utils" / "misc.py"
    missing = [str(path) for path in (*paths.values(), utils) if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{missing[0]} is not there: --solo-learn takes a clone of its repository")
    gatherers = ("GatherLayer", "gather", "get_rank")
    syntax = ast.parse(utils.read_text(), str(utils))
    syntax.body = [node for node in syntax.body if getattr(node, "name", None) in gatherers]
    misc = types.ModuleType("solo.utils.misc")
    vars(misc).update(torch=torch, dist=torch.distributed)
    exec(compile(syntax, str(utils), "exec"), vars(misc))
    stubs = {"solo": types.ModuleType("solo"), "solo.utils": types.ModuleType("solo.utils"), misc.__name__: misc}
    functions = {}
    with mock.patch.dict(sys.modules, stubs):
        for name, path in paths.items():
            module = types.ModuleType(name)
            exec(compile(path.read_text(), str(path), "exec"), vars(module))
            functions[name] = vars(module)[f"{name}_loss_func"]
    return functions
