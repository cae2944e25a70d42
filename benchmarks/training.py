"""One pretraining run: a backbone and projection head under a criterion, by Lightning, with lightly's LARS."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import torch
import torchvision
from lightly.models import ResNetGenerator
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.models.utils import get_weight_decay_parameters
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler
from torch import Tensor, nn

from benchmarks import evaluation
from benchmarks.data import Task

WARMUP = 0.1
WEIGHT_DECAY = 1e-6
PLAIN_RATE = 0.0048 / 0.2
ADAMW_RATE = 2e-3
RESIDUAL_WIDTHS = (24, 48, 96, 192)


@dataclass(frozen=True)
class Settings:
    """The budget and the network, the same for every method."""

    steps: int = 300
    batch_size: int = 256
    projector_dim: int = 1024
    head_layers: int = 2
    backbone: str = "conv"
    devices: int = 1
    precision: str = "32-true"
    optimizer: str = "lars"
    evaluations: int = 6
    hidden_dim: int | None = None
    """Width of the projector's hidden layers; None: ``projector_dim``."""


@dataclass
class Outcome:
    """What a run measured: accuracy over steps, final accuracies, and where the time went.

    ``measures`` is filled by ``pretrain(..., measure=True)``; accuracies are NaN if the run diverged.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    knn: float = float("nan")
    linear: float = float("nan")
    step_ms: float = float("nan")
    loss_ms: float = float("nan")
    measures: dict[str, Any] = field(default_factory=dict)


class _Residual(nn.Module):
    """A basic block of ResNet (He et al. 2016) that halves the image."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, 2, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x)) + self.shortcut(x)).relu()


