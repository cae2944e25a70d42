"""The ablation: its runs, the estimators it alone has, its report."""

import itertools
import statistics

import pytest
import torch

pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[bench]")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install mmi-loss[bench]")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install mmi-loss[bench]")

from scipy import stats
from sklearn import covariance as sklearn_covariance

from benchmarks import ablate, environment, grid, series
from benchmarks.data import latent
from benchmarks.estimators import (
    INTENSITIES,
    SCALES,
    Annealed,
    CrossFitted,
    Plain,
    Queue,
    Rescaled,
    Running,
    Shrunk,
    Weighted,
)
from mmi_loss import MMILoss
from tests.conftest import views

pytestmark = pytest.mark.filterwarnings("ignore:objective=")
OBJECTIVES = ("content", "joint")
REPORTED = ("objective", "snr", "snr x slice_dim")


def gradients(criterion, n=48, dim=24):
    z_a, z_b = views(n, dim)
    loss = criterion(z_a, z_b)
    return loss.detach(), *torch.autograd.grad(loss, (z_a, z_b))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("slice_dim", [8, None])
@pytest.mark.parametrize(
    "estimator",
    [
        Plain,
        lambda **o: Running(0.0, **o),
        lambda **o: Shrunk(0.0, **o),
        lambda **o: Queue(0, **o),
        lambda **o: Annealed(64.0, 64.0, 10, **o),
    ],
)
def test_limits_are_the_products_loss(estimator, slice_dim, objective):
    options = {"objective": objective, "slice_dim": slice_dim}
    for ours, exact in zip(gradients(estimator(**options)), gradients(MMILoss(**options)), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-10)


def test_cross_fitting_of_equal_halves_is_the_loss():
    pair = [z.detach().repeat_interleave(2, 0).requires_grad_() for z in views(24, 12)]
    ours, exact = (torch.autograd.grad(criterion(*pair), pair) for criterion in (CrossFitted(), MMILoss()))
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-10)
    pair = views(24, 12)
    torch.testing.assert_close(CrossFitted()(*pair), MMILoss()(*pair), rtol=1e-10, atol=0)
    different = (torch.autograd.grad(criterion(*pair), pair)[0] for criterion in (CrossFitted(), MMILoss()))
    assert not torch.allclose(*different)


def test_queue_holds_the_past_as_constants():
    criterion, batches = Queue(2, slice_dim=6), [views(16, 8, seed=s) for s in range(4)]
    for batch in batches:
        loss = criterion(*batch)
    # On the last step's slice: its batch and the two before it.
    whole = [torch.cat(views) for views in zip(*batches[:0:-1], strict=True)]
    exact = Plain(slice_dim=6)
    exact.step += 3
    torch.testing.assert_close(loss, exact(*whole), rtol=1e-10, atol=0)
    loss.backward()
    assert batches[3][0].grad.any()
    assert batches[2][0].grad is None


def test_noise_floor_moves():
    pair, criterion = views(32, 8), Annealed(4.0, 64.0, steps=2)
    losses = [criterion(*pair) for _ in range(4)]
    expected = [MMILoss(snr=snr)(*pair) for snr in (4.0, 16.0, 64.0, 64.0)]
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)


def test_weight_of_the_nuisance():
    pair = views(32, 8)
    halves = [Weighted(w)(*pair) for w in (0.0, 1.0, 2.0)]
    torch.testing.assert_close(halves[1], MMILoss()(*pair), rtol=1e-10, atol=0)
    torch.testing.assert_close(halves[2] - halves[1], halves[1] - halves[0], rtol=1e-8, atol=0)
    assert not torch.isclose(halves[0], halves[1])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("order", [1, 4, 5])
