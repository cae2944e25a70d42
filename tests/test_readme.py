"""What README and docs show: their code runs, their commands exist, their links and pictures lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path: re.sub(r"<!--(?! rows| end).*?-->", "", path.read_text(), flags=re.DOTALL) for path in DOCUMENTS}
OTHERS = {"main_pretrain.py", "main_knn.py"}  # of solo-learn


BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def blocks():
    """Code, and what the document says that it prints."""
    found = {path: BLOCK.findall(text) for path, text in TEXTS.items()}
    return [pytest.param(*block, id=f"{path.stem}-{i}") for path, of in found.items() for i, block in enumerate(of)]


@pytest.mark.parametrize(("code", "shown"), blocks())
@pytest.mark.filterwarnings("ignore:objective=")
def test_code_runs(code, shown, capsys):
    if "from lightly" in code:
        pytest.importorskip("lightly")
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 64)
    names = {"model": layer, "x0": torch.randn(32, 16), "x1": torch.randn(32, 16)}
    exec(code, names)
    if "loss.backward()" in code:
        assert layer.weight.grad.isfinite().all()
    if shown:
        printed = capsys.readouterr().out
        assert NUMBER.sub("", printed).split() == NUMBER.sub("", shown).split()
        numbers = [[float(x) for x in NUMBER.findall(text)] for text in (printed, shown)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=2e-3)


def test_commands_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path, text in TEXTS.items():
        if path.name == "decisions.md":  # of commands that are no longer here
            continue
        assert set(re.findall(r"(?:^|`)make\s+([a-z-]+)", text, re.MULTILINE)) <= targets, path
        for module in re.findall(r"python -m benchmarks\s+([a-z_]+)", text):
            assert (ROOT / "benchmarks" / f"{module}.py").exists(), (path, module)
        for script in re.findall(r"python ([\w/]+\.py)", text):
            assert script in OTHERS or (ROOT / script).exists(), (path, script)


def test_pictures_and_links_exist():
    for path, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (path.parent / target).exists(), (path, target)


def test_readme_is_read_in_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    assert "not measured on a gpu" in "\n".join(text.splitlines()[:20]).lower()
