"""``mmi-loss doctor`` on every loss of two views of the libraries that are installed: the table docs/doctor.md.

A class is constructed without options and called in the first way that gives a number; those that cannot be, because
they want prototypes, teachers, patches or options, are listed by name. Losses that are in the rows already are not
examined again. stable-pretraining and pytorch-metric-learning are asked for only if they are installed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks import environment
from benchmarks.losses import solo_learn
from mmi_loss.doctor import FORWARDS, check
from mmi_loss.doctor.examination import CHECKS, Patient
from mmi_loss.doctor.isolation import isolated

MODULES = {
    "mmi-loss": "mmi_loss.loss",
    "lightly": "lightly.loss",
    "stable-pretraining": "stable_pretraining.losses",
    "pytorch-metric-learning": "pytorch_metric_learning.losses",
}
SOLO_LEARN = ("barlow", "byol", "nnclr", "simclr", "simsiam", "vicreg", "wmse")
OF_TEACHERS_AND_PATCHES = (
    "CAPI",
    "DINO",
    "IBOT",
    "iBOT",
    "Patch",
    "SwAV",
    "SwaV",
    "DetCon",
    "MSN",
    "Koleo",
    "Mixin",
    "MAE",
)
"""Parts of names of losses that take something else, though they may be called with two views."""
LEFT_OUT = ("cost", "compile", "processes")
TIMEOUT = 300.0
SIZES = {"pytorch-metric-learning": {"batch": 32, "dim": 48}}
"""Where not the doctor's own: some of these losses take all triplets of a batch."""
PAGE = Path(__file__).parent.parent / "docs" / "doctor.md"
Row = dict[str, str]


def losses(checkout: Path | None) -> Iterator[tuple[str, str, str, Any]]:
    """Library, its version, name and criterion."""
    for library, module in MODULES.items():
        try:
            found = vars(importlib.import_module(module))
        except ImportError:
            continue
        for name, value in found.items():
            if inspect.isclass(value) and issubclass(value, nn.Module) and not inspect.isabstract(value):
                yield library, importlib.metadata.version(library), name, value
    if checkout:
        version = environment.output(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"])
        for name, function in solo_learn(checkout, SOLO_LEARN).items():
            yield "solo-learn", version, f"{name}_loss_func", function


def way_of_calling(criterion: Any, library: str) -> str:
    """The first of the forwards that gives a number, or ''."""
    ways = ["labels"] if library == "pytorch-metric-learning" else FORWARDS  # its second argument is always the labels
    for forward in ways:
        patient = Patient(criterion, forward, **SIZES.get(library, {}))
        if isolated(60, (_is_called, (patient,)))[0] is True:
            return forward
    return ""


def _is_called(patient: Patient) -> bool:
    return all(patient.run(patient.views(dtype=torch.float32)).finite)


def examine(options: argparse.Namespace, console: Console) -> None:
    """Append the findings on every loss that has no row yet; one that is without findings has a row that says so."""
    finished = {(row["library"], row["version"], row["loss"]) for row in environment.read(options.rows)}
    for library, version, name, criterion in losses(options.solo_learn):
        if (library, version, name) in finished:
            continue
        is_other = any(part in name for part in OF_TEACHERS_AND_PATCHES)
        forward = "" if is_other else way_of_calling(criterion, library)
        checks = [name for name in CHECKS if name not in LEFT_OUT]
        report = (
            check(criterion, forward, only=checks, name=name, timeout=TIMEOUT, **SIZES.get(library, {}))
            if forward
            else None
        )
        console.print(str(report or f"{name} is not of two views alone"), markup=False, highlight=False)
        where = {"library": library, "version": version, "loss": name, "forward": forward}
        rows = [{"severity": f.severity, "check": f.check, "text": f.text} for f in report.findings] if report else []
        for row in rows or [{"severity": "", "check": "", "text": ""}]:
            environment.append(options.rows, {**where, **row, "torch": torch.__version__})


def markdown(rows: list[Row]) -> str:
    """The page."""
    by_loss: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        by_loss.setdefault((row["library"], row["version"], row["loss"], row["forward"]), []).append(row)
    versions = ", ".join(dict.fromkeys(f"{library} {version}" for library, version, _, _ in by_loss))
    left_out = f"all checks but {', '.join(LEFT_OUT)}"
    lines = ["# The doctor on other libraries' losses", ""]
    lines += [
        f"Every loss that takes two (N, D) views and has no options without a default: {versions}; torch "
        f"{rows[0]['torch']}, on the CPU, {left_out} (`python -m benchmarks doctor`).",
        "",
        "*Wrong* is a finite number that is not the right one, *fragile* an error or NaN on input that training can "
        "bring. A loss may not have been meant for all of it: unequal batches, float16 or N = 1. N = 64 and D = 192 "
        "but for what a text says, 32 and 48 for pytorch-metric-learning. Notes, such as a "
        f"dependence on scale, are in the [rows]({_link(environment.RESULTS / 'doctor.csv')}).",
        "",
        "| library | loss | called | wrong | fragile | notes |",
        "|---|---|---|---|---|---|",
    ]
    uncalled: dict[str, list[str]] = {}
    for (library, _, loss, forward), found in by_loss.items():
        if not forward:
            uncalled.setdefault(library, []).append(loss)
            continue
        texts = {s: [f"{r['check']}: {r['text']}" for r in found if r["severity"] == s] for s in ("wrong", "fragile")}
        cells = ["<br>".join(t.replace("|", r"\|").replace("<", "&lt;") for t in texts[s]) for s in texts]
        notes = sum(r["severity"] == "note" for r in found)
        lines.append(f"| {library} | {loss} | {forward} | {' | '.join(cells)} | {notes} |")
    lines += ["", "Not of two views alone: " + "; ".join(f"{k}: {', '.join(v)}" for k, v in uncalled.items()) + "."]
    return "\n".join(lines) + "\n"


def _link(path: Path) -> str:
    return f"../{path.relative_to(PAGE.parent.parent).as_posix()}"


def main(arguments: list[str]) -> None:
    """Examine what is missing, then write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks doctor", description=__doc__)
    parser.add_argument("--solo-learn", type=Path, metavar="PATH", help="a clone of solo-learn")
    parser.add_argument(
        "--rows", type=Path, default=environment.RESULTS / "doctor.csv", help="CSV file of the findings"
    )
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--report", action="store_true", help="only write the page")
    options = parser.parse_args(arguments)
    if not options.report:
        examine(options, Console())
    rows = environment.read(options.rows)
    if not rows:
        raise SystemExit(f"{options.rows} has no rows to report")
    options.page.write_text(markdown(rows))


if __name__ == "__main__":
    sys.exit("run as `python -m benchmarks doctor`")
