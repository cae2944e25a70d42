"""The gauntlet's verdicts, on losses with planted faults; its command, on a few cases."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[bench]")

from benchmarks import environment, gauntlet
from benchmarks.gauntlet import CASES, Contestant
from mmi_loss import MMILoss


def case(name):
    (found,) = [case for case in CASES if case.name == name]
    return found


def judge(name, criterion):
    return gauntlet.judge(case(name), Contestant("planted", "tests", lambda: criterion))


def mean_square(z_a, z_b):
    """A loss without any fault."""
    return (z_a - z_b).float().square().mean() + z_a.float().square().mean() + z_b.float().square().mean()


def hides_nan(z_a, z_b):
    return mean_square(z_a.nan_to_num(0, 0, 0), z_b.nan_to_num(0, 0, 0))


def hides_nan_in_the_gradient_alone(z_a, z_b):
    loss = mean_square(z_a.nan_to_num(0, 0, 0), z_b.nan_to_num(0, 0, 0))
    return loss + (mean_square(z_a, z_b) * 0).detach()


class Overflows(nn.Module):
    """Squares in the inputs' own dtype."""

    def forward(self, z_a, z_b):
        return (z_a - z_b).square().mean() + z_a.square().mean() + z_b.square().mean()


class Whitens(nn.Module):
    """Divides by a variance taken in the inputs' own dtype: 0 where float16 has no smaller numbers."""

    def forward(self, z_a, z_b):
        return mean_square(z_a / z_a.square().mean(), z_b / z_b.square().mean())


