"""The schedules on small data of the same on-disk form: from files to a row, resumed on the way; and their table."""

import dataclasses

import pytest
import torch

pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[bench]")
pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")

from benchmarks import environment, schedule
from tests.benchmarks.test_data import write_cifar, write_folders

SMALL = ["--workers", "0", "--accelerator", "cpu", "--batch-size", "4", "--epochs", "2", "--linear-epochs", "1"]


@pytest.fixture
def modules(monkeypatch):
    """The modules the command builds, and the epochs they begin. Their networks are small ones here."""
    built, build = [], schedule.build
    for name, recipe in schedule.SCHEDULES.items():
        small = dataclasses.replace(recipe, backbone="tiny", projector_dim=16)
        monkeypatch.setitem(schedule.SCHEDULES, name, small)

    def watched(*arguments, **options):
        module = build(*arguments, **options)
        module.begun = []
        module.on_train_epoch_start = lambda: module.begun.append(module.current_epoch)
        built.append(module)
        return module

    monkeypatch.setattr(schedule, "build", watched)
    # The checksums are those of the real files.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_, **__: True)
    return built


def arguments(name, method, folder):
    where = ["--data", str(folder), "--out", str(folder / "runs"), "--results", str(folder / "schedules.csv")]
    return [name, "--method", method, *SMALL, *where]


def test_cifar10_goes_on_from_a_checkpoint(modules, tmp_path, monkeypatch, capsys):
    write_cifar(tmp_path, "cifar10")
    command = arguments("cifar10", "mmi", tmp_path)
    with monkeypatch.context() as interrupted:

        def stop(self, trainer, module):
            if trainer.current_epoch == 1:
                raise OSError("the machine went away")

        interrupted.setattr("pytorch_lightning.Callback.on_train_epoch_start", stop)
        with pytest.raises(OSError, match="went away"):
            schedule.main(command)
    schedule.main(command)
    _, resumed = modules
    assert resumed.begun == [1]
    assert resumed.criterion.step == 2 * 5
    (row,) = environment.read(tmp_path / "schedules.csv")
    assert (row["schedule"], row["method"], row["epochs"], row["images"]) == ("cifar10", "mmi", "2", "20")
    for metric in ("online_top1", "knn_top1", "knn_top5", "linear_top1", "linear_top5"):
        assert 0 <= float(row[metric]) <= 100
    assert row["commit"]
    schedule.main(command)
    assert len(modules) == 2
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "method", "optimizer"),
    [("cifar100", "vicreg", "SGD"), ("imagenet100", "mmi", "LARS"), ("imagenet", "barlow_twins", "LARS")],
)
def test_other_forms_and_methods(name, method, optimizer, modules, tmp_path):
    if name == "cifar100":
        write_cifar(tmp_path, name)
    else:
        write_folders(tmp_path)
    schedule.main([*arguments(name, method, tmp_path), "--epochs", "1"])
    (module,) = modules
    assert module.begun == [0]
    assert type(module.criterion) is type(schedule.METHODS[method].criterion(False))
    # Biases and norms take no weight decay from LARS, all weights take some.
    state = torch.load(next(tmp_path.glob("runs/*/last.ckpt")), weights_only=False)["optimizer_states"][0]
    decays = [group["weight_decay"] for group in state["param_groups"]]
    assert decays == ([5e-4] if optimizer == "SGD" else [schedule.rates(method, 4).weight_decay, 0, 0])
    (row,) = environment.read(tmp_path / "schedules.csv")
    assert float(row["linear_top1"]) >= 0


def test_networks_are_the_published_ones():
    for name, width, layers in (("cifar10", 512, 2), ("imagenet100", 512, 3)):
        module = schedule.build(schedule.SCHEDULES[name], "mmi", 10, 4, gather=False)
        linear = [layer for layer in module.projection_head.modules() if isinstance(layer, torch.nn.Linear)]
        assert [layer.in_features for layer in linear] == [width, *[2048] * (layers - 1)]
        assert module.eval()(torch.randn(1, 3, 32, 32)).shape == (1, width)
    stem = next(schedule.build(schedule.SCHEDULES["cifar10"], "mmi", 10, 4, gather=False).parameters())
    assert stem.shape == (64, 3, 3, 3)
    assert schedule.rates("mmi", 512).rate == 0.4
    assert schedule.rates("barlow_twins", 512).plain_rate == 0.0048


def test_errors(tmp_path, modules, capsys):
    with pytest.raises(SystemExit):
        schedule.main(["cifar10"])
    assert "needs --data DIR" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="cifar10"):
        schedule.main(arguments("cifar10", "mmi", tmp_path))
    write_folders(tmp_path)
    with pytest.raises(SystemExit, match="7 per device exceed the 6 images"):
        schedule.main([*arguments("imagenet", "mmi", tmp_path), "--batch-size", "7"])
    with pytest.raises(SystemExit, match="does not divide among --devices 3"):
        schedule.main([*arguments("imagenet", "mmi", tmp_path), "--devices", "3"])


def published():
    return environment.read(environment.RESULTS / schedule.PUBLISHED)


def test_table_is_the_stored_results():
    rows = environment.read(environment.RESULTS / "schedules.csv")
    assert (environment.RESULTS / "schedules.md").read_text() == schedule.table(rows, published())


def test_table_takes_whole_runs_alone():
    """Short runs, small data and others' numbers never reach the measured columns."""
    whole = {"schedule": "cifar10", "method": "mmi", "epochs": "800", "batch_size": "512", "linear_epochs": "90"}
    whole |= {"images": "50000", "knn_top1": "12.345", "linear_top1": "23.456"}

    def measured(row):
        lines = schedule.table([row], published()).splitlines()
        cells = [line.split("|")[3:5] for line in lines if line.startswith("| ") and "measured here" not in line]
        return {cell.strip() for pair in cells for cell in pair}

    assert measured(whole) == {"not run", "12.35", "23.46"} or measured(whole) == {"not run", "12.34", "23.46"}
    for change in ({"epochs": "2"}, {"images": "20"}, {"linear_epochs": "1"}, {"batch_size": "4"}):
        assert measured({**whole, **change}) == {"not run"}
    assert all(row["source"].startswith("https://github.com/") for row in published())
