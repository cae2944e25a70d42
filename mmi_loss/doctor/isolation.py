"""Calls in processes of their own: one that hangs or ends its process is an answer too."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

GRACE = 5.0
"""Seconds that others are given to answer once one has failed: they may wait for it."""
Call = tuple[Callable[..., Any], tuple[Any, ...]]


class CannotForkError(RuntimeError):
    """Processes cannot be forked here, or are of no use; it says what to do."""


@contextlib.contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """SIGTERM, which would leave what was started behind, is an exit as any other, unless the caller handles it."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@ends_on_sigterm()
def isolated(timeout: float, *calls: Call) -> list[Any]:
    """The answers of functions that run at once, in a process each, forked from this one: they need not pickle.

    An error is answered in words, a string, as is that a process has not answered for ``timeout`` seconds, or for a few
    after another's error. If a process ends, all are ended, and every answer says how.

    Raises:
        CannotForkError: This system has no fork (Windows), or autograd does not run in a forked process, as after a
            backward on a GPU.

    Example:
        >>> isolated(9.0, (max, (1, 2)), (int, ("x",)))
        [2, "fails: ValueError: invalid literal for int() with base 10: 'x'"]
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise CannotForkError("this system cannot fork processes: run the doctor in Linux (WSL, a container)")
    context = multiprocessing.get_context("fork")
    owners: dict[Any, Any] = {}
    answers: dict[Any, Any] = {}
    try:
        for call in calls:
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_answer, args=(send, *call), daemon=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
                process.start()
            owners[receive] = process
            send.close()  # before the next fork, which would hold it open after this process has ended
        left = timeout
        while len(answers) < len(calls):
            ready: list[Any] = wait([receive for receive in owners if receive not in answers], timeout=0.5)
            left -= 0 if ready else 0.5  # by turns and not by the clock: the machine may have slept
            if left < 0:
                return [answers.get(receive, f"gives no answer in {timeout:g} s") for receive in owners]
            for receive in ready:
                try:
                    answers[receive] = receive.recv()
                except EOFError:
                    owners[receive].join(5)
                    code = owners[receive].exitcode or 0
                    return [f"ends the process ({signal.Signals(-code).name if code < 0 else code})"] * len(calls)
                if isinstance(answers[receive], CannotForkError):
                    raise answers[receive]
                left = min(left, GRACE) if isinstance(answers[receive], str) else left
        return [answers[receive] for receive in owners]
    finally:
        for receive, process in owners.items():
            process.join(GRACE if receive in answers else 0)  # who has answered may end: coverage is written then
            process.kill()
            process.join()
            receive.close()


def words(error: BaseException) -> str:
    """An error in a line, without the folders of this machine."""
    text = re.sub(r"(/[^\s/:'\"]+)+/", "", " ".join(f"{type(error).__name__}: {error}".split()))
    return text if len(text) <= 120 else text[:117] + "..."


def _answer(send: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    gc.freeze()  # what was there stays: collecting it would copy its memory
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # others do not survive a fork
    try:
        torch.zeros((), requires_grad=True).backward()
    except RuntimeError as error:
        remedy = "use the command mmi-loss doctor, a new process; on macOS, Linux in a container"
        send.send(CannotForkError(f"no autograd in a forked process: {remedy} ({words(error)})"))
        return
    try:
        answer = function(*arguments)
    except Exception as error:
        answer = f"fails: {words(error)}"
    send.send(answer)
