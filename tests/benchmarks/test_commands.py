"""The benchmark commands, small: they run, resume, and write what they promise."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[bench]")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install mmi-loss[bench]")

from benchmarks import __main__ as command_line
from benchmarks import demo, distributed, environment, speed, training
from mmi_loss.distributed import HEAD

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One folder for all demos: the digits' views are drawn once."""
    return tmp_path_factory.mktemp("demo")


SMALL = ["--quick", "--steps", "3", "--projector-dim", "32", "--batch-size", "64"]


def rows_of(folder):
    (path,) = folder.glob("digits-*.csv")
    with path.open(newline="") as file:
        return path, list(csv.DictReader(file))


def test_demo_runs_and_resumes(cache, capsys):
    methods = ["untrained", "mmi", "barlow_twins", "vicreg", "supervised"]
    arguments = [*SMALL, "--out", str(cache), "--methods", *methods]
    demo.main(arguments)
    path, rows = rows_of(cache)
    assert [row["method"] for row in rows] == methods
    assert all(0 <= float(row["knn"]) <= 1 and 0 <= float(row["linear"]) <= 1 for row in rows)
    assert {row["steps"] for row in rows} == {"3"}
    by_method = {row["method"]: row for row in rows}
    assert 0 < float(by_method["mmi"]["loss_ms"]) < float(by_method["mmi"]["step_ms"])
    assert json.loads(by_method["mmi"]["history"])[-1]["step"] == 3
    assert path.with_suffix(".png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "Barlow Twins" in shown
    assert "picture:" in shown
    # A run interrupted before its last row goes on with that row alone.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    demo.main(arguments)
    _, resumed = rows_of(cache)
    assert [row["method"] for row in resumed] == methods
    assert resumed[:-1] == rows[:-1]


def test_same_seed_same_result(cache):
    from benchmarks import data
    from mmi_loss import MMILoss

    task = data.load("digits", None, cache / "cache", quick=True)
    settings = training.Settings(steps=3, batch_size=64, projector_dim=32, evaluations=1)
    runs = [training.pretrain(task, lambda _: MMILoss(), 1.0, 5, settings) for _ in range(2)]
    assert runs[0].knn == runs[1].knn
    assert runs[0].linear == runs[1].linear


@pytest.mark.parametrize(("name", "features"), [("conv", 192), ("resnet18", 512), ("resnet50", 2048)])
def test_backbones(name, features):
    backbone, dim = training.make_backbone(name, 3, 32)
    assert dim == features
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, features)
    if name != "conv":
        assert training.make_backbone(name, 3, 224)[0](torch.randn(2, 3, 64, 64)).shape == (2, features)


