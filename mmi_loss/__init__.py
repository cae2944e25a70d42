"""MMI loss: explicit mutual information maximisation for self-supervised learning.

``import mmi_loss`` is cheap: torch is imported with the first attribute that needs it, because configuration
frameworks import this package merely to look for files in it.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["MMILoss", "__version__", "diagnostics", "functional"]

if TYPE_CHECKING:
    from mmi_loss import diagnostics, functional
    from mmi_loss.loss import MMILoss


def __getattr__(name: str) -> Any:
    module = {"MMILoss": "loss", "diagnostics": "diagnostics", "functional": "functional"}.get(name)
    if module is None:
        raise AttributeError(f"module 'mmi_loss' has no attribute {name!r}")
    found = importlib.import_module(f"mmi_loss.{module}")
    return found.MMILoss if name == "MMILoss" else found
