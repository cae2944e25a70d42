"""solo-learn's own scripts, unmodified, on a folder of real images: as its users call them, but on the CPU."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BATCHES = 2
CPU = ["accelerator=cpu", "devices='1'", "strategy=auto", "precision=32-true", "sync_batchnorm=False"]
LAUNCHER = ["-m", "mmi_loss.integrations.solo_learn"]
CIFAR = ["--config-path", "scripts/pretrain/cifar"]


@pytest.fixture(scope="module")
def digits(checkout, tmp_path_factory):
    from benchmarks.solo_learn import export_digits

    folder = tmp_path_factory.mktemp("digits")
    export_digits(folder, num_train=40, num_test=20)
    return folder


def python(command, cwd):
    command = [sys.executable, "-W", "ignore", *map(str, command)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    output = done.stderr + done.stdout
    last = [line for line in output.replace("\r", "\n").splitlines() if line.strip(" \x1b[A")][-3:]
    print("$ " + " ".join(command), *last, sep="\n")  # pytest -rP shows it
    assert done.returncode == 0, output[-5000:]
    return output


def pretrain(checkout, digits, out, *overrides, config=("--config-name", "mmi_custom")):
    """``main_pretrain.py`` for two epochs of two steps; the folder with its one checkpoint."""
    common = [
        "name=test",
        "data.dataset=custom",
        f"data.train_path={digits / 'train'}",
        "data.val_path=null",
        "data.num_workers=0",
        "optimizer.batch_size=16",
        "max_epochs=2",
        f"+limit_train_batches={BATCHES}",
        "method_kwargs.proj_hidden_dim=128",
        "method_kwargs.proj_output_dim=256",
        "augmentations.0.crop_size=32",
        "augmentations.1.crop_size=32",
        "auto_resume.enabled=False",
        f"checkpoint.dir={out}",
        f"+default_root_dir={out}",
    ]
    output = python(["main_pretrain.py", *config, *common, *CPU, *overrides], checkout)
    (folder,) = (path.parent for path in Path(out, "mmi").rglob("*.ckpt"))
    return folder, output


def checkpoint(folder):
    (path,) = folder.glob("*.ckpt")
    return path


def steps(folder):
    return torch.load(checkpoint(folder), weights_only=False)["state_dict"]._metadata["mmi_loss"]["step"]


def losses(out):
    (path,) = Path(out).rglob("metrics.csv")
    with path.open(newline="") as file:
        return [float(row["train_mmi_loss_epoch"]) for row in csv.DictReader(file) if row.get("train_mmi_loss_epoch")]


@pytest.fixture(scope="module")
def pretrained(checkout, digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("ours")
    return pretrain(checkout, digits, out)[0]


def test_pretraining_with_our_configuration(pretrained):
    assert steps(pretrained) == 2 * BATCHES
    assert all(torch.tensor(losses(pretrained.parent.parent)).isfinite())
    args = json.loads((pretrained / "args.json").read_text())
    assert args["method"] == "mmi"
    assert args["method_kwargs"]["slice_dim"] == 128


def test_pretraining_with_their_configuration(checkout, digits, tmp_path):
    theirs = [*CIFAR, "--config-name", "barlow"]
    folder, _ = pretrain(checkout, digits, tmp_path, "method=mmi", "wandb.enabled=False", config=theirs)
    assert steps(folder) == 2 * BATCHES
    args = json.loads((folder / "args.json").read_text())
    assert args["method_kwargs"]["scale_loss"] == 0.1  # inherited, and no part of the loss
    assert args["optimizer"]["kwargs"]["eta"] == 0.02


def test_resuming_goes_on_counting(checkout, digits, pretrained, tmp_path):
    resume = f"resume_from_checkpoint='{checkpoint(pretrained)}'"
    folder, _ = pretrain(checkout, digits, tmp_path, "max_epochs=3", f"+{resume}")
    assert steps(folder) == 3 * BATCHES
    assert len(losses(tmp_path)) == 1


def test_two_processes(checkout, digits, tmp_path):
    """Gloo, Lightning's backend on CPUs. Of 40 images, 20 per process are two batches of 8; one process has five."""
    two = ["devices='2'", "strategy=ddp", "optimizer.batch_size=8", "++limit_train_batches=5"]
    folder, _ = pretrain(checkout, digits, tmp_path, *two)
    assert steps(folder) == 2 * 2
    assert all(torch.tensor(losses(tmp_path)).isfinite())


