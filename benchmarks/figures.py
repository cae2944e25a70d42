"""The paper's figures 2 to 4, drawn again, and one it does not have: how much information chance alone shows.

2, 3 and ``spurious`` take seconds. 4 trains: the paper's loss as we read it, for several ``beta``, on two embedded
tasks. Finished runs are kept in ``figure4.csv``: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from scipy import special, stats

from benchmarks import environment, grid
from benchmarks.generalised_gaussian import generalised_gaussian_constant
from benchmarks.plots import COLOURS, plt
from mmi_loss import MMILoss, diagnostics

SHAPES = (0.5, 0.75, 1.0, 2.0, 8.0)
ORDERS = range(1, 9)
RESCALED_TO, LARGEST = 1.0, 8.0
"""``beta`` and the largest eigenvalue of figure 3's rescaled columns."""

BETAS = (0.25, 0.5, 1.0, 1.5)
TASKS = {"latent": 400, "digits": 300}
DIM, BATCH_SIZE, RATE = 32, 256, 4e-3
"""Eight samples per dimension: below, the joint form fails whatever beta. The rate was the best of 1e-3, 4e-3 and
1.6e-2 at beta = 1 on ``latent``."""

OBJECTIVE_COLOURS = {
    "joint": COLOURS["mmi_joint"],
    "exchangeable": COLOURS["mmi_exchangeable"],
    "content": COLOURS["mmi"],
}
SIMULATED_DIM, SLICED_DIM, SLICE_DIMS = 64, 512, (32, 128)
SAMPLES, SLICED_SAMPLES = (72, 96, 136, 192, 256, 512, 1024, 4096), (160, 320, 640, 1280, 2560, 5120)
REPEATS = 16


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks figures", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="FIGURE")
    parser.add_argument("--seeds", type=int, default=2, help="of figure 4")
    parser.add_argument("--draw", action="store_true", help="train nothing: figure 4 from finished runs alone")
    parser.add_argument("--steps", type=int, help="of figure 4, in place of each task's own")
    parser.add_argument("--workers", type=int, default=1, help="single-threaded processes of figure 4")
    parser.add_argument("--cache", type=Path, default=Path("runs/figures/cache"), help="folder of the tasks' views")
    parser.add_argument("--out", type=Path, default=environment.RESULTS, help="folder for pictures and figure4.csv")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Draw the chosen figures as ``figure-NAME.png``; train what figure 4 misses."""
    options, console = parse(arguments), Console()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        if name == "4" and not options.draw:
            grid.run(cells(options), options.out / "figure4.csv", options.cache, options.workers, console)
        figure = FIGURES[name](options)
        path = options.out / f"figure-{name}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        console.print(f"picture: {path}")


def _panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)


def densities(options: argparse.Namespace) -> Any:
    """Figure 2: the univariate generalised Gaussian; and what its shape adds to mutual information (Theorem 2)."""
    figure, axes = _panels(1, 2, (10, 3.9))
    density, constant = axes[0]
    x = np.linspace(-4, 4, 801)
    names = {0.5: " (Laplace)", 1.0: " (Gaussian)"}
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(SHAPES)))
    for shape, colour in zip(SHAPES, colours, strict=True):
        # exp(-(x^2)^s / 2) of variance one; gennorm's exponent is 2 s and its scale another.
        family = stats.gennorm(2 * shape)
        width = 2.4 if shape == 1 else 1.3
        y = family.pdf(x * family.std()) * family.std()
        density.plot(x, y, color=colour, linewidth=width, label=f"s = {shape:g}{names.get(shape, '')}")
    density.set(xlabel="x (unit variance)", ylabel="density", title=r"$p(x) \propto \exp(-\frac{1}{2}(x^2/m)^s)$")
    density.legend(fontsize=8)
    shapes = np.geomspace(0.3, 10, 200)
    colours = plt.get_cmap("plasma")(np.linspace(0, 0.8, 4))
    for dim, colour in zip((1, 2, 8, 32), colours, strict=True):
        y = [generalised_gaussian_constant(dim, dim, float(s)) / dim for s in shapes]
        constant.semilogx(shapes, y, color=colour, label=f"D = {dim}")
    constant.plot(1, 0, "ko", markersize=4)
    constant.axhline(0, color="black", linewidth=0.6)
    constant.set(xlabel="shape s", ylabel="constant / D, nats", title="what Theorem 2 adds (our reading)")
    constant.set_xticks([0.3, 1, 3, 10], labels=["0.3", "1", "3", "10"])
    constant.minorticks_off()
    constant.legend(fontsize=8)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure


def series(eigenvalue: np.ndarray, order: int, scale: float = 1.0) -> np.ndarray:
    """The truncated series of the logarithm about ``scale``: log c + sum_m (-1)^(m+1) / m (lambda/c - 1)^m."""
    x = eigenvalue / scale - 1
    return np.log(scale) + sum((-1) ** (m + 1) / m * x**m for m in range(1, order + 1))


def slope(eigenvalue: np.ndarray, order: int, scale: float = 1.0) -> np.ndarray:
    """Its derivative at constant ``scale``, sum_{m<order} (-x)^m / c: for even orders negative beyond 2 c."""
    x = eigenvalue / scale - 1
    return sum((-x) ** m for m in range(order)) / scale


def logarithm(options: argparse.Namespace) -> Any:
    """Figure 3: log and its series, with and without rescaling, and their derivatives."""
    figure, axes = _panels(2, 2, (10.5, 7.2))
    scale = LARGEST / RESCALED_TO
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.92, len(ORDERS)))
    columns = (
        (1.0, LARGEST, "without rescaling"),
        (scale, LARGEST, rf"rescaled: $\lambda/c$ in (0, β], β = {RESCALED_TO:g}, c = {scale:g}"),
    )
    for (value, derivative), (c, largest, title) in zip(axes.T, columns, strict=True):
        x = np.linspace(1e-3, 2.5 * c, 1001)
        for order, colour in zip(ORDERS, colours, strict=True):
            style = {"color": colour, "linewidth": 2.4 if order == 4 else 1.2, "linestyle": "-" if order % 2 else "--"}
            value.plot(x, series(x, order, c), label=f"order {order}", **style)
            derivative.plot(x, c * slope(x, order, c), **style)
        value.plot(x, np.log(x), color="black", linewidth=1.6, label="log")
        derivative.plot(x, c / x, color="black", linewidth=1.6)
        derivative.axhline(0, color="black", linewidth=0.6)
        derivative.plot(2 * c, 0, "o", color=COLOURS["mmi"], markersize=6, zorder=6)
        derivative.annotate(
            f"even orders: the sign\nchanges at λ = {2 * c:g}",
            (2 * c, 0),
            (0.45, 0.1),
            textcoords="axes fraction",
            fontsize=9,
            arrowprops={"arrowstyle": "->", "color": COLOURS["mmi"]},
        )
        for axis in (value, derivative):
            axis.axvspan(0, min(largest, 2.5 * c), color="#1f77b4", alpha=0.08, linewidth=0)
            axis.set_xlim(0, 2.5 * c)
            axis.set_xlabel("eigenvalue λ")
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
    return figure


def cells(options: argparse.Namespace) -> list[grid.Cell]:
    """Figure 4's runs: the paper's joint form by the series, a beta each, and with the exact logarithm beside them."""
    joint = {"objective": "joint", "slice_dim": None}
    losses: dict[str, dict[str, Any]] = {f"β = {b:g}": {**joint, "logdet": "taylor", "beta": b} for b in BETAS}
    losses["exact log"] = joint
    return [
        grid.Cell(task, name, DIM, BATCH_SIZE, seed, RATE, options.steps or steps, evaluations=8, options=loss)
        for seed in range(options.seeds)
        for task, steps in TASKS.items()
        for name, loss in losses.items()
    ]


def convergence(options: argparse.Namespace) -> Any:
    """Figure 4's form: accuracy and held-out mutual information over steps, for several beta."""
    wanted = {cell.key: cell for cell in cells(options)}
    rows = [row for row in environment.read(options.out / "figure4.csv") if row["cell"] in wanted]
    names = list(dict.fromkeys(cell.method for cell in wanted.values()))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if not rows:
        raise SystemExit(f"{options.out / 'figure4.csv'} has no finished runs to draw")
    figure, axes = _panels(2, len(tasks), (5.2 * len(tasks), 7))
    colours = dict(zip(names, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(BETAS))), strict=False))
    for column, task in zip(axes.T, tasks, strict=True):
        for name in names:
            found = [json.loads(r["history"]) for r in rows if (r["task"], r["method"]) == (task, name)]
            if not found:
                continue
            exact = name not in colours
            style = {"color": "black" if exact else colours[name], "linestyle": "--" if exact else "-"}
            step = [point["step"] for point in found[0]]
            for axis, key in zip(column, ("knn", "mi_corrected"), strict=True):
                values = np.array([[point.get(key, np.nan) for point in history] for history in found])
                axis.plot(step, values.mean(0), marker="o", markersize=3, label=name, **style)
                axis.fill_between(step, values.min(0), values.max(0), color=style["color"], alpha=0.12, linewidth=0)
        seeds = len({row["seed"] for row in rows if row["task"] == task})
        title = f"{task}, D = {DIM}, N = {BATCH_SIZE}: {'mean and range of ' if seeds > 1 else ''}{seeds} seed"
        column[0].set_title(title + "s" * (seeds > 1), fontsize=11)
        column[1].set_xlabel("optimiser steps")
        for axis in column:
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("kNN accuracy")
    axes[1, 0].set_ylabel("held-out mutual information, nats")
    axes[0, 0].legend(fontsize=9)
    return figure


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


