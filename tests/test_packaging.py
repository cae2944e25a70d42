"""The wheel and the sdist hold what the tree holds, and import without the repository."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mmi_loss

ROOT = Path(__file__).parent.parent
# Folder in the tree: folder in the wheel; a file belongs to the first that holds it.
MAPPING = {
    "mmi_loss": "mmi_loss",
    "integrations/hydra_plugins": "hydra_plugins",
    "integrations": "mmi_loss/integrations",
}
SUFFIXES = {".py", ".yaml", ".typed"}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "project"
    # From the files git knows: leftovers of earlier builds must not reach the archive.
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    for name in listed:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    # As installers do: the sdist from the tree, the wheel from the sdist.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def package_files():
    seen = set()
    for folder, installed in MAPPING.items():
        for path in set((ROOT / folder).rglob("*")) - seen:
            seen.add(path)
            if path.is_file() and path.suffix in SUFFIXES and "__pycache__" not in path.parts:
                yield f"{installed}/{path.relative_to(ROOT / folder).as_posix()}"


def test_wheel_holds_the_tree(distributions):
    names = set(zipfile.ZipFile(distributions[0]).namelist())
    names = {name for name in names if ".dist-info/" not in name}
    assert names == set(package_files())


def test_sdist_holds_tests_and_adapters(distributions):
    with tarfile.open(distributions[1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "tests/oracle.py", "integrations/__init__.py"} <= names


def test_wheel_imports_alone(distributions, tmp_path):
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, str(distributions[0])], check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import mmi_loss, mmi_loss.integrations as i; "
        f"assert mmi_loss.__file__.startswith({str(target)!r}) and i.__file__.startswith({str(target)!r}); "
        "import torch; print(mmi_loss.__version__, mmi_loss.MMILoss()(torch.eye(4), torch.eye(4)).isfinite().item())"
    )
    done = subprocess.run([sys.executable, "-S", "-c", _with_site(code)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [mmi_loss.__version__, "True"], done.stderr


def _with_site(code):
    """The environment's packages after the target folder, without editable installs (which live in .pth files)."""
    paths = [p for p in sys.path if p.endswith("site-packages")]
    return f"import sys; sys.path += {paths!r}; {code}"


def test_installed_integrations_are_the_trees():
    import mmi_loss.integrations

    assert Path(mmi_loss.integrations.__file__).name == "__init__.py"


def test_folder_imported_as_a_second_copy_is_refused():
    done = subprocess.run([sys.executable, "-c", "import integrations"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "installed as mmi_loss.integrations" in done.stderr


def test_changelog_knows_the_version():
    assert f"## [{mmi_loss.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
