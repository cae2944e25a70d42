"""``mmi-loss doctor`` on every loss of two views of the libraries that are installed: the table of docs/doctor.md.

A class is constructed without options and called in the first way that gives a number; those that cannot be, because
they want prototypes, teachers, patches or options, are listed by name. Losses that are in the rows already are not
examined again. stable-pretraining and pytorch-metric-learning are asked for only if they are installed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import environment
from benchmarks.environment import Row
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
OF_TEACHERS = ("CAPI", "DINO", "IBOT", "iBOT", "Patch", "SwAV", "SwaV", "DetCon", "MSN", "Koleo", "Mixin", "MAE")
"""Parts of names of losses that take something else, though they may be called with two views."""
LEFT_OUT = ("cost", "compile", "processes")
TIMEOUT = 300.0
SIZES: dict[str, Any] = {"pytorch-metric-learning": {"batch": 32, "dim": 48}}
"""Where not the doctor's own: some of these losses take all triplets of a batch."""


def main(arguments: list[str]) -> None:
    """Examine what is missing, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks doctor", description=__doc__)
    parser.add_argument("--solo-learn", type=Path, metavar="PATH", help="a clone of solo-learn")
    parser.add_argument("--out", type=Path, default=environment.RUNS / "doctor", help="folder for the CSV file")
    options = parser.parse_args(arguments)
    path = options.out / "doctor.csv"
    finished = {(row["library"], row["version"], row["loss"]) for row in environment.read(path)}
    for library, version, name, criterion in losses(options.solo_learn):
        if (library, version, name) not in finished:
            where = {"library": library, "version": version, "loss": name}
            for row in examine(library, name, criterion):
                environment.append(path, {**where, **row, "torch": torch.__version__})
    print(table(environment.read(path)))


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
            yield "solo-learn", version, f"{name.removeprefix('solo-learn ')}_loss_func", function


def examine(library: str, name: str, criterion: Any) -> list[Row]:
    """The findings on a loss, a row each; one row without a finding where there are none."""
    is_other, sizes = any(part in name for part in OF_TEACHERS), SIZES.get(library, {})
    ways = ["labels"] if library == "pytorch-metric-learning" else FORWARDS  # its second argument is always the labels
    called = (way for way in ways if isolated(60, (_is_called, (Patient(criterion, way, **sizes),)))[0] is True)
    row = {"forward": "" if is_other else next(called, ""), "severity": "", "check": "", "text": ""}
    if not row["forward"]:
        print(f"{name} is not of two views alone")
        return [row]
    checks = [name for name in CHECKS if name not in LEFT_OUT]
    report = check(criterion, row["forward"], only=checks, name=name, timeout=TIMEOUT, **sizes)
    print(report)
    return [{**row, "severity": f.severity, "check": f.check, "text": f.text} for f in report.findings] or [row]


def _is_called(patient: Patient) -> bool:
    return all(patient.run(patient.views(dtype=torch.float32)).finite)


def table(rows: list[Row]) -> str:
    """What is wrong or fragile, by loss, and the number of notes; then those that could not be called."""
    by_loss: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        by_loss[f"{row['library']} {row['version']}", row["loss"], row["forward"]].append(row)
    uncalled: dict[str, list[str]] = defaultdict(list)
    lines = ["| library | loss | called | wrong | fragile | notes |", "|---|---|---|---|---|---|"]
    for (library, loss, forward), found in by_loss.items():
        if not forward:
            uncalled[library].append(loss)
            continue
        texts: dict[str, list[str]] = {"wrong": [], "fragile": [], "note": []}
        for row in found:
            text = f"{row['check']}: {row['text']}".replace("|", r"\|").replace("<", "&lt;")
            texts.get(row["severity"], []).append(text)
        cells = [library, loss, forward, *("<br>".join(texts[s]) for s in ("wrong", "fragile")), len(texts["note"])]
        lines.append(f"| {' | '.join(map(str, cells))} |")  # not aligned: a cell may be a paragraph
    others = "; ".join(f"{library}: {', '.join(names)}" for library, names in uncalled.items())
    return "\n".join([*lines, "", f"Not of two views alone: {others or 'none'}."])
