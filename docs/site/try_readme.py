"""Runs the README's lines of Python as a new user does, who has nothing but the installed package."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import mmi_loss

ROOT = Path(__file__).parents[2]

if __name__ == "__main__":
    if Path(mmi_loss.__file__).is_relative_to(ROOT / "mmi_loss"):
        raise SystemExit("this is the checkout, not an installed package")
    layer = torch.nn.Linear(16, 64)
    names = {"model": layer, "x0": torch.randn(32, 16), "x1": torch.randn(32, 16)}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(code, names)
    print(f"mmi-loss {mmi_loss.__version__} from {Path(mmi_loss.__file__).parent.name}: loss {names['loss']:.3f}")
