"""One pretraining run: a backbone and projection head under a loss, by Lightning, to kNN and linear accuracy."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
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

from benchmarks import data, evaluation, timing
from benchmarks.data import Task
from benchmarks.losses import FIXED, find
from mmi_loss.options import Options

WARMUP = 0.1
OPTIMIZERS = ("adamw", "lars", "sgd", "sgd-plain")
"""``sgd`` has momentum 0.9, ``sgd-plain`` none."""
PLAIN_RATE = 0.0048 / 0.2
"""LARS adapts the rate of weights alone; biases and norms take plain SGD, at the ratio of Barlow Twins' schedule."""
RESIDUAL_WIDTHS = (24, 48, 96, 192)
NOISE = ".*(does not have many workers|objective=|treespec|lr_scheduler|Checkpoint dir|sync_dist).*"
"""Warnings that a run of the benchmarks knows about."""


@dataclass(frozen=True)
class Cell:
    """One run: a task, a method, and all that decides its outcome.

    ``method`` is what :func:`benchmarks.losses.find` knows. ``learning_rate`` is the optimiser's: AdamW's and SGD's as
    it is, LARS's per 256 samples. ``own`` takes every loss as its library has it, where otherwise faster forms of the
    same number are taken.
    """

    task: str
    method: str
    projector_dim: int
    batch_size: int
    seed: int
    learning_rate: float
    steps: int
    evaluations: int = 3
    optimizer: str = "adamw"
    backbone: str = "tiny"
    head_layers: int = 2
    hidden_dim: int = 512
    precision: str = "32-true"
    own: bool = False

    @property
    def key(self) -> str:
        """Names the cell in the CSV file; it changes with any of its fields and, for ours, with any default."""
        loss = find(self.method)
        ours = Options(**loss.options).given() if loss and loss.options is not None else None
        content = {**dataclasses.asdict(self), "options": ours}
        if data.variant(self.task):
            content["variant"] = data.variant(self.task)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """For progress bars and errors."""
        where = f"D={self.projector_dim}, N={self.batch_size}, rate {self.learning_rate:g}, seed {self.seed}"
        return f"{self.task}, {self.method}, {where}"