NO_FLOOR = 1e-9
"""A ridge that float64 resolves and no result here can tell from none."""


def chance(options: argparse.Namespace) -> Any:
    """Spurious information against N/D: closed forms as lines, simulated batches as points."""
    figure, axes = _panels(1, 2, (11, 4.6))
    whole, sliced = axes[0]
    dim = SIMULATED_DIM
    least = {"joint": 2 * dim + 1, "exchangeable": dim + 1, "content": dim}
    for objective, colour in OBJECTIVE_COLOURS.items():
        _curve(whole, objective, least[objective], 64 * dim, dim, dim, {"color": colour, "label": objective})
        floor: list[tuple[int, float]] = []
        for n in SAMPLES:
            floor.append((n, simulate(n, dim, REPEATS, objective=objective, slice_dim=None)[0]))
            if n > least[objective]:
                _point(whole, n, dim, dim, objective, {"color": colour}, slice_dim=None)
        x, y = zip(*floor, strict=True)
        whole.plot(np.array(x) / dim, np.array(y) / dim, ":", color=colour, linewidth=1)
    whole.plot([], [], "k:", linewidth=1, label="with the noise floor, snr = 64 (simulated)")
    whole.plot([], [], "ko", markersize=4, label=f"mean of {REPEATS} batches, ± 2 standard errors")
    whole.set_title(f"all features, D = {dim}", fontsize=11)
    _curve(sliced, "joint", 2 * SLICED_DIM + 1, 16 * SLICED_DIM, SLICED_DIM, SLICED_DIM, {"color": "#7f7f7f"})
    sliced.lines[-1].set_label("joint, all features")
    _point(sliced, 4 * SLICED_DIM, SLICED_DIM, SLICED_DIM, "joint", {"color": "#7f7f7f"}, slice_dim=None)
    for k, line in zip(SLICE_DIMS, ("-", "--"), strict=True):
        for objective in ("joint", "content"):
            style = {"color": OBJECTIVE_COLOURS[objective], "linestyle": line, "label": f"{objective}, slice of {k}"}
            first = 2 * k + 1 if objective == "joint" else k
            _curve(sliced, objective, first, 16 * SLICED_DIM, k, SLICED_DIM, style)
            for n in SLICED_SAMPLES:
                if n > 1.1 * first:
                    _point(sliced, n, k, SLICED_DIM, objective, {"color": style["color"]}, slice_dim=k)
    sliced.set_title(f"random slices of D = {SLICED_DIM} features", fontsize=11)
    for axis in axes[0]:
        axis.set(xscale="log", yscale="log", xlabel="samples per feature, N/D", ylim=(1e-3, 3))
        axis.set_ylabel("spurious information / dimension, nats")
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_formatter("{x:g}")
    whole.legend(fontsize=8, loc="upper right")
    sliced.legend(fontsize=8, loc="lower left")
    figure.suptitle(
        "what independent Gaussian views seem to share, per dimension of embedding or slice; lines: exact (digamma)",
        fontsize=11,
    )
    return figure


def _curve(axis: Any, objective: str, first: int, last: int, dim: int, width: int, style: dict[str, Any]) -> None:
    n = np.unique(np.geomspace(first, last, 200).astype(int))
    axis.plot(n / width, [spurious(objective, int(count), dim) / dim for count in n], linewidth=1.5, **style)


def _point(axis: Any, n: int, dim: int, width: int, objective: str, style: dict[str, Any], **options: Any) -> None:
    mean, error = simulate(n, width, REPEATS, objective=objective, ridge=NO_FLOOR, **options)
    axis.errorbar(n / width, mean / dim, 2 * error / dim, marker="o", markersize=4, capsize=2, **style)


FIGURES = {"2": densities, "3": logarithm, "4": convergence, "spurious": chance}
