"""The benchmark commands, small: they run, resume, and write what they promise."""

import sys

import pytest
import torch

pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[bench]")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install mmi-loss[bench]")

from benchmarks import __main__ as command_line
from benchmarks import demo, environment, grid, speed, timing, training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One working folder for all demos: the digits' views are drawn once."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


SMALL = ["--quick", "--steps", "3", "--dim", "32", "--batch-size", "64", "--backbone", "tiny"]


def test_demo_runs_and_resumes(folder, capsys):
    methods = ["untrained", "mmi", "barlow_twins", "vicreg", "supervised"]
    arguments = [*SMALL, "--methods", *methods]
    demo.main(arguments)
    path = folder / "runs" / "demo" / "quick.csv"
    rows = environment.read(path)
    assert [row["method"] for row in rows] == methods
    assert all(0 <= float(row["knn"]) <= 1 and 0 <= float(row["linear"]) <= 1 for row in rows)
    assert {(row["steps"], row["core"], row["own"]) for row in rows} == {("3", environment.core_digest(), "True")}
    by_method = {row["method"]: row for row in rows}
    assert 0 < float(by_method["mmi"]["loss_ms"]) < float(by_method["mmi"]["step_ms"])
    points = grid.history(by_method["mmi"])
    assert points[-1]["step"] == 3
    assert points[-1]["knn"] == float(by_method["mmi"]["knn"])
    assert path.with_name("quick-digits.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "| Barlow Twins" in shown
    assert "picture:" in shown
    # A run interrupted before its last row goes on with that row alone.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    demo.main(arguments)
    resumed = environment.read(path)
    assert [row["method"] for row in resumed] == methods
    assert resumed[:-1] == rows[:-1]
    # The same seed gives the same result.
    assert (resumed[-1]["knn"], resumed[-1]["linear"]) == (rows[-1]["knn"], rows[-1]["linear"])


@pytest.mark.usefixtures("folder")
def test_demo_says_which_rates_are_not_known():
    with pytest.raises(SystemExit, match=r"no stored rate of visreg for sgd.*python -m benchmarks rates"):
        demo.main(["--quick", "--optimizer", "sgd", "--methods", "visreg"])


@pytest.mark.parametrize(("name", "features"), [("conv", 192), ("resnet18", 512), ("resnet50", 2048)])
def test_backbones(name, features):
    backbone, dim = training.make_backbone(name, 3, 32)
    assert dim == features
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, features)
    if name != "conv":
        assert training.make_backbone(name, 3, 224)[0](torch.randn(2, 3, 64, 64)).shape == (2, features)


def test_speed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.timing.EVICTION_BYTES", 1024)
    path = tmp_path / "speed-cpu.csv"
    names = ["mmi", "mmi_all", "barlow_twins", "mmcr", "lejepa", "visreg", "slice_dim=4", "floor", "floor_reused"]
    speed.main(["--shapes", "32x16", "8x64", "--losses", *names, "--turns", "2", "--out", str(tmp_path)])
    rows = environment.read(path)
    assert [(row["loss"], row["n"], row["d"]) for row in rows] == [
        (name, n, d) for n, d in (("32", "16"), ("8", "64")) for name in names
    ]
    assert all(float(row["q1_ms"]) <= float(row["median_ms"]) <= float(row["q3_ms"]) for row in rows)
    assert all(row["core"] and row["torch"] and row["device"] and row["date"] for row in rows)
    assert "Barlow Twins" in capsys.readouterr().out
    # Measuring one shape again leaves the others as they are; solo-learn's losses come from its own files.
    solo_learn_in(tmp_path)
    again = ["--shapes", "8x64", "--losses", "mmi", "--turns", "1", "--out", str(tmp_path)]
    speed.main([*again, "--solo-learn", str(tmp_path)])
    found = environment.read(path)
    assert [row for row in found if row["n"] != "8"] == [row for row in rows if row["n"] != "8"]
    assert [row["loss"] for row in found if row["n"] == "8"] == ["mmi", "solo-learn barlow", "solo-learn vicreg"]
    assert not speed.fits("barlow_twins", 64, 32768)
    assert not speed.fits("solo-learn vicreg", 64, 32768)
    assert not speed.fits("mmi_all", 4096, 8192)
    assert speed.fits("mmi", 4096, 8192)


def test_peak_memory_counts_temporaries_not_gradients():
    leaves = [torch.randn(64, 1024, requires_grad=True) for _ in range(2)]

    def step():
        (leaves[0] * leaves[1]).sum().backward()

    # The product, its expanded gradient, and at most two products with it before they become gradients.
    peak = timing.peak_extra_bytes(step, leaves) / leaves[0].nbytes
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


def test_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    assert command_line.main() == 0
    assert "demo" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmarks", "nonsense"])
    assert command_line.main() == 2
    with pytest.raises(SystemExit):
        speed.main(["--shapes", "12"])
    assert "12: expected NxD" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        demo.main(["--methods", "vicregg"])
    assert "'vicregg' is neither options of MMILoss" in capsys.readouterr().err
