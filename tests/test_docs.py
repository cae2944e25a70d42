"""The site builds without a warning, and shows the options where they are asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

from mmi_loss.options import DEFAULTS

ROOT = Path(__file__).parent.parent
pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        "docs/site/mkdocs.yml",
        "--site-dir",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_api_has_every_option(site):
    page = (site / "api.html").read_text()
    signature = page.split('id="mmi_loss.loss.MMILoss"')[1].split("</div>")[0]
    assert all(name in signature for name in DEFAULTS)
    assert ":class:" not in page
    assert ".. math::" not in page


def test_pages_show_outputs_and_pictures(site):
    for name in (
        "tutorials/collapse-0.png",
        "benchmarks/results/compare-map.png",
        "pictures/views.png",
        "site/site.css",
    ):
        assert (site / name).stat().st_size > 100, name
    assert "kNN accuracy" in (site / "tutorials" / "lightly.html").read_text()


def test_nothing_is_loaded_from_elsewhere(site):
    for path in site.rglob("*.html"):
        text = path.read_text()
        for mark in ('src="http', 'rel="stylesheet" href="http', "fonts.googleapis"):
            assert mark not in text, path
