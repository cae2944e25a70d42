"""The method: solo-learn's Barlow Twins with :class:`mmi_loss.MMILoss` as the loss. Imports solo-learn."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import omegaconf
import torch
from solo.methods.base import BaseMethod
from solo.utils.misc import omegaconf_select
from torch import nn

from mmi_loss import MMILoss
from mmi_loss.options import DEFAULTS, Options

PROJECTOR = ("proj_hidden_dim", "proj_output_dim")

# Statistics are those of the global batch, as in solo-learn's Barlow Twins and VICReg. No configuration can hold a
# process group.
OPTIONS = {**DEFAULTS, "gather_distributed": True}
del OPTIONS["process_group"]

# What the configurations of solo-learn's own methods hold in `method_kwargs`: `--config-name barlow method=mmi`
# inherits such keys, and they are no mistakes. Anything else that is not ours is one.
FOREIGN = frozenset(
    re.findall(
        r"\w+",
        """
        base_tau_momentum clip_grad cov_loss_weight decoder_depth decoder_embed_dim decoder_num_heads epoch_queue_starts
        final_tau_momentum freeze_last_layer freeze_prototypes_epochs iternorm kmeans_iters lamb mask_ratio
        momentum_classifier norm_last_layer norm_pix_loss num_prototypes pred_hidden_dim queue_size scale_loss
        sim_loss_weight sk_epsilon sk_iters student_temperature teacher_temperature temperature temperature_k
        temperature_q use_bn_in_head var_loss_weight warmup_teacher_temperature warmup_teacher_temperature_epochs
        whitening_eps whitening_iters whitening_size
        """,
    )
)


class MMI(BaseMethod):
    """Maximises the mutual information of two views (Chang et al. 2024, https://arxiv.org/abs/2409.04747).

    Extra cfg settings:
        method_kwargs:
            proj_hidden_dim (int): number of neurons of the hidden layers of the projector.
            proj_output_dim (int): number of dimensions of projected features.
            any option of :class:`mmi_loss.MMILoss` but ``process_group``, by its name and with its default, but
            ``gather_distributed=True``.
    """

    def __init__(self, cfg: omegaconf.DictConfig) -> None:
        super().__init__(cfg)
        kwargs = self.cfg.method_kwargs
        self.mmi_loss = MMILoss(**{name: kwargs[name] for name in OPTIONS})
        self.projector = nn.Sequential(
            nn.Linear(self.features_dim, kwargs.proj_hidden_dim),
            nn.BatchNorm1d(kwargs.proj_hidden_dim),
            nn.ReLU(),
            nn.Linear(kwargs.proj_hidden_dim, kwargs.proj_hidden_dim),
            nn.BatchNorm1d(kwargs.proj_hidden_dim),
            nn.ReLU(),
            nn.Linear(kwargs.proj_hidden_dim, kwargs.proj_output_dim),
        )

    @staticmethod
    def add_and_assert_specific_cfg(cfg: omegaconf.DictConfig) -> omegaconf.DictConfig:
        """Writes the loss's options into ``cfg.method_kwargs``, so that a checkpoint's ``args.json`` has them all.

        Raises:
            ValueError: A projector dimension is missing, a key is no method's, or an option's value does not fit.
            TypeError: An option is of another type.
        """
        cfg = BaseMethod.add_and_assert_specific_cfg(cfg)
        for name in PROJECTOR:
            if omegaconf_select(cfg, f"method_kwargs.{name}") is None:
                raise ValueError(f"method_kwargs.{name} is missing: method=mmi needs it, for example 2048")
        others = sorted(set(cfg.method_kwargs) - set(PROJECTOR) - set(OPTIONS))
        unknown = [name for name in others if name not in FOREIGN]
        if unknown:
            known = ", ".join([*PROJECTOR, *OPTIONS])
            raise ValueError(f"method=mmi does not know method_kwargs {', '.join(unknown)}; it takes {known}")
        if others:
            ignored = ", ".join(f"{name}={cfg.method_kwargs[name]}" for name in others)
            warnings.warn(f"method=mmi ignores the method_kwargs of another method: {ignored}", stacklevel=2)
        given = {name: omegaconf_select(cfg, f"method_kwargs.{name}") for name in OPTIONS if name in cfg.method_kwargs}
        resolved = Options(**{**OPTIONS, **given}).given()
        for name in OPTIONS:
            cfg.method_kwargs[name] = resolved[name]
        return cfg

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """The parent's learnable parameters and the projector's."""
        return [*super().learnable_params, {"name": "projector", "params": self.projector.parameters()}]

    def forward(self, X: torch.Tensor) -> dict[str, Any]:  # noqa: N803 - solo-learn's name
        """The parent's outputs for a batch of images, and their projections ``z``."""
        out = super().forward(X)
        out["z"] = self.projector(out["feats"])
        return out

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> torch.Tensor:
        """The loss of a batch [indexes, [two views], labels] plus the online classifier's."""
        out = super().training_step(batch, batch_idx)
        z1, z2 = out["z"]
        mmi_loss = self.mmi_loss(z1, z2)
        self.log("train_mmi_loss", mmi_loss, on_epoch=True, sync_dist=True)
        return mmi_loss + out["loss"]