def test_linear_evaluation(checkout, digits, pretrained, tmp_path):
    python(
        [
            "main_linear.py",
            *("--config-path", "scripts/linear/imagenet-100", "--config-name", "barlow"),
            "name=linear",
            "pretrain_method=mmi",
            f"pretrained_feature_extractor='{checkpoint(pretrained)}'",
            "data.dataset=custom",
            f"data.train_path={digits / 'train'}",
            f"data.val_path={digits / 'val'}",
            "data.num_workers=0",
            "optimizer.batch_size=20",
            "max_epochs=1",
            "wandb.enabled=False",
            "auto_resume.enabled=False",
            f"checkpoint.dir={tmp_path}",
            f"+default_root_dir={tmp_path}",
            *CPU,
        ],
        checkout,
    )
    assert list(tmp_path.glob("linear/**/linear-*.ckpt"))


def evaluation(digits, pretrained):
    return [
        *("--dataset", "custom", "--train_data_path", digits / "train", "--val_data_path", digits / "val"),
        *("--batch_size", 20, "--num_workers", 0, "--pretrained_checkpoint_dir", pretrained),
    ]


def test_knn_by_the_launcher(checkout, digits, pretrained):
    options = [
        *("--k", 1, 5, "--temperature", 0.1, "--distance_function", "euclidean", "cosine"),
        *("--feature_type", "backbone", "projector"),
    ]
    output = python([*LAUNCHER, "main_knn.py", *evaluation(digits, pretrained), *options], checkout)
    assert output.count("Result: acc@1=") == 8


def test_umap_by_the_launcher(checkout, digits, pretrained, tmp_path):
    pytest.importorskip("umap", reason="umap-learn is not installed: solo-learn's extra [umap]")
    # The script draws into the current folder.
    python([*LAUNCHER, checkout / "main_umap.py", *evaluation(digits, pretrained)], tmp_path)
    assert {path.name for path in tmp_path.glob("*.pdf")} == {"im100_train_umap.pdf", "im100_val_umap.pdf"}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("mmi_cifar10", "cifar/barlow"),
        ("mmi_cifar100", "cifar/barlow"),
        ("mmi_imagenet100", "imagenet-100/barlow"),
        ("mmi_imagenet", "imagenet/barlow"),
    ],
)
def test_configuration_differs_from_theirs_by_the_method_alone(checkout, ours, theirs):
    import hydra
    from mmi_loss.integrations import solo_learn
    from omegaconf import OmegaConf

    def compose(path):
        with hydra.initialize_config_dir(str(path.parent), version_base="1.2"):
            return OmegaConf.to_container(hydra.compose(path.name))

    mine = compose(Path(solo_learn.__file__).parent / "conf" / ours)
    other = compose(checkout / "scripts" / "pretrain" / theirs)
    for key in ("name", "method", "wandb"):
        mine.pop(key, None), other.pop(key)
    for key in ("lamb", "scale_loss"):
        other["method_kwargs"].pop(key, None)
    if ours == "mmi_cifar100":
        other["data"]["dataset"] = "cifar100"  # "change here for cifar100"
    assert mine == other


def test_the_clone_is_untouched(checkout):
    """Last: after all of the above."""
    status = subprocess.run(["git", "-C", str(checkout), "status", "--porcelain"], capture_output=True, text=True)
    assert status.stdout == ""
