"""The paper's figures 3 and 4, drawn again, and one it does not have: how much information chance alone shows.

3 and ``spurious`` take seconds. 4 trains: the paper's joint form, for several ``beta``, on two embedded tasks.
Finished runs are kept in ``figure4.csv``: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from pathlib import Path

import numpy as np
import torch

from benchmarks import grid, plots, report
from benchmarks.plots import COLOURS, plt
from benchmarks.training import Cell
from mmi_loss import MMILoss

ORDERS = range(1, 9)
RESCALED_TO, LARGEST = 1.0, 8.0
"""``beta`` and the largest eigenvalue of figure 3's rescaled columns."""
BETAS = (0.25, 0.5, 1.0, 1.5)
TASKS = {"latent": 400, "digits": 300}
DIM, BATCH_SIZE, RATE = 32, 256, 4e-3
"""Eight samples per dimension: below, the joint form fails whatever beta. The rate was the best of 1e-3, 4e-3 and
1.6e-2 at beta = 1 on ``latent``."""
SAMPLES, REPEATS = (64, 128, 256, 512, 1024, 2048), 8


def main(arguments: list[str]) -> None:
    """Draw the chosen figures as ``figure-NAME.png``; train what figure 4 misses."""
    parser = grid.parser("figures", __doc__, TASKS)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="FIGURE")
    parser.add_argument("--steps", type=int, help="of figure 4, in place of each task's own")
    parser.set_defaults(seeds=2)
    options = parser.parse_args(arguments)
    for name in options.only:
        print(f"picture: {FIGURES[name](options, options.out / f'figure-{name}.png')}")


def series(eigenvalue: np.ndarray, order: int, scale: float = 1.0) -> np.ndarray:
    """The truncated series of the logarithm about ``scale``: log c + sum_m (-1)^(m+1) / m (lambda/c - 1)^m."""
    x = eigenvalue / scale - 1
    return np.log(scale) + sum((-1) ** (m + 1) / m * x**m for m in range(1, order + 1))


def slope(eigenvalue: np.ndarray, order: int, scale: float = 1.0) -> np.ndarray:
    """Its derivative at constant ``scale``, sum_{m<order} (-x)^m / c: for even orders negative beyond 2 c."""
    x = eigenvalue / scale - 1
    return sum((-x) ** m for m in range(order)) / scale


def logarithm(options: argparse.Namespace, path: Path) -> Path:
    """Figure 3: log and its series, with and without rescaling, and their derivatives."""
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.2), layout="constrained")
    scale = LARGEST / RESCALED_TO
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.92, len(ORDERS)))
    rescaled = rf"rescaled: $\lambda/c$ in (0, β], β = {RESCALED_TO:g}, c = {scale:g}"
    for (value, derivative), (c, title) in zip(axes.T, ((1.0, "without rescaling"), (scale, rescaled)), strict=True):
        x = np.linspace(1e-3, 2.5 * c, 1001)
        for order, colour in zip(ORDERS, colours, strict=True):
            style = {"color": colour, "linewidth": 2.4 if order == 4 else 1.2, "linestyle": "-" if order % 2 else "--"}
            value.plot(x, series(x, order, c), label=f"order {order}", **style)
            derivative.plot(x, c * slope(x, order, c), **style)
        value.plot(x, np.log(x), color="black", linewidth=1.6, label="log")
        derivative.plot(x, c / x, color="black", linewidth=1.6)
        derivative.axhline(0, color="black", linewidth=0.6)
        derivative.plot(2 * c, 0, "o", color=COLOURS["mmi"], markersize=6, zorder=6)
        arrow = {"arrowstyle": "->", "color": COLOURS["mmi"]}
        text = f"even orders: the sign\nchanges at λ = {2 * c:g}"
        derivative.annotate(text, (2 * c, 0), (0.45, 0.1), textcoords="axes fraction", fontsize=9, arrowprops=arrow)
        for axis in (value, derivative):
            axis.axvspan(0, min(LARGEST, 2.5 * c), color="#1f77b4", alpha=0.08, linewidth=0)
            axis.set(xlim=(0, 2.5 * c), xlabel="eigenvalue λ")
            axis.grid(alpha=0.3)
        value.set_ylim(np.log(c) - 3.2, np.log(c) + 1.6)
        derivative.set_ylim(-2, 4.5)
        value.set_title(title, fontsize=11)
    axes[0, 0].set_ylabel("log λ and its series, nats")
    axes[1, 0].set_ylabel("c times the derivative at constant c")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    shade = plt.Rectangle((0, 0), 1, 1, color="#1f77b4", alpha=0.08)
    label = f"a spectrum up to\nλ = {LARGEST:g}: on the left\nbeyond the frame"
    figure.legend([*handles, shade], [*labels, label], loc="outside right center", fontsize=9, frameon=False)
    return plots.save(figure, path)


def cells(options: argparse.Namespace) -> list[Cell]:
    """Figure 4's runs: the joint form by the series, a beta each, and with the exact logarithm beside them."""
    joint = "objective=joint,slice_dim=None"
    return [
        Cell(
            *(task, method, DIM, BATCH_SIZE, seed, RATE, options.steps or TASKS[task]),
            evaluations=8,
            backbone=grid.BACKBONES.get(task, "tiny"),
        )
        for seed in range(options.seeds)
        for task in options.tasks
        for method in (*(f"{joint},logdet=taylor,beta={beta}" for beta in BETAS), joint)
    ]


def convergence(options: argparse.Namespace, path: Path) -> Path | None:
    """Figure 4's form: accuracy over steps, for several beta."""
    wanted, results = cells(options), options.out / "figure4.csv"
    if not options.report:
        grid.run(wanted, results, grid.Means.of(options))
    return grid.draw(grid.rows_of(wanted, results), path)


def chance(options: argparse.Namespace, path: Path) -> Path:
    """Information, in nats, that the loss finds in independent Gaussian views of 512 features: means over batches."""
    lines: dict[str, plots.Line] = {}
    for objective, slice_dim in itertools.product(("content", "joint"), (128, None)):
        criterion = MMILoss(objective=objective, slice_dim=slice_dim)
        found = []
        for n in SAMPLES:
            views = torch.randn(REPEATS, 2, n, 512, generator=torch.Generator().manual_seed(n))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="objective=", category=UserWarning)
                found.append(float(np.mean([-float(criterion(*pair)) for pair in views])))
        lines[f"{objective}, {f'slice of {slice_dim}' if slice_dim else 'all features'}"] = plots.Line(
            [*SAMPLES], [found]
        )
    shown = [[name, *(f"{nats:.2f}" for nats in line.y[0])] for name, line in lines.items()]
    print(report.table(["independent views show, nats", *(f"N = {n}" for n in SAMPLES)], shown))
    axes = {"xlabel": "samples N", "ylabel": "nats", "xscale": "log", "yscale": "log"}
    return plots.lines({"independent views of 512 features": lines}, path, **axes)


FIGURES = {"3": logarithm, "4": convergence, "spurious": chance}
