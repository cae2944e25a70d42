"""The registry of losses: ours, and its rivals with their libraries' published settings.

Every entry of :data:`LOSSES` makes a criterion of two (N, D) views; commands also take options of ``MMILoss`` as a
name, such as ``snr=256,slice_dim=None``. ``python -m benchmarks rates`` measures which learning rate a loss wants.
"""

from __future__ import annotations

import argparse
import ast
import functools
import math
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import lightly.loss
import torch
from lightly.loss.lejepa_loss import lejepa_invariance_loss
from torch import Tensor, nn

from mmi_loss import MMILoss

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """A criterion of two (N, D) views.

    Attributes:
        title: Its name in print.
        library: Where it comes from.
        make: ``make()`` is a new one with its library's settings.
        fast: The same number and gradient on one device in less time, where there is such a form: for training runs
            whose time is not the question.
        square: Rows of the largest square matrix it builds, of N and D.
        options: Of ``MMILoss``, where it is ours.
    """

    title: str
    library: str
    make: Callable[[], nn.Module]
    fast: Callable[[], nn.Module] | None = None
    square: Callable[[int, int], int] = lambda n, dim: 0
    options: dict[str, Any] | None = field(default=None)

    def criterion(self, fast: bool = False) -> nn.Module:
        """A new criterion, in its fast form where that is wanted and there is one."""
        return self.fast() if fast and self.fast else self.make()


def ours(title: str, **options: Any) -> Loss:
    """``MMILoss(**options)``."""
    options = {name: value for name, value in options.items() if not name.startswith(("gather", "process"))}

    def square(n: int, dim: int) -> int:
        is_joint = options.get("objective") == "joint"
        return options.get("slice_dim", 1) or (min(n, 2 * dim) if is_joint else min(2 * n, dim))

    return Loss(title, "mmi-loss", functools.partial(MMILoss, **options), None, square, options)


def _squared_norm_of_product(a: Tensor, b: Tensor) -> Tensor:
    """The squared Frobenius norm of ``a.T @ b`` for (N, D) matrices, by whichever of D x D and N x N is smaller."""
    if len(a) < a.shape[1]:
        return ((a @ a.T) * (b @ b.T)).sum()
    return (a.T @ b).square().sum()


