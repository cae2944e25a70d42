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
import functools
import math
import warnings
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

try:
    from lightly.models.modules.heads import VICRegProjectionHead
    from lightly.models.utils import get_weight_decay_parameters
    from lightly.transforms.vicreg_transform import VICRegTransform
    from lightly.utils.benchmarking import KNNClassifier, OnlineLinearClassifier
    from lightly.utils.lars import LARS
    from lightly.utils.scheduler import CosineWarmupScheduler
    from pytorch_lightning import Callback, LightningModule, Trainer  # lightly's Trainer is this package's
except ImportError as error:
    raise ImportError(
        f"mmi_loss.integrations.lightly needs lightly: pip install 'mmi-loss[lightly]' ({error})"
    ) from error

from torchvision.models import resnet50

from mmi_loss import MMILoss, diagnostics
from mmi_loss.measures import OF_ONE_VIEW

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


class _Neighbours(KNNClassifier):
    """Lightly's classifier of features. Lightning lets only the module it trains log: the one that holds this does. A
    bank of fewer than ``knn_k`` images, as in the check before training, gives all.
    """

    def concat_train_features(self) -> None:
        super().concat_train_features()
        assert self._train_targets_tensor is not None
        self.knn_k = min(self.hparams["knn_k"], self._train_targets_tensor.numel())

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class MMI(LightningModule):
    """Pretraining by mutual information, with an online linear classifier beside it.

    Args:
        batch_size_per_device: Scales the learning rate, with the number of devices.
        num_classes: Of the online classifier.
        backbone: Images to features (N, feature_dim), or (N, feature_dim, 1, 1). None: torchvision's ResNet-50.
        feature_dim: Of the backbone.
        projection_head: (N, feature_dim) to (N, D). None: :class:`MMIProjectionHead`.
        criterion: Of two (N, D) views, or of a list of more. None: ``MMILoss(gather_distributed=True)``.
        learning_rate: LARS's per 256 samples.
        warmup_epochs: At most a tenth of the run is warm-up, however short it is.
        knn_k: Neighbours of a kNN classifier in validation, which then takes two loaders: first the bank's, training
            images without augmentation, then the validation's. None: one loader, no kNN.
        knn_t: Temperature of its votes.

    ``training_step`` takes lightly's batches, (views, labels, ...), and logs ``train_loss``. Of more than two views, as
    multi-crop gives, all count alike: I(Z; content) of all of them. Views of one size go through the backbone together;
    the online classifier learns from those of the first one's size. ``validation_step`` takes (images, labels, ...) and
    logs ``val_online_cls_...`` and ``val_knn_...``; ``forward`` gives backbone features, as lightly's KNNClassifier and
    LinearClassifier expect. The optimiser is the one of lightly's VICReg benchmark; its rate has not been tuned for
    this loss on ImageNet.

    Raises:
        ValueError: A batch has fewer than two views, there are not the validation loaders that ``knn_k`` asks for, or
            the run has no end to schedule the learning rate to.
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
        knn_k: int | None = None,
        knn_t: float = 0.1,
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
        self.knn_classifier = _Neighbours(None, num_classes, knn_k, knn_t, 0, 1, topk) if knn_k else None

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views, targets = batch[0], batch[1]
        if len(views) < 2:
            raise ValueError(f"MMI trains on two or more views per image, got {len(views)}; use a two-view transform")
        sizes = list(dict.fromkeys(view.shape for view in views))
        by_size = [[view for view in views if view.shape == size] for size in sizes]
        features = [self.forward(torch.cat(group)).flatten(start_dim=1) for group in by_size]
        z = self.projection_head(torch.cat(features)).chunk(len(views))  # all views count alike, in any order
        loss: Tensor = self.criterion(*z) if len(views) == 2 else self.criterion(z)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(targets))
        classifier_loss, logged = self.online_classifier.training_step(
            (features[0].detach(), targets.repeat(len(by_size[0]))), batch_idx
        )
        self.log_dict(logged, sync_dist=True, batch_size=len(targets))
        return loss + classifier_loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor | None:
        images, targets = batch[0], batch[1]
        labelled = self.forward(images).flatten(start_dim=1).detach(), targets
        neighbours = self.knn_classifier and self.knn_classifier.validation_step(labelled, batch_idx, dataloader_idx)
        if self.knn_classifier and dataloader_idx == self.knn_classifier.train_dataloader_idx:
            return None  # the bank's
        loss, logged = self.online_classifier.validation_step(labelled, batch_idx)
        logged = {**logged, **(neighbours or {})}
        self.log_dict(logged, prog_bar=True, sync_dist=True, batch_size=len(targets), add_dataloader_idx=False)
        return loss

    def on_validation_start(self) -> None:
        wanted, found = 2 if self.knn_classifier else 1, len(self.trainer.num_val_batches)
        if found != wanted:
            raise ValueError(
                f"MMI(knn_k={self.hparams['knn_k']}) takes {wanted} validation loader(s), got {found}: without knn_k "
                "one, with it two, the bank's first, as val_dataloaders=[bank, validation]"
            )

    def on_validation_epoch_end(self) -> None:
        if self.knn_classifier:
            self.knn_classifier.reset_storage()

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
    """Logs what backbone and projector hold, of two views of a batch, in training and in validation.

    It listens to the outputs of ``modules`` in the steps it measures and in no others, so it works with any
    LightningModule that has them, lightly's methods of two views among them. In training, every ``every_n_steps``,
    ``mmi/...`` is of the projections and ``mmi/backbone/...`` of the features of this device's batch; after validation
    ``mmi/val/...`` and ``mmi/val/backbone/...`` are of its first ``validation_samples`` images:

    - ``rank_me``, ``effective_rank``, ``participation_ratio``, ``alpha_req``: of all features of the first view;
    - ``lidar``: of all features of both views;
    - ``mutual_information`` in nats, bias-corrected: it may be slightly negative, 0 at collapse;
      ``content_information``, through the default loss's noise floor; ``min_canonical_correlation``; ``entropy_a``,
      ``entropy_b`` and ``conditional_entropy``, of the first view given the second, through the joint objective's: of a
      fixed random slice of at most 64 dimensions, eight samples for each.

    :mod:`mmi_loss.diagnostics` defines them. A module is called twice in a step, or once with both views under one
    another; of a batch of more views than two, as multi-crop's, the first two that it was given count. In validation
    once is one view, of which only the first line is logged, a projector that is not called is given the backbone's
    features, and of several loaders the last is measured.

    Nothing ends a run. What cannot be measured is NaN: of fewer than eight samples, of views of unequal length, of NaN
    or infinite outputs, and where the value is infinite, as the mutual information of equal views is. A step in which a
    module gave not two (N, D) outputs logs nothing of it; the first such step warns.

    Args:
        every_n_steps: How often in training. A measurement waits for the device.
        validation_samples: Images of a validation, on each device; values are averaged over devices. 0: none.
        modules: Attributes of the LightningModule; the last is the projector, whose values have the short names.

    Raises:
        ValueError: ``every_n_steps`` is below 1; or, before the run, the LightningModule has none of ``modules``.
    """

    MEASURES = (
        "mutual_information",
        "entropy_a",
        "entropy_b",
        "conditional_entropy",
        "min_canonical_correlation",
        *OF_ONE_VIEW,
        "lidar",
        "content_information",
    )

    def __init__(
        self,
        every_n_steps: int = 100,
        validation_samples: int = 1024,
        modules: Sequence[str] = ("backbone", "projection_head"),
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps, self.validation_samples, self.modules = every_n_steps, validation_samples, tuple(modules)
        self._criterion = MMILoss(objective="joint", slice_dim=None)
        self._outputs: dict[str, list[Tensor]] = {}
        self._validation: dict[str, list[list[Tensor]]] = {}
        self._listeners: list[Any] = []
        self._has_warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not any(isinstance(getattr(pl_module, name, None), nn.Module) for name in self.modules):
            listened, owner = " or ".join(reversed(self.modules)), type(pl_module).__name__
            raise ValueError(f"MMIDiagnostics listens to {listened}, which {owner} does not have; modules= names yours")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stop_listening()  # to an earlier batch that came to no end
        self._outputs = {}
        if trainer.global_step % self.every_n_steps == 0:
            self._listen_to(pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._stop_listening()  # activation checkpointing calls the head again in backward

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_listening()
        crops = batch[0] if isinstance(batch, (list, tuple)) and batch else ()
        crops = crops if isinstance(crops, (list, tuple)) else ()
        for name, heard in self._outputs.items():
            views = heard
            if len(crops) > 2:  # all in one output, or those of each size
                rows = torch.cat(heard) if heard and all(z.ndim == 2 for z in heard) else torch.zeros(0)
                views = list(rows.tensor_split(len(crops)))[:2] if len(rows) == sum(map(len, crops)) else []
            elif len(heard) == 1 and heard[0].ndim > 0:
                views = list(heard[0].tensor_split(2))  # always two, where chunk makes one of a single row
            if len(views) == 2 and views[0].ndim == views[1].ndim == 2:
                measured = self.measure(views[0], views[1], self._prefix(name))
                pl_module.log_dict(measured, sync_dist=True, batch_size=max(1, len(views[0])))
            else:
                self._warn(f"in this step it gave {[tuple(z.shape) for z in heard]}", name)
        self._outputs = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_listening()
        self._validation = {}

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._stop_listening()
        self._outputs = {}
        if dataloader_idx < len(trainer.num_val_batches) - 1:
            return  # a bank for kNN
        seen = max((sum(len(batch[0]) for batch in batches) for batches in self._validation.values()), default=0)
        if seen < self.validation_samples and not trainer.sanity_checking:
            self._listen_to(pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._stop_listening()
        for name, outputs in self._outputs.items():
            if len(outputs) in (1, 2) and all(z.ndim == 2 for z in outputs):
                self._validation.setdefault(name, []).append(outputs)
        self._outputs = {}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            self._log_validation(pl_module)
        except (RuntimeError, ValueError, TypeError) as error:  # a projector that does not take these features
            self._warn(f"in validation: {error}")
        self._validation = {}

    def _log_validation(self, pl_module: LightningModule) -> None:
        views = {}
        for name, batches in self._validation.items():
            count = min(map(len, batches))
            views[name] = [torch.cat([batch[i] for batch in batches])[: self.validation_samples] for i in range(count)]
        head = getattr(pl_module, self.modules[-1], None)
        if self.modules[-1] not in views and views and isinstance(head, nn.Module):
            with torch.no_grad():
                views[self.modules[-1]] = [head(z) for z in next(iter(views.values()))]
        for name, of_module in views.items():
            measured = self.measure(
                of_module[0], of_module[1] if len(of_module) > 1 else None, self._prefix(name, "mmi/val")
            )
            pl_module.log_dict(measured, sync_dist=True, batch_size=max(1, len(of_module[0])))

    @torch.no_grad()
    def measure(self, z_a: Tensor, z_b: Tensor | None, prefix: str = "mmi") -> dict[str, Tensor]:
        """The logged values of (N, D) outputs of two views, or of one: float32 scalars, NaN where there is none."""
        values = dict.fromkeys(self.MEASURES if z_b is not None else OF_ONE_VIEW, math.nan)
        if z_a.ndim == 2 and len(z_a) >= SAMPLES_PER_DIM and (z_b is None or (z_b.ndim == 2 and len(z_b) == len(z_a))):
            for name in OF_ONE_VIEW:
                with contextlib.suppress(ValueError, RuntimeError):  # as torch.linalg.LinAlgError is
                    values[name] = float(getattr(diagnostics, name)(z_a))
            if z_b is not None:
                with contextlib.suppress(ValueError, RuntimeError):
                    values |= self._measure_slices(z_a, z_b)
                with contextlib.suppress(ValueError, RuntimeError):
                    values["lidar"] = float(diagnostics.lidar(z_a, z_b))
        return {
            f"{prefix}/{name}": torch.tensor(value if math.isfinite(value) else math.nan, device=z_a.device)
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
            "content_information": float(diagnostics.content_information(y_a, y_b)),
        }

    @staticmethod
    def _slice(z: Tensor, measured_dim: int) -> Tensor:
        """Fixed random directions of z, stored no finer than z is: what rounding made of it must not pass for rank."""
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(z.shape[1], measured_dim, generator=generator, dtype=torch.float64)
        return (z.double().cpu() @ directions).to(torch.promote_types(z.dtype, torch.float32))

    def _prefix(self, name: str, prefix: str = "mmi") -> str:
        return prefix if name == self.modules[-1] else f"{prefix}/{name}"

    def _warn(self, what: str, name: str = "") -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "MMIDiagnostics logs nothing: it measures (N, D) outputs of two views, which "
                f"{name or 'a module'} gives in two calls or in the halves of one, and {what}",
                stacklevel=3,
            )

    def _listen_to(self, pl_module: LightningModule) -> None:
        for name in self.modules:
            module = getattr(pl_module, name, None)
            if isinstance(module, nn.Module):
                self._outputs[name] = []
                self._listeners.append(module.register_forward_hook(functools.partial(self._listen, name)))

    def _listen(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if name in self._outputs and isinstance(output, Tensor):
            is_pooled = output.ndim > 2 and output[0, 0].numel() == 1  # as (N, D, 1, 1) is
            self._outputs[name].append(output.detach().flatten(1) if is_pooled else output.detach())

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.remove()
        self._listeners = []
