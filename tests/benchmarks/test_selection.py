"""The selection study: its correlations against scipy, its runs small; and the doctor's page of other losses."""

import numpy as np
import pytest
from scipy.stats import spearmanr

pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[bench]")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install mmi-loss[bench]")

from benchmarks import doctor, environment, selection
from mmi_loss import MMILoss


def rows(count=24, seed=0):
    """Runs whose measures are noise, but that one is the accuracy, one its opposite, and one diverged."""
    generator, found = np.random.default_rng(seed), []
    for index, (task, method) in enumerate([(t, m) for t in ("one", "two") for m in ("mmi", "simclr")] * (count // 4)):
        values = generator.normal(size=len(selection.MEASURES))
        knn = generator.uniform()
        row = {"task": task, "method": method, "knn": knn, "linear": knn + 0.1 * generator.normal()}
        row |= dict(zip(selection.MEASURES, values, strict=True))
        row |= {"features_lidar": np.exp(knn), "features_rank_me": -knn, "projections_alpha_req": 1 + abs(knn - 1)}
        found.append({name: str(value) for name, value in row.items()} | {"seed": str(index)})
    return [*found, {**found[0], "knn": "nan", "linear": "nan"}]


def test_correlations_are_scipys():
    data = rows()
    found = {(f["measure"], f["accuracy"]): f for f in selection.correlations(data, ("task",), draws=50)}
    groups = [[row for row in data[:-1] if row["task"] == task] for task in ("one", "two")]
    for measure in ("features_lidar", "minus_loss", "projections_lidar"):
        for accuracy in selection.ACCURACIES:
            each = [
                spearmanr([float(r[measure]) for r in group], [float(r[accuracy]) for r in group])[0]
                for group in groups
            ]
            one = found[measure, accuracy]
            assert one["correlation"] == pytest.approx(np.mean(each))
            assert one["worst"] == pytest.approx(min(each))
            assert one["low"] <= one["correlation"] <= one["high"]
            assert (one["runs"], one["groups"]) == (24, 2)


def test_what_misleads_is_named():
    verdicts = {(one["question"], one["measure"]): one["verdict"] for one in selection.summarise(rows(48))}
    for question in selection.QUESTIONS:
        assert verdicts[question, "features_lidar"] == "trust"
        assert verdicts[question, "projections_alpha_req"] == "trust"  # the nearer to 1 the better
        assert verdicts[question, "features_rank_me"] == "misleads"
        assert verdicts[question, "projections_lidar"] == ""
    assert ("across methods", "minus_loss") not in verdicts


def test_runs_resume_and_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(selection, "IMAGES", 128)
    monkeypatch.setattr(selection, "SIZES", ((16, 64),))
    monkeypatch.setattr(selection, "RATES", (5e-4, 2e-3, 8e-3))
    path = tmp_path / "selection.csv"
    arguments = ["--rows", str(path), "--tasks", "latent", "--methods", "mmi", "simclr", "--cache", str(tmp_path)]
    selection.main(arguments)
    finished = environment.read(path)
    assert len(finished) == 6
    assert all(float(row["features_rank_me"]) > 1 and 0 < float(row["knn"]) < 1 for row in finished)
    assert all(row["core"] == environment.core_digest() for row in finished)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    selection.main(arguments)
    assert [row["rate"] for row in environment.read(path)] == [row["rate"] for row in finished]
    assert "across methods: 6 runs" in capsys.readouterr().out
    assert (tmp_path / "selection.png").stat().st_size > 1000
    assert (tmp_path / "selection-summary.csv").exists()


def test_doctors_page(tmp_path, monkeypatch):
    """Losses of two views are examined once; others are listed."""
    found = [("mmi-loss", "1", "MMILoss", MMILoss), ("tests", "1", "Linear", doctor.nn.Linear)]
    monkeypatch.setattr(doctor, "losses", lambda checkout: iter(found))
    monkeypatch.setattr(doctor, "LEFT_OUT", [name for name in doctor.CHECKS if name not in ("order", "batch size")])
    arguments = ["--rows", str(tmp_path / "rows.csv"), "--page", str(tmp_path / "page.md")]
    for _ in range(2):
        doctor.main(arguments)
    assert [row["check"] for row in environment.read(tmp_path / "rows.csv")] == ["batch size", ""]
    page = (tmp_path / "page.md").read_text()
    assert "| mmi-loss | MMILoss | two |  |  | 1 |" in page
    assert "Not of two views alone: tests: Linear." in page
