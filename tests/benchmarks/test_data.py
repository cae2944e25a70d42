"""The loaders, on small files in the data sets' own on-disk formats."""

import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[bench]")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install mmi-loss[bench]")

from PIL import Image
from sklearn.linear_model import LinearRegression

from benchmarks import data
from benchmarks.data import clutter, digits, latent, views


def write_cifar(root, name):
    """Python pickles as torchvision unpacks them: five training batches, or one for CIFAR-100."""
    rng = np.random.default_rng(0)
    coarse = name == "cifar100"
    folder = root / ("cifar-100-python" if coarse else "cifar-10-batches-py")
    folder.mkdir()
    key = "fine_labels" if coarse else "labels"

    def batch(count):
        return {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), key: [i % 10 for i in range(count)]}

    names = ["train", "test"] if coarse else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for file in names:
        (folder / file).write_bytes(pickle.dumps(batch(4)))
    classes = [f"class{i}" for i in range(100 if coarse else 10)]
    meta = {"fine_label_names": classes} if coarse else {"label_names": classes}
    (folder / ("meta" if coarse else "batches.meta")).write_bytes(pickle.dumps(meta))


def write_folders(root):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("cat", "dog", "owl"):
            (root / split / label).mkdir(parents=True)
            for i in range(2):
                image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
                image.save(root / split / label / f"{i}.png")


@pytest.mark.parametrize(("name", "classes", "images"), [("cifar10", 10, 20), ("cifar100", 100, 4)])
def test_cifar(name, classes, images, tmp_path, monkeypatch):
    write_cifar(tmp_path, name)
    # The checksums are those of the real files.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_, **__: True)
    monkeypatch.setattr("benchmarks.data.folders.NUM_WORKERS", 0)
    task = data.load(name, tmp_path, tmp_path)
    assert (task.num_classes, task.num_images, task.image_size) == (classes, images, 32)
    (view_a, view_b), labels = next(iter(task.pretrain_batches(4, seed=0)))[:2]
    assert view_a.shape == view_b.shape == (4, 3, 32, 32)
    assert not torch.equal(view_a, view_b)
    assert labels.shape == (4,)
    test_images, _ = next(iter(task.test()))
    assert test_images.shape == (4, 3, 32, 32)


def test_image_folder(tmp_path, monkeypatch):
    write_folders(tmp_path)
    monkeypatch.setattr("benchmarks.data.folders.NUM_WORKERS", 0)
    task = data.load("imagefolder", tmp_path, tmp_path)
    assert (task.num_classes, task.num_images) == (3, 6)
    (view_a, _), _ = next(iter(task.pretrain_batches(2, seed=0)))[:2]
    assert view_a.shape == (2, 3, 224, 224)


def test_missing_data_is_said(tmp_path):
    with pytest.raises(SystemExit, match="--folder PATH names the folder"):
        data.load("cifar10", tmp_path)
    with pytest.raises(SystemExit, match="cifar10"):
        data.load("cifar10", tmp_path, tmp_path)
    with pytest.raises(SystemExit, match="no folder train"):
        data.load("imagefolder", tmp_path, tmp_path)


def test_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "NUM_VIEWS", 4)
    task = digits.load(tmp_path)
    assert (task.num_classes, task.num_images, task.channels) == (10, 1198, 1)
    batches = list(task.pretrain_batches(256, seed=0))
    assert len(batches) == 4
    (view_a, view_b), _ = batches[0]
    assert view_a.shape == view_b.shape == (256, 1, 16, 16)
    assert not (view_a == view_b).flatten(1).all(1).any()
    again, other = (next(iter(task.pretrain_batches(256, seed=s))) for s in (0, 1))
    assert torch.equal(again[0][0], view_a)
    assert not torch.equal(other[0][0], view_a)
    # The cache holds what was drawn, and a half-written one is never taken for whole.
    assert {path.name for path in tmp_path.iterdir()} == {"digits-train-4.pt", "digits-test.pt"}
    assert torch.equal(next(iter(digits.load(tmp_path).pretrain_batches(256, 0)))[0][0], view_a)
    images, _ = zip(*task.test(), strict=True)
    assert torch.cat(images).shape == (599 * 4, 1, 16, 16)
    with pytest.raises(SystemExit, match="exceeds the 1198 training images"):
        task.pretrain_batches(2000, seed=0)


def test_two_processes_draw_the_same_views_at_once(tmp_path, monkeypatch):
    """The other one draws, saves and is done while this one is between saving and naming its file."""
    save, processes = torch.save, iter((1, 2))
    monkeypatch.setattr(views.os, "getpid", lambda: next(processes))

    def save_and_wait(tensor, path):
        save(tensor, path)
        monkeypatch.setattr(torch, "save", save)
        views.cached(tmp_path / "views.pt", lambda: torch.ones(2))

    monkeypatch.setattr(torch, "save", save_and_wait)
    assert views.cached(tmp_path / "views.pt", lambda: torch.ones(2)).tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["views.pt"]


def test_clutter_shares_the_digit_and_nothing_else():
    digits = torch.zeros(2, 8, 8)
    digits[:, 2:6, 2:6] = 1
    first, second = (clutter.scenes(digits, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert first.shape == (2, 3, 32, 32)
    assert first.isfinite().all()
    assert not torch.allclose(first, second)
    assert torch.equal(first, clutter.scenes(digits, torch.Generator().manual_seed(0)))
    # The same scene with and without its digit differs where the digit is, and it is somewhere.
    empty = clutter.scenes(torch.zeros_like(digits), torch.Generator().manual_seed(0))
    changed = (first - empty).abs().amax(1) > 0.3
    assert (changed.float().mean((1, 2)) > 0.05).all()
    assert (changed.float().mean((1, 2)) < 0.6).all()


def test_clutter_task(tmp_path):
    task = data.load("clutter", tmp_path, quick=True)
    (view_a, view_b), labels = next(iter(task.pretrain_batches(16, seed=0)))
    assert view_a.shape == view_b.shape == (16, 3, 32, 32)
    assert labels.shape == (16,)
    assert sum(len(images) for images, _ in task.test()) == 599 * task.views_per_image


def test_latent_views_share_content_alone(tmp_path):
    sample = latent.draw(500, 3, seed=5)
    content, nuisance = sample.factors.split([latent.CONTENT_DIM, latent.NUISANCE_DIM], dim=2)
    assert torch.equal(content[:, 0], content[:, 1])
    assert abs(np.corrcoef(nuisance[:, 0].flatten(), nuisance[:, 1].flatten())[0, 1]) < 0.03
    # The world is the same for every seed: a map learnt on one sample holds on another.
    other = latent.draw(500, 3, seed=6)
    x, y = (s.views.flatten(0, 1).numpy() for s in (sample, other))
    known = LinearRegression().fit(x, content.flatten(0, 1))
    assert known.score(y, other.factors[..., : latent.CONTENT_DIM].flatten(0, 1)) > 0.3
    task = data.load("latent", tmp_path)
    images, labels = next(iter(task.train()))
    assert images.shape[1:] == (latent.OBSERVED_DIM,)
    assert torch.equal(labels[::2], labels[1::2])
