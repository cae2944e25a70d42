"""One timer for all commands: steps take turns, with their inputs out of the cache, on the CPU or a CUDA device."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Any]
ALWAYS_NEW_BYTES = 32 * 2**20
"""glibc takes blocks of this size from the system and gives them back, unless freed ones of other sizes happen to make
room: whether a gradient pays for new pages would be chance. The chance is taken away; all such blocks are new.
"""
EVICTION_BYTES = 256 * 2**20
SECONDS_PER_STEP = 3.0
"""Of all turns together; slower steps get fewer turns, three at least."""
SLOW_SECONDS = 0.5
"""Calls that take longer are not preceded by an untimed one."""


def views(n: int, dim: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> list[Tensor]:
    """Two views (n, dim) of the same content, as leaves."""
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(n, dim, generator=generator) + 1.5
    noise = torch.randn(2, n, dim, generator=generator) / 2
    return [(content + e).to(device, dtype).requires_grad_() for e in noise]


class Clock:
    """Marks on the device's time line, read when what lies between them is over."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"

    def mark(self) -> Any:
        """Now, on the device: an event in its queue."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; waits for the second."""
        if not self.is_cuda:
            return end - start
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def take_turns(
    steps: Mapping[Any, Step], turns: int, leaves: Sequence[Tensor] = (), device: str | torch.device = "cpu"
) -> dict[Any, list[float]]:
    """Seconds of every turn of every step, each after an untimed call of the same step, so that what the allocator
    holds is the step's own. The gradients of ``leaves`` are forgotten before.
    """
    clock = Clock(device)
    eviction = torch.zeros(EVICTION_BYTES // 4, device=device)
    seconds: dict[Any, list[float]] = {name: [] for name in steps}
    latest = dict.fromkeys(steps, 0.0)
    for turn in range(turns + 1):
        for name, step in steps.items():
            if turn > 2 and sum(seconds[name]) > SECONDS_PER_STEP:
                continue
            if latest[name] < SLOW_SECONDS:
                step()
            for z in leaves:
                z.grad = None
            eviction.add_(1)
            if not clock.is_cuda and any(z.nbytes >= ALWAYS_NEW_BYTES for z in leaves):
                _give_back_freed_memory()
            start = clock.mark()
            step()
            latest[name] = clock.seconds(start, clock.mark())
            if turn:  # the first turn warms up
                seconds[name].append(latest[name])
    return seconds


def _give_back_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc's alone
        trim(0)


def summary(seconds: Sequence[float], prefix: str = "") -> dict[str, str]:
    """Median and quartiles in milliseconds, and the number of turns."""
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    names = ("q1_ms", "median_ms", "q3_ms")
    found = {f"{prefix}{name}": digits(1e3 * value) for name, value in zip(names, quartiles, strict=True)}
    return found | {f"{prefix}turns": str(len(seconds))}


def peak_extra_bytes(step: Step, leaves: Sequence[Tensor]) -> int:
    """The peak of what a call allocates, without the inputs and their gradients."""
    for z in leaves:
        z.grad = None
    if leaves[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - sum(z.nbytes for z in leaves)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports the GPU that it does not find as an error
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    # Grown and shrunk in time order.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events)]
    gradients = [z.nbytes for z in leaves if z.grad is not None]
    # The gradients are the last allocations of an input's size.
    for index in range(len(changes) - 1, -1, -1):
        if changes[index] in gradients:
            gradients.remove(changes[index])
            del changes[index]
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return peak


def digits(value: float) -> str:
    """Four significant ones."""
    return f"{value:.4g}"
