"""``mmi-loss doctor MODULE:CRITERION``: what is wrong with a loss of two or more views, found without knowing it.

Every finding is one of

- wrong: a finite number that is not the right one, and nothing that shows it;
- fragile: an error, NaN, an end or a hang of the process, on input that training can bring;
- note: a property that a loss may well have, and who uses it should know.

Checks run in processes of their own on the CPU; one that hangs or ends its process is a finding as well.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mmi_loss.doctor.examination import CHECKS, FORWARDS, FRAGILE, NOTE, SEVERITIES, UNCALLABLE, Patient
from mmi_loss.doctor.isolation import CannotForkError, ends_on_sigterm, isolated, words

TIMEOUT = 60.0


@dataclass(frozen=True)
class Finding:
    """One thing that was found: how bad, by which check, in plain words."""

    severity: str
    check: str
    text: str


@dataclass(frozen=True)
class Report:
    """All findings about a criterion, the most severe first; ``str()`` is a table."""

    name: str
    findings: list[Finding]
    checks: list[str]
    seconds: float
    torch: str = torch.__version__

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong or fragile."""
        return all(finding.severity == NOTE for finding in self.findings)

    def __str__(self) -> str:
        counts = ", ".join(f"{sum(f.severity == s for f in self.findings)} {s}" for s in SEVERITIES)
        title = f"{self.name}: {counts}; {len(self.checks)} checks in {self.seconds:.0f} s"
        return "\n".join([title, *(f"  {f.severity:8} {f.check:14}  {f.text}" for f in self.findings)])


@ends_on_sigterm()
def check(
    criterion: Any, forward: str = "two", *, ranks: int = 2, batch: int = 64, dim: int = 192, name: str = "",
    only: Sequence[str] = (), timeout: float = TIMEOUT, progress: Callable[[str], None] = lambda name: None,
    **options: Any,
) -> Report:  # fmt: skip
    """Examine a loss of two or more views (N, D), on the CPU, in half a minute for a usual one.

    Args:
        criterion: A module or function, of which copies are examined; or a class, which is constructed with the
            ``options`` and, for the checks of ranks, ``gather_distributed=True`` if it takes that.
        forward: How it is called: ``"two"``: (z_a, z_b); ``"list"``: ([z_a, z_b]); ``"multicrop"``: (local_proj=,
            global_proj=), (V, N, D) each; ``"nested"``: two (N, 1, D); ``"labels"``: (all views under one another, the
            image of each row).
        ranks: Processes of the distributed checks; below 2 there are none.
        batch: N of most checks; others have fewer, 2 D or 4 N.
        dim: D of all checks but the cost's.
        name: What the report calls it.
        only: Names of the checks to make, of :data:`mmi_loss.doctor.examination.CHECKS`; none: all.
        timeout: Seconds without an answer after which a check counts as hung.
        progress: Called with the name of every check before it starts.
        **options: Of the class.

    Raises:
        ValueError: ``forward`` or ``only`` names nothing.
        CannotForkError: There is no fork (Windows), or no autograd after it, as after a backward on a GPU.

    Example:
        >>> def loss(z_a, z_b):
        ...     return (z_a - z_b.flip(0)).square().mean()
        >>> print(check(loss, only=["order"]).findings[0].text.split(":")[0])
        the value depends on the order of the samples
    """
    if forward not in FORWARDS:
        raise ValueError(f"forward must be one of {', '.join(FORWARDS)}, got {forward!r}")
    if unknown := set(only) - set(CHECKS):
        raise ValueError(f"only names {', '.join(sorted(unknown))}, which is none of {', '.join(CHECKS)}")
    patient = Patient(criterion, forward, batch, dim, ranks, timeout, options)
    names = [n for n in CHECKS if n in (only or CHECKS) and (ranks > 1 or "ranks" not in n)]
    start, findings = time.perf_counter(), []
    for examined in names:
        progress(examined)
        is_own = CHECKS[examined].forks  # else a process is made for it
        call = functools.partial(_examine, patient, examined)
        found = call() if is_own else isolated(timeout, (call, ()))[0]
        found = [(FRAGILE, f"the check {found}")] if isinstance(found, str) else found
        findings += [Finding(severity, examined, text) for severity, text in found]
        if any(text.startswith(f"{UNCALLABLE}:") for _, text in found):
            break  # all further checks would say the same
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    name = name or getattr(criterion, "__name__", type(criterion).__name__)
    return Report(name, findings, names, round(time.perf_counter() - start, 1))


