"""CIFAR-10, CIFAR-100, ImageNet-100 and ImageNet-1K by lightly's published schedules, to kNN and linear probe.

``python -m benchmarks schedule cifar10 --data DIR`` pretrains, then evaluates by lightly's KNNClassifier and
LinearClassifier and appends a row to ``schedules.csv``. It saves a checkpoint every epoch, and the same command goes
on from it. Every method gets the same network, batches, epochs and optimiser family; its views and rates are those
lightly publishes for it. ``python -m benchmarks schedule table`` writes ``schedules.md``: what was run here, and
beside it, in a column of its own, what others published.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightly
import pytorch_lightning as pl
import torch
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.models.utils import get_weight_decay_parameters
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform, VICRegTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.benchmarking import KNNClassifier, LinearClassifier, MetricCallback
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler
from mmi_loss.integrations.lightly import MMI
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader
from torchvision import transforms as T

from benchmarks import environment
from benchmarks.data import folders
from benchmarks.methods import METHODS
from benchmarks.training import make_backbone

KNN_T = 0.1
LINEAR_EPOCHS = 90
PUBLISHED = "schedules-published.csv"


@dataclass(frozen=True)
class Schedule:
    """One of lightly's published recipes; ``images`` is the size of the real training split, where it has one size."""

    title: str
    data: str
    backbone: str
    projector_dim: int
    head_layers: int
    optimizer: str
    batch_size: int
    epochs: int
    knn_k: int
    images: int | None = None

    @property
    def image_size(self) -> int:
        """Pixels of a side."""
        return folders.CIFAR_SIZE if self.data.startswith("cifar") else folders.IMAGENET_SIZE


# docs/source/getting_started/benchmarks/cifar10_benchmark.py (it has no CIFAR-100: the same recipe),
# imagenet100_benchmark.py beside it, and benchmarks/imagenet/resnet50/ of lightly.
SCHEDULES = {
    "cifar10": Schedule("CIFAR-10", "cifar10", "resnet18", 2048, 2, "sgd", 512, 800, 200, 50_000),
    "cifar100": Schedule("CIFAR-100", "cifar100", "resnet18", 2048, 2, "sgd", 512, 800, 200, 50_000),
    "imagenet100": Schedule("ImageNet-100", "imagefolder", "resnet18", 2048, 3, "lars", 256, 200, 20),
    "imagenet": Schedule("ImageNet-1K", "imagefolder", "resnet50", 8192, 2, "lars", 256, 100, 200, 1_281_167),
}


@dataclass(frozen=True)
class Rates:
    """LARS's rate per 256 samples, that of biases and norms, weight decay, and the share of the rate at the end."""

    rate: float
    plain_rate: float
    weight_decay: float
    end: float


VICREG_RATES = {128: 0.8, 256: 0.5, 512: 0.4}
"""lightly's rates for 100 epochs by global batch size; 0.3 for others."""


def rates(method: str, batch_size: int) -> Rates:
    """The rates of lightly's ImageNet scripts. Those of MMI, and of all without a script, are VICReg's, not tuned."""
    if method == "barlow_twins":
        return Rates(0.2, 0.0048, 1.5e-6, 0.001)
    rate = VICREG_RATES.get(batch_size, 0.3)
    return Rates(rate, rate, 1e-6, 0.01)


