"""What all closed-form backwards have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Refusal(torch.autograd.Function):
    """The identity, with a derivative that raises: a gradient passed through it can be used, not differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "the MMI loss has no second derivative: its gradient is a closed form that autograd does not see. "
            "Use impl='reference' where a gradient of the gradient is needed"
        )


def closed_form(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a Function's backward: full precision under any autocast, and a second derivative is an error.

    (``once_differentiable`` returns a silent zero where the incoming gradient is a constant, as it is for a loss.)
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> Any:
        device_type = grads[0].device.type
        if not (torch.is_grad_enabled() or torch.is_autocast_enabled(device_type) or torch.compiler.is_compiling()):
            return backward(ctx, *grads)  # entering contexts takes longer than a small operation
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            outputs = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return outputs

        return tuple(_Refusal.apply(x.detach().requires_grad_()) if isinstance(x, Tensor) else x for x in outputs)

    return wrapped
