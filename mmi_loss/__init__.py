"""MMI loss: explicit mutual information maximisation for self-supervised learning.

``import mmi_loss`` is cheap: torch is imported with the first attribute that needs it, because configuration
frameworks import this package merely to look for files in it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["MMILoss", "__version__", "diagnostics", "functional"]

if TYPE_CHECKING:
    from mmi_loss import diagnostics, functional
    from mmi_loss.loss import MMILoss


def __getattr__(name: str) -> Any:
    if name == "MMILoss":
        return importlib.import_module("mmi_loss.loss").MMILoss
    if name in ("diagnostics", "functional"):
        return importlib.import_module(f"mmi_loss.{name}")
    raise AttributeError(f"module 'mmi_loss' has no attribute {name!r}")