class Pretraining(MMI):
    """The module of ``mmi_loss.integrations.lightly`` with any criterion, and the schedule's optimiser."""

    schedule: Schedule
    method: str

    def configure_optimizers(self) -> Any:
        batch_size = self.batch_size_per_device * self.trainer.world_size
        if self.schedule.optimizer == "sgd":
            sgd = torch.optim.SGD(self.parameters(), lr=0.06 * batch_size / 128, momentum=0.9, weight_decay=5e-4)
            return [sgd], [torch.optim.lr_scheduler.CosineAnnealingLR(sgd, self.trainer.max_epochs)]
        chosen = rates(self.method, batch_size)
        decayed, plain = get_weight_decay_parameters([self.backbone, self.projection_head])
        classifier = list(self.online_classifier.parameters())
        factor = batch_size / 256
        groups = [
            {"name": "weights", "params": decayed},
            {"name": "plain", "params": plain, "weight_decay": 0.0, "lr": chosen.plain_rate * factor},
            {"name": "online_classifier", "params": classifier, "weight_decay": 0.0},
        ]
        lars = LARS(groups, lr=chosen.rate * factor, momentum=0.9, weight_decay=chosen.weight_decay)
        steps, warmup = self._schedule_steps()
        scheduler = CosineWarmupScheduler(lars, warmup_epochs=warmup, max_epochs=steps, end_value=chosen.end)
        return [lars], [{"scheduler": scheduler, "interval": "step"}]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks schedule", description=__doc__)
    parser.add_argument("schedule", choices=(*SCHEDULES, "table"))
    parser.add_argument(
        "--data", type=Path, help="CIFAR: the folder with cifar-10-batches-py; ImageNet: that with train/ and val/"
    )
    parser.add_argument("--method", choices=METHODS, default="mmi", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="in place of the schedule's")
    parser.add_argument("--batch-size", type=int, help="of all devices together, in place of the schedule's")
    parser.add_argument("--linear-epochs", type=int, default=LINEAR_EPOCHS)
    parser.add_argument("--workers", type=int, default=8, help="loading processes per device")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", help="Lightning's (default 16-mixed on a GPU, 32-true without)")
    parser.add_argument("--out", type=Path, default=Path("runs/schedule"), help="folder for checkpoints and logs")
    parser.add_argument("--results", type=Path, default=environment.RESULTS / "schedules.csv")
    options = parser.parse_args(arguments)
    if options.schedule != "table" and options.data is None:
        parser.error(f"{options.schedule} needs --data DIR, the folder the data set lies in")
    return options


def main(arguments: list[str]) -> None:
    """Pretrain and evaluate, or write the table."""
    options = parse(arguments)
    if options.schedule == "table":
        path = options.results.with_suffix(".md")
        path.write_text(table(environment.read(options.results), environment.read(environment.RESULTS / PUBLISHED)))
        print(f"table: {path}")
        return
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=".*(does not have many workers|treespec|lr_scheduler|objective=|Checkpoint dir).*"
    )
    run(options.schedule, options)


def run(name: str, options: argparse.Namespace) -> None:
    """Pretraining and evaluation of one method, unless its row is there already."""
    schedule = SCHEDULES[name]
    settings = {
        "schedule": name,
        "method": options.method,
        "seed": options.seed,
        "epochs": options.epochs or schedule.epochs,
        "batch_size": options.batch_size or schedule.batch_size,
        "linear_epochs": options.linear_epochs,
    }
    if settings["batch_size"] % options.devices:
        raise SystemExit(f"--batch-size {settings['batch_size']} does not divide among --devices {options.devices}")
    if any(all(row[key] == str(value) for key, value in settings.items()) for row in environment.read(options.results)):
        print(f"finished: {settings} has its row in {options.results}")
        return
    pl.seed_everything(options.seed, workers=True, verbose=False)
    out = options.out / "-".join(str(value) for value in settings.values())
    loaders = Loaders(
        schedule, options.method, options.data, settings["batch_size"] // options.devices, options.workers
    )
    module = build(schedule, options.method, loaders.num_classes, loaders.batch_size, gather=options.devices > 1)
    is_cuda = torch.cuda.is_available() and options.accelerator != "cpu"
    shared = {
        "accelerator": options.accelerator,
        "devices": options.devices,
        "precision": options.precision or ("16-mixed" if is_cuda else "32-true"),
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
    }
    found = pretrain(module, loaders, settings["epochs"], out, is_cuda and options.devices > 1, shared)
    found |= evaluate(module, loaders, schedule.knn_k, options.linear_epochs, out, shared)
    if module.global_rank == 0:
        row = {
            **settings,
            **{metric: round(100 * value, 2) for metric, value in found.items()},
            "images": loaders.num_images,
            "devices": options.devices,
            "precision": shared["precision"],
            "lightly": lightly.__version__,
            **environment.columns("cuda" if is_cuda else "cpu"),
        }
        environment.append(options.results, row)
        print(row)


