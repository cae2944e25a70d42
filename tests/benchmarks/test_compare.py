"""The grids of training runs, tiny: they run, resume, find rates, and report with honest intervals."""

import statistics

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[bench]")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install mmi-loss[bench]")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install mmi-loss[bench]")

from lightly.loss import BarlowTwinsLoss, LeJEPALoss, VICRegLoss, VISRegLoss
from scipy import stats

from benchmarks import ablate, compare, environment, grid, losses, rates, report, training
from benchmarks.data import latent
from benchmarks.training import Cell
from mmi_loss.options import Options

METHODS = [losses.UNTRAINED, losses.SUPERVISED, *losses.LOSSES, "snr=16.0,slice_dim=None"]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A working folder, with a smaller latent task: evaluation is most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent, "NUM_TRAIN", 320)
        patch.setattr(latent, "NUM_TEST", 160)
        folder = tmp_path_factory.mktemp("grid")
        patch.chdir(folder)
        yield folder


def cell(method="mmi", seed=0, **changes):
    small = {"projector_dim": 16, "batch_size": 64, "learning_rate": 2e-3, "steps": 2, "backbone": "mlp"}
    return Cell("latent", method, seed=seed, **{**small, **changes})


def outcome(criterion, views):
    torch.manual_seed(0)
    leaves = [z.clone().requires_grad_() for z in views]
    loss = criterion(*leaves)
    loss.backward()
    return loss.detach(), leaves[0].grad, leaves[1].grad


def lightlys_lejepa(z_a, z_b):
    stack = torch.stack([z_a, z_b])
    return LeJEPALoss()(local_proj=stack, global_proj=stack)


def lightlys_visreg(z_a, z_b):
    stack = torch.stack([z_a, z_b])
    return VISRegLoss(0.6)(local_proj=stack, global_proj=stack)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
