"""What every Hydra program in the environment gets to see of the plugin. Needs no solo-learn."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

hydra = pytest.importorskip("hydra", reason="hydra-core is not installed: pip install mmi-loss[solo]")

import mmi_loss.integrations.solo_learn as adapter  # noqa: E402

CONF = Path(adapter.__file__).parent / "conf"

APP = """
import sys
import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins

{before}

@hydra.main(version_base=None, config_path=None)
def main(cfg):
    print("plugins", *sorted(plugin.__name__ for plugin in Plugins.instance().discover()))
    print("imported", *sorted(name for name in sys.modules if name.split(".")[0] in ("mmi_loss", "torch", "solo")))
    print("search", *(source.path for source in HydraConfig.get().runtime.config_sources))
    print(eval({expression!r}))

main()
"""

# Stands in for a program that has imported solo-learn: only what the plugin asks about.
SOLO_IMPORTED = """
import types
solo_methods = types.ModuleType("solo.methods")
solo_methods.METHODS = {"barlow_twins": object}
solo_methods.BaseMethod = type("BaseMethod", (), {"add_and_assert_specific_cfg": None})
sys.modules["solo.methods"] = solo_methods
"""

RAISES_ON_IMPORT = """
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.startswith({name!r}):
            raise RuntimeError("broken on purpose")
sys.meta_path.insert(0, Broken())
"""


def run(tmp_path, before="", expression="'done'", **environment):
    app = tmp_path / "app.py"
    app.write_text(APP.format(before=before, expression=expression))
    command = [sys.executable, str(app), "hydra.run.dir=.", "hydra.output_subdir=null"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.partition(" ")[::2] for line in done.stdout.splitlines()[:-1])
    return lines, done.stdout.splitlines()[-1], done.stderr


def test_another_program_finds_the_plugin_and_imports_nothing_of_ours(tmp_path):
    lines, last, errors = run(tmp_path)
    assert "MMISearchPath" in lines["plugins"].split()
    assert lines["imported"] == ""
    assert "mmi" not in lines["search"]
    assert (last, errors) == ("done", "")


def test_another_program_survives_a_broken_installation_of_ours(tmp_path):
    _, last, errors = run(tmp_path, before=RAISES_ON_IMPORT.format(name="mmi_loss"))
    assert (last, errors) == ("done", "")


def test_another_project_called_solo_is_left_alone(tmp_path):
    lines, last, errors = run(tmp_path, before="import types; sys.modules['solo.methods'] = types.ModuleType('x')")
    assert "mmi_loss" not in lines["imported"]
    assert (last, errors) == ("done", "")


def test_solo_program_goes_on_where_the_method_cannot_be_imported(tmp_path):
    before = SOLO_IMPORTED + RAISES_ON_IMPORT.format(name="mmi_loss.integrations.solo_learn.method")
    _, last, errors = run(tmp_path, before, "sorted(solo_methods.METHODS)")
    assert last == "['barlow_twins']"
    assert "method=mmi is not available: broken on purpose" in errors


def test_solo_program_gets_method_and_configurations(tmp_path):
    method = """
sys.modules["mmi_loss.integrations.solo_learn.method"] = types.ModuleType("method")
sys.modules["mmi_loss.integrations.solo_learn.method"].MMI = "the class"
"""
    lines, last, errors = run(tmp_path, SOLO_IMPORTED + method, "solo_methods.METHODS['mmi']")
    assert last == "the class"
    assert str(CONF) in lines["search"]
    assert errors == ""


def test_other_plugins_live_beside_it(tmp_path):
    folder = tmp_path / "elsewhere" / "hydra_plugins"
    folder.mkdir(parents=True)
    (folder / "other.py").write_text(
        "from hydra.plugins.search_path_plugin import SearchPathPlugin\n"
        "class Other(SearchPathPlugin):\n"
        "    def manipulate_search_path(self, search_path): pass\n"
    )
    lines, _, errors = run(tmp_path, PYTHONPATH=str(folder.parent))
    assert {"MMISearchPath", "Other"} <= set(lines["plugins"].split())
    assert errors == ""


def test_namespace_has_no_init():
    import hydra_plugins

    assert hydra_plugins.__file__ is None


def python(code, tmp_path, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_import_needs_no_torch(tmp_path):
    code = "import sys; sys.modules['torch'] = None; import mmi_loss, mmi_loss.integrations.solo_learn; print('fine')"
    assert python(code, tmp_path).stdout == "fine\n"


def test_registration_without_solo_learn_says_what_is_needed(tmp_path):
    code = "import sys; sys.modules['solo'] = None; import mmi_loss.integrations.solo_learn as s; s.register()"
    last = python(code, tmp_path).stderr.splitlines()[-1]
    assert last.startswith("ImportError: method=mmi cannot be added to solo-learn")
    assert "from the root of a clone" in last


def test_registration_in_an_old_release_says_so(tmp_path):
    """As in 1.0.2: methods are configured by arguments, there is no add_and_assert_specific_cfg."""
    methods = tmp_path / "solo" / "methods"
    methods.mkdir(parents=True)
    (methods.parent / "__init__.py").touch()
    (methods / "__init__.py").write_text("class BaseMethod: ...\nMETHODS = {'base': BaseMethod}\n")
    code = "import mmi_loss.integrations.solo_learn as s; s.register()"
    last = python(code, tmp_path, PYTHONPATH=str(tmp_path)).stderr.splitlines()[-1]
    assert f"{methods / '__init__.py'} is of an older version" in last
    assert "the release on PyPI, 1.0.2, is not supported" in last


@pytest.mark.parametrize("arguments", [[], ["main_knn.py"]])
def test_launcher_explains_itself(arguments, tmp_path):
    command = [sys.executable, "-m", "mmi_loss.integrations.solo_learn", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert ("from the root of a clone" if arguments else "SCRIPT") in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet100", "imagenet", "custom"])
def test_configuration_is_complete(name):
    with hydra.initialize_config_dir(str(CONF), version_base="1.2"):
        cfg = hydra.compose(f"mmi_{name}")
    assert cfg.method == "mmi"
    assert cfg.data.dataset == name
    assert [view.num_crops for view in cfg.augmentations] == [1, 1]
    assert set(cfg.method_kwargs) == {"proj_hidden_dim", "proj_output_dim"}
    assert "wandb" not in cfg  # optional: solo-learn's own file, where its folder is on the search path