def _examine(patient: Patient, name: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    try:
        found.extend(CHECKS[name].examine(patient))
    except CannotForkError:
        raise
    except Exception as error:
        found.append((FRAGILE, f"cannot be checked: {words(error)}"))
    return found


def criterion_of(text: str) -> tuple[Any, dict[str, Any]]:
    """What ``MODULE:CRITERION`` or ``MODULE:CRITERION(option=value, ...)`` names, and the options.

    Raises:
        ValueError: It is not of that form; options are given by name, with literal values.
        ImportError, AttributeError: There is no such module, or nothing of that name in it.

    Example:
        >>> criterion_of("mmi_loss:MMILoss(snr=256)")
        (<class 'mmi_loss.loss.MMILoss'>, {'snr': 256})
    """
    module, _, expression = text.partition(":")
    try:
        syntax = ast.parse(expression, mode="eval").body
        call = syntax if isinstance(syntax, ast.Call) else ast.Call(syntax, [], [])
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        names = ast.unparse(call.func).split(".")
        if call.args or not all(name.isidentifier() for name in names):
            raise ValueError("options are given by name")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} is not MODULE:CRITERION or MODULE:CRITERION(option=value): {error}") from error
    found: Any = importlib.import_module(module)
    for name in names:
        found = getattr(found, name)
    return found, options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints what is found; 0 if nothing is as bad as ``--fail-on``, 1 if something is, 2 if the criterion
    cannot be had.
    """
    parser = argparse.ArgumentParser(prog="mmi-loss", description="Tools beside the loss.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="examine any loss of views", description=__doc__)
    doctor.formatter_class = argparse.RawDescriptionHelpFormatter
    doctor.epilog = "\n".join(["checks:", *(f"  {name:16} {check.severities}" for name, check in CHECKS.items())])
    doctor.add_argument(
        "criterion", metavar="MODULE:CRITERION", help="as lightly.loss:NTXentLoss or '...(temperature=0.2)'"
    )
    doctor.add_argument("--forward", choices=FORWARDS, default="two", help="how it is called; default: with two views")
    doctor.add_argument("--ranks", type=int, default=2, help="processes of the distributed checks; 1: none")
    doctor.add_argument("--batch", type=int, default=64, help="N of most checks")
    doctor.add_argument("--dim", type=int, default=192, help="D")
    doctor.add_argument("--only", nargs="+", default=(), metavar="CHECK", help="names of checks, below; default: all")
    doctor.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds after which a check counts as hung")
    doctor.add_argument("--fail-on", choices=SEVERITIES, default=FRAGILE, help="the least severity to exit with 1")
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    given = vars(parser.parse_args(arguments))
    text, as_json, fail_on = given.pop("criterion"), given.pop("json"), given.pop("fail_on")
    end = "\r" if sys.stderr.isatty() else "\n"

    def progress(name: str) -> None:
        print(f"{name} ...".ljust(24), end=end, file=sys.stderr, flush=True)

    sys.path.insert(0, "")  # as for python -m: criteria of the working folder
    try:
        criterion, options = criterion_of(text)
        report = check(criterion, name=text, progress=progress, **given, **options)
    except (ImportError, AttributeError, ValueError, RuntimeError) as error:
        print(f"mmi-loss doctor: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(json.dumps({**asdict(report), "passed": report.passed}, indent=2) if as_json else report)
    return int(any(SEVERITIES.index(f.severity) <= SEVERITIES.index(fail_on) for f in report.findings))