class FastBarlowTwins(lightly.loss.BarlowTwinsLoss):
    """lightly's Barlow Twins on one device; where N < D no D x D matrix is formed."""

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        n = len(z_a)
        z_a, z_b = (nn.functional.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
        diagonal = (z_a * z_b).sum(0) / n
        off_diagonal = _squared_norm_of_product(z_a, z_b) / n**2 - diagonal.square().sum()
        return (diagonal - 1).square().sum() + self.lambda_param * off_diagonal


class FastVICReg(lightly.loss.VICRegLoss):
    """lightly's VICReg on one device, with the same shortcut as :class:`FastBarlowTwins`."""

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        n, dim = z_a.shape
        variance, covariance = z_a.new_zeros(()), z_a.new_zeros(())
        for z in (z_a, z_b):
            x = z - z.mean(0)
            squares = x.square().sum(0)
            std = (squares / (n - 1) + self.eps).sqrt()
            variance = variance + 0.5 * (1 - std).relu().mean()
            off_diagonal = _squared_norm_of_product(x, x) - squares.square().sum()
            covariance = covariance + off_diagonal / (n - 1) ** 2 / dim
        invariance = nn.functional.mse_loss(z_a, z_b)
        return self.lambda_param * invariance + self.mu_param * variance + self.nu_param * covariance


class LeJEPA(lightly.loss.LeJEPALoss):
    """lightly's LeJEPA of two global views. Its own forward demands local views besides; repeating the global ones
    there gives the same number for twice the cost.
    """

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        views = torch.stack([z_a, z_b])
        invariance = lejepa_invariance_loss(all_proj=views, global_proj=views)
        return self.lambda_param * self.sigreg(views) + (1 - self.lambda_param) * invariance


class VISReg(lightly.loss.VISRegLoss):
    """lightly's VISReg of two global views and no local one. It recommends lambda .6 for small data, .9 for large."""

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        views = torch.stack([z_a, z_b])
        return super().forward(local_proj=views[:0], global_proj=views)


class FroSSL(lightly.loss.FroSSLLoss):
    """lightly's FroSSL of two views."""

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return super().forward([z_a, z_b])


class MMCR(lightly.loss.MMCRLoss):
    """lightly's MMCR, with the first view as the online network's and the second as the momentum network's."""

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return super().forward(z_a[:, None], z_b[:, None])


LOSSES: dict[str, Loss] = {
    "mmi": ours("MMI"),
    "mmi_all": ours("MMI, all features", slice_dim=None),
    "mmi_exchangeable": ours("MMI exchangeable", objective="exchangeable"),
    "mmi_joint": ours("MMI joint", objective="joint"),
    "mmi_joint_all": ours("MMI joint, all features", objective="joint", slice_dim=None),
    "mmi_paper": ours("MMI as in the paper (our reading)", **MMILoss.paper().options.given()),
    "barlow_twins": Loss("Barlow Twins", "lightly", lightly.loss.BarlowTwinsLoss, FastBarlowTwins, lambda n, d: d),
    "vicreg": Loss("VICReg", "lightly", lightly.loss.VICRegLoss, FastVICReg, lambda n, d: d),
    "simclr": Loss("SimCLR", "lightly", lightly.loss.NTXentLoss),
    "lejepa": Loss("LeJEPA", "lightly", LeJEPA),
    "simclr_02": Loss("SimCLR, τ = .2", "lightly", functools.partial(lightly.loss.NTXentLoss, 0.2)),
    "simclr_01": Loss("SimCLR, τ = .1", "lightly", functools.partial(lightly.loss.NTXentLoss, 0.1)),
    "visreg": Loss("VISReg", "lightly", functools.partial(VISReg, 0.6)),
    "visreg_09": Loss("VISReg, λ = .9", "lightly", VISReg),
    "frossl": Loss("FroSSL", "lightly", FroSSL, square=min),
    # Its svd makes a D x D matrix of every sample.
    "mmcr": Loss("MMCR", "lightly", MMCR, square=lambda n, d: math.isqrt(n) * d),
}
UNTRAINED, PIXELS, SUPERVISED = "untrained", "pixels", "supervised"
"""Methods of a comparison that have no loss: before training, without a network, and trained with labels."""
FIXED = (UNTRAINED, PIXELS)


def find(method: str) -> Loss | None:
    """The loss of that name, or ours with the options that the name consists of, such as ``snr=256,slice_dim=None``.

    None for the methods that have no loss.

    Raises:
        ValueError, TypeError: There is no such method; the message names the known ones.
    """
    if method in (*FIXED, SUPERVISED):
        return None
    if method in LOSSES:
        return LOSSES[method]
    if "=" not in method:
        known = ", ".join([*FIXED, SUPERVISED, *LOSSES])
        raise ValueError(f"{method!r} is neither options of MMILoss, such as snr=256, nor one of {known}")
    options = {}
    for assignment in method.split(","):
        name, text = assignment.strip().split("=", 1)
        try:
            options[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            options[name] = text
    return ours(method, **options)


def method(name: str) -> str:
    """A name for the command line: one that :func:`find` knows."""
    try:
        found = find(name)
        if found:
            found.criterion()
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def title(method: str) -> str:
    """A method's name in print."""
    named = {UNTRAINED: "untrained backbone", PIXELS: "raw pixels", SUPERVISED: "supervised, with labels"}
    return named.get(method) or (LOSSES[method].title if method in LOSSES else method)


def is_rival(method: str) -> bool:
    """Whether it is another library's loss."""
    return method in LOSSES and LOSSES[method].library != "mmi-loss"


WITHOUT_US = (*FIXED, SUPERVISED, *filter(is_rival, LOSSES))
"""Methods in whose results our code has no part."""


def solo_learn(checkout: Path, names: Sequence[str] = ("barlow", "vicreg")) -> dict[str, Callable[..., Tensor]]:
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
            functions[f"solo-learn {name}"] = vars(module)[f"{name}_loss_func"]
    return functions
