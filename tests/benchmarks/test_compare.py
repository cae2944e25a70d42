"""The comparison, tiny: its tasks, its grid, its tables and its report."""

import argparse
import json

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[bench]")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install mmi-loss[bench]")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install mmi-loss[bench]")

from lightly.loss import BarlowTwinsLoss, LeJEPALoss, VICRegLoss, VISRegLoss
from rich.console import Console
from scipy import stats
from sklearn.linear_model import LinearRegression

from benchmarks import compare, data, environment, evaluation, grid, report
from benchmarks.data import clutter, latent
from benchmarks.grid import Cell
from benchmarks.methods import METHODS, FastBarlowTwins, FastLeJEPA, FastVICReg, LeJEPA, VISReg

SIZES = {"NUM_TRAIN": latent.NUM_TRAIN, "NUM_TEST": latent.NUM_TEST}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder of views, of a smaller latent task: evaluation is most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent, "NUM_TRAIN", 320)
        patch.setattr(latent, "NUM_TEST", 160)
        yield tmp_path_factory.mktemp("cache")


def cell(method="mmi", seed=0, **changes):
    small = {"projector_dim": 16, "batch_size": 64, "learning_rate": 2e-3, "steps": 2}
    return Cell("latent", method, seed=seed, **{**small, **changes})


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


def test_clutter_task(cache):
    task = data.load("clutter", None, cache, quick=True)
    (view_a, view_b), labels = next(iter(task.pretrain_batches(16, seed=0)))
    assert view_a.shape == view_b.shape == (16, 3, 32, 32)
    assert labels.shape == (16,)
    assert sum(len(images) for images, _ in task.test()) == 599 * task.views_per_image


def test_latent_views_share_content_alone(cache):
    sample = latent.draw(500, 3, seed=5)
    content, nuisance = sample.factors.split([latent.CONTENT_DIM, latent.NUISANCE_DIM], dim=2)
    assert torch.equal(content[:, 0], content[:, 1])
    assert abs(np.corrcoef(nuisance[:, 0].flatten(), nuisance[:, 1].flatten())[0, 1]) < 0.03
    # The world is the same for every seed: a map learnt on one sample holds on another.
    other = latent.draw(500, 3, seed=6)
    x, y = (s.views.flatten(0, 1).numpy() for s in (sample, other))
    known = LinearRegression().fit(x, content.flatten(0, 1))
    assert known.score(y, other.factors[..., : latent.CONTENT_DIM].flatten(0, 1)) > 0.3
    task = data.load("latent", None, cache)
    images, labels = next(iter(task.train()))
    assert images.shape[1:] == (latent.OBSERVED_DIM,)
    assert len(task.factors.names) == task.factors.train.shape[1]
    assert torch.equal(labels[::2], labels[1::2])
    # Factors are in the order of the evaluated images: the images know them.
    rows = [torch.cat([images for images, _ in batches()]).numpy() for batches in (task.train, task.test)]
    r2 = LinearRegression().fit(rows[0], task.factors.train).score(rows[1], task.factors.test)
    assert r2 > 0.3


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
@pytest.mark.parametrize(("known", "fast"), [(BarlowTwinsLoss, FastBarlowTwins), (VICRegLoss, FastVICReg)])
def test_fast_baselines_are_lightlys(known, fast, shape):
    outcomes = []
    for criterion in (known(), fast()):
        generator = torch.Generator().manual_seed(0)
        z = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
        loss = criterion(0.4 * z[0] + 0.1, 0.4 * (z[0].detach() + 0.5 * z[1]))
        loss.backward()
        outcomes.append((loss.detach(), z[0].grad, z[1].grad))
    for theirs, ours in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("ours", "known"), [(LeJEPA, LeJEPALoss), (FastLeJEPA, LeJEPALoss), (VISReg, VISRegLoss)])
