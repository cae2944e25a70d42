"""The figures: their curves against independent computations, and every picture drawn once, small."""

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[bench]")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install mmi-loss[bench]")

from benchmarks import environment, figures
from tests import oracle


@pytest.mark.parametrize("order", figures.ORDERS)
def test_series_and_slope(order):
    """The series is the oracle's, its slope autograd's; even orders change sign at twice the scale."""
    x = np.linspace(0.1, 9, 50)
    # The oracle's scale is a norm of the spectrum over beta: of one eigenvalue, the eigenvalue over beta.
    for value in x:
        expected = 2 * oracle.half_sum([1], [np.array([[value - 1]])], order=order, beta=value / 3.0)
        np.testing.assert_allclose(figures.series(value, order, 3.0), expected, rtol=1e-9)
    eigenvalues, scale = torch.tensor(x, requires_grad=True), 3.0
    (gradient,) = torch.autograd.grad(figures.series(eigenvalues, order, scale).sum(), eigenvalues)
    np.testing.assert_allclose(figures.slope(x, order, scale), gradient.numpy(), rtol=1e-8, atol=1e-10)
    below, above = figures.slope(np.array([1.99 * scale, 2.01 * scale]), order, scale)
    assert below > 0
    assert (above < 0) == (order % 2 == 0)


def test_pictures(tmp_path, monkeypatch, capsys):
    """All of them, figure 4 from two runs of two steps, which are not repeated."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"BETAS": (1.0,), "REPEATS": 1, "SAMPLES": (8, 16)}.items():
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
