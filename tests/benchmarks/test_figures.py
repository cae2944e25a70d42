"""The figures: their curves against independent computations, and every picture drawn once, small."""

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[bench]")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install mmi-loss[bench]")

from benchmarks import environment, figures
from mmi_loss import reference


@pytest.mark.parametrize("order", figures.ORDERS)
def test_series_and_slope(order):
    """The series is that of the loss's oracle, its slope autograd's; even orders change sign at twice the scale."""
    eigenvalues = torch.linspace(0.1, 9, 50, dtype=torch.float64, requires_grad=True)
    scale = 3.0
    matrices = eigenvalues[:, None, None]
    expected = reference._series(matrices, torch.full_like(eigenvalues, scale), order)
    (gradient,) = torch.autograd.grad(expected.sum(), eigenvalues)
    x = eigenvalues.detach().numpy()
    np.testing.assert_allclose(figures.series(x, order, scale), expected.detach().numpy(), rtol=1e-10)
    np.testing.assert_allclose(figures.slope(x, order, scale), gradient.numpy(), rtol=1e-8, atol=1e-10)
    below, above = figures.slope(np.array([1.99 * scale, 2.01 * scale]), order, scale)
    assert below > 0
    assert (above < 0) == (order % 2 == 0)


@pytest.mark.parametrize("objective", ["joint", "exchangeable", "content"])
def test_spurious_information_is_what_the_loss_shows(objective):
    n, dim = 20, 8
    mean, error = figures.simulate(n, dim, 150, objective=objective, slice_dim=None, ridge=figures.NO_FLOOR)
    assert error < 0.1 * mean
    assert figures.spurious(objective, n, dim) == pytest.approx(mean, abs=4 * error)


@pytest.mark.parametrize("kind", ["gaussian", "kronecker", "coordinates"])
def test_spurious_information_of_a_slice_is_that_of_its_dimension(kind):
    """Whatever the width it was cut from."""
    mean, error = figures.simulate(48, 64, 40, objective="joint", slice_dim=8, slice_kind=kind, ridge=figures.NO_FLOOR)
    assert figures.spurious("joint", 48, 8) == pytest.approx(mean, abs=4 * error)


def test_pictures(tmp_path, monkeypatch, capsys):
    """All of them, figure 4 from two runs of two steps, which are not repeated."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"BETAS": (1.0,), "REPEATS": 2, "SLICED_DIM": 24, "SLICE_DIM": 8, "SAMPLES": (40, 60)}.items():
        monkeypatch.setattr(figures, name, value)
    arguments = ["--seeds", "1", "--steps", "2", "--tasks", "latent"]
    figures.main(arguments)
    out = tmp_path / "runs" / "figures"
    assert {path.stem for path in out.glob("*.png")} == {f"figure-{name}" for name in figures.FIGURES}
    rows = environment.read(out / "figure4.csv")
    assert [row["method"].rpartition(",")[2] for row in rows] == ["beta=1.0", "slice_dim=None"]
    figures.main(["--only", "4", *arguments])
    assert environment.read(out / "figure4.csv") == rows
    assert "figure-spurious.png" in capsys.readouterr().out