def make_backbone(name: str, channels: int, image_size: int) -> tuple[nn.Module, int]:
    """A backbone that gives (N, features), and the number of features.

    ``conv`` is small enough for two CPU cores, ``tiny`` for hundreds of runs on them; ``residual`` suits grey images
    of 28 pixels; ``mlp`` takes vectors; ``pixels`` leaves the images as they are.
    """
    if name == "pixels":
        return nn.Flatten(), channels * image_size**2
    if name == "residual":
        # Channels last is a fifth faster on a CPU.
        blocks = [_Residual(i, o) for i, o in pairwise(RESIDUAL_WIDTHS)]
        stem = [nn.Conv2d(channels, RESIDUAL_WIDTHS[0], 3, 2, 1, bias=False), nn.BatchNorm2d(RESIDUAL_WIDTHS[0])]
        network = nn.Sequential(*stem, nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return network.to(memory_format=torch.channels_last), RESIDUAL_WIDTHS[-1]
    layers: list[nn.Module] = []
    if name == "mlp":
        for width in (256, 256, 128):
            layers += [nn.Linear(channels, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
            channels = width
        return nn.Sequential(*layers), channels
    if name in ("conv", "tiny"):
        last = 2 if image_size >= 32 else 1
        plan = {"conv": ((24, 2), (48, 2), (96, 1), (192, 2)), "tiny": ((16, 2), (32, 2), (64, last), (128, 2))}
        for width, stride in plan[name]:
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels
    if name in ("resnet18", "resnet50"):
        if image_size <= 32 and name == "resnet18":  # lightly's CIFAR stem
            small = ResNetGenerator("resnet-18", num_splits=0)
            return nn.Sequential(*list(small.children())[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten()), 512
        resnet = getattr(torchvision.models, name)()
        features = resnet.fc.in_features
        resnet.fc = nn.Identity()
        return resnet, features
    raise SystemExit(f"--backbone {name} is not one of conv, tiny, residual, mlp, pixels, resnet18, resnet50")


class Pretraining(pl.LightningModule):
    """Two views through backbone and head into ``criterion(z_a, z_b)``; without criterion, supervised training.

    On the CPU it times the criterion inside the step: forward by the clock, backward from the start of the pass to
    the arrival of the gradient at the projections.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        criterion: nn.Module | None,
        learning_rate: float,
        settings: Settings,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.criterion = backbone, head, criterion
        self.learning_rate, self.settings = learning_rate, settings
        self.loss_seconds: list[float] = []
        self._clock = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views, labels = batch[0], batch[1]
        if self.criterion is None:
            return nn.functional.cross_entropy(self.head(self.backbone(views[0])), labels)
        z = self.head(self.backbone(torch.cat(views)))
        z_a, z_b = z.chunk(2)
        start = time.perf_counter()
        loss = self.criterion(z_a, z_b)
        seconds = time.perf_counter() - start
        z.register_hook(lambda grad: self.loss_seconds.append(seconds + time.perf_counter() - self._clock))
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        self._clock = time.perf_counter()

    def configure_optimizers(self) -> Any:
        decayed, plain = get_weight_decay_parameters([self.backbone, self.head])
        if self.settings.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate)
            return [optimizer], [self._schedule(optimizer)]
        rate = self.learning_rate * self.settings.batch_size * self.settings.devices / 256
        # LARS adapts the rate of weights alone; biases and norms get plain SGD, at the ratio of Barlow Twins' schedule.
        plain_rate = PLAIN_RATE * rate
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0, "lr": plain_rate}]
        optimizer = LARS(groups, lr=rate, momentum=0.9, weight_decay=WEIGHT_DECAY)
        return [optimizer], [self._schedule(optimizer)]

    def _schedule(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        steps = self.settings.steps
        scheduler = CosineWarmupScheduler(optimizer, warmup_epochs=int(WARMUP * steps), max_epochs=steps)
        return {"scheduler": scheduler, "interval": "step"}


class Watch(pl.Callback):
    """Evaluates along the way, times the steps and reports progress."""

    def __init__(self, task: Task, settings: Settings, on_step: Callable[[], None], measure: bool) -> None:
        self.task, self.settings, self.on_step, self.measure = task, settings, on_step, measure
        self.history: list[dict[str, float]] = []
        self.step_seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self._start)
        self.on_step()
        steps = self.settings.steps
        every = max(1, steps // self.settings.evaluations)
        if trainer.global_step < steps - every // 2 and trainer.global_step % every == 0 and trainer.is_global_zero:
            train, test = evaluation.features_of(module.backbone, self.task)
            accuracy = evaluation.knn_accuracy(train, test, self.task.num_classes)
            seconds = sum(self.step_seconds)
            point = {"step": trainer.global_step, "seconds": seconds, "knn": accuracy}
            if self.measure:
                point |= evaluation.information(module.head, test, self.task)
            self.history.append(point)


def pretrain(
    task: Task,
    criterion: Callable[[bool], nn.Module] | None,
    learning_rate: float,
    seed: int,
    settings: Settings,
    on_step: Callable[[], None] = lambda: None,
    accelerator: str = "auto",
    measure: bool = False,
) -> Outcome:
    """Train for ``settings.steps`` steps and evaluate. ``criterion=None`` trains the backbone with labels;
    ``settings.steps=0`` leaves it untrained. ``measure`` adds information and spectra of held-out embeddings.

    ``learning_rate`` is LARS's per 256 samples, or AdamW's, which is not scaled with the batch.
    """
    pl.seed_everything(seed, verbose=False)
    backbone, features = make_backbone(settings.backbone, task.channels, task.image_size)
    if criterion is None:
        head: nn.Module = nn.Linear(features, task.num_classes)
    else:
        hidden = settings.hidden_dim or settings.projector_dim
        head = VICRegProjectionHead(features, hidden, settings.projector_dim, settings.head_layers)
    module = Pretraining(
        backbone,
        head,
        criterion(settings.devices > 1) if criterion else None,
        learning_rate,
        settings,
    )
    watch = Watch(task, settings, on_step, measure)
    if settings.steps:
        trainer = pl.Trainer(
            max_steps=settings.steps,
            max_epochs=-1,
            accelerator=accelerator,
            devices=settings.devices,
            precision=settings.precision,  # type: ignore[arg-type]
            sync_batchnorm=settings.devices > 1 and torch.cuda.is_available() and accelerator != "cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[watch],
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning|lightning")
            trainer.fit(module, task.pretrain_batches(settings.batch_size, seed))
    train, test = evaluation.features_of(module.backbone, task)
    outcome = Outcome(watch.history)
    if train[0].isfinite().all() and test[0].isfinite().all():
        outcome.knn = evaluation.knn_accuracy(train, test, task.num_classes)
        outcome.linear = evaluation.linear_accuracy(train, test)
    last = {"step": settings.steps, "seconds": sum(watch.step_seconds), "knn": outcome.knn}
    if measure and outcome.knn == outcome.knn:
        last |= evaluation.information(module.head, test, task) if criterion else {}
        outcome.measures = evaluation.measures(module.head if criterion else None, train, test, task)
    outcome.history.append(last)
    if watch.step_seconds:
        outcome.step_ms = 1e3 * float(torch.tensor(watch.step_seconds).median())
    if module.loss_seconds and module.device.type == "cpu":
        outcome.loss_ms = 1e3 * float(torch.tensor(module.loss_seconds).median())
    return outcome
