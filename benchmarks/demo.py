"""MMI beside Barlow Twins, VICReg, VISReg and LeJEPA on real images: one budget, one network, the same views.

Each method has the best learning rate of a grid (``python -m benchmarks rates``; its rows are stored). Ends with a
table and a picture. Finished runs are kept, so an interrupted demo goes on where it stopped; ``--fresh`` starts over.
"""

from __future__ import annotations

import statistics

from benchmarks import grid, losses, rates, report
from benchmarks.environment import Row
from benchmarks.losses import LOSSES, SUPERVISED, UNTRAINED
from benchmarks.training import OPTIMIZERS

METHODS = (UNTRAINED, "mmi_joint_all", "barlow_twins", "lejepa", "vicreg", "visreg", "mmi", SUPERVISED)
QUICK = {"steps": 60, "dim": 512, "seeds": 1, "evaluations": 3}


def main(arguments: list[str]) -> None:
    """Run what is missing, then show the table and draw the picture."""
    parser = grid.parser("demo", __doc__, ["digits"], METHODS)
    rates.network_options(parser)
    parser.add_argument("--quick", action="store_true", help="one seed and few steps: does it run?")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="lars")
    parser.add_argument("--rate", type=float, help="one rate for all, in place of each method's best")
    parser.add_argument("--fresh", action="store_true", help="forget finished runs")
    parser.set_defaults(evaluations=6)
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args(arguments)
    path = options.out / ("quick.csv" if options.quick else "demo.csv")
    if options.fresh:
        path.unlink(missing_ok=True)
    means = grid.Means.of(options, options.quick)
    for task in options.tasks:
        known = rates.stored(task, options.optimizer)
        missing = [m for m in options.methods if m not in known and m != UNTRAINED and not options.rate]
        if missing:
            command = f"python -m benchmarks rates --methods {' '.join(missing)} --optimizers {options.optimizer}"
            unknown = f"no stored rate of {', '.join(missing)} for {options.optimizer}"
            raise SystemExit(f"{unknown}: give one by --rate, or measure by {command} --out benchmarks/results")
        # Seeds outermost: an early stop leaves every method measured equally often.
        changes = {"optimizer": options.optimizer, "evaluations": options.evaluations}
        cells = [
            rates.cell(task, method, seed, options.rate or known.get(method, 0.0), options, **changes)
            for seed in range(options.seeds)
            for method in options.methods
        ]
        print(
            f"{task}: {options.steps} steps of {options.batch_size} x 2 views, backbone {cells[0].backbone}, "
            f"D = {options.dim}, {options.seeds} seed(s). Results: {path}"
        )
        if not options.report:
            grid.run(cells, path, means)
        rows = grid.rows_of(path, cells)
        print(table(rows))
        picture = grid.draw(rows, path.with_name(f"{path.stem}-{task}.png"), x=("step", "seconds"))
        print(f"picture: {picture}" if picture else "no picture: the runs were not made on this machine")


def table(rows: list[Row], *tasks: str) -> str:
    """Accuracy by method, mean and standard deviation over seeds, and what the loss takes of a step."""
    lines = []
    rows = [row for row in rows if not tasks or row["task"] in tasks]
    for method in report.in_order(row["method"] for row in rows):
        found = [row for row in rows if row["method"] == method]
        values = {name: [float(row[name]) for row in found] for name in ("knn", "linear", "loss_ms", "step_ms")}
        loss_ms, step_ms = (statistics.median(values[name]) for name in ("loss_ms", "step_ms"))
        times = (f"{loss_ms:.1f}", f"{loss_ms / step_ms:.0%}") if method in LOSSES and loss_ms == loss_ms else ("", "")
        lines.append([losses.title(method), report.spread(values["knn"]), report.spread(values["linear"]), *times])
    head = [", ".join(dict.fromkeys(row["task"] for row in rows)), "kNN", "linear probe"]
    return report.table([*head, "loss, ms per step", "share of the step"], lines, bold=losses.title("mmi"))
