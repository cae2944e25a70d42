"""``python -m mmi_loss.integrations.solo_learn SCRIPT [ARGUMENTS]``: solo-learn's SCRIPT with ``method=mmi`` known.

For the scripts without Hydra, main_knn.py and main_umap.py, run from the root of a clone. Without a CUDA device their
``.cuda()`` and ``.to("cuda:0")`` stay on the CPU.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmi_loss.integrations.solo_learn import register
from torch.overrides import TorchFunctionMode


class CUDACallsOnCPU(TorchFunctionMode):
    """Tensors asked to move to a CUDA device stay on the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Torch's hook: called in place of every torch function and tensor method."""
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(argument) for argument in args)
            kwargs = {name: _on_cpu(argument) for name, argument in kwargs.items()}
        return func(*args, **kwargs)


def _on_cpu(argument: Any) -> Any:
    is_cuda = isinstance(argument, (str, torch.device)) and torch.device(argument).type == "cuda"
    return torch.device("cpu") if is_cuda else argument


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
    keep_on_cpu: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if not torch.cuda.is_available():
        print(f"no CUDA device: {script.name} runs on the CPU", file=sys.stderr)
        keep_on_cpu = CUDACallsOnCPU()
    with keep_on_cpu:
        runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
