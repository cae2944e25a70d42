"""The long profile's runner: it counts, finds, resumes, and notices other code."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import environment
from tests import fuzz, test_properties


@given(x=st.integers())
def holds(x):
    assert x == x


@given(x=st.integers())
def fails(x):
    if x >= 1000:
        pytest.fail("too large")


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(*tests, examples=100):
        monkeypatch.setattr(fuzz, "properties", lambda: {f"test_{test.__name__}": test for test in tests})
        status = fuzz.main(["--examples", str(examples), "--out", str(tmp_path)])
        return status, environment.read(tmp_path / "rounds.csv"), environment.read(tmp_path / "fuzz.csv")

    return run


def test_counts_and_resumes(run):
    status, rounds, summary = run(holds)
    assert status == 0
    assert [int(row["examples"]) for row in rounds] == [fuzz.ROUND] * 2
    assert [(row["property"], row["examples"], row["failures"]) for row in summary] == [
        ("holds", "100", "0"),
        ("all", "100", "0"),
    ]
    # Finished rounds are kept, more are added, with seeds of their own.
    _, more, summary = run(holds, examples=150)
    assert more[:2] == rounds
    assert [row["round"] for row in more] == ["0", "1", "2"]
    assert summary[-1]["examples"] == "150"


def test_failure_is_reported_and_the_others_go_on(run, tmp_path, capsys):
    status, rounds, summary = run(fails, holds, examples=200)
    assert status == 1
    assert [row["failures"] for row in summary] == ["1", "0", "1"]
    assert sum(row["property"] == "test_holds" for row in rounds) == 2
    (report,) = (tmp_path / "failures").iterdir()
    assert "x=1000" in report.read_text().replace(" ", "")
    assert "failed: test_fails" in capsys.readouterr().out


def test_rounds_of_other_code_do_not_count(run, monkeypatch):
    run(holds)
    monkeypatch.setattr(environment, "core_digest", lambda: "another core")
    _, rounds, summary = run(holds)
    assert len(rounds) == 4
    assert summary[-1]["examples"] == "100"


def test_every_property_is_found():
    names = {name for name in vars(test_properties) if name.startswith("test_")}
    assert set(fuzz.properties()) == names
    assert len(names) > 25
