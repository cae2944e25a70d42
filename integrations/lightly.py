"""MMI as a method for lightly: LightningModule, projection head, transform, diagnostics.

The parts have the shape of lightly's own benchmark modules. In a checkout of lightly, in
``benchmarks/imagenet/resnet50``, its unmodified script trains it after registration::

    import main
    from mmi_loss.integrations.lightly import register

    register(main.METHODS)
    main.main(**vars(main.parser.parse_args()))  # --methods mmi

Stand-alone::

    model = MMI(batch_size_per_device=256, num_classes=10, backbone=backbone, feature_dim=512)
    pytorch_lightning.Trainer(callbacks=[MMIDiagnostics()]).fit(model, loader)
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

try:
    from lightly.models.modules.heads import VICRegProjectionHead
    from lightly.models.utils import get_weight_decay_parameters
    from lightly.transforms.vicreg_transform import VICRegTransform
    from lightly.utils.benchmarking import OnlineLinearClassifier
    from lightly.utils.lars import LARS
    from lightly.utils.scheduler import CosineWarmupScheduler
    from pytorch_lightning import Callback, LightningModule, Trainer  # lightly's Trainer is this package's
except ImportError as error:
    raise ImportError(
        f"mmi_loss.integrations.lightly needs lightly: pip install 'mmi-loss[lightly]' ({error})"
    ) from error

from torchvision.models import resnet50

from mmi_loss import MMILoss, diagnostics

WARMUP_EPOCHS = 10
WARMUP_SHARE = 0.1
MAX_MEASURED_DIM = 64
SAMPLES_PER_DIM = 8


class MMIProjectionHead(VICRegProjectionHead):
    """Linear, batch norm, ReLU, linear: the head of lightly's VICReg benchmark, (N, input_dim) to (N, output_dim).

    The output is not normalised: the loss standardises it.
    """

    def __init__(
        self, input_dim: int = 2048, hidden_dim: int = 8192, output_dim: int = 8192, num_layers: int = 2
    ) -> None:
        super().__init__(input_dim, hidden_dim, output_dim, num_layers)


class MMITransform(VICRegTransform):
    """Two views by one augmentation distribution: lightly's VICReg transform, with its arguments.

    The default objective takes the views of an image to be exchangeable. Transforms that treat the first view
    otherwise than the second (BYOL's, Barlow Twins') are not: exchange the views at random, or use
    ``MMILoss(objective="joint")``.
    """


transform = MMITransform()


class MMI(LightningModule):
    """Pretraining by mutual information, with an online linear classifier beside it.

    Args:
        batch_size_per_device: Scales the learning rate, with the number of devices.
        num_classes: Of the online classifier.
        backbone: Images to features (N, feature_dim), or (N, feature_dim, 1, 1). None: torchvision's ResNet-50.
        feature_dim: Of the backbone.
        projection_head: (N, feature_dim) to (N, D). None: :class:`MMIProjectionHead`.
        criterion: Of two (N, D) views. None: ``MMILoss(gather_distributed=True)``.
        learning_rate: LARS's per 256 samples.
        warmup_epochs: At most a tenth of the run is warm-up, however short it is.

    ``training_step`` takes lightly's batches, (views, labels, ...) with two views, and logs ``train_loss``;
    ``validation_step`` takes (images, labels, ...); ``forward`` gives backbone features, as lightly's KNNClassifier
    and LinearClassifier expect. The optimiser is the one of lightly's VICReg benchmark; its rate has not been tuned
    for this loss on ImageNet.

    Raises:
        ValueError: A batch has not two views, or the run has no end to schedule the learning rate to.
    """

    def __init__(
        self,
        batch_size_per_device: int = 256,
        num_classes: int = 1000,
        backbone: nn.Module | None = None,
        feature_dim: int = 2048,
        projection_head: nn.Module | None = None,
        criterion: nn.Module | None = None,
        learning_rate: float = 0.5,
        warmup_epochs: int = WARMUP_EPOCHS,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone", "projection_head", "criterion"])
        self.batch_size_per_device = batch_size_per_device
        self.learning_rate, self.warmup_epochs = learning_rate, warmup_epochs
        if backbone is None:
            backbone = resnet50()
            backbone.fc = nn.Identity()  # type: ignore[assignment]
        self.backbone = backbone
        self.projection_head = projection_head or MMIProjectionHead(feature_dim)
        self.criterion = criterion or MMILoss(gather_distributed=True)
        topk = (1, 5) if num_classes >= 5 else (1,)
        self.online_classifier = OnlineLinearClassifier(feature_dim, num_classes, topk)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views, targets = batch[0], batch[1]
        if len(views) != 2:
            raise ValueError(f"MMI trains on two views per image, got {len(views)}; use a two-view transform")
        features = self.forward(torch.cat(list(views))).flatten(start_dim=1)
        z_a, z_b = self.projection_head(features).chunk(2)
        loss: Tensor = self.criterion(z_a, z_b)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(targets))
        classifier_loss, logged = self.online_classifier.training_step(
            (features.detach(), targets.repeat(2)), batch_idx
        )
        self.log_dict(logged, sync_dist=True, batch_size=len(targets))
        return loss + classifier_loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch[0], batch[1]
        features = self.forward(images).flatten(start_dim=1)
        loss, logged = self.online_classifier.validation_step((features.detach(), targets), batch_idx)
        self.log_dict(logged, prog_bar=True, sync_dist=True, batch_size=len(targets))
        return loss

    def configure_optimizers(self) -> Any:
        decayed, plain = get_weight_decay_parameters([self.backbone, self.projection_head])
        groups = [
            {"name": "mmi", "params": decayed},
            {"name": "mmi_no_weight_decay", "params": plain, "weight_decay": 0.0},
            {"name": "online_classifier", "params": self.online_classifier.parameters(), "weight_decay": 0.0},
        ]
        rate = self.learning_rate * self.batch_size_per_device * self.trainer.world_size / 256
        optimizer = LARS(groups, lr=rate, momentum=0.9, weight_decay=1e-6)
        steps, warmup = self._schedule_steps()
        scheduler = CosineWarmupScheduler(optimizer, warmup_epochs=warmup, max_epochs=steps, end_value=0.01)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _schedule_steps(self) -> tuple[int, int]:
        """Steps of the run and of its warm-up."""
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(
                "the learning rate's schedule needs the run's length: give the Trainer max_epochs or max_steps"
            )
        steps, warmup = int(steps), WARMUP_SHARE * steps
        if self.trainer.max_epochs is not None and self.trainer.max_epochs > 0:
            warmup = min(warmup, self.warmup_epochs * steps / self.trainer.max_epochs)
        return steps, int(warmup)


def register(methods: MutableMapping[str, Any]) -> None:
    """Add ``mmi`` to the ``METHODS`` of lightly's ``benchmarks/imagenet/resnet50/main.py``.

    Raises:
        ValueError: Another method has the name already.
    """
    known = methods.get("mmi")
    if known is not None and known.get("model") is not MMI:
        raise ValueError(f"METHODS has another method called 'mmi': {known}")
    methods["mmi"] = {"model": MMI, "transform": transform}


class MMIDiagnostics(Callback):
    """Logs what the projections of a training batch hold, every ``every_n_steps`` steps.

    It listens to the module's ``projection_head`` in those steps only, so it works with lightly's own methods of two
    views too; the other steps do not know of it. Logged, from a fixed random slice of at most 64 dimensions, eight
    samples of this device's batch for each:

    - ``mmi/mutual_information``: I(Z; Z') in nats, bias-corrected; it may be slightly negative. 0 at collapse.
    - ``mmi/entropy_a``, ``mmi/entropy_b``, ``mmi/conditional_entropy``: of the first view, of the second, and of the
      first given the second; of the standardised slice seen through the loss's noise floor, in nats.
    - ``mmi/min_canonical_correlation``: the smallest between the views' slices. NaN at collapse, which has none.
    - ``mmi/effective_rank``: of the whole projection of the first view, between 0 and min(N - 1, D). 0 at collapse.

    No projections end a run. Every measured step logs all six, and what cannot be measured is NaN: of fewer than eight
    samples, of views of unequal length, of NaN or infinite projections, and where the value is infinite, as the mutual
    information of equal views is. A step in which the head gave not two (N, D) projections logs nothing; the first
    such step warns.

    Args:
        every_n_steps: How often. A measurement waits for the device.

    Raises:
        ValueError: ``every_n_steps`` is below 1; or, before the run, the module has no ``projection_head``.
    """

    MEASURES = (
        "mutual_information",
        "entropy_a",
        "entropy_b",
        "conditional_entropy",
        "min_canonical_correlation",
        "effective_rank",
    )

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._criterion = MMILoss(objective="joint", slice_dim=None)
        self._outputs: list[Tensor] | None = None
        self._listener: Any = None
        self._has_warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(getattr(pl_module, "projection_head", None), nn.Module):
            raise ValueError(
                f"MMIDiagnostics listens to projection_head, which {type(pl_module).__name__} does not have"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stop_listening()  # to an earlier batch that came to no end
        self._outputs = None
        if trainer.global_step % self.every_n_steps == 0:
            head: nn.Module = pl_module.projection_head  # type: ignore[assignment]
            self._outputs = []
            self._listener = head.register_forward_hook(self._listen)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._stop_listening()  # activation checkpointing calls the head again in backward

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._stop_listening()
        outputs, self._outputs = self._outputs, None
        if outputs is None:
            return
        views = outputs
        if len(outputs) == 1 and outputs[0].ndim > 0:
            views = list(outputs[0].tensor_split(2))  # always two, where chunk makes one of a single row
        if len(views) == 2 and views[0].ndim == views[1].ndim == 2:
            measured = self.measure(views[0], views[1])
            pl_module.log_dict(measured, sync_dist=True, batch_size=max(1, len(views[0])))
        elif not self._has_warned:
            self._has_warned = True
            shapes = [tuple(z.shape) for z in outputs]
            warnings.warn(
                "MMIDiagnostics logs nothing: it measures (N, D) projections of two views, which projection_head gives "
                f"in two calls or in the halves of one, and in this step it gave {shapes}",
                stacklevel=2,
            )

    @torch.no_grad()
    def measure(self, z_a: Tensor, z_b: Tensor) -> dict[str, Tensor]:
        """The logged values of two (N, D) projections: float32 scalars, NaN for what cannot be measured."""
        values = dict.fromkeys(self.MEASURES, math.nan)
        if z_a.ndim == z_b.ndim == 2 and len(z_a) == len(z_b) >= SAMPLES_PER_DIM:
            with contextlib.suppress(ValueError, torch.linalg.LinAlgError):
                values["effective_rank"] = float(diagnostics.effective_rank(z_a))
            with contextlib.suppress(ValueError, torch.linalg.LinAlgError):
                values |= self._measure_slices(z_a, z_b)
        return {
            f"mmi/{name}": torch.tensor(value if math.isfinite(value) else math.nan, device=z_a.device)
            for name, value in values.items()
        }

    def _measure_slices(self, z_a: Tensor, z_b: Tensor) -> dict[str, float]:
        measured_dim = min(MAX_MEASURED_DIM, z_a.shape[1], z_b.shape[1], len(z_a) // SAMPLES_PER_DIM)
        y_a, y_b = (self._slice(z, measured_dim) for z in (z_a, z_b))
        parts = self._criterion.forward_components(y_a.double(), y_b.double())
        return {
            "mutual_information": float(diagnostics.mutual_information(y_a, y_b)),
            "entropy_a": float(parts.entropy_a),
            "entropy_b": float(parts.entropy_b),
            "conditional_entropy": float(parts.conditional_entropy),
            "min_canonical_correlation": min(diagnostics.canonical_correlations(y_a, y_b).tolist(), default=math.nan),
        }

    @staticmethod
    def _slice(z: Tensor, measured_dim: int) -> Tensor:
        """Fixed random directions of z, stored no finer than z is: what rounding made of it must not pass for rank."""
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(z.shape[1], measured_dim, generator=generator, dtype=torch.float64)
        return (z.double().cpu() @ directions).to(torch.promote_types(z.dtype, torch.float32))

    def _listen(self, head: nn.Module, inputs: Any, output: Any) -> None:
        if self._outputs is not None and isinstance(output, Tensor):
            self._outputs.append(output.detach())

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.remove()
            self._listener = None
