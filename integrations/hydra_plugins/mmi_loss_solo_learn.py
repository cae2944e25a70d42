"""Makes ``method=mmi`` and the configurations beside it known to solo-learn. Installed as a ``hydra_plugins`` module.

Hydra imports this file in every Hydra program of the environment, and an exception here, other than an ImportError,
would end that program: so nothing is imported but Hydra, and nothing is done unless the program is solo-learn's.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class MMISearchPath(SearchPathPlugin):
    """Registers the method and names its folder of configurations, in a program that has imported solo-learn."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Hydra's hook: called once before a configuration is composed."""
        # solo-learn's scripts import solo.methods, then call Hydra, then look the method up.
        if not hasattr(sys.modules.get("solo.methods"), "METHODS"):
            return
        try:
            adapter = import_module("mmi_loss.integrations.solo_learn")
            adapter.register()
        except Exception as error:  # another method's run must go on
            warnings.warn(f"method=mmi is not available: {error}", stacklevel=2)
            return
        search_path.append(provider="mmi-loss", path=f"file://{Path(adapter.__file__).parent / 'conf'}")