def test_two_devices(tmp_path):
    """Lightning starts the command once per rank; both may draw the views, only the first writes results."""
    arguments = [*SMALL, "--devices", "2", "--accelerator", "cpu", "--methods", "mmi", "vicreg", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks", "demo", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["method"] for row in rows_of(tmp_path)[1]] == ["mmi", "vicreg"]


def test_speed(tmp_path, capsys):
    out = tmp_path / "speed.csv"
    losses = ["mmi", "mmi_all", "barlow_twins", "vicreg", "frossl", "mmcr", "wmse", "lejepa", "visreg", "simclr"]
    losses += ["mec", "corinfomax", "mmi_naive", "floor", "floor_gram", "floor_covariance"]
    speed.main(["--shapes", "256x128", "32x16", "8x64", "--losses", *losses, "--turns", "2", "--out", str(out)])
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = {(row["loss"], row["n"], row["d"]) for row in rows}
    assert ("wmse", "32", "16") in measured
    assert ("wmse", "8", "64") not in measured
    assert ("floor_gram", "8", "64") in measured
    assert ("floor_covariance", "32", "16") in measured
    assert all(float(row["q1_ms"]) <= float(row["median_ms"]) <= float(row["q3_ms"]) for row in rows)
    assert all(row["torch"] and row["device"] and row["date"] for row in rows)
    assert {path.name for path in tmp_path.glob("*.png")} == {"speed-time.png", "speed-memory.png"}
    assert "barlow_twins" in capsys.readouterr().out
    # Measuring one shape again leaves the others as they are.
    speed.main(["--shapes", "8x64", "--losses", "mmi", "--turns", "1", "--out", str(out)])
    again = environment.read(out)
    assert [row for row in again if row["n"] != "8"] == [row for row in rows if row["n"] != "8"]
    assert {row["loss"] for row in again if row["n"] == "8"} == {"mmi"}


def test_peak_memory_counts_temporaries_not_gradients():
    leaves = [torch.randn(64, 1024, requires_grad=True) for _ in range(2)]

    def step():
        (leaves[0] * leaves[1]).sum().backward()

    # The product, its expanded gradient, and at most two products with it before they become gradients.
    peak = speed._peak_bytes(step, leaves) / leaves[0].nbytes
    assert 0.9 < peak < 2.1


def solo_learn_in(folder):
    """What a clone of solo-learn looks like to what takes its losses."""
    losses = folder / "solo" / "losses"
    losses.mkdir(parents=True)
    (folder / "solo" / "utils").mkdir()
    local = "def {0}_loss_func(z1, z2):\n    return (z1 - z2).square().mean() - z1.std()\n"
    (losses / "barlow.py").write_text(local.format("barlow"))
    (losses / "vicreg.py").write_text("from solo.utils.misc import gather\n" + local.format("vicreg"))
    (folder / "solo" / "utils" / "misc.py").write_text("import no_such_package\ndef gather(x):\n    return x\n")


def test_speed_of_solo_learns_losses(tmp_path):
    solo_learn_in(tmp_path)
    out = tmp_path / "speed.csv"
    losses = ["mmi", "solo_barlow", "solo_vicreg"]
    arguments = ["--shapes", "8x4", "--turns", "1", "--losses", *losses, "--out", str(out)]
    speed.main([*arguments, "--solo-learn", str(tmp_path)])
    assert [row["loss"] for row in environment.read(out)[::2]] == losses
    speed.main(arguments)  # without a clone, without them
    assert {row["loss"] for row in environment.read(out)} == {"mmi"}


def test_distributed(tmp_path, capsys):
    """A loss that takes the processes with it is a row, not the end; solo-learn's losses come from its own files."""
    solo_learn_in(tmp_path)
    arguments = ["--worlds", "2", "--batches", "12", "--traffic-dim", "160", "--out", str(tmp_path / "rows.csv")]
    arguments += ["--losses", "content, kronecker", "default", "barlow", "lightly vicreg"]
    distributed.main([*arguments, "--solo-learn", str(tmp_path)])
    rows = environment.read(tmp_path / "rows.csv")
    by_cell = {(row["loss"], row["split"], row["dim"]): row for row in rows}
    for split in ("equal", "unequal"):
        assert float(by_cell["content, kronecker", split, "128"]["gradient_error"]) < 1e-12
        assert float(by_cell["solo-learn barlow", split, "128"]["gradient_error"]) > 0.01
    assert by_cell["lightly vicreg", "unequal", "128"]["failure"]
    # A head of fixed size, in which two views' sums find room; two 128 x 128 moments; their gradient: each goes round
    # the ring, (W - 1) / W twice.
    assert by_cell["default", "equal", "160"]["calls"] == "3"
    assert int(by_cell["default", "equal", "160"]["ring_bytes"]) == HEAD + 4 * 2 * 2 * 128**2
    assert int(by_cell["lightly barlow_twins", "equal", "160"]["ring_bytes"]) == 4 * 2 * 160**2
    shown = capsys.readouterr().out
    assert "fails: lightly vicreg" in shown
    distributed.main(arguments)  # nothing is left to do
    assert environment.read(tmp_path / "rows.csv") == rows
    with pytest.raises(FileNotFoundError, match=r"barlow\.py is not there: --solo-learn takes a clone"):
        distributed.solo_learn(tmp_path / "nowhere")


def test_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    assert command_line.main() == 0
    assert "demo" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmarks", "nonsense"])
    assert command_line.main() == 2
    with pytest.raises(SystemExit, match="expected NxD"):
        speed.main(["--shapes", "12"])
