"""The selection study: its correlations against scipy, its runs small; and the doctor's table of other losses."""

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
    found = {one.measure: one for one in selection.correlations(data, "across methods", draws=50)}
    groups = {task: [row for row in data[:-1] if row["task"] == task] for task in ("one", "two")}
    for measure in ("features_lidar", "features_effective_rank", "projections_lidar"):
        each = {
            name: [
                spearmanr([float(r[measure]) for r in group], [float(r[accuracy]) for r in group])[0]
                for accuracy in selection.ACCURACIES
            ]
            for name, group in groups.items()
        }
        one = found[measure.replace("_", " ")]
        np.testing.assert_allclose(one.mean, np.mean(list(each.values()), 0))
        assert (one.low <= one.mean).all()
        assert (one.mean <= one.high).all()
        assert (one.worst, one.worst_group) == (
            pytest.approx(min(map(min, each.values()))),
            min(each, key=lambda g: min(each[g])),
        )
    assert selection.correlations(data[:3], "across methods") == []


def test_what_misleads_is_named():
    data = rows(48)
    for question in selection.QUESTIONS:
        verdicts = {one.measure: one.verdict for one in selection.correlations(data, question)}
        assert verdicts["features lidar"] == "trust"
        assert verdicts["projections alpha req"] == "trust"  # the nearer to 1 the better
        assert verdicts["features rank me"] == "misleads"
        assert verdicts["projections lidar"] == ""
        assert ("minus loss" in verdicts) == (question == "within a method")


def test_runs_resume_and_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(selection, "IMAGES", 128)
    monkeypatch.setattr(selection, "SIZES", ((16, 64),))
    monkeypatch.setattr(selection, "RATES", (5e-4, 2e-3, 8e-3))
    path = tmp_path / "runs" / "selection" / "selection.csv"
    arguments = ["--tasks", "latent", "--methods", "mmi", "simclr"]
    selection.main(arguments)
    finished = environment.read(path)
    assert len(finished) == 6
    assert all(float(row["features_rank_me"]) > 1 and 0 < float(row["knn"]) < 1 for row in finished)
    assert all(row["core"] == environment.core_digest() for row in finished)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    selection.main(arguments)
    assert [row["rate"] for row in environment.read(path)] == [row["rate"] for row in finished]
    shown = capsys.readouterr().out
    assert "| across methods" in shown
    assert "6 rows, core" in shown
    assert path.with_suffix(".png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="no finished runs"):
        selection.main([*arguments, "--report", "--tasks", "digits"])


def test_doctors_table(tmp_path, monkeypatch):
    """Losses of two views are examined once; others are listed."""
    found = [("mmi-loss", "1", "MMILoss", MMILoss), ("tests", "1", "Linear", doctor.nn.Linear)]
    monkeypatch.setattr(doctor, "losses", lambda checkout: iter(found))
    monkeypatch.setattr(doctor, "LEFT_OUT", [name for name in doctor.CHECKS if name not in ("order", "batch size")])
    for _ in range(2):
        doctor.main(["--out", str(tmp_path)])
    found = environment.read(tmp_path / "doctor.csv")
    assert [row["check"] for row in found] == ["batch size", ""]
    page = doctor.table([*found, {**found[0], "severity": "wrong", "check": "order", "text": "a | b < c"}])
    assert r"| mmi-loss 1 | MMILoss | two | order: a \| b &lt; c |  | 1 |" in page
    assert "Not of two views alone: tests 1: Linear." in page
