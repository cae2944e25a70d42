"""The losses that are compared, each with its library's published settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightly.loss import BarlowTwinsLoss, FroSSLLoss, LeJEPALoss, MMCRLoss, NTXentLoss, VICRegLoss, VISRegLoss, WMSELoss
from lightly.loss.lejepa_loss import SIGReg, lejepa_invariance_loss
from torch import Tensor, nn

from mmi_loss import MMILoss


class FroSSL(FroSSLLoss):
    """lightly's FroSSL of two views."""

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return super().forward([z_a, z_b])


def _squared_norm_of_product(a: Tensor, b: Tensor) -> Tensor:
    """The squared Frobenius norm of ``a.T @ b`` for (N, D) matrices, by whichever of D x D and N x N is smaller."""
    if len(a) < a.shape[1]:
        return ((a @ a.T) * (b @ b.T)).sum()
    return (a.T @ b).square().sum()


class FastBarlowTwins(BarlowTwinsLoss):
    """lightly's Barlow Twins on one device; where N < D no D x D matrix is formed.

    The same number and gradient to rounding (a test compares) in a fraction of the time: a comparison of accuracy can
    afford more runs. Its times are not lightly's; ``speed`` measures those.
    """

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        n = len(z_a)
        z_a, z_b = (nn.functional.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
        diagonal = (z_a * z_b).sum(0) / n
        off_diagonal = _squared_norm_of_product(z_a, z_b) / n**2 - diagonal.square().sum()
        return (diagonal - 1).square().sum() + self.lambda_param * off_diagonal


class FastVICReg(VICRegLoss):
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


class LeJEPA(LeJEPALoss):
    """lightly's LeJEPA of two global views. Its own forward demands local views besides; repeating the global ones
    there gives the same number for twice the cost.
    """

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        views = torch.stack([z_a, z_b])
        invariance = lejepa_invariance_loss(all_proj=views, global_proj=views)
        return self.lambda_param * self.sigreg(views) + (1 - self.lambda_param) * invariance


class _CharacteristicError(torch.autograd.Function):
    """sum_j w_j |mean_n z_n^j - phi_j|^2 of samples x (..., N, M) with z = exp(i h x), and its gradient.

    The frequencies are j h: all their sines and cosines are powers of one, and the gradient is a polynomial in it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spacing: float, phi: Tensor, weights: Tensor) -> Tensor:
        errors, gradients = [], []
        for part in x.split(64, dim=-1):  # some vectors at a time stay in the cache
            z = torch.polar(torch.ones_like(part), part * spacing)
            power, deviations = torch.ones_like(z), []
            for value in phi:
                deviations.append(power.mean(-2, keepdim=True) - value)
                power = power * z
            errors.append(sum(w * d.abs().square() for w, d in zip(weights, deviations, strict=True)))
            gradient = torch.zeros_like(z)
            for j in range(len(phi) - 1, 0, -1):
                gradient = (gradient + j * weights[j] * deviations[j].conj()) * z
            gradients.append(gradient.imag * (-2 * spacing / x.shape[-2]))
        ctx.save_for_backward(torch.cat(gradients, -1))
        return torch.cat(errors, -1).squeeze(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.unsqueeze(-2), None, None, None


class FastSIGReg(SIGReg):
    """lightly's SIGReg on one device: the same number and gradient to rounding, with a 17th of the sines."""

    def forward(self, proj: Tensor) -> Tensor:
        vectors = self._generate_unit_vectors(proj.device, proj.dtype, proj.size(-1))
        phi, weights = self.phi.to(proj.dtype), self.weights.to(proj.dtype)
        errors: Tensor = _CharacteristicError.apply(proj @ vectors, float(self.t[1]), phi, weights)
        return errors.mean() * proj.size(-2)


class FastLeJEPA(LeJEPA):
    """:class:`LeJEPA` with the shortcut of :class:`FastSIGReg`."""

    def __init__(self) -> None:
        super().__init__()
        self.sigreg = FastSIGReg()


class VISReg(VISRegLoss):
    """lightly's VISReg of two global views and no local ones."""

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        views = torch.stack([z_a, z_b])
        return super().forward(local_proj=views[:0], global_proj=views)


class MMCR(MMCRLoss):
    """lightly's MMCR of two views by one network, which its forward calls online and momentum."""

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return super().forward(z_a[:, None], z_b[:, None])


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
    "barlow_twins_fast": Method("Barlow Twins", lambda gather: FastBarlowTwins(), 1.0),
    "vicreg_fast": Method("VICReg", lambda gather: FastVICReg(), 16.0),
    "mmi_exchangeable": Method(
        "MMI exchangeable", lambda gather: MMILoss(objective="exchangeable", gather_distributed=gather), 32.0
    ),
    "mmi_joint": Method("MMI joint", lambda gather: MMILoss(objective="joint", gather_distributed=gather), 32.0),
    "mmi_paper": Method(
        "MMI as in the paper (our reading)", lambda gather: MMILoss.paper(gather_distributed=gather), 32.0
    ),
    "frossl": Method("FroSSL", lambda gather: FroSSL(), 16.0),
    "simclr": Method("SimCLR", lambda gather: NTXentLoss(gather_distributed=gather), 16.0),
    "lejepa": Method("LeJEPA", lambda gather: LeJEPA(gather_distributed=True) if gather else FastLeJEPA(), 16.0),
    "simclr_02": Method("SimCLR, τ = .2", lambda gather: NTXentLoss(0.2, gather_distributed=gather), 16.0),
    "simclr_01": Method("SimCLR, τ = .1", lambda gather: NTXentLoss(0.1, gather_distributed=gather), 16.0),
    "visreg": Method("VISReg, λ = .6", lambda gather: VISReg(0.6, gather_distributed=gather), 16.0),
    "visreg_09": Method("VISReg, λ = .9", lambda gather: VISReg(0.9, gather_distributed=gather), 16.0),
    "mmcr": Method("MMCR", lambda gather: MMCR(), 16.0),
    "wmse": Method("W-MSE", lambda gather: WMSE(), 16.0),
}
