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

from benchmarks import environment

METHODS = ("barlow_twins", "vicreg", "mmi")
SCRIPT = Path(__file__).with_name("small_images.py")


def export_digits(folder: Path, size: int = 32, num_train: int = 1198, num_test: int = 599) -> None:
    """Write the digits as ``folder/{train,val}/CLASS/INDEX.png`` of ``size`` pixels, a split stratified by class."""
    data = load_digits()
    split = train_test_split(
        np.arange(len(data.target)),
        train_size=num_train,
        test_size=num_test,
        random_state=0,
        stratify=data.target,
    )
    for name, indices in zip(("train", "val"), split, strict=True):
        for index in indices:
            path = folder / name / str(data.target[index]) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((data.images[index] / 16 * 255).astype(np.uint8))
            image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB").save(path)


def pretrain(
    checkout: Path, data: Path, out: Path, method: str, seed: int, rate: float, options: argparse.Namespace
) -> None:
    """One run of ``main_pretrain.py``; its log and metrics go to ``out``."""
    overrides = [
        f"method={method}",
        f"name={method}-{seed}",
        f"+seed={seed}",
        "data.dataset=custom",
        f"data.train_path={data / 'train'}",
        f"data.val_path={data / 'val'}",
        "data.num_workers=0",
        f"optimizer.batch_size={options.batch_size}",
        f"optimizer.lr={rate}",
        f"max_epochs={options.epochs}",
        "+scheduler.warmup_epochs=1",
        f"method_kwargs.proj_hidden_dim={options.projector_dim}",
        f"method_kwargs.proj_output_dim={options.projector_dim}",
        "+knn_eval.enabled=True",
        "wandb.enabled=False",
        "auto_resume.enabled=False",
        "checkpoint.enabled=False",
        f"+default_root_dir={out}",
        "+enable_progress_bar=False",
    ]
    for view in (0, 1):  # digits fill their images and a mirrored one is no digit
        overrides += [
            f"augmentations.{view}.crop_size={options.size}",
            f"augmentations.{view}.rrc.crop_min_scale=0.3",
            f"augmentations.{view}.horizontal_flip.prob=0.0",
        ]
    if not torch.cuda.is_available():
        overrides += ["accelerator=cpu", "devices='1'", "strategy=auto", "precision=32-true", "sync_batchnorm=False"]
    command = [sys.executable, str(SCRIPT), str(options.size), "main_pretrain.py"]
    command += ["--config-path", "scripts/pretrain/cifar", "--config-name", "barlow", *overrides]
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    with log.open("w") as file:
        done = subprocess.run(command, cwd=checkout, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        last_words = f"its last words, from {log}:\n{log.read_text()[-2000:]}"
        raise SystemExit(f"{method}, learning rate {rate}, seed {seed} failed; {last_words}")


def online_accuracy(out: Path) -> dict[str, float]:
    """The last epoch's kNN and linear accuracy, in percent, from Lightning's CSV log."""
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
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--projector-dim", type=int, default=512)
    parser.add_argument("--results", type=Path, default=environment.RESULTS / "solo_learn.csv")
    options = parser.parse_args(arguments)
    head = ["git", "-C", str(options.checkout), "rev-parse", "--short", "HEAD"]
    settings = {name: getattr(options, name) for name in ("epochs", "batch_size", "size", "projector_dim")}
    finished = {(row["method"], row["seed"], float(row["learning_rate"])) for row in environment.read(options.results)}
    with tempfile.TemporaryDirectory() as folder:
        export_digits(Path(folder, "digits"), options.size)
        for seed in range(options.seeds):
            for method, rate in itertools.product(options.methods, options.rates):
                if (method, str(seed), rate) in finished:
                    continue
                out = Path(folder, f"{method}-{seed}-{rate}")
                pretrain(options.checkout.resolve(), Path(folder, "digits"), out, method, seed, rate, options)
                row = {
                    "method": method,
                    "seed": seed,
                    "learning_rate": rate,
                    **online_accuracy(out),
                    **settings,
                    "solo_learn": subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip(),
                    **environment.columns("cuda" if torch.cuda.is_available() else "cpu"),
                }
                row["threads"] = os.environ.get("OMP_NUM_THREADS", row["threads"])
                environment.append(options.results, row)
    print(f"{'method':14}{'rate':>6}{'seed':>5}{'kNN':>8}{'linear':>8}   {settings}")
    for row in environment.read(options.results):
        print(f"{row['method']:14}{row['learning_rate']:>6}{row['seed']:>5}{row['knn']:>8}{row['linear']:>8}")


if __name__ == "__main__":
    sys.exit("run as `python -m benchmarks solo_learn`")
