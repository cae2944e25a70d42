"""What every choice in the loss is worth: options of ``MMILoss`` in place of the default's, under one budget.

Backbone, projector, views and optimiser are those of ``compare``, the learning rate is the one it found for the default
loss, the runs are shorter. Any options can be tried: ``--methods snr=256 snr=256,slice_dim=None``. Finished runs are
kept: the same command goes on where it stopped. Ends with a table of the differences to the default.
"""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import fmean, variance

from scipy import stats

from benchmarks import compare, environment, grid, report
from benchmarks.environment import Row
from benchmarks.report import OURS

METHODS = (
    *("objective=exchangeable", "objective=joint", "objective=joint,slice_dim=32", "objective=joint,slice_dim=None"),
    *("snr=4.0", "snr=16.0", "snr=32.0", "snr=128.0", "snr=256.0"),
    *("slice_dim=32", "slice_dim=64", "slice_dim=256", "slice_dim=None"),
    *("slice_kind=gaussian", "slice_kind=coordinates", "num_slices=4"),
    *(f"logdet=taylor,order={order}" for order in (1, 2, 3, 4, 5, 6)),
    *(f"logdet=taylor,beta={beta}" for beta in (0.5, 0.75, 1.5, 1.75)),
)
RATE = 1.6e-2
"""AdamW's: the best of the grid of ``compare`` for the default loss on digits, clutter and latent."""


def main(arguments: list[str]) -> None:
    """Run what is missing, then show the table."""
    parser = grid.parser("ablate", __doc__, ("latent", "digits"), METHODS)
    parser.add_argument("--dims", nargs="+", type=int, default=[512])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[256])
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps at N = 256")
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate")
    options = parser.parse_args(arguments)
    path, means = options.out / "ablate.csv", grid.Means.of(options)
    # Seeds outermost: an early stop leaves every choice measured equally often.
    cells = [
        compare.cell(task, method, (dim, batch_size), seed, options.rate, options.steps, 1)
        for seed in range(options.seeds)
        for method in dict.fromkeys([OURS, *options.methods])
        for dim in options.dims
        for batch_size in options.batch_sizes
        for task in options.tasks
    ]
    if not options.report:
        grid.run(cells, path, means)
    rows = grid.rows_of(cells, path)
    if not rows:
        raise SystemExit(f"{path} has no finished runs to report")
    print(table(rows), environment.provenance(rows), sep="\n\n")


def table(rows: list[Row], dim: str = "", batch_size: str = "") -> str:
    """Mean of kNN and linear accuracy less the default's at the same size, paired by seed, with a 95 % interval.

    Paired: the same seed starts from the same network and sees the same batches. Two or three differences tell little
    about their own spread; so it is pooled over all lines of a task, weighted by degrees of freedom.
    """
    scores: dict[tuple[str, ...], dict[int, float]] = defaultdict(dict)
    for row in rows:
        scores[row["projector_dim"], row["batch_size"], row["method"], row["task"]][int(row["seed"])] = report.score(
            row
        )
    differences: dict[tuple[str, ...], list[float]] = {}
    for (d, n, method, task), ours in scores.items():
        default = scores.get((d, n, OURS, task), {})
        found = [ours[seed] - default[seed] for seed in sorted(ours.keys() & default.keys())]
        if found and method != OURS:
            differences[d, n, method, task] = found
    tasks, lines = list(dict.fromkeys(row["task"] for row in rows)), []
    spread = {task: _spread([found for which, found in differences.items() if which[3] == task]) for task in tasks}
    for d, n, method in dict.fromkeys(which[:3] for which in differences):
        if dim in ("", d) and batch_size in ("", n):
            line = [(differences.get((d, n, method, task)), spread[task]) for task in tasks]
            shown = [
                f"{fmean(found):+.3f} ± {half / len(found) ** 0.5:.3f} ({len(found)})" if found else ""
                for found, half in line
            ]
            lines.append([method, d, n, *shown])
    return report.table(["in place of the default", "D", "N", *(f"{task} (seeds)" for task in tasks)], lines)


def _spread(samples: list[list[float]]) -> float:
    """Half the 95 % interval of one paired difference, from the pooled standard deviation."""
    freedom = sum(len(sample) - 1 for sample in samples)
    squares = sum(variance(sample) * (len(sample) - 1) for sample in samples if len(sample) > 1)
    return float(stats.t.ppf(0.975, freedom)) * math.sqrt(squares / freedom) if freedom else math.nan
