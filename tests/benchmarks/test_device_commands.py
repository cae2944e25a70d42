"""The commands meant for a GPU, small and on the CPU: they run, check before they time, and write what they promise."""

import csv
import math

import pytest
import torch

pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[bench]")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install mmi-loss[bench]")
pytest.importorskip("triton.knobs", reason="the kernels need Triton 3.4, of torch 2.8 and later, on Linux")

from benchmarks import speed_cuda

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
CPU = torch.device("cpu")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@no_gpu
def test_no_device_no_numbers(tmp_path):
    out = tmp_path / "out.csv"
    with pytest.raises(SystemExit, match="nothing was measured"):
        speed_cuda.main(["--out", str(out)])
    assert not out.exists()


@no_gpu
def test_dry_run_checks_and_compiles_and_times_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed_cuda, "SMALL_CHECKS", [(16, 140, {}), (17, 13, {"slice_dim": None})])
    monkeypatch.setattr(speed_cuda, "PROBLEMS", ["256x2048-all"])
    monkeypatch.setattr(speed_cuda, "_times", None)
    speed_cuda.main(["--dry-run", "--out", str(tmp_path / "speed.csv")])
    checks = rows_of(tmp_path / "speed-checks.csv")
    assert [(row["d"], row["precision"]) for row in checks] == [
        (dim, precision) for dim in ("140", "13") for precision in ("bf16", "float32", "fp16")
    ]
    for row in checks:
        assert row["passed"] == "True"
        assert float(row["grad_b_error"]) < 0.02
        assert row["triton"]
    assert not (tmp_path / "speed.csv").exists()
    printed = capsys.readouterr().out
    assert "not measured: no GPU" in printed
    assert printed.count("_gram_backward_kernel") == 2  # for compute capabilities 9.0 and 10.0


@no_gpu
def test_a_wrong_kernel_fails_the_run(tmp_path, monkeypatch):
    exact = speed_cuda.MMILoss.forward

    def wrong(self, z_a, z_b):
        return exact(self, z_a, z_b) * (1.001 if self.options.impl == "triton" else 1)

    monkeypatch.setattr(speed_cuda.MMILoss, "forward", wrong)
    monkeypatch.setattr(speed_cuda, "SMALL_CHECKS", [(12, 20, {"slice_dim": None})])
    monkeypatch.setattr(speed_cuda, "compile_ahead_of_time", lambda: None)
    with pytest.raises(SystemExit, match="of 3 checks of the kernels failed"):
        speed_cuda.main(["--dry-run", "--out", str(tmp_path / "speed.csv")])


def test_measures_of_one_loss(monkeypatch):
    """All but the clock, the profiler and the capture, which need a device."""
    monkeypatch.setattr(speed_cuda, "_times", lambda step: [step() or 0.002] * 3)
    monkeypatch.setattr(speed_cuda, "_launches_and_memory", lambda step, leaves: {"launches": "5"})
    monkeypatch.setattr(torch, "compile", lambda criterion: criterion)
    for name in speed_cuda.NAMES[1:]:
        row = speed_cuda.measure(name, "compiled", 8, 40, torch.float32, 1e9, CPU)
        assert row["failure"] == ""
        assert (row["q1_ms"], row["median_ms"], row["launches"]) == ("2", "2", "5")
        assert float(row["of_copy_rate"]) == pytest.approx(4 * 8 * 40 * 4 / 0.002 / 1e9, rel=0.01)
    if not torch.cuda.is_available():
        row = speed_cuda.measure("mmi_eager", "graph", 8, 40, torch.float32, 1e9, CPU)
        assert row["failure"]
        assert row["median_ms"] == ""


def test_an_interrupted_run_continues_and_ratios_follow(tmp_path, monkeypatch):
    measured = []

    def measure(name, mode, n, dim, *_):
        measured.append((name, mode, n, dim))
        row = dict.fromkeys(speed_cuda.MEASURES, "")
        return {**row, "median_ms": {"mmi_triton": "2", "vicreg": "3"}.get(name, "8")}

    monkeypatch.setattr(speed_cuda, "measure", measure)
    monkeypatch.setattr(speed_cuda, "bytes_per_second_of_a_copy", lambda: 1e12)
    out, place = tmp_path / "speed.csv", {"device": "a card", "date": "today"}
    for deadline, losses in ((-math.inf, []), (math.inf, ["mmi_triton"]), (math.inf, list(speed_cuda.NAMES))):
        speed_cuda.measure_all(losses or list(speed_cuda.NAMES), deadline, place, out, CPU)
    cells = len(speed_cuda.MODES) * len(speed_cuda.SHAPES) * len(speed_cuda.TIMED_DTYPES)
    assert len(measured) == len(rows_of(out)) == cells * len(speed_cuda.NAMES)
    ratios = speed_cuda.decision(rows_of(out))
    assert len(ratios) == cells
    for row in ratios:
        assert (row["mmi_eager"], row["vicreg"], row["fastest rival"]) == ("4", "1.5", "vicreg")
