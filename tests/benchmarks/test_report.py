"""Every number that a document shows in a marked block is what the command prints from the stored rows."""

import re

import pytest

pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[bench]")

from benchmarks import environment, report


@pytest.mark.parametrize("path", report.documents(), ids=lambda path: path.name)
def test_documents_show_the_stored_rows(path):
    text = path.read_text()
    # Put right by: python -m benchmarks report --write
    assert report.rendered(text) == text
    assert text.count("<!-- rows:") == text.count("<!-- end rows -->") == len(report.BLOCK.findall(text))


def test_every_row_names_its_core():
    for path in environment.RESULTS.rglob("*.csv"):
        if path.name == "gauntlet.csv":
            continue
        rows = environment.read(path)
        assert rows, path
        assert all(re.fullmatch(rf"[0-9a-f]{{12}}|{environment.BEFORE_DIGESTS}", row["core"]) for row in rows), path


def test_results_are_summaries():
    files = [path for path in environment.RESULTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2**20
    assert {path.suffix for path in files} <= {".csv", ".png", ".md"}


def test_a_changed_row_or_document_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "RESULTS", tmp_path)
    where = {"core": "0" * 12, "commit": "c", "torch": "t", "device": "d"}
    for seed in (0, 1):
        environment.append(
            tmp_path / "demo.csv",
            {"task": "digits", "method": "mmi", "seed": seed, "knn": 0.5 + seed / 5, "linear": 0.5, **where}
            | {"loss_ms": 1.0, "step_ms": 4.0},
        )
    number = "<!-- rows: python -m benchmarks report value demo.csv knn method=mmi -->{}<!-- end rows -->"
    block = "<!-- rows: python -m benchmarks report demo -->\n\n{}\n\n<!-- end rows -->"
    once = report.rendered(f"It has {number.format('?')} here.\n\n{block.format('?')}\n")
    assert number.format("0.600") in once
    assert "0.600 ± 0.141" in once
    assert "core 000000000000" in once
    assert report.rendered(once) == once
    path = tmp_path / "demo.csv"
    path.write_text(path.read_text().replace("digits,mmi,1,0.7", "digits,mmi,1,0.9").replace("0" * 12, "1" * 12, 1))
    changed = report.rendered(once)
    assert number.format("0.700") in changed
    assert "MIXED CORES: 111111111111 (1 rows), 000000000000 (1 rows)" in changed
    with pytest.raises(SystemExit, match="no rows with"):
        report.render("value demo.csv knn method=vicreg")
    with pytest.raises(SystemExit, match="report nothing: known are value, demo"):
        report.render("nothing")


def test_rows_of_other_columns_are_refused(tmp_path):
    environment.append(tmp_path / "rows.csv", {"a": 1, "b": 2})
    with pytest.raises(ValueError, match=r"has the columns \['a', 'b'\], not \['a', 'c'\]"):
        environment.append(tmp_path / "rows.csv", {"a": 1, "c": 2})