class ForgetsItsState(nn.Module):
    """Counts its calls, and loses the count in a checkpoint."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, z_a, z_b):
        self.calls += 1
        return mean_square(z_a, z_b) * self.calls


class WrongUnderAutocast(nn.Module):
    def forward(self, z_a, z_b):
        return mean_square(z_a, z_b) * (1.1 if torch.is_autocast_enabled("cpu") else 1.0)


class Clips(nn.Module):
    """A gradient clipped at 1: right as long as the loss is not scaled."""

    def forward(self, z_a, z_b):
        for z in (z_a, z_b):
            if z.requires_grad:
                z.register_hook(lambda grad: grad.clamp(-1, 1))
        return mean_square(z_a, z_b)


class WaitsForTheHost(nn.Module):
    def forward(self, z_a, z_b):
        loss = mean_square(z_a, z_b)
        return loss if loss.item() > 0 else -loss


def no_gradient(z_a, z_b):
    return mean_square(z_a, z_b).detach() + 0 * (z_a.sum() + z_b.sum())


@pytest.mark.parametrize("name", [c.name for c in CASES if "compile" not in c.name and c.name != "batches of 64 and 1"])
def test_faultless_loss_is_right(name):
    expected = {"N = 0": gauntlet.NAN, "batches of 64 and 32": gauntlet.REFUSED}
    assert judge(name, mean_square).kind == expected.get(name, gauntlet.RIGHT)


@pytest.mark.parametrize(
    ("name", "criterion", "kind"),
    [
        ("NaN in one element, whichever feature", hides_nan, gauntlet.SILENT),
        ("inf in one element, whichever feature", hides_nan, gauntlet.SILENT),
        ("NaN in one element, whichever feature", hides_nan_in_the_gradient_alone, gauntlet.SILENT),
        ("batches of 64 and 1", mean_square, gauntlet.SILENT),  # broadcast
        ("fp16, scale 10000", Overflows(), gauntlet.SILENT),  # an infinite loss with finite gradients
        ("fp16, scale 0.0001", Whitens(), gauntlet.NAN),
        ("checkpoint and resume", ForgetsItsState(), gauntlet.WRONG),
        ("bf16 under autocast, scale 1", WrongUnderAutocast(), gauntlet.WRONG),
        ("loss scaled by 2^24", Clips(), gauntlet.WRONG),
        ("float32, views in good health", Clips(), gauntlet.RIGHT),
        ("deterministic algorithms", lambda a, b: mean_square(a, b) * (1 + torch.rand(())), gauntlet.WRONG),
        ("N = 1", lambda a, b: mean_square(a, b) / (len(a) - 1), gauntlet.NAN),
        ("float32, views in good health", nn.Linear(192, 1), gauntlet.REFUSED),
    ],
)
def test_planted_faults(name, criterion, kind):
    assert judge(name, criterion).kind == kind


def test_errors_where_there_is_a_number_are_failures():
    def float_only(z_a, z_b):
        if z_a.dtype != z_b.dtype:
            raise RuntimeError("dtypes differ in /some/folder/of/this/machine/loss.py")
        return mean_square(z_a, z_b)

    judged = judge("fp16 and float32 views", float_only)
    assert judged.kind == gauntlet.FAILED
    assert str(judged) == "fails: RuntimeError: dtypes differ in loss.py"


def test_size_of_an_error_is_that_of_loss_or_gradient():
    def definition(z_a, z_b):
        return mean_square(z_a, z_b)

    contestant = Contestant("planted", "tests", lambda: lambda a, b: 1.25 * mean_square(a, b), lambda: definition)
    judged = gauntlet.judge(case("float32, views in good health"), contestant)
    assert judged.kind == gauntlet.WRONG
    assert judged.loss_error == pytest.approx(0.25, rel=1e-4)
    assert str(judged) == "wrong by 0.25"
    silent = Contestant("planted", "tests", lambda: no_gradient, lambda: definition)
    judged = gauntlet.judge(case("float32, views in good health"), silent)
    assert judged.loss_error < 1e-6
    assert judged.grad_error == pytest.approx(1.0)


def test_an_error_of_half_precision_that_nobody_can_avoid_is_right():
    """At scale 1e4 the exact gradients are subnormal numbers of float16."""
    judged = gauntlet.judge(case("fp16, scale 10000"), gauntlet._ours("mmi"))
    assert judged.kind == gauntlet.RIGHT
    assert judged.grad_error > 1e-3


def test_compile_notices_a_graph_break():
    judged = judge("torch.compile(fullgraph=True)", WaitsForTheHost())
    assert judged.kind == gauntlet.FAILED


def test_command(tmp_path, capsys):
    """Ours is never wrong, the rivals are named, an interrupted run goes on, and the page is written."""
    arguments = ["--out", str(tmp_path), "--only", "NaN", "N = 1", "scale 10000", "dead", "constant", "inference"]
    arguments += ["--losses", "MMI", "VICReg"]
    gauntlet.main(arguments)
    shown = capsys.readouterr().out
    assert "solo-learn skipped: no --solo-learn PATH given" in shown
    rows = environment.read(tmp_path / "gauntlet.csv")
    ours = [row for row in rows if row["library"] == "mmi-loss"]
    assert {row["verdict"] for row in ours} == {gauntlet.RIGHT, gauntlet.REFUSED}
    assert all(row["torch"] and row["lightly"] and row["commit"] for row in rows)
    vicreg = {row["case"]: row for row in rows if row["loss"] == "VICRegLoss"}
    assert vicreg["fp16, scale 10000"]["verdict"] == gauntlet.NAN
    page = (tmp_path / "gauntlet.md").read_text()
    assert "| constant embeddings | right |" in page
    lines = (tmp_path / "gauntlet.csv").read_text().splitlines(keepends=True)
    (tmp_path / "gauntlet.csv").write_text("".join(lines[:-1]))
    gauntlet.main(arguments)
    (tmp_path / "gauntlet.md").unlink()
    gauntlet.main(["--out", str(tmp_path), "--report"])
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert [line for line in (tmp_path / "gauntlet.md").read_text().splitlines() if line.startswith("|")] == table
    resumed = environment.read(tmp_path / "gauntlet.csv")
    assert [row["case"] for row in resumed] == [row["case"] for row in rows]


def test_ours_wrong_is_an_error(tmp_path, monkeypatch):
    broken = Contestant("MMI, broken", "mmi-loss", lambda: hides_nan, lambda: mean_square)
    monkeypatch.setattr(gauntlet, "CONTESTANTS", [broken])
    with pytest.raises(SystemExit, match="MMI, broken, NaN in one element, whichever feature: silent"):
        gauntlet.main(["--out", str(tmp_path), "--only", "NaN"])


def test_solo_learn_is_skipped_with_a_reason(tmp_path):
    assert gauntlet.solo_learn(tmp_path) == ([], f"{tmp_path} has no solo/losses")


def test_resume_takes_the_same_slices():
    assert gauntlet.judge(case("checkpoint and resume"), gauntlet._ours("mmi")).kind == gauntlet.RIGHT
    assert not math.isnan(MMILoss()(*gauntlet.healthy_views()).item())