def test_multi_view_losses_of_two_views_are_lightlys(ours, known):
    def repeated(z_a, z_b):
        stack = torch.stack([z_a, z_b])
        return known()(local_proj=stack, global_proj=stack)

    outcomes = []
    for call in (lambda a, b: ours()(a, b), repeated):
        views = [torch.randn(32, 24, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1)]
        views[1] += 0.5 * views[0]
        torch.manual_seed(0)
        loss = call(*(z.requires_grad_() for z in views))
        loss.backward()
        outcomes.append((loss.detach(), views[0].grad, views[1].grad))
    for theirs, mine in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_grid_runs_resumes_and_survives_a_failure(cache, tmp_path):
    path = tmp_path / "grid.csv"
    wrong = cell("wmse", batch_size=16)  # W-MSE wants N >= 2 D
    wanted = [cell(), wrong, cell("half the floor", options={"snr": 128.0}), cell("untrained")]
    with pytest.raises(RuntimeError, match=r"1 of 4 cells failed:\nlatent, wmse, D=16, N=16, seed 0: ValueError"):
        grid.run(wanted, path, cache, workers=1)
    rows = environment.read(path)
    assert [row["method"] for row in rows] == ["mmi", "half the floor", "untrained"]
    assert rows[0]["knn"] != rows[2]["knn"]
    assert json.loads(rows[1]["options"]) == {"snr": 128.0}
    history, measures = json.loads(rows[0]["history"]), json.loads(rows[0]["measures"])
    assert history[-1]["step"] == 2
    assert history[-1]["mi"] > history[-1]["mi_corrected"]
    assert set(measures["factors"]) == set(latent.NAMES)
    assert 1 <= measures["features"]["effective_rank"] <= 128
    assert rows[0]["torch"]
    grid.run([cell(), cell(seed=1)], path, cache, workers=1)
    assert environment.read(path)[:3] == rows
    assert len(environment.read(path)) == 4
    assert len({c.key for c in [cell(), cell(seed=1), cell(learning_rate=1.0), cell(options={"snr": 1.0})]}) == 4


def test_grid_in_worker_processes(tmp_path, monkeypatch):
    for name, size in SIZES.items():  # the workers do not know of the smaller task
        monkeypatch.setattr(latent, name, size)
    wanted = [cell(seed=seed) for seed in range(2)]
    grid.run(wanted, tmp_path / "two.csv", tmp_path, workers=2)
    assert grid.missing(wanted, tmp_path / "two.csv") == []
    assert {row["threads"] for row in environment.read(tmp_path / "two.csv")} == {"1"}