def build(schedule: Schedule, method: str, num_classes: int, batch_size: int, gather: bool) -> Pretraining:
    """The network of a schedule under a method's criterion. ``batch_size`` is per device."""
    backbone, features = make_backbone(schedule.backbone, 3, schedule.image_size)
    # The depth lightly's ImageNet script gives Barlow Twins.
    layers = 3 if method == "barlow_twins" and schedule is SCHEDULES["imagenet"] else schedule.head_layers
    module = Pretraining(
        batch_size_per_device=batch_size,
        num_classes=num_classes,
        backbone=backbone,
        feature_dim=features,
        projection_head=VICRegProjectionHead(features, schedule.projector_dim, schedule.projector_dim, layers),
        criterion=METHODS[method].criterion(gather),
    )
    module.schedule, module.method = schedule, method
    return module


class Loaders:
    """The data of a schedule: two views to pretrain on, images to evaluate on, crops for the linear probe.

    Raises:
        SystemExit: ``data`` does not hold the data set, or the batch exceeds it.
    """

    def __init__(self, schedule: Schedule, method: str, data: Path, batch_size: int, workers: int) -> None:
        self.schedule, self.data, self.batch_size, self.workers = schedule, data, batch_size, workers
        size = schedule.image_size
        finish = [T.ToTensor(), T.Normalize(**IMAGENET_NORMALIZE)]
        # As lightly evaluates: a central crop of ImageNet, the whole of a CIFAR image.
        whole = [] if size == folders.CIFAR_SIZE else [T.Resize(256), T.CenterCrop(size)]
        self.plain = T.Compose([*whole, *finish])
        self.crops = T.Compose([T.RandomResizedCrop(size), T.RandomHorizontalFlip(), *finish])
        self.views = views(method, size)
        pretraining = folders.dataset(schedule.data, data, True, self.views)
        self.num_images, self.num_classes = len(pretraining), len(pretraining.classes)
        if batch_size > self.num_images:
            raise SystemExit(f"--batch-size: {batch_size} per device exceed the {self.num_images} images of {data}")

    def training(self, transform: Any) -> Any:
        """Shuffled, without the last incomplete batch."""
        return self._loader(True, transform, shuffle=True, drop_last=True)

    def plain_images(self, is_train: bool) -> Any:
        """Every image of a split, in order."""
        return self._loader(is_train, self.plain)

    def _loader(self, is_train: bool, transform: Any, **options: Any) -> Any:
        return DataLoader(
            folders.dataset(self.schedule.data, self.data, is_train, transform),
            self.batch_size,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )


def views(method: str, size: int) -> Any:
    """The transform lightly publishes for the method; without blur for small images, as in its CIFAR script."""
    blur = {"gaussian_blur": 0.0} if size == folders.CIFAR_SIZE else {}
    if method == "barlow_twins":
        return BYOLTransform(BYOLView1Transform(input_size=size, **blur), BYOLView2Transform(input_size=size, **blur))
    return VICRegTransform(input_size=size, **blur)


def pretrain(
    module: Pretraining, loaders: Loaders, epochs: int, out: Path, sync_batchnorm: bool, shared: dict[str, Any]
) -> dict[str, float]:
    """Train for the epochs, from the last checkpoint in ``out`` if there is one; the online classifier's accuracy."""
    last = out / "last.ckpt"
    trainer = pl.Trainer(
        max_epochs=epochs,
        # One file, replaced after every epoch.
        callbacks=[ModelCheckpoint(out, "last", enable_version_counter=False, save_on_train_epoch_end=True)],
        logger=CSVLogger(out, "pretrain"),
        sync_batchnorm=sync_batchnorm,
        **shared,
    )
    checkpoint = str(last) if last.exists() else None
    trainer.fit(module, loaders.training(loaders.views), loaders.plain_images(False), ckpt_path=checkpoint)
    # Evaluated again, because a run resumed after its last epoch has nothing left to fit.
    (online,) = trainer.validate(module, loaders.plain_images(False), verbose=False)
    return {"online_top1": online["val_online_cls_top1"]}


