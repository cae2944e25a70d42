"""Tables and a self-contained HTML report of the comparison, from its CSV files."""

from __future__ import annotations

import base64
import html
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from scipy import stats

from benchmarks import grid, plots
from benchmarks.methods import METHODS

Row = dict[str, str]
CellName = tuple[str, int, int]
"""Task, D, N."""
BASELINES = ("vicreg_fast", "barlow_twins_fast", "simclr", "lejepa", "frossl", "wmse")
BASELINES += ("visreg", "visreg_09", "simclr_02", "simclr_01", "mmcr")
REFERENCES = {grid.UNTRAINED: "untrained", grid.PIXELS: "raw pixels", grid.SUPERVISED: "supervised"}
OURS = "mmi"
METRICS = {"linear": "linear probe", "knn": "kNN"}


class Difference(NamedTuple):
    """Mean of paired differences over ``seeds`` seeds and its 95 % t interval (NaN for a single seed)."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def verdict(self) -> str:
        """``worse`` and ``better``: the interval leaves zero out; otherwise ``tie``, or ``one run``."""
        if self.seeds < 2:
            return "one run"
        return "worse" if self.high < 0 else "better" if self.low > 0 else "tie"

    def __str__(self) -> str:
        return f"{self.mean:+.3f}" + (f" [{self.low:+.3f}, {self.high:+.3f}]" if self.seeds > 1 else "")


def paired(a: dict[int, float], b: dict[int, float]) -> Difference | None:
    """The difference of two methods over the seeds both have."""
    return interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def interval(differences: Sequence[float]) -> Difference | None:
    """Mean and 95 % interval of Student's t."""
    n = len(differences)
    if n == 0:
        return None
    mean = statistics.fmean(differences)
    if n == 1:
        return Difference(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5
    return Difference(mean, mean - half, mean + half, n)


def title(method: str) -> str:
    """A method's name in print."""
    return REFERENCES.get(method) or METHODS[method].title


def best_rates(rows: Iterable[Row], cells: Iterable[grid.Cell] | None = None) -> dict[tuple[str, str], float]:
    """The rate of the highest mean of kNN and linear accuracy, per task and method; of the given cells, or of all."""
    keys = None if cells is None else {cell.key for cell in cells}
    scores: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if keys is None or row["cell"] in keys:
            score = (float(row["knn"]) + float(row["linear"])) / 2
            scores[row["task"], row["method"]].append(
                (-1.0 if math.isnan(score) else score, float(row["learning_rate"]))
            )
    return {which: max(tried)[1] for which, tried in scores.items()}


def at_best_rates(rows: list[Row]) -> list[Row]:
    """The rows of each task's and method's best rate in the first seed, where several were tried."""
    first: dict[tuple[str, str], int] = {}
    for row in rows:
        which, seed = (row["task"], row["method"]), int(row["seed"])
        first[which] = min(first.get(which, seed), seed)
    best = best_rates(row for row in rows if int(row["seed"]) == first[row["task"], row["method"]])
    return [row for row in rows if float(row["learning_rate"]) == best[row["task"], row["method"]]]


class Results:
    """The rows of a comparison by cell, method and seed."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.values: dict[tuple[CellName, str, str], dict[int, float]] = defaultdict(dict)
        for row in rows:
            name = (row["task"], int(row["projector_dim"]), int(row["batch_size"]))
            for metric in METRICS:
                self.values[name, row["method"], metric][int(row["seed"])] = float(row[metric])
        present = {row["method"] for row in rows}
        self.methods = [m for m in (*REFERENCES, *METHODS) if m in present]
        self.tasks = list(dict.fromkeys(row["task"] for row in rows))
        self.cells = sorted({name for name, method, _ in self.values if method not in REFERENCES})

    def of(self, cell: CellName, method: str, metric: str) -> dict[int, float]:
        """Accuracy by seed. References are the same in every cell of a task."""
        if method in REFERENCES:
            cell = next((c for c, m, _ in self.values if m == method and c[0] == cell[0]), cell)
        return self.values.get((cell, method, metric), {})

    def cells_of(self, task: str) -> list[CellName]:
        return [cell for cell in self.cells if cell[0] == task]

    def difference(self, cell: CellName, baseline: str, metric: str) -> Difference | None:
        return paired(self.of(cell, OURS, metric), self.of(cell, baseline, metric))

    def best_baseline(self, cell: CellName, metric: str) -> str | None:
        """The baseline of the highest mean over the seeds ours has too; two seeds at least, where any has two."""
        common = {b: sorted(self.of(cell, b, metric).keys() & self.of(cell, OURS, metric).keys()) for b in BASELINES}
        most = max(map(len, common.values()))
        candidates = [b for b, seeds in common.items() if most and len(seeds) >= min(most, 2)]
        return max(
            candidates,
            key=lambda b: statistics.fmean(self.of(cell, b, metric)[s] for s in common[b]),
            default=None,
        )

    def against_best(self, cell: CellName, metric: str) -> tuple[str, Difference] | None:
        best = self.best_baseline(cell, metric)
        difference = self.difference(cell, best, metric) if best else None
        return (best, difference) if best and difference else None

    def pooled(self, task: str, baseline: str, metric: str) -> Difference | None:
        """The paired difference over all cells and seeds of a task, averaged over cells first: seeds are the sample."""
        by_seed: dict[int, list[float]] = defaultdict(list)
        for cell in self.cells_of(task):
            ours, theirs = self.of(cell, OURS, metric), self.of(cell, baseline, metric)
            for seed in ours.keys() & theirs.keys():
                by_seed[seed].append(ours[seed] - theirs[seed])
        full = max(map(len, by_seed.values()), default=0)
        return interval([statistics.fmean(d) for d in by_seed.values() if len(d) == full])


def draw_map(rows: list[Row], path: Path) -> Path | None:
    """The picture of ours against the best baseline of every cell; none where there is no such pair."""
    results, maps = Results(rows), {}
    for metric, name in METRICS.items():
        for task in results.tasks:
            patches = {}
            for cell in results.cells_of(task):
                best = results.against_best(cell, metric)
                if best:
                    patches[cell[1:]] = plots.Patch(best[1].mean, best[1].verdict, title(best[0]))
            if patches:
                maps[name, task] = patches
    return plots.difference_maps(maps, path) if maps else None


def draw_steps(rows: list[Row], path: Path) -> Path:
    """The picture of accuracy over steps."""
    path.write_bytes(plots.steps_grid(rows, {row["method"]: title(row["method"]) for row in rows}))
    return path


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation over seeds."""
    values = list(values)
    if not values:
        return ""
    if any(map(math.isnan, values)):
        return "diverged"
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def tables(rows: list[Row]) -> list[Table]:
    """For the terminal: per task the linear accuracy of every method and cell, and ours against the best baseline."""
    results, made = Results(rows), []
    for task in results.tasks:
        table = Table(title=f"{task}: linear probe, mean ± standard deviation over seeds")
        table.add_column("D, N")
        for method in results.methods:
            table.add_column(title(method), justify="right")
        table.add_column("MMI - best baseline [95 %]")
        for cell in results.cells_of(task):
            found = results.against_best(cell, "linear")
            last = f"{found[1]} ({title(found[0])})" if found else ""
            values = [spread(results.of(cell, method, "linear").values()) for method in results.methods]
            table.add_row(f"{cell[1]}, {cell[2]}", *values, last)
        made.append(table)
    return made


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; display: block; overflow-x: auto; }
td, th { padding: 3px 9px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; } h2 { margin-top: 2em; } .note { color: #555; }
.worse { background: #f8d0cc; } .better { background: #d3efd3; } .best { font-weight: bold; }
"""


def write(rows: list[Row], rate_rows: list[Row], path: Path) -> Path:
    """Write the report, one file with its pictures inside."""
    results = Results(rows)
    titles = {method: title(method) for method in results.methods}
    parts = [
        "<h1>MMI beside other self-supervised losses</h1>",
        _introduction(rows),
        "<h2>MMI's default against the best baseline of each cell</h2>",
        "<p class=note>Paired by seed (same initial weights, same batches), 95 % interval of Student's t. The best "
        "baseline is chosen after the fact, per cell and column, which favours the baselines. Red: the interval lies "
        "below zero; green: above.</p>",
        _against_best(results),
        "<h2>MMI's default against each baseline, all cells of a task together</h2>",
        "<p class=note>Differences are averaged over cells first; seeds are the sample.</p>",
        _pooled(results),
        "<h2>Accuracy</h2>",
    ]
    for metric, name in METRICS.items():
        for task in results.tasks:
            parts += [f"<h3>{html.escape(task)}: {name}</h3>", _accuracy(results, task, metric)]
    parts.append("<h2>Paired differences, MMI's default minus each baseline (linear probe)</h2>")
    parts.append(_differences(results, "linear"))
    for heading, note, draw in (
        (
            "Accuracy over steps",
            "kNN on test images, D = 512. Lines are means over seeds, bands their range.",
            plots.steps_grid,
        ),
        ("Accuracy against D and N", "Linear probe; above at N = 256, below at D = 512.", plots.against_sizes),
        (
            "Spectrum of the embeddings",
            "Share of variance per principal direction of 512 test images, D = 512, N = 256, first seed; in the "
            "legend the effective rank.",
            plots.spectra,
        ),
        (
            "Mutual information during training",
            "I(Z; Z') of held-out pairs of views in a fixed random 32-dimensional slice of the projections, in nats, "
            "D = 512, N = 256, first seed: bias-corrected (solid) and plug-in (dotted), measured at the evaluations.",
            plots.information,
        ),
        (
            "Which latent factors are kept",
            "R² of a linear regression of each factor on the features, test images of the latent task, D = 512, "
            "N = 256, mean over seeds. c1 to c8: content, from strong to weak. Nuisance: mean over the 24 factors.",
            plots.factors,
        ),
    ):
        picture = draw(rows, titles)
        if picture is not None:
            encoded = base64.b64encode(picture).decode()
            parts += [
                f"<h2>{heading}</h2><p class=note>{note}</p>",
                f"<img alt='{heading}' src='data:image/png;base64,{encoded}'>",
            ]
    parts += ["<h2>Learning rates</h2>", _rates(rate_rows)]
    page = "<!doctype html><html lang=en><meta charset=utf-8><title>MMI: comparison</title>"
    path.write_text(f"{page}<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n")
    return path


def _introduction(rows: list[Row]) -> str:
    budgets = sorted(
        {(r["task"], int(r["batch_size"]), int(r["steps"])) for r in rows if r["method"] != grid.UNTRAINED}
    )
    budget = "; ".join(
        f"{task} " + ", ".join(f"{steps} at N = {n}" for t, n, steps in budgets if t == task)
        for task in dict.fromkeys(b[0] for b in budgets)
    )
    columns = {name: sorted({row[name] for row in rows}) for name in ("version", "commit", "torch", "device", "date")}
    where = "; ".join(f"{name} {', '.join(values)}" for name, values in columns.items())
    counts = Counter(row["method"] for row in rows)
    runs = ", ".join(f"{title(method)} {count}" for method, count in counts.most_common())
    return (
        f"<p>{len(rows)} runs. One backbone per task, one projector (hidden width {rows[0]['hidden_dim']}), the same "
        "views, AdamW with warm-up and cosine decay; every loss with its library's published settings and the best "
        "learning rate of its own grid (at the end of this page). digits: scikit-learn's 1,797 real handwritten digits "
        "under nuisances; clutter: the same digits in synthetic 32 x 32 RGB scenes; latent: 8 known factors of content "
        f"among 24 of nuisance. Optimiser steps: {html.escape(budget)}. Small networks and short budgets: what holds "
        "here need not hold at the scale of ImageNet.</p>"
        f"<p class=note>Runs per method: {html.escape(runs)}. A method "
        "without figures in a cell was not run there; a figure without spread is one seed, mostly of a baseline too "
        "far behind to be repeated. The CSV file also keeps the runs at rates that a finer grid has overtaken; "
        "they are not compared.</p>"
        f"<p class=note>{html.escape(where)}. Rates were tuned at D = 512, N = 256 alone; times in the CSV file were "
        "taken while other processes ran: <code>python -m benchmarks speed</code> measures time.</p>"
    )


def _html_table(head: Sequence[str], lines: Iterable[Sequence[tuple[str, str]]]) -> str:
    """Cells are (text, class)."""
    first = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td class='{style}'>{html.escape(text)}</td>" for text, style in line) + "</tr>"
        for line in lines
    )
    return f"<table><tr>{first}</tr>{body}</table>"


def _shaded(difference: Difference | None, name: str = "") -> tuple[str, str]:
    if difference is None:
        return "", ""
    return f"{difference}{name}", difference.verdict.replace(" ", "")


def _against_best(results: Results) -> str:
    lines = []
    for cell in results.cells:
        found = [results.against_best(cell, metric) for metric in METRICS]
        shown = [_shaded(f[1], f"  ({title(f[0])})") if f else ("", "") for f in found]
        lines.append([(f"{cell[0]}, D = {cell[1]}, N = {cell[2]}", ""), *shown])
    return _html_table(["", *METRICS.values()], lines)


def _pooled(results: Results) -> str:
    baselines = [b for b in BASELINES if b in results.methods]
    lines = [
        [(f"{task}, {name}", ""), *(_shaded(results.pooled(task, b, metric)) for b in baselines)]
        for task in results.tasks
        for metric, name in METRICS.items()
    ]
    return _html_table(["", *map(title, baselines)], lines)


def _accuracy(results: Results, task: str, metric: str) -> str:
    cells, lines = results.cells_of(task), []
    means = {
        (cell, method): statistics.fmean(values)
        for cell in cells
        for method in results.methods
        if (values := results.of(cell, method, metric).values())
    }
    for method in results.methods:
        line = [(title(method), "")]
        for cell in cells:
            is_best = (cell, method) in means and means[cell, method] == max(
                value for (c, _), value in means.items() if c == cell
            )
            line.append((spread(results.of(cell, method, metric).values()), "best" if is_best else ""))
        lines.append(line)
    return _html_table(["D, N", *(f"{dim}, {n}" for _, dim, n in cells)], lines)


def _differences(results: Results, metric: str) -> str:
    baselines = [b for b in BASELINES if b in results.methods]
    lines = [
        [
            (f"{cell[0]}, D = {cell[1]}, N = {cell[2]}", ""),
            *(_shaded(results.difference(cell, b, metric)) for b in baselines),
        ]
        for cell in results.cells
    ]
    return _html_table(["", *map(title, baselines)], lines)


def _rates(rows: list[Row]) -> str:
    if not rows:
        return "<p class=note>One rate for all, no grid.</p>"
    first = rows[0]
    note = (
        f"<p class=note>Mean of kNN and linear accuracy per rate of AdamW, seed {first['seed']} (not compared above), "
        "D = 512, N = 256 (W-MSE: D = 128). "
        "The grid grows by factors of four until the best rate is inside; baselines are also tried at half and twice "
        "their best.</p>"
    )
    rates = sorted({float(row["learning_rate"]) for row in rows})
    scores = {
        (row["task"], row["method"], float(row["learning_rate"])): (float(row["knn"]) + float(row["linear"])) / 2
        for row in rows
    }
    lines = []
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in rows):
        tried = {rate: scores[task, method, rate] for rate in rates if (task, method, rate) in scores}
        best = max(tried.values())
        values = [
            (f"{tried[rate]:.3f}", "best" if tried[rate] == best else "") if rate in tried else ("", "")
            for rate in rates
        ]
        lines.append([(f"{task}, {title(method)}", ""), *values])
    return note + _html_table(["", *(f"{rate:g}" for rate in rates)], lines)
