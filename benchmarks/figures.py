"""The paper's figures 3 and 4, drawn again, and one it does not have: how much information chance alone shows.

3 and ``spurious`` take seconds. 4 trains: the paper's joint form, for several ``beta``, on two embedded tasks.
Finished runs are kept in ``figure4.csv``: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import special

from benchmarks import grid, plots
from benchmarks.plots import COLOURS, plt
from benchmarks.training import Cell
from mmi_loss import MMILoss, diagnostics

ORDERS = range(1, 9)
RESCALED_TO, LARGEST = 1.0, 8.0
"""``beta`` and the largest eigenvalue of figure 3's rescaled columns."""
BETAS = (0.25, 0.5, 1.0, 1.5)
TASKS = {"latent": 400, "digits": 300}
DIM, BATCH_SIZE, RATE = 32, 256, 4e-3
"""Eight samples per dimension: below, the joint form fails whatever beta. The rate was the best of 1e-3, 4e-3 and
1.6e-2 at beta = 1 on ``latent``."""
SLICED_DIM, SLICE_DIM, SAMPLES, REPEATS = 512, 128, (160, 320, 640, 1280, 2560), 8
NO_FLOOR = 1e-9
"""A ridge that float64 resolves and no result here can tell from none."""


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
    """Figure 4's form: accuracy and held-out mutual information over steps, for several beta."""
    wanted, results = cells(options), options.out / "figure4.csv"
    if not options.report:
        grid.run(wanted, results, grid.Means.of(options))
    return grid.draw(grid.rows_of(wanted, results), path, y=("knn", "nats"))


def spurious(objective: str, n: int, dim: int) -> float:
    """Expected information, in nats, that n pairs of independent Gaussian (n, dim) views seem to hold.

    Every matrix is a Wishart matrix W_m over its divisor, with E log det W_m = sum_{i<dim} digamma((m - i) / 2) +
    dim log 2. About the common mean the views' sum has n - 1 degrees of freedom, their difference n, both together
    2 n - 1. No noise floor. The joint form's excess is the same for dependent views, the others' is not.
    """

    def log_det(degrees: int) -> float:
        return float(special.digamma((degrees - np.arange(dim)) / 2).sum())

    if objective == "joint":
        return diagnostics.spurious_information(n, dim, dim)
    total, within = log_det(2 * n - 1) - dim * np.log(2), log_det(n)
    if objective == "content":
        return 0.5 * (total - within)
    return total - 0.5 * (log_det(n - 1) + within)


def simulate(n: int, dim: int, repeats: int, **options: Any) -> tuple[float, float]:
    """Mean and standard error of the information, in nats, ``MMILoss(**options)`` finds in independent views."""
    generator = torch.Generator().manual_seed(n)
    criterion = MMILoss(**options)
    found = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="objective=", category=UserWarning)
        for _ in range(repeats):
            z_a, z_b = torch.randn(2, n, dim, generator=generator, dtype=torch.float64)
            found.append(-float(criterion(z_a, z_b)))
    return float(np.mean(found)), float(np.std(found, ddof=1) / len(found) ** 0.5)


def chance(options: argparse.Namespace, path: Path) -> Path:
    """What independent views seem to share: exact without a noise floor, simulated with the default's."""
    lines = {}
    for objective, colour in (("joint", COLOURS["mmi_joint_all"]), ("content", COLOURS["mmi"])):
        for k, dash, name in (
            (SLICED_DIM, "-", f"all {SLICED_DIM} features"),
            (SLICE_DIM, "--", f"slice of {SLICE_DIM}"),
        ):
            least = 2 * k + 1 if objective == "joint" else k
            n = np.unique(np.geomspace(least, 32 * SLICED_DIM, 100).astype(int))
            style = {"color": colour, "linestyle": dash, "marker": ""}
            exact = [spurious(objective, int(count), k) for count in n]
            lines[f"{objective}, {name}"] = plots.Line(n.tolist(), [exact], style)
            dim = None if k == SLICED_DIM else k
            floor = [simulate(n, SLICED_DIM, REPEATS, objective=objective, slice_dim=dim)[0] for n in SAMPLES]
            style = {"color": colour, "linestyle": ":", "marker": "s" if dim else "o", "linewidth": 1}
            lines[f"the same with the noise floor: {objective}, {name}"] = plots.Line(list(SAMPLES), [floor], style)
    panel = {f"independent views of {SLICED_DIM} features": lines}
    return plots.lines(panel, path, xlabel="samples N", ylabel="apparent information, nats", xscale="log", yscale="log")


FIGURES = {"3": logarithm, "4": convergence, "spurious": chance}
