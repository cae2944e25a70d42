"""Barlow Twins, VICReg and MMI in an unmodified clone of solo-learn, by its own pretraining script.

Every method is solo-learn's ``scripts/pretrain/cifar/barlow.yaml`` with ``method=...``: the same ResNet-18, projector
width, augmentations, LARS and schedule, and each loss at solo-learn's own weights. The data are scikit-learn's digits
as a folder of small images. Reports solo-learn's online numbers after the last epoch: kNN and linear classifier.
Needs solo-learn's requirements and ``mmi-loss[solo]`` in the environment that runs this.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks import environment, report
from benchmarks.environment import Row

METHODS = ("barlow_twins", "vicreg", "mmi")
BATCH_SIZE, SIZE, DIM = 64, 32, 512
"""SIZE: pixels of a side."""
# Digits fill their images and a mirrored one is no digit.
SHARED = f"""
data.dataset=custom data.num_workers=0 optimizer.batch_size={BATCH_SIZE} +scheduler.warmup_epochs=1
method_kwargs.proj_hidden_dim={DIM} method_kwargs.proj_output_dim={DIM} +knn_eval.enabled=True wandb.enabled=False
auto_resume.enabled=False checkpoint.enabled=False +enable_progress_bar=False
augmentations.0.crop_size={SIZE} augmentations.0.rrc.crop_min_scale=0.3 augmentations.0.horizontal_flip.prob=0.0
augmentations.1.crop_size={SIZE} augmentations.1.rrc.crop_min_scale=0.3 augmentations.1.horizontal_flip.prob=0.0
"""
# solo-learn evaluates folders of images at 224 pixels, in a function which it tells its users to rewrite.
SMALL_IMAGES = """
import runpy, sys
from torchvision import transforms as T
size = int(sys.argv.pop(1))
from solo.data import classification_dataloader
finish = [T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
pipeline = {
    "T_train": T.Compose([T.RandomResizedCrop(size, scale=(0.3, 1.0)), *finish]),
    "T_val": T.Compose([T.Resize((size, size)), *finish]),
}
classification_dataloader.build_custom_pipeline = lambda: pipeline
sys.argv[0] = "main_pretrain.py"
runpy.run_path("main_pretrain.py", run_name="__main__")
"""


def export_digits(folder: Path, size: int = 32, num_train: int = 1198, num_test: int = 599) -> None:
    """Write the digits as ``folder/{train,val}/CLASS/INDEX.png`` of ``size`` pixels, a split stratified by class."""
    digits = load_digits()
    labels = digits.target
    sizes = {"train_size": num_train, "test_size": num_test}
    split = train_test_split(np.arange(len(labels)), **sizes, random_state=0, stratify=labels)
    for name, indices in zip(("train", "val"), split, strict=True):
        for index in indices:
            path = folder / name / str(labels[index]) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((digits.images[index] / 16 * 255).astype(np.uint8))
            image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB").save(path)


def pretrain(
    data: Path, out: Path, method: str, seed: int, rate: float, options: argparse.Namespace
) -> dict[str, float]:
    """One run of ``main_pretrain.py``: the last epoch's kNN and linear accuracy, in percent, from Lightning's log."""
    overrides = [
        *SHARED.split(),
        *(f"method={method}", f"name={method}-{seed}", f"+seed={seed}", f"optimizer.lr={rate}"),
        *(f"data.train_path={data / 'train'}", f"data.val_path={data / 'val'}", f"+default_root_dir={out}"),
        f"max_epochs={options.epochs}",
    ]
    if not torch.cuda.is_available():
        overrides += ["accelerator=cpu", "devices='1'", "strategy=auto", "precision=32-true", "sync_batchnorm=False"]
    command = [sys.executable, "-c", SMALL_IMAGES, str(SIZE)]
    command += ["--config-path", "scripts/pretrain/cifar", "--config-name", "barlow", *overrides]
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    with log.open("w") as file:
        done = subprocess.run(command, cwd=options.checkout, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        last_words = f"its last words, from {log}:\n{log.read_text()[-2000:]}"
        raise SystemExit(f"{method}, learning rate {rate}, seed {seed} failed; {last_words}")
    (metrics,) = out.glob("lightning_logs/version_*/metrics.csv")
    last = [row for row in environment.read(metrics) if row["val_acc1"]][-1]
    return {"knn": round(float(last["val_knn_acc1"]), 2), "linear": round(float(last["val_acc1"]), 2)}


def main(arguments: list[str]) -> None:
    """Run what is missing in the results, seeds outermost, then print all rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks solo_learn", description=__doc__)
    parser.add_argument("checkout", type=Path, help="a clone of solo-learn")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.3], help="learning rates (default: barlow.yaml's)")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=environment.RUNS / "solo_learn", help="folder for the CSV file")
    options = parser.parse_args(arguments)
    path = options.out / "solo_learn.csv"
    head = environment.output(["git", "-C", str(options.checkout), "rev-parse", "--short", "HEAD"])
    settings = {"epochs": options.epochs, "batch_size": BATCH_SIZE, "size": SIZE, "projector_dim": DIM}
    finished = {(row["method"], row["seed"], float(row["learning_rate"])) for row in environment.read(path)}
    with tempfile.TemporaryDirectory() as folder:
        export_digits(Path(folder, "digits"), SIZE)
        for seed, method, rate in itertools.product(range(options.seeds), options.methods, options.rates):
            if (method, str(seed), rate) in finished:
                continue
            out = Path(folder, f"{method}-{seed}-{rate}")
            row = {"method": method, "seed": seed, "learning_rate": rate}
            row |= pretrain(Path(folder, "digits"), out, method, seed, rate, options)
            row |= {
                **settings,
                "solo_learn": head,
                **environment.columns("cuda" if torch.cuda.is_available() else "cpu"),
            }
            row["threads"] = os.environ.get("OMP_NUM_THREADS", row["threads"])
            environment.append(path, row)
    print(table(environment.read(path)))


def table(rows: list[Row]) -> str:
    """All rows."""
    names = ("method", "learning_rate", "seed", "knn", "linear", "epochs", "batch_size", "projector_dim")
    return report.table(names, [[row[name] for name in names] for row in rows])
