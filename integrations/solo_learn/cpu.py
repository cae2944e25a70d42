"""Scripts that ask for CUDA by name, on a machine without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class CUDACallsOnCPU(TorchFunctionMode):
    """A context in which tensors and modules asked to move to a CUDA device stay on the CPU."""

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
