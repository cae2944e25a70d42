"""Pictures drawn from the CSV files."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "mmi": "#d62728",
    "vicreg": "#1f77b4",
    "barlow_twins": "#2ca02c",
    "mmi_joint_all": "#ff9896",
    "supervised": "#7f7f7f",
    "untrained": "#bbbbbb",
}


def accuracy_over_steps(rows: list[dict[str, str]], titles: dict[str, str], path: Path) -> Path:
    """KNN accuracy over steps and over seconds of training: the mean over seeds, with the range shaded."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    for method, title in titles.items():
        histories = [json.loads(row["history"]) for row in rows if row["method"] == method]
        if not histories:
            continue
        colour = COLOURS.get(method)
        if method == "untrained":
            level = np.mean([history[-1]["knn"] for history in histories])
            for axis in axes:
                axis.axhline(level, color=colour, linestyle=":", label=title)
            continue
        length = min(map(len, histories))
        values = {k: np.array([[p[k] for p in h[:length]] for h in histories]) for k in ("step", "seconds", "knn")}
        style = {"color": colour, "linestyle": "--" if method == "supervised" else "-", "marker": "o", "markersize": 3}
        for axis, x in zip(axes, ("step", "seconds"), strict=True):
            axis.plot(values[x].mean(0), values["knn"].mean(0), label=title, **style)
            axis.fill_between(
                values[x].mean(0), values["knn"].min(0), values["knn"].max(0), color=colour, alpha=0.15, linewidth=0
            )
    axes[0].set(xlabel="optimiser steps", ylabel="kNN accuracy under nuisances")
    axes[1].set(xlabel="seconds of training")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
