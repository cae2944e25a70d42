"""The losses that are compared, each with its library's published settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightly.loss import BarlowTwinsLoss, FroSSLLoss, LeJEPALoss, NTXentLoss, VICRegLoss, WMSELoss
from lightly.loss.lejepa_loss import lejepa_invariance_loss
from torch import Tensor, nn

from mmi_loss import MMILoss


class FroSSL(FroSSLLoss):
    """lightly's FroSSL of two views."""

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return super().forward([z_a, z_b])


class LeJEPA(LeJEPALoss):
    """lightly's LeJEPA of two global views. Its own forward demands local views besides; repeating the global ones
    there gives the same number for twice the cost.
    """

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        views = torch.stack([z_a, z_b])
        invariance = lejepa_invariance_loss(all_proj=views, global_proj=views)
        return self.lambda_param * self.sigreg(views) + (1 - self.lambda_param) * invariance


class WMSE(nn.Module):
    """lightly's W-MSE, whitening over the whole batch: it needs N >= 2 D."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion: WMSELoss | None = None

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        if self.criterion is None:
            self.criterion = WMSELoss(embedding_dim=z_a.shape[1], w_size=len(z_a))
        return self.criterion(torch.cat([z_a, z_b]))


@dataclass(frozen=True)
class Method:
    """A criterion of two (N, D) views, made by ``criterion(gather_distributed)``, and LARS's rate per 256 samples.

    The rates of the methods the demo does not show are guesses of a start; ``compare`` tunes its own, of AdamW.
    """

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
    "mmi_exchangeable": Method(
        "MMI exchangeable", lambda gather: MMILoss(objective="exchangeable", gather_distributed=gather), 32.0
    ),
    "mmi_joint": Method("MMI joint", lambda gather: MMILoss(objective="joint", gather_distributed=gather), 32.0),
    "mmi_paper": Method(
        "MMI as in the paper (our reading)", lambda gather: MMILoss.paper(gather_distributed=gather), 32.0
    ),
    "frossl": Method("FroSSL", lambda gather: FroSSL(), 16.0),
    "simclr": Method("SimCLR", lambda gather: NTXentLoss(gather_distributed=gather), 16.0),
    "lejepa": Method("LeJEPA", lambda gather: LeJEPA(gather_distributed=gather), 16.0),
    "wmse": Method("W-MSE", lambda gather: WMSE(), 16.0),
}
