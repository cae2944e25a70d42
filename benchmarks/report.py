"""Tables from stored rows, for the terminal and for documents.

``python -m benchmarks report NAME`` prints a table of the stored results. A document marks where it shows one::

    <!-- rows: python -m benchmarks report demo -->
    ...
    <!-- end rows -->

and a single number in a sentence in the same way, on one line, by ``report value FILE COLUMN NAME=VALUE ...``. What
stands between the marks is what the command prints: ``--write`` puts it there in all documents, and a test compares.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from scipy import stats

from benchmarks import environment
from benchmarks.environment import Row
from benchmarks.losses import FIXED, LOSSES, SUPERVISED, is_rival

CellName = tuple[str, int, int]
"""Task, D, N."""
OURS = "mmi"
METRICS = {"linear": "linear probe", "knn": "kNN"}
ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- rows: python -m benchmarks report ([^>]+?) -->)(.*?)(<!-- end rows -->)", re.DOTALL)
TABLES = {
    "demo": "demo.csv",
    "rates": "rates.csv",
    "compare": "compare.csv",
    "ablate": "ablate.csv",
    "speed": "speed-cpu.csv",
    "solo_learn": "solo_learn.csv",
}
"""Commands with a function ``table(rows, *arguments)``, and their stored rows."""


class Difference(NamedTuple):
    """Mean of paired differences over ``seeds`` seeds and half of its 95 % interval (NaN where it is not known)."""

    mean: float
    half: float
    seeds: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:+.3f}" + (f" ± {self.half:.3f}" if not math.isnan(self.half) else "")


def interval(differences: Sequence[float]) -> Difference | None:
    """Mean and 95 % interval of Student's t."""
    n = len(differences)
    if n == 0:
        return None
    spread = statistics.stdev(differences) / n**0.5 if n > 1 else math.nan
    return Difference(statistics.fmean(differences), float(stats.t.ppf(0.975, n - 1)) * spread, n)


def paired(a: dict[int, float], b: dict[int, float]) -> Difference | None:
    """The difference of two methods over the seeds both have."""
    return interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def score(row: Row) -> float:
    """The mean of kNN and linear accuracy; of a run that diverged, zero."""
    mean = (float(row["knn"]) + float(row["linear"])) / 2
    return 0.0 if math.isnan(mean) else mean


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation over seeds."""
    values = list(values)
    if not values:
        return ""
    if any(map(math.isnan, values)):
        return "diverged"
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def table(head: Sequence[str], lines: Iterable[Sequence[str]], bold: str = "") -> str:
    """A Markdown table with aligned columns; the line whose first cell is ``bold`` stands out."""
    rows = [list(head), *(list(map(str, line)) for line in lines)]
    rows = [[f"**{cell}**" if bold and cell and row[0] == bold else cell for cell in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(head))]
    shown = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([shown[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *shown[1:]])


def in_order(methods: Iterable[str]) -> list[str]:
    """Untrained first, the registry's order, with labels last."""
    known = [*FIXED, *LOSSES, SUPERVISED]
    return sorted(set(methods), key=lambda name: known.index(name) if name in known else len(known))


class Results:
    """The rows of a comparison by cell, method and seed."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.values: dict[tuple[CellName, str, str], dict[int, float]] = defaultdict(dict)
        for row in rows:
            name = (row["task"], int(row["projector_dim"]), int(row["batch_size"]))
            for metric in METRICS:
                self.values[name, row["method"], metric][int(row["seed"])] = float(row[metric])
        self.methods = in_order(row["method"] for row in rows)
        self.rivals = [name for name in self.methods if is_rival(name)]
        self.tasks = list(dict.fromkeys(row["task"] for row in rows))
        self.cells = sorted({name for name, method, _ in self.values if method not in (*FIXED, SUPERVISED)})

    def of(self, cell: CellName, method: str, metric: str) -> dict[int, float]:
        """Accuracy by seed. The untrained backbone is the same in every cell of a task."""
        if method in (*FIXED, SUPERVISED):
            cell = next((c for c, m, _ in self.values if m == method and c[0] == cell[0]), cell)
        return self.values.get((cell, method, metric), {})

    def best_rival(self, cell: CellName, metric: str) -> str | None:
        """The rival of the highest mean over the seeds ours has too; of two seeds at least, where any has two."""
        ours = self.of(cell, OURS, metric)
        common = {name: sorted(self.of(cell, name, metric).keys() & ours.keys()) for name in self.rivals}
        most = max(map(len, common.values()), default=0)
        candidates = [name for name, seeds in common.items() if most and len(seeds) >= min(most, 2)]
        means = {b: statistics.fmean(self.of(cell, b, metric)[seed] for seed in common[b]) for b in candidates}
        return max(candidates, key=means.__getitem__, default=None)

    def against_best(self, cell: CellName, metric: str) -> tuple[str, Difference] | None:
        """The best rival and the paired difference of ours to it."""
        best = self.best_rival(cell, metric)
        found = paired(self.of(cell, OURS, metric), self.of(cell, best, metric)) if best else None
        return (best, found) if best and found else None


STATISTICS = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "sd": statistics.stdev,
    "min": min,
    "max": max,
    "count": len,
}


def value(file: str, column: str, *conditions: str) -> str:
    """One number: ``column`` of the rows of ``file`` that meet all of NAME=VALUE.

    ``stat=`` names a statistic over the rows (mean), ``format=`` a format (``.3f``).
    """
    named = dict(condition.split("=", 1) for condition in conditions)
    statistic, form = STATISTICS[named.pop("stat", "mean")], named.pop("format", ".3f")
    rows = environment.read(environment.RESULTS / file)
    found = [float(row[column]) for row in rows if all(row[name] == wanted for name, wanted in named.items())]
    if not found:
        raise SystemExit(f"{file} has no rows with {named}")
    return format(statistic(found), form)


def render(command: str) -> str:
    """What ``report COMMAND`` prints."""
    name, *arguments = shlex.split(command)
    if name == "value":
        return value(*arguments)
    folder, _, name = name.rpartition("/")
    if name not in TABLES:
        raise SystemExit(f"report {name}: known are value, {', '.join(TABLES)}")
    path = Path(folder, TABLES[name])
    rows = environment.read(environment.RESULTS / path)
    if not rows:
        raise SystemExit(
            f"{path} has no rows: python -m benchmarks {name} --out benchmarks/results/{folder} makes them"
        )
    shown = importlib.import_module(f"benchmarks.{name}").table(rows, *arguments)
    return f"{shown}\n\n*{path.as_posix()}: {environment.provenance(rows)}*"


def rendered(text: str) -> str:
    """A document with all its blocks as the commands print them now."""

    def replace(match: re.Match[str]) -> str:
        begin, command, _, end = match.groups()
        shown = render(command)
        return f"{begin}{shown}{end}" if command.startswith("value ") else f"{begin}\n\n{shown}\n\n{end}"

    return BLOCK.sub(replace, text)


def documents() -> list[Path]:
    """All that may show rows."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main(arguments: list[str]) -> None:
    """Print a table, or put all into the documents."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("command", nargs="*", help=f"value, or a table: {', '.join(TABLES)}; and its arguments")
    parser.add_argument("--write", action="store_true", help="into the marked blocks of README.md and docs")
    options = parser.parse_args(arguments)
    if options.command:
        print(render(shlex.join(options.command)))
    for path in documents() if options.write else []:
        text = path.read_text()
        if rendered(text) != text:
            path.write_text(rendered(text))
            print(f"written: {path.relative_to(ROOT)}")
    if not options.command and not options.write:
        parser.error("name a table, or --write")
