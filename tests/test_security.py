"""Nothing is executed by loading, nothing is sent, nothing is written but where it was asked for, and no dependency is
allowed at a version with a known hole.
"""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mmi_loss import MMILoss

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).parent.parent
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
CONFIGURATIONS = sorted((ROOT / "integrations").rglob("*.yaml"))

# Runs before anything else in a process of its own: an audit hook cannot be removed.
AUDIT = """
import json, os, sys
SENDS = {"socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "urllib.Request"}
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
events = []
def hook(event, args):
    if event == "open":
        path, _, flags = args
        if isinstance(path, (str, bytes)) and flags & (os.O_WRONLY | os.O_RDWR) and path != os.devnull:
            events.append(("write", os.path.abspath(os.fsdecode(path))))
    elif event in CHANGES:
        events.append(("write", os.path.abspath(os.fsdecode(args[0]))))
    elif event in STARTS:
        events.append(("start", os.fsdecode(args[0]) if isinstance(args[0], (str, bytes)) else str(args[0])))
    elif event in SENDS:
        events.append(("send", event))
        raise OSError(f"{event}: the network is closed")
sys.addaudithook(hook)
"""
REPORT = "\nprint(json.dumps(events))\n"


def audited(code, folder):
    """Run code in an empty folder with an empty home; what it wrote, sent and started, and the files it left."""
    folders = {name: folder / name for name in ("work", "home", "tmp")}
    for path in folders.values():
        path.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "HOME": str(folders["home"]),
        "TMPDIR": str(folders["tmp"]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-B", "-c", AUDIT + code + REPORT]
    done = subprocess.run(command, cwd=folders["work"], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    left = {str(path) for name in folders for path in folders[name].rglob("*") if path.is_file()}
    return json.loads(done.stdout.splitlines()[-1]), left


# Loading


class Holder(nn.Module):
    """A model that keeps its criterion, as Lightning modules do."""

    def __init__(self):
        super().__init__()
        self.layer, self.criterion = nn.Linear(4, 4), MMILoss(slice_dim=2)


def reloaded(checkpoint):
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("make", [MMILoss, MMILoss.paper, Holder])
def test_checkpoints_hold_tensors_and_numbers_alone(make):
    module = make()
    state = reloaded({"state_dict": module.state_dict()})["state_dict"]
    make().load_state_dict(state)
    assert all(type(value) is torch.Tensor for value in state.values())
    assert state._metadata == module.state_dict()._metadata


def test_checkpoint_of_lightlys_method(tmp_path):
    """Lightning's whole file: weights, optimiser, hyperparameters, loops."""
    pl = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    lightly = pytest.importorskip("mmi_loss.integrations.lightly", reason="lightly is not installed")
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    arguments = {"backbone": backbone, "feature_dim": 8, "projection_head": lightly.MMIProjectionHead(8, 8, 8)}
    model = lightly.MMI(batch_size_per_device=4, num_classes=5, **arguments)
    batch = [[torch.randn(4, 3, 2, 2)] * 2, torch.arange(4), ["a.png"] * 4]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(model, torch.utils.data.DataLoader([batch], batch_size=None))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert checkpoint["state_dict"]._metadata["criterion"]["step"] == 1
    assert checkpoint["hyper_parameters"]["batch_size_per_device"] == 4


def test_weights_only_is_what_refuses_code():
    """The test above can fail: a module pickled whole executes code when loaded, and is refused."""
    with pytest.raises(Exception, match="Weights only load failed"):
        reloaded({"criterion": MMILoss()})


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_configurations_are_data(path):
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed: pip install mmi-loss[solo]")
    text = path.read_text()
    assert executes(yaml.safe_load(text)) == []
    assert "!!" not in text


def executes(node, place=""):
    """Places in a configuration that name code to call, or that read the environment."""
    if isinstance(node, dict):
        named = [f"{place}.{key}" for key in node if str(key) in ("_target_", "_partial_", "_args_")]
        return named + [found for key, value in node.items() for found in executes(value, f"{place}.{key}")]
    if isinstance(node, list):
        return [found for i, value in enumerate(node) for found in executes(value, f"{place}[{i}]")]
    return [place] if isinstance(node, str) and re.search(r"\$\{\s*[\w.]+\s*:", node) else []


def test_code_in_a_configuration_is_found():
    assert CONFIGURATIONS
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed: pip install mmi-loss[solo]")
    assert executes({"a": [{"_target_": "os.system"}], "b": "${oc.env:HOME}", "c": "${name}"}) == [
        ".a[0]._target_",
        ".b",
    ]
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load("a: !!python/object/apply:os.getcwd []")


# Running


CORE = """
import warnings
warnings.simplefilter("ignore")
import torch
events.clear()  # torch asks the system for its libraries
import mmi_loss
from mmi_loss import MMILoss, diagnostics, functional
from mmi_loss.objectives import OBJECTIVES
z_a, z_b, z_c = (torch.randn(16, 40, requires_grad=True) for _ in range(3))
for objective in OBJECTIVES:
    for options in ({}, {"slice_dim": 8}, {"slice_dim": 8, "slice_kind": "coordinates"}, {"logdet": "taylor"}):
        for impl in ("auto", "eager", "reference"):
            loss_fn = MMILoss(objective=objective, impl=impl, **options)
            loss_fn(z_a, z_b).backward()
            loss_fn.forward_components(z_a, z_b)
            loss_fn.load_state_dict(loss_fn.state_dict())
            functional.mmi_loss_multiview([z_a, z_b, z_c], objective=objective, impl=impl, **options).backward()
with torch.autocast("cpu", dtype=torch.bfloat16):
    MMILoss(gather_distributed=True)(z_a, z_b).backward()
diagnostics.mutual_information(z_a[:, :3], z_b[:, :3])
diagnostics.effective_rank(z_a)
repr(MMILoss.paper())
"""


def test_core_sends_writes_and_starts_nothing(tmp_path):
    events, left = audited(CORE, tmp_path)
    assert events == []
    assert left == set()


BENCHMARKS = """
from benchmarks import speed
out = {out!r}
speed.main(["--shapes", "16x32", "--losses", "mmi", "floor", "--turns", "1", "--out", out])
"""


@pytest.mark.skipif(TORCH < (2, 7), reason="before torch 2.7 its own importing writes temporary files")
def test_benchmarks_write_only_where_told(tmp_path):
    for package in ("lightly", "matplotlib", "rich"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install mmi-loss[bench]")
    out = tmp_path / "out"
    out.mkdir()
    # Caches of matplotlib and torch, which are not ours to place, where a user can: in the output folder.
    caches = {"MPLCONFIGDIR": str(out), "TORCHINDUCTOR_CACHE_DIR": str(out)}
    code = f"os.environ.update({caches!r})\n" + BENCHMARKS.format(out=str(out))
    events, left = audited(code, tmp_path)
    outside = [event for event in events if event[0] == "write" and not Path(event[1]).is_relative_to(out)]
    assert outside == []
    assert [event for event in events if event[0] == "send"] == []
    # git for the commit column; matplotlib asks for fonts, torch for libraries.
    started = {Path(event[1]).name for event in events if event[0] == "start"}
    assert started <= {"git", "fc-list", "ldconfig", "gcc", "ld", "sh"}
    assert left == set()
    assert {"speed-cpu.csv"} <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("open('x', 'w').write('')", "write"),
        ("import pathlib; pathlib.Path('x').touch()", "write"),
        ("import torch; torch.save({}, 'x')", "write"),  # not by Python: seen by what is left
        ("import os; os.mkdir('x')", "write"),
        ("import subprocess; subprocess.run(['true'])", "start"),
        ("import socket\ntry:\n    socket.create_connection(('localhost', 9))\nexcept OSError:\n    pass", "send"),
    ],
)
def test_audit_sees(code, kind, tmp_path):
    events, left = audited("\n" + code, tmp_path)
    assert kind in {event[0] for event in events} or left
    assert bool(left) == (kind == "write" and "mkdir" not in code)


# Dependencies


def floors():
    """The lowest versions that pyproject.toml allows, of all extras and of the build: {name: version}."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    named += [entry for extra in project["project"]["optional-dependencies"].values() for entry in extra]
    found = {}
    for entry in named:
        if entry.startswith("mmi-loss"):
            continue
        name, version = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)", entry).groups()
        # Releases are named in full: 2.10 is 2.10.0.
        version = ".".join([*version.split("."), "0", "0"][: max(3, version.count(".") + 1)])
        found.setdefault(name, set()).add(version)
    return found


def test_floors_are_stated_once():
    assert {name: versions for name, versions in floors().items() if len(versions) > 1} == {}
    assert "torch" in floors()


def test_floors_have_no_known_advisory(tmp_path):
    pytest.importorskip("pip_audit", reason="pip-audit is not installed: pip install mmi-loss[dev]")
    # Not of torch: what its own loader does with a file is not this package's to enforce.
    audited = {name: min(versions) for name, versions in floors().items() if name != "torch"}
    requirements = tmp_path / "floors.txt"
    requirements.write_text("".join(f"{name}=={version}\n" for name, version in audited.items()))
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--no-deps", "--disable-pip"]
    command += ["--progress-spinner", "off", "--format", "json", "--timeout", "10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("pip-audit's database cannot be reached: no answer within two minutes")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        pytest.skip(f"pip-audit's database cannot be reached: {(done.stderr.splitlines() or ['no answer'])[-1]}")
    audited_floors = json.loads(lines[-1])["dependencies"]
    skipped = [entry["skip_reason"] for entry in audited_floors if "skip_reason" in entry]
    if len(skipped) == len(audited_floors):  # without the index it knows of no package and says that all is well
        pytest.skip(f"pip-audit's database cannot be reached: {skipped[0]}")
    assert skipped == []
    assert advisories(audited_floors) == {}


def advisories(audited_floors):
    found = {f"{entry['name']} {entry['version']}": [hole["id"] for hole in entry["vulns"]] for entry in audited_floors}
    return {package: holes for package, holes in found.items() if holes}


def test_an_advisory_is_found():
    """What pip-audit reports of torch 2.5.1, in its own form."""
    hole = {"id": "PYSEC-2025-41", "aliases": ["CVE-2025-32434"], "fix_versions": ["2.6.0"]}
    audit = [{"name": "torch", "version": "2.5.1", "vulns": [hole]}, {"name": "rich", "version": "13", "vulns": []}]
    assert advisories(audit) == {"torch 2.5.1": ["PYSEC-2025-41"]}