def test_compare_runs_and_reports(cache, tmp_path, capsys):
    (tmp_path / "cache").symlink_to(cache)
    arguments = ["--tasks", "latent", "--dims", "16", "32", "--batch-sizes", "64", "--seeds", "2", "--steps", "2"]
    arguments += ["--workers", "1", "--rates", "2e-3", "--out", str(tmp_path)]
    core = ["--methods", "untrained", *compare.CORE]
    compare.main([*arguments, *core])
    rows = environment.read(tmp_path / "compare.csv")
    assert len(rows) == 2 * (1 + 2 * len(compare.CORE))
    assert {int(row["steps"]) for row in rows} == {4}
    page = (tmp_path / "compare.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in page
    assert "VICReg" in page
    shown = capsys.readouterr().out
    assert "linear probe" in shown
    for name in ("compare-map.png", "compare-steps.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "report:" in shown
    for methods in (core, ["--methods", "mmi"], ["--methods", "simclr"]):
        compare.main([*arguments, *methods, "--report"])
    assert environment.read(tmp_path / "compare.csv") == rows


def test_rates_named_are_all_run_and_the_best_reported():
    options = compare.parse(["--rates", "1e-3", "4e-3", "--tasks", "latent", "--dims", "32", "--batch-sizes", "64"])
    chosen = compare.cells(options, {}, 2)
    assert {c.learning_rate for c in chosen if c.method == "mmi"} == {1e-3, 4e-3}
    assert [c.learning_rate for c in chosen if c.method == "untrained"] == [0.0, 0.0]

    def row(method, rate, seed, score):
        return {"task": "t", "method": method, "learning_rate": rate, "seed": seed, "knn": score, "linear": score}

    best = [row("mmi", "4e-3", "0", ".6"), row("vicreg_fast", "1e-3", "0", ".7"), row("mmi", "4e-3", "1", ".4")]
    others = [row("mmi", "1e-3", "0", ".5"), row("vicreg_fast", "4e-3", "0", "nan"), row("mmi", "1e-3", "1", ".9")]
    assert report.at_best_rates([*best, *others]) == best


def test_every_method_runs(cache):
    for name in {*compare.METHODS, *compare.RIVALS, *compare.REFERENCES}:
        row = grid._run(cell(name, batch_size=64, steps=1), cache)
        assert 0 <= float(row["knn"]) <= 1, name


def test_rates_grow_until_the_best_is_inside(monkeypatch, tmp_path):
    path, peak = tmp_path / "rates.csv", 5.2e-4

    def score(cells, path, *_):
        for c in grid.missing(cells, path):
            accuracy = 1 - abs(np.log(c.learning_rate / peak)) / 20
            row = {"cell": c.key, "task": c.task, "method": c.method, "learning_rate": c.learning_rate}
            environment.append(path, {**row, "knn": accuracy, "linear": accuracy})

    monkeypatch.setattr(grid, "run", score)
    options = argparse.Namespace(methods=["mmi", "simclr"], tasks=["latent"], steps=None, out=tmp_path, workers=1)
    best = compare.tune(options, path, Console(quiet=True))
    assert best == {("latent", "mmi"): pytest.approx(1e-3), ("latent", "simclr"): pytest.approx(5e-4)}
    rows = environment.read(path)
    tried = {m: sorted(float(row["learning_rate"]) for row in rows if row["method"] == m) for m in options.methods}
    assert tried["mmi"] == pytest.approx([2.5e-4, 1e-3, 4e-3, 1.6e-2])
    assert tried["simclr"] == pytest.approx([2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 1.6e-2])


def test_cells_are_in_order_of_what_matters():
    options = compare.parse([])
    cells = compare.cells(options, {}, seeds=3)
    assert len({c.key for c in cells}) == len(cells)
    known = [c for c in cells if c.method != "untrained"]
    order = [
        (c.seed, c.method in compare.SECONDARY, c.projector_dim != 512 and c.batch_size != 256 and c.method != "wmse")
        for c in known
    ]
    assert [place[:2] for place in order] == sorted(place[:2] for place in order)
    core = [place for place in order if not place[1]]
    assert core == sorted(core)
    assert len(core) == 3 * len(compare.CORE) * len(compare.DIMS) * len(compare.BATCH_SIZES) * len(compare.TASKS)
    assert {(c.projector_dim, c.batch_size) for c in cells if c.method == "wmse"} == set(compare.WMSE_CELLS)
    for task in compare.TASKS:
        budgets = [compare.steps(task, n) for n in compare.BATCH_SIZES]
        assert budgets == sorted(budgets, reverse=True)


def test_hopeless_baselines_run_once():
    options = compare.parse(["--tasks", "latent", "--dims", "64", "--batch-sizes", "32"])
    options.methods = ["mmi", "vicreg_fast", "simclr", "barlow_twins_fast", "lejepa"]
    chosen = compare.cells(options, {}, seeds=2)
    assert compare.contenders(chosen, []) == chosen  # nothing is known yet
    scores = {"mmi": 0.9, "vicreg_fast": 0.8, "simclr": 0.76, "barlow_twins_fast": 0.74, "lejepa": float("nan")}
    first = [c for c in chosen if c.seed == 0]
    rows = [{"cell": c.key, "knn": str(scores[c.method] + 0.01), "linear": str(scores[c.method] - 0.01)} for c in first]
    further = [c.method for c in compare.contenders(chosen, rows) if c.seed == 1]
    assert further == ["mmi", "vicreg_fast", "simclr"]


def test_paired_interval_is_the_t_tests():
    rng = np.random.default_rng(0)
    a, b = (dict(enumerate(rng.normal(size=4))) for _ in range(2))
    ours = report.paired(a, {**b, 9: 1.0})
    theirs = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.95)
    assert (ours.low, ours.high, ours.seeds) == (pytest.approx(theirs.low), pytest.approx(theirs.high), 4)
    assert report.paired(a, {}) is None
    assert report.paired({0: 1.0}, {0: 0.5}).verdict == "one run"
    verdicts = [report.interval(d).verdict for d in ([0.1, 0.11, 0.12], [-0.1, -0.11, -0.12], [-1, 1])]
    assert verdicts == ["better", "worse", "tie"]


def test_report_names_best_baseline_and_red_cells():
    def row(method, seed, linear):
        values = {"task": "t", "method": method, "projector_dim": "16", "batch_size": "8", "seed": str(seed)}
        return {**values, "linear": str(linear), "knn": str(linear)}

    rows = [row("mmi", s, 0.5 + s / 100) for s in range(3)]
    rows += [row("vicreg_fast", s, 0.6 + s / 100 + s * s / 1000) for s in range(3)]
    rows += [row("simclr", 0, 0.9)]  # a single lucky seed is not the best baseline
    results = report.Results(rows)
    best, difference = results.against_best(("t", 16, 8), "linear")
    assert best == "vicreg_fast"
    assert difference.verdict == "worse"
    assert results.pooled("t", "vicreg_fast", "linear").mean == pytest.approx(difference.mean)
    assert report.spread([0.5, float("nan")]) == "diverged"


def test_latent_factors_are_found(cache):
    """Features that hold two factors and nothing else."""
    task = data.load("latent", None, cache)
    train, test = (f[:, [0, 9]] for f in (task.factors.train, task.factors.test))
    r2 = dict(zip(task.factors.names, evaluation._factor_r2(train, test, task.factors), strict=True))
    assert r2["c1"] > 0.99
    assert r2[task.factors.names[9]] > 0.99
    assert max(value for name, value in r2.items() if name.startswith("n") and name != task.factors.names[9]) < 0.05


def test_titles_are_known():
    assert all(report.title(method) for method in (*compare.METHODS, *compare.RIVALS, *compare.REFERENCES))
    assert set(compare.RIVALS) <= set(report.BASELINES) <= set(METHODS)