@pytest.mark.parametrize(
    ("known", "name"),
    [
        (BarlowTwinsLoss(), "barlow_twins"),
        (VICRegLoss(), "vicreg"),
        (lightlys_lejepa, "lejepa"),
        (lightlys_visreg, "visreg"),
    ],
)
def test_rivals_are_lightlys(known, name, shape):
    """In the form of training runs, which is a faster one for some."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    views = 0.4 * a + 0.1, 0.4 * (a + 0.5 * b)
    for theirs, ours in zip(
        outcome(known, views), outcome(losses.LOSSES[name].criterion(fast=True), views), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_every_method_runs(folder):
    grid.run([cell(method, steps=1) for method in METHODS], folder / "every.csv")
    rows = environment.read(folder / "every.csv")
    assert [row["method"] for row in rows] == METHODS
    assert all(0 <= float(row["knn"]) <= 1 and row["core"] == environment.core_digest() for row in rows)
    assert all(float(row["linear"]) > 0.1 for row in rows)


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_optimizers_move_the_weights(optimizer, folder):
    task = grid.data.load("latent", folder / "runs" / "cache")
    found = [training.pretrain(task, cell(optimizer=optimizer, learning_rate=r, steps=4)).linear for r in (0.0, 0.3)]
    assert found[0] != found[1]


def test_grid_runs_resumes_and_survives_a_failure(folder):
    path = folder / "grid.csv"
    wanted = [cell(), cell("mmi_joint", backbone="no such"), cell("snr=128.0"), cell("untrained")]
    with pytest.raises(RuntimeError, match=r"1 of 4 cells failed:\nlatent, mmi_joint, D=16, N=64"):
        grid.run(wanted, path)
    rows = environment.read(path)
    assert [row["method"] for row in rows] == ["mmi", "snr=128.0", "untrained"]
    assert grid.history(rows[0])[-1]["step"] == 2
    grid.run([cell(), cell(seed=1)], path)
    assert environment.read(path)[:3] == rows
    assert len(environment.read(path)) == 4


def test_a_key_changes_with_every_field_and_with_the_defaults(monkeypatch):
    cells = [cell(), cell(seed=1), cell(learning_rate=1.0), cell("snr=1.0"), cell("vicreg"), cell(optimizer="sgd")]
    before = [c.key for c in cells]
    assert len(set(before)) == len(cells)
    given = Options.given
    monkeypatch.setattr(Options, "given", lambda self: {**given(self), "snr": 256.0})
    changed = [c.key != key for c, key in zip(cells, before, strict=True)]
    assert changed == [True, True, True, True, False, True]  # VICReg has none of them


def test_grid_in_worker_processes(folder, monkeypatch):
    """One cell, so one of them: to start it takes longer than all else."""
    monkeypatch.setattr(latent, "NUM_TRAIN", 2048)  # the workers do not know of the smaller task
    monkeypatch.setattr(latent, "NUM_TEST", 1024)
    grid.run([cell()], folder / "two.csv", grid.Means(workers=2, cache=folder / "large"))
    (row,) = environment.read(folder / "two.csv")
    assert (row["cell"], row["threads"]) == (cell().key, "1")


def test_compare_runs_and_reports(folder, capsys):
    arguments = ["--tasks", "latent", "--dims", "16", "32", "--batch-sizes", "64", "--seeds", "2", "--steps", "2"]
    arguments += ["--rates", "2e-3", "--methods", "untrained", "mmi", "vicreg", "simclr"]
    compare.main(arguments)
    out = folder / "runs" / "compare"
    rows = environment.read(out / "compare.csv")
    assert len(rows) == 2 * (1 + 2 * 3)
    assert {int(row["steps"]) for row in rows} == {4}
    shown = capsys.readouterr().out
    assert "MMI less the best rival" in shown
    assert f"core {environment.core_digest()}" in shown
    for name in ("compare-map.png", "compare-steps.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    compare.main([*arguments, "--report"])
    assert environment.read(out / "compare.csv") == rows


def test_ablation_is_against_the_default(folder):
    def row(method, seed, score, n="256"):
        sizes = {"projector_dim": "512", "batch_size": n}
        return {"task": "t", "method": method, "seed": str(seed), "knn": str(score), "linear": str(score), **sizes}

    rows = [row("mmi", seed, 0.6 + 0.1 * seed) for seed in (0, 1)] + [row("mmi", 0, 0.3, n="32")]
    rows += [row("snr=4.0", 0, 0.65), row("snr=4.0", 1, 0.77), row("snr=9.0", 0, 0.5), row("snr=4.0", 0, 0.4, n="32")]
    lines = ablate.table(rows).splitlines()
    half = stats.t.ppf(0.975, 1) * statistics.stdev([0.05, 0.07])
    assert f"+0.060 ± {half / 2**0.5:.3f} (2)" in lines[2]
    assert f"-0.100 ± {half:.3f} (1)" in lines[3]
    assert "+0.100" in lines[4]
    assert len(lines) == 5
    ablate.main(["--tasks", "latent", "--methods", "snr=16", "--seeds", "1", "--steps", "1", "--dims", "16"])
    assert [row["method"] for row in environment.read(folder / "runs" / "ablate" / "ablate.csv")] == ["mmi", "snr=16"]


def test_rates_grow_until_the_best_is_inside(monkeypatch, tmp_path):
    path, peak = tmp_path / "rates.csv", 5.2e-4

    def score(cells, path, *_):
        for c in grid.missing(cells, path):
            accuracy = 1 - abs(np.log(c.learning_rate / peak)) / 20
            row = {
                "cell": c.key,
                "task": c.task,
                "method": c.method,
                "learning_rate": c.learning_rate,
                "optimizer": "adamw",
            }
            environment.append(path, {**row, "knn": accuracy, "linear": accuracy})

    monkeypatch.setattr(grid, "run", score)
    options = compare.argparse.Namespace(methods=["mmi", "simclr"], tasks=["latent"], steps=None)
    best = compare.tune(options, path, grid.Means())
    assert best == {("latent", "mmi"): pytest.approx(1e-3), ("latent", "simclr"): pytest.approx(5e-4)}
    rows = environment.read(path)
    tried = {m: sorted(float(row["learning_rate"]) for row in rows if row["method"] == m) for m in options.methods}
    assert tried["mmi"] == pytest.approx([2.5e-4, 1e-3, 4e-3, 1.6e-2])
    assert tried["simclr"] == pytest.approx([2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 1.6e-2])
    assert "0.00025 to 0.001" in rates.table(rows).splitlines()[2] or "edge" not in rates.table(rows)
    assert "(edge)" in rates.table([row for row in rows if float(row["learning_rate"]) >= 1e-3])


def test_rates_named_are_all_run_and_the_best_reported():
    def row(method, rate, seed, score):
        return {"task": "t", "method": method, "learning_rate": rate, "seed": seed, "knn": score, "linear": score}

    best = [row("mmi", "4e-3", "0", ".6"), row("vicreg", "1e-3", "0", ".7"), row("mmi", "4e-3", "1", ".4")]
    others = [row("mmi", "1e-3", "0", ".5"), row("vicreg", "4e-3", "0", "nan"), row("mmi", "1e-3", "1", ".9")]
    assert compare.at_best_rates([*best, *others]) == best


def test_paired_interval_is_the_t_tests():
    rng = np.random.default_rng(0)
    a, b = (dict(enumerate(rng.normal(size=4))) for _ in range(2))
    ours = report.paired(a, {**b, 9: 1.0})
    theirs = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.95)
    assert (ours.mean - ours.half, ours.mean + ours.half) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
    assert ours.seeds == 4
    assert report.paired(a, {}) is None
    assert not report.paired({0: 1.0}, {0: 0.5}).is_clear
    assert [report.interval(d).is_clear for d in ([0.1, 0.11, 0.12], [-0.1, -0.11, -0.12], [-1, 1])] == [
        True,
        True,
        False,
    ]


def test_best_rival_has_as_many_seeds_as_any():
    def row(method, seed, linear):
        values = {"task": "t", "method": method, "projector_dim": "16", "batch_size": "8", "seed": str(seed)}
        return {**values, "linear": str(linear), "knn": str(linear)}

    rows = [row("mmi", s, 0.5 + s / 100) for s in range(3)]
    rows += [row("vicreg", s, 0.6 + s / 100 + s * s / 1000) for s in range(3)]
    rows += [row("simclr", 0, 0.9)]  # a single lucky seed is not the best rival
    best, difference = report.Results(rows).against_best(("t", 16, 8), "linear")
    assert best == "vicreg"
    assert difference.is_clear
    assert difference.mean < 0
    assert report.spread([0.5, float("nan")]) == "diverged"