def test_common_scale_is_the_shipped_series(order, objective):
    options = {"order": order, "beta": 0.8, "objective": objective, "slice_dim": 8}
    shipped = gradients(MMILoss(logdet="taylor", **options))
    for ours, theirs in zip(gradients(Rescaled("common", **options)), shipped, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_converges_to_the_exact_loss(scale):
    # Weak dependence: the unscaled series needs a spectrum below 2.
    z_a, z_b = torch.randn(2, 1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = Plain(ridge=0.3)(z_a, z_b)
    torch.testing.assert_close(Rescaled(scale, order=300, ridge=0.3)(z_a, z_b), exact, rtol=1e-6, atol=1e-9)
    assert abs(Rescaled(scale, order=1, ridge=0.3)(z_a, z_b) - exact) > 1e-6


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: Running(0.7, **o),
        *(lambda name=name, **o: Shrunk(name, **o) for name in INTENSITIES),
        *(lambda scale=scale, **o: Rescaled(scale, order=3, **o) for scale in SCALES if scale != "detached"),
    ],
)
def test_gradients(make, objective):
    criterion = make(objective=objective, slice_dim=3)
    criterion(*(z.detach() for z in views(20, 6, seed=1)))  # a past
    criterion.eval()
    assert torch.autograd.gradcheck(criterion, views(20, 6), fast_mode=True)


def test_detached_scale_has_no_gradient_of_its_own():
    with_gradient, without = (gradients(Rescaled(scale)) for scale in ("common", "detached"))
    assert with_gradient[0] == without[0]
    assert not torch.allclose(with_gradient[1], without[1])


@pytest.mark.parametrize("name", INTENSITIES)
def test_shrinkage_is_scikit_learns(name):
    x = views(30, 20)[0].detach()
    x = x - x.mean(0)
    theirs = {"ledoit_wolf": sklearn_covariance.ledoit_wolf_shrinkage, "oas": None}[name]
    expected = (
        theirs(x.numpy(), assume_centered=True)
        if theirs
        else sklearn_covariance.oas(x.numpy(), assume_centered=True)[1]
    )
    assert 0 < expected < 1
    assert float(INTENSITIES[name](x)) == pytest.approx(expected, rel=1e-10)
    # Shrunk all the way, the views are independent.
    assert abs(float(Shrunk(1.0)(*views(30, 20)).detach())) < 1e-12


def test_momentum_averages_the_past_as_a_constant():
    criterion, batches = Running(0.6, slice_dim=4), [views(32, 8, seed=s) for s in (0, 1)]
    moments = []
    for batch in batches:
        alone = Running(0.0, slice_dim=4)
        alone(*batch)
        moments.append(alone.average)
        criterion(*batch)
    expected = (0.6 * 0.4 * moments[0] + 0.4 * moments[1]) / (1 - 0.6**2)
    torch.testing.assert_close(criterion.average / criterion.weight, expected, rtol=1e-6, atol=0)
    loss = criterion.eval()(*batches[1])
    loss.backward()
    assert batches[1][0].grad.any()
    assert batches[0][0].grad is None
    assert set(criterion.state_dict()) == {"step", "average", "weight"}


def test_cells_are_unique_and_every_setting_makes_a_loss():
    options = ablate.parse([])
    cells = ablate.cells(list(ablate.STUDIES), options)
    assert len({cell.key for cell in cells}) == len(cells)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    for study in ablate.STUDIES.values():
        assert {setting.reference.title for setting in study if setting.options} <= {setting.title for setting in study}
    z_a, z_b = views(64, 160, dtype=torch.float32)
    for criterion in {cell.method: cell.criterion()(False) for cell in cells}.values():
        assert criterion(z_a, z_b).isfinite()
    # An option that names the default is the default.
    assert ablate._mmi(snr=64.0, objective="content") == ablate.DEFAULT


def test_estimators_run_in_the_grid(tmp_path, monkeypatch):
    monkeypatch.setattr(latent, "NUM_TRAIN", 320)
    monkeypatch.setattr(latent, "NUM_TEST", 160)
    arguments = ["--tasks", "latent", "--only", "num_slices", "--seeds", "1", "--steps", "1", "--rate", "1e-3"]
    studies = {"num_slices": [ablate.DEFAULT, ablate._estimator("running", momentum=0.5)]}
    monkeypatch.setattr(ablate, "STUDIES", {**ablate.STUDIES, **studies})
    monkeypatch.setattr(ablate, "BATCH_SIZE", 64)
    ablate.main([*arguments, "--workers", "1", "--out", str(tmp_path)])
    rows = environment.read(tmp_path / "ablate.csv")
    assert [row["method"] for row in rows] == ["untrained", "mmi", "running, momentum=0.5"]
    monkeypatch.setattr(grid, "_run", lambda *_: pytest.fail("a finished run was repeated"))
    ablate.main([*arguments, "--workers", "1", "--out", str(tmp_path)])
    assert environment.read(tmp_path / "ablate.csv") == rows