@dataclass
class Outcome:
    """What a run measured; accuracies are NaN if it diverged. ``history`` has the kNN accuracy over the steps."""

    history: list[dict[str, float]]
    knn: float = float("nan")
    linear: float = float("nan")
    step_ms: float = float("nan")
    loss_ms: float = float("nan")


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
        stem = [nn.Conv2d(channels, RESIDUAL_WIDTHS[0], 3, 2, 1, bias=False), nn.BatchNorm2d(RESIDUAL_WIDTHS[0])]
        blocks = [_Residual(i, o) for i, o in itertools.pairwise(RESIDUAL_WIDTHS)]
        network = nn.Sequential(*stem, nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return network.to(memory_format=torch.channels_last), RESIDUAL_WIDTHS[-1]  # a fifth faster on a CPU
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
    raise ValueError(f"--backbone {name} is not one of conv, tiny, residual, mlp, pixels, resnet18, resnet50")


class Pretraining(pl.LightningModule):
    """Two views through backbone and head into ``criterion(z_a, z_b)``; without criterion, supervised training.

    It times the criterion inside the step: forward, and backward from the start of the pass to the arrival of the
    gradient at the projections.
    """

    def __init__(self, task: Task, cell: Cell) -> None:
        super().__init__()
        self.cell = cell
        self.backbone, features = make_backbone(cell.backbone, task.channels, task.image_size)
        loss = find(cell.method)
        self.criterion = loss.criterion(fast=not cell.own) if loss else None
        self.head: nn.Module = nn.Linear(features, task.num_classes)
        if self.criterion is not None:
            self.head = VICRegProjectionHead(features, cell.hidden_dim, cell.projector_dim, cell.head_layers)
        self.marks: list[list[Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views, labels = batch[0], batch[1]
        if self.criterion is None:
            return nn.functional.cross_entropy(self.head(self.backbone(views[0])), labels)
        z = self.head(self.backbone(torch.cat(list(views))))
        z_a, z_b = z.chunk(2)
        marks = [self.clock.mark()]
        loss = self.criterion(z_a, z_b)
        marks.append(self.clock.mark())
        self.marks.append(marks)
        z.register_hook(lambda grad: marks.append(self.clock.mark()))
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        if self.marks:
            self.marks[-1].append(self.clock.mark())

    @property
    def clock(self) -> timing.Clock:
        """Of the device."""
        return timing.Clock(self.device)

    def configure_optimizers(self) -> Any:
        cell, rate = self.cell, self.cell.learning_rate
        if cell.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), rate)
        elif cell.optimizer == "lars":
            rate *= cell.batch_size / 256
            decayed, plain = get_weight_decay_parameters([self.backbone, self.head])
            groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0, "lr": PLAIN_RATE * rate}]
            optimizer = LARS(groups, lr=rate, momentum=0.9, weight_decay=1e-6)
        else:
            momentum = 0.9 if cell.optimizer == "sgd" else 0.0
            optimizer = torch.optim.SGD(self.parameters(), rate, momentum=momentum, weight_decay=5e-4)
        scheduler = CosineWarmupScheduler(optimizer, warmup_epochs=int(WARMUP * cell.steps), max_epochs=cell.steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Watch(pl.Callback):
    """Evaluates along the way, times the steps and reports progress."""

    def __init__(self, task: Task, cell: Cell, on_step: Callable[[], None]) -> None:
        self.task, self.cell, self.on_step = task, cell, on_step
        self.history: list[dict[str, float]] = []
        self.marks: list[tuple[Any, Any]] = []
        self.clock = timing.Clock()
        self._start: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.clock = timing.Clock(module.device)
        self._start = self.clock.mark()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.marks.append((self._start, self.clock.mark()))
        self.on_step()
        every = max(1, self.cell.steps // self.cell.evaluations)
        is_early = trainer.global_step < self.cell.steps - every // 2
        if is_early and trainer.global_step % every == 0:
            train, test = evaluation.features_of(module.backbone, self.task)
            self.note(trainer.global_step, evaluation.knn_accuracy(train, test, self.task.num_classes))

    def note(self, step: int, knn: float) -> None:
        """One point of the history."""
        seconds = sum(self.clock.seconds(*marks) for marks in self.marks)
        self.history.append({"step": step, "seconds": round(seconds, 3), "knn": round(knn, 4)})


def pretrain(task: Task, cell: Cell, on_step: Callable[[], None] = lambda: None, accelerator: str = "cpu") -> Outcome:
    """Train for ``cell.steps`` steps and evaluate; ``on_step`` is called after every step."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    pl.seed_everything(cell.seed, verbose=False)
    module = Pretraining(task, cell)
    watch = Watch(task, cell, on_step)
    if cell.method not in FIXED:
        trainer = pl.Trainer(
            max_steps=cell.steps,
            max_epochs=-1,
            accelerator=accelerator,
            devices=1,
            precision=cell.precision,  # type: ignore[arg-type]
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[watch],
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=NOISE)
            warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning|lightning")
            trainer.fit(module, task.pretrain_batches(cell.batch_size, cell.seed))
    module.to(watch.clock.device)  # Lightning takes it back to the CPU
    outcome = Outcome(watch.history)
    train, test = evaluation.features_of(module.backbone, task)
    if train[0].isfinite().all() and test[0].isfinite().all():
        outcome.knn = evaluation.knn_accuracy(train, test, task.num_classes)
        outcome.linear = evaluation.linear_accuracy(train, test)
        watch.note(len(watch.marks), outcome.knn)
    if watch.marks:
        outcome.step_ms = 1e3 * statistics.median(watch.clock.seconds(*marks) for marks in watch.marks)
    if module.marks:
        spent = [watch.clock.seconds(a, b) + watch.clock.seconds(c, d) for a, b, c, d in module.marks]
        outcome.loss_ms = 1e3 * statistics.median(spent)
    return outcome
