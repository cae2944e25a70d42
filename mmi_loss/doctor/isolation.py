"""Calls in processes of their own: one that hangs or ends its process is an answer too."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

GRACE = 5.0
"""Seconds that others are given to answer once one has failed: they may wait for it."""
Call = tuple[Callable[..., Any], tuple[Any, ...]]


def isolated(timeout: float, *calls: Call) -> list[Any]:
    """The answers of functions that run at once, in a process each, forked from this one: they need not pickle.

    An error is answered in words, a string, as is that a process has not answered for ``timeout`` seconds, or for a few
    after another's error. If a process ends, all are ended, and every answer says how.

    Raises:
        ValueError: This system has no fork (Windows).

    Example:
        >>> isolated(9.0, (max, (1, 2)), (int, ("x",)))
        [2, "fails: ValueError: invalid literal for int() with base 10: 'x'"]
    """
    context = multiprocessing.get_context("fork")
    owners: dict[Any, Any] = {}
    answers: dict[Any, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
            for call in calls:
                receive, send = context.Pipe(duplex=False)
                owners[receive] = context.Process(target=_answer, args=(send, *call), daemon=True)
                owners[receive].start()
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
                    if isinstance(answers[receive], str):
                        left = min(left, GRACE)
                except EOFError:
                    owners[receive].join(5)
                    code = owners[receive].exitcode or 0
                    return [f"ends the process ({signal.Signals(-code).name if code < 0 else code})"] * len(calls)
        return [answers[receive] for receive in owners]
    finally:
        for receive, process in owners.items():
            process.kill()
            process.join()
            receive.close()


def words(error: BaseException) -> str:
    """An error in a line, without the folders of this machine."""
    text = re.sub(r"(/[^\s/:'\"]+)+/", "", " ".join(f"{type(error).__name__}: {error}".split()))
    return text if len(text) <= 120 else text[:117] + "..."


def _answer(send: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # others do not survive a fork
    try:
        answer = function(*arguments)
    except Exception as error:
        answer = f"fails: {words(error)}"
    send.send(answer)
