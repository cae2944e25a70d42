"""The commands meant for a GPU, small and on the CPU: they run, check before they time, and write what they promise."""

import csv

import pytest
import torch

pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[bench]")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install mmi-loss[bench]")
pytest.importorskip("triton", reason="triton is not installed: it comes with torch's Linux wheels")

from rich.console import Console

from benchmarks import speed, speed_cuda, step

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@no_gpu
@pytest.mark.parametrize("command", [speed, step])
def test_no_device_no_numbers(command, tmp_path):
    out = tmp_path / "out.csv"
    with pytest.raises(SystemExit, match="nothing was measured"):
        command.main(["--device", "cuda", "--out", str(out)])
    assert not out.exists()


@no_gpu
def test_speed_checks_then_times(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_cuda, "COMPILED", {})

    def fail(n, dim):
        raise ValueError("needs more memory than there is")

    monkeypatch.setitem(speed_cuda.LOSSES, "corinfomax", fail)
    out = tmp_path / "speed.csv"
    speed_cuda.run([(8, 40)], ["barlow_twins", "corinfomax"], 2, out, torch.device("cpu"), Console(quiet=True))
    checks = rows_of(tmp_path / "speed-checks.csv")
    assert [(row["loss"], row["precision"], row["passed"]) for row in checks] == [
        (loss, precision, "True") for precision in ("float32", "bf16") for loss in ("mmi", "mmi_eager")
    ]
    rows = rows_of(out)
    assert [row["loss"] for row in rows] == 2 * ["mmi", "mmi_eager", "barlow_twins", "corinfomax"]
    for row in rows:
        if row["loss"] == "corinfomax":
            assert row["failure"] == "ValueError: needs more memory than there is"
            assert row["median_ms"] == ""
        else:
            assert 0 < float(row["q1_ms"]) <= float(row["median_ms"]) <= float(row["q3_ms"])
            assert float(row["of_copy_rate"]) > 0
            assert row["graph_ms"] == row["launches"] == ""  # there are none on a CPU
            assert row["torch"]
            assert row["device"]


@no_gpu
def test_a_wrong_kernel_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_cuda, "COMPILED", {})
    exact = speed_cuda.MMILoss.forward

    def wrong(self, z_a, z_b):
        return exact(self, z_a, z_b) * (1.001 if self.options.impl == "triton" else 1)

    monkeypatch.setattr(speed_cuda.MMILoss, "forward", wrong)
    out = tmp_path / "speed.csv"
    speed_cuda.run([(12, 20)], [], 2, out, torch.device("cpu"), Console(quiet=True))
    passed = {(row["loss"], row["precision"]): row["passed"] for row in rows_of(tmp_path / "speed-checks.csv")}
    assert passed["mmi", "float32"] == "False"
    assert passed["mmi_eager", "float32"] == "True"
    assert ("mmi", "float32") not in {(row["loss"], row["precision"]) for row in rows_of(out)}


def test_share_of_a_step(tmp_path, capsys):
    out = tmp_path / "step.csv"
    small = ["--backbones", "conv", "--batch-sizes", "8", "--projector-dims", "32", "--image-size", "16"]
    step.main([*small, "--device", "cpu", "--steps", "2", "--out", str(out)])
    rows = rows_of(out)
    assert [row["method"] for row in rows] == ["mmi", "barlow_twins", "vicreg"]
    for row in rows:
        assert 0 < float(row["loss_ms"]) < float(row["step_ms"])
        assert 0 < float(row["loss_share"]) < 1
        assert row["failure"] == ""
    assert "share of the step" in capsys.readouterr().out