@pytest.fixture
def finished(tmp_path):
    """Results of some studies on two seeds of one task: the default .6 and .7, any other by 0.05 and 0.07 better."""
    arguments = ["--tasks", "latent", "--seeds", "2", "--rate", "1e-3", "--out", str(tmp_path), "--only", *REPORTED]
    options = ablate.parse([*arguments, *ablate.SERIES])
    for cell in ablate.cells(REPORTED, options):
        accuracy = 0.6 + 0.1 * cell.seed
        if (cell.method, cell.projector_dim, cell.batch_size) != ("mmi", ablate.DIM, ablate.BATCH_SIZE):
            accuracy += 0.05 + 0.02 * cell.seed
        row = {"cell": cell.key, "task": cell.task, "method": cell.method, "seed": cell.seed}
        environment.append(tmp_path / "ablate.csv", {**row, "knn": accuracy, "linear": accuracy})
    names = ("embedding", "objective", "features", "order", "beta")
    for place in itertools.product(
        ("step 1", "step 100"), series.OBJECTIVES, (32, 128, 512), series.ORDERS, series.BETAS
    ):
        row = {"task": "latent", **dict(zip(names, place, strict=True)), "exact": 2.0}
        row |= {"nats": 0.3 * row["order"], "bound": row["order"] < 6}
        environment.append(tmp_path / "series.csv", row)
    for order in (0, *series.ORDERS):
        row = {"n": 8, "order": order, "median_ms": 1.0 + order, "ratio": 1.0 + order, "noisy": order == 3}
        environment.append(tmp_path / "series-times.csv", row)
    return options, [*arguments, *ablate.SERIES, "--report"]


def test_report(finished, capsys, monkeypatch):
    options, arguments = finished
    monkeypatch.setenv("COLUMNS", "160")
    ablate.main(arguments)
    shown = capsys.readouterr().out
    assert shown.count("objective=joint") == 3
    assert f"0 of {2 * 3 * 3 * 5 * len(series.BETAS)} bounds violated" in shown
    for name in ("ablate", "ablate-maps", "ablate-series"):
        assert (options.out / f"{name}.png").stat().st_size > 5000
    results = ablate.Results(environment.read(options.out / "ablate.csv"), options)
    effect = results.effect("snr=4.0", "latent")
    others = len({s.title for name in REPORTED for s in ablate.STUDIES[name]}) - 1
    half = stats.t.ppf(0.975, others) * statistics.stdev([0.05, 0.07]) / 2**0.5
    assert (effect.mean, effect.half, effect.seeds) == (pytest.approx(0.06), pytest.approx(half), 2)
    assert effect.style == "green"
    assert str(effect) == f"+0.060 ± {half:.3f}"
    assert results.effect("default", "latent") is None


def test_series_is_a_bound_where_it_says_so(monkeypatch):
    monkeypatch.setattr(series, "SLICE_DIMS", (None,))

    def rows_of(pair):
        rows = [{name: str(value) for name, value in row.items()} for row in series.values(*pair)]
        assert len(rows) == 3 * len(series.ORDERS) * len(series.BETAS)
        return rows

    # In one dimension the spectrum can lie above the scale altogether: elsewhere than claimed it is no bound.
    one, many = (rows_of([z.detach() for z in views(256, dim, noise=noise)]) for dim, noise in ((1, 4.0), (12, 0.7)))
    assert series.violations(one) == series.violations(many) == []
    assert series.violations([{**row, "bound": "True"} for row in one])


def test_times_are_relative_to_cholesky():
    rows = list(series.times(8, turns=2, seconds=1e-3))
    assert [row["order"] for row in rows] == [0, *series.ORDERS]
    assert rows[0]["ratio"] == 1
    assert all(row["ratio"] == pytest.approx(row["median_ms"] / rows[0]["median_ms"], rel=0.05) for row in rows)