def evaluate(
    module: Pretraining, loaders: Loaders, knn_k: int, linear_epochs: int, out: Path, shared: dict[str, Any]
) -> dict[str, float]:
    """Top-1 and top-5 of lightly's kNN and linear classifiers on the frozen backbone, after the last epoch.

    lightly reports the best epoch on the same images; here none is chosen.
    """
    topk = (1, 5) if loaders.num_classes >= 5 else (1,)
    knn = KNNClassifier(module, loaders.num_classes, min(knn_k, loaders.num_images), KNN_T, 0, 1, topk)
    banks = [loaders.plain_images(True), loaders.plain_images(False)]
    measured = MetricCallback()
    pl.Trainer(logger=False, callbacks=[measured], **shared).validate(knn, banks, verbose=False)
    found = {f"knn_top{k}": measured.val_metrics[f"val_knn_top{k}/dataloader_idx_1"][-1] for k in topk}
    features = module.online_classifier.feature_dim
    linear = LinearClassifier(
        module, loaders.batch_size, feature_dim=features, num_classes=loaders.num_classes, topk=topk
    )
    measured = MetricCallback()
    trainer = pl.Trainer(
        max_epochs=linear_epochs,
        callbacks=[measured],
        logger=CSVLogger(out, "linear"),
        enable_checkpointing=False,
        **shared,
    )
    trainer.fit(linear, loaders.training(loaders.crops), loaders.plain_images(False))
    return found | {f"linear_top{k}": measured.val_metrics[f"val_top{k}"][-1] for k in topk}


TABLE = """\
# Schedules

Top-1 accuracy in percent. *Measured here* holds rows of `schedules.csv` by the whole schedule on the whole data set,
and nothing else; *published* is what others report, by their own runs and protocols, and is no result of this project.
The paper's own numbers are not available to us. `python -m benchmarks schedule table` writes this file.

| schedule | method | kNN, measured here | linear, measured here | published elsewhere |
|---|---|---|---|---|
{rows}

{recipes}

lightly's "best epoch" is chosen on the evaluation images; the command reports the last. Rates of MMI are lightly's for
VICReg and have not been tuned on these data sets. CIFAR-100, which lightly does not publish, takes its CIFAR-10 recipe.

solo-learn's own schedules, in a clone of it with `mmi-loss[solo]` installed (the README has the set-up):
`python main_pretrain.py --config-name NAME` with `mmi_cifar10`, `mmi_cifar100`, `mmi_imagenet100` or `mmi_imagenet`,
then its `main_linear.py`, and `python -m mmi_loss.integrations.solo_learn main_knn.py`. They have not been run on these
data sets either.
"""

NOT_RUN = "not run"


def table(rows: list[dict[str, str]], published: list[dict[str, str]]) -> str:
    """The Markdown of ``schedules.md`` from finished runs and published baselines."""
    lines = []
    for name, schedule in SCHEDULES.items():
        for method in ("mmi", "vicreg", "barlow_twins"):
            whole = [row for row in rows if (row["schedule"], row["method"]) == (name, method) and _is_whole(row)]
            cells = [_mean(whole, metric) for metric in ("knn_top1", "linear_top1")]
            found = [_sentence(row) for row in published if (row["schedule"], row["method"]) == (name, method)]
            lines.append(f"| {schedule.title} | {METHODS[method].title} | {' | '.join(cells)} | {'; '.join(found)} |")
    return TABLE.format(rows="\n".join(lines), recipes="\n".join(_recipe(*item) for item in SCHEDULES.items()))


def _is_whole(row: dict[str, str]) -> bool:
    schedule = SCHEDULES[row["schedule"]]
    done = tuple(int(row[name]) for name in ("epochs", "batch_size", "linear_epochs"))
    is_real = schedule.images in (None, int(row["images"]))
    return done == (schedule.epochs, schedule.batch_size, LINEAR_EPOCHS) and is_real


def _mean(rows: list[dict[str, str]], metric: str) -> str:
    if not rows:
        return NOT_RUN
    values = torch.tensor([float(row[metric]) for row in rows])
    spread = f" ± {values.std():.2f} ({len(rows)} seeds)" if len(rows) > 1 else ""
    return f"{values.mean():.2f}{spread}"


def _sentence(row: dict[str, str]) -> str:
    return (
        f"{row['top1']} {row['protocol']}, {row['backbone']}, {row['epochs']} epochs, batch {row['batch_size']} "
        f"([{row['library']}]({row['source']}))"
    )


def _recipe(name: str, schedule: Schedule) -> str:
    return (
        f"* `python -m benchmarks schedule {name} --data DIR`: {schedule.backbone}, "
        f"{schedule.head_layers}-layer projector of {schedule.projector_dim}, batch {schedule.batch_size}, "
        f"{schedule.epochs} epochs, {schedule.optimizer.upper()}; kNN with k = {schedule.knn_k}, linear probe of "
        f"{LINEAR_EPOCHS} epochs."
    )
