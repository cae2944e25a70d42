"""The loaders, on small files in the data sets' own on-disk formats."""

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[bench]")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install mmi-loss[bench]")

from PIL import Image
from sklearn.linear_model import LinearRegression

from benchmarks import data
from benchmarks.data import clutter, digits, glyphs, images, latent, photographs, views


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


def write_photographs(folder, compressed):
    """Two images a class, black but for a pixel, as in MNIST's files; tests of the first class are its training."""
    folder.mkdir(parents=True)
    labels = np.arange(20, dtype=np.uint8) % 10
    pixels = np.zeros((20, 28, 28), np.uint8)
    pixels[np.arange(20), 14, labels] = 255
    for name in ("train", "t10k"):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            content = head + array.tobytes()
            path = folder / f"{name}-{kind}-ubyte{'.gz' if compressed else ''}"
            path.write_bytes(gzip.compress(content) if compressed else content)


@pytest.mark.parametrize("folder", photographs.FOLDERS)
@pytest.mark.parametrize("compressed", [True, False])
def test_photographs_in_every_layout(folder, compressed, tmp_path):
    write_photographs(tmp_path / "data" / folder, compressed)
    task = data.load("photographs", tmp_path, tmp_path / "data")
    assert (task.num_classes, task.num_images, task.channels, task.image_size) == (10, 20, 1, 28)
    (view_a, view_b), labels = next(iter(task.pretrain_batches(8, seed=0)))
    assert view_a.shape == view_b.shape == (8, 1, 28, 28)
    assert not torch.equal(view_a, view_b)
    plain, classes = next(iter(task.test()))
    assert classes.tolist() == [i % 10 for i in range(20)]
    assert plain[3, 0, 14].tolist() == [float(column == 3) for column in range(28)]
    again, other = (next(iter(task.pretrain_batches(8, seed=s))) for s in (0, 1))
    assert torch.equal(again[0][0], view_a)
    assert torch.equal(again[1], labels)
    assert not torch.equal(other[0][0], view_a)


def test_photographs_are_balanced_and_as_many_as_asked(tmp_path, monkeypatch):
    labels = torch.arange(1000) % 10
    chosen = photographs.balanced(labels, 200)
    assert labels[chosen].bincount().tolist() == [20] * 10
    assert torch.equal(chosen, photographs.balanced(labels, 200))
    write_photographs(tmp_path / "data", compressed=True)
    monkeypatch.setenv("MMI_PHOTOGRAPHS", "")
    monkeypatch.setenv("MMI_NUM_PHOTOGRAPHS", "")
    data.configure(str(tmp_path / "data"), 10, None)
    assert data.load("photographs", tmp_path).num_images == 10
    assert data.variant("photographs") == "10"


def test_missing_photographs_say_how_to_get_them(tmp_path):
    with pytest.raises(SystemExit, match=r"no train-images-idx3-ubyte.gz(.|\n)*apt-get download dataset-fashion-mnist"):
        data.load("photographs", tmp_path, tmp_path)
    write_photographs(tmp_path / "data", compressed=False)
    broken = tmp_path / "data" / "t10k-images-idx3-ubyte"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(SystemExit, match="t10k-images-idx3-ubyte is damaged: 100 bytes"):
        data.load("photographs", tmp_path, tmp_path / "data")


@pytest.fixture(scope="module")
def fonts():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MMI_FONTS", raising=False)
        yield data.load("glyphs", Path())


def test_glyphs_query_designs_that_training_has_not(fonts):
    (bank, labels), (query, asked) = (map(torch.cat, zip(*part(), strict=True)) for part in (fonts.train, fonts.test))
    assert fonts.num_classes >= glyphs.MIN_CLASSES
    assert labels.bincount().tolist() == [12] * fonts.num_classes
    assert asked.bincount().tolist() == [4] * fonts.num_classes
    learnt = {image.numpy().tobytes() for image in bank}
    assert not any(image.numpy().tobytes() in learnt for image in query)
    again = data.load("glyphs", Path())
    assert torch.equal(next(iter(again.test()))[0], query[: views.EVALUATION_BATCH])


def test_glyphs_are_characters_of_every_design_and_no_two_alike(fonts):
    query, asked = map(torch.cat, zip(*fonts.test(), strict=True))
    assert query.flatten(1).amax(1).min() > 0
    for design in query.unflatten(0, (4, fonts.num_classes)):
        assert len({image.numpy().tobytes() for image in design}) == fonts.num_classes
    assert torch.equal(asked[: fonts.num_classes], torch.arange(fonts.num_classes))
    drawn = torch.tensor([[1, 1, 2, 0, 3, 8], [9, 4, 5, 6, 3, 7]], dtype=torch.uint8).view(2, 6, 1, 1, 1)
    assert glyphs.distinct(drawn.expand(2, 6, 1, 28, 28)) == [0, 2, 5]  # not alike, blank, or the same in both


def test_fonts_of_folders(fonts, tmp_path, monkeypatch):
    shipped = glyphs.shipped()
    for number, folder in enumerate(("a", "b")):  # a font that is in both is one design
        (tmp_path / folder).mkdir()
        for path in (shipped[:10], shipped[9:])[number]:
            (tmp_path / folder / path.name).symlink_to(path)
    folders = [str(tmp_path / folder) for folder in ("a", "b")]
    task = data.load("glyphs", tmp_path, Path(os.pathsep.join(folders)))
    assert (task.num_classes, task.num_images) == (fonts.num_classes, fonts.num_images)
    with pytest.raises(SystemExit, match=r"10 fonts of .*a give 9 designs(.|\n)*apt-get download fonts-"):
        data.load("glyphs", tmp_path, Path(folders[0]))
    with pytest.raises(SystemExit, match="0 fonts of"):
        data.load("glyphs", tmp_path, tmp_path / "nowhere")
    monkeypatch.setenv("MMI_FONTS", "")
    data.configure(None, None, folders)
    assert data.variant("glyphs") == os.pathsep.join(("a", "b"))
    assert data.variant("digits") == ""


def test_augmentation_draws_for_every_image():
    plain = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(1))

    def augment(**options):
        return images.Augmentation(**options)(plain, torch.Generator().manual_seed(0))

    whole = {"area": (1.0, 1.0), "ratio": (1.0, 1.0)}
    torch.testing.assert_close(augment(**whole), plain)
    flipped = augment(**whole, flip=True)
    is_flipped = torch.isclose(flipped, plain.flip(3), atol=1e-4).flatten(1).all(1)
    is_same = torch.isclose(flipped, plain, atol=1e-4).flatten(1).all(1)
    assert (is_flipped ^ is_same).all()
    assert 16 < is_flipped.sum() < 48
    jittered = augment(**whole, jitter=0.4)
    assert jittered.min() >= 0
    assert jittered.max() <= 1
    assert jittered.mean((1, 2, 3)).std() > 0.05
    crops = augment(area=(0.5, 0.5))
    assert len(crops.flatten(1).mean(1).unique()) == 64


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
