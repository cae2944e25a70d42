"""``python -m mmi_loss.integrations.solo_learn SCRIPT [ARGUMENTS]``: solo-learn's SCRIPT with ``method=mmi`` known.

For the scripts without Hydra, main_knn.py and main_umap.py, run from the root of a clone. Without a CUDA device their
``.cuda()`` and ``.to("cuda:0")`` stay on the CPU.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from pathlib import Path
from typing import Any

from mmi_loss.integrations.solo_learn import register


def main(arguments: list[str]) -> int:
    """Run a script as ``python SCRIPT ARGUMENTS`` would, after :func:`register`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    script = Path(arguments[0])
    if not script.is_file():
        print(f"{script} is no file; run from the root of a clone of solo-learn", file=sys.stderr)
        return 2
    sys.argv = arguments
    sys.path[0] = str(script.resolve().parent)  # was: the current folder
    register()
    with _cuda_or_cpu(script.name):
        runpy.run_path(str(script), run_name="__main__")
    return 0


def _cuda_or_cpu(name: str) -> contextlib.AbstractContextManager[Any]:
    import torch
    from mmi_loss.integrations.solo_learn.cpu import CUDACallsOnCPU

    if torch.cuda.is_available():
        return contextlib.nullcontext()
    print(f"no CUDA device: {name} runs on the CPU", file=sys.stderr)
    return CUDACallsOnCPU()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
