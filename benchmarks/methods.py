"""The losses that are compared, each with its library's published settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightly.loss import BarlowTwinsLoss, VICRegLoss
from torch import nn

from mmi_loss import MMILoss


@dataclass(frozen=True)
class Method:
    """A criterion of two (N, D) views, made by ``criterion(gather_distributed)``, and LARS's rate per 256 samples."""

    title: str
    criterion: Callable[[bool], nn.Module]
    learning_rate: float


# Rates are the best of a grid on the digits (seed 0, D=1024, 300 steps): MMI 16, 32; VICReg 8, 16;
# Barlow Twins 0.2, 0.5, 1, 2, 8, 16.
METHODS = {
    "mmi": Method("MMI", lambda gather: MMILoss(gather_distributed=gather), 32.0),
    "mmi_gaussian": Method(
        "MMI, Gaussian slice", lambda gather: MMILoss(slice_kind="gaussian", gather_distributed=gather), 32.0
    ),
    "mmi_coordinates": Method(
        "MMI, random coordinates", lambda gather: MMILoss(slice_kind="coordinates", gather_distributed=gather), 32.0
    ),
    "mmi_all": Method("MMI, all features", lambda gather: MMILoss(slice_dim=None, gather_distributed=gather), 32.0),
    "mmi_joint_all": Method(
        "MMI joint, all features",
        lambda gather: MMILoss(objective="joint", slice_dim=None, gather_distributed=gather),
        32.0,
    ),
    "barlow_twins": Method("Barlow Twins", lambda gather: BarlowTwinsLoss(gather_distributed=gather), 1.0),
    "vicreg": Method("VICReg", lambda gather: VICRegLoss(gather_distributed=gather), 16.0),
}
