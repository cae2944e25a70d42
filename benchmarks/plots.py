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


SPEED_LINES = {
    "mmi": ("MMI (default)", "#d62728", "-"),
    "mmi_all": ("MMI, all features", "#d62728", "--"),
    "mmi_naive": ("MMI, naive autograd", "#ff9896", ":"),
    "barlow_twins": ("Barlow Twins", "#2ca02c", "-"),
    "vicreg": ("VICReg", "#1f77b4", "-"),
    "frossl": ("FroSSL", "#9467bd", "-"),
    "mmcr": ("MMCR", "#8c564b", "-"),
    "lejepa": ("LeJEPA", "#e377c2", "-"),
    "visreg": ("VISReg", "#bcbd22", "-"),
    "simclr": ("SimCLR (NT-Xent)", "#17becf", "-"),
    "mec": ("MEC", "#aec7e8", "-"),
    "corinfomax": ("CorInfoMax", "#98df8a", "-"),
    "floor": ("floor: copy the bytes", "#000000", ":"),
}


def speed(rows: list[dict[str, str]], stem: Path, n: int = 256) -> list[Path]:
    """Time and peak memory against D at one N, log-log, forward and backward in float32."""
    pictures = []
    for column, label, name in (
        ("median_ms", f"forward + backward, ms (N = {n})", "time"),
        ("peak_extra_mib", f"peak extra memory, MiB (N = {n})", "memory"),
    ):
        figure, axis = plt.subplots(figsize=(6.5, 4.6), constrained_layout=True)
        for loss, (title, colour, style) in SPEED_LINES.items():
            points = sorted(
                (int(r["d"]), float(r[column]))
                for r in rows
                if (r["loss"], int(r["n"]), r["pass"], r["precision"]) == (loss, n, "forward+backward", "float32")
            )
            points = [p for p in points if p[1] > 0]
            if points:
                width = 2.5 if loss == "mmi" else 1.2
                axis.loglog(*zip(*points, strict=True), style, color=colour, label=title, linewidth=width, marker=".")
        axis.set(xlabel="width of the projector, D", ylabel=label)
        axis.set_xticks([128, 512, 2048, 8192], labels=["128", "512", "2048", "8192"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2)
        pictures.append(stem.with_name(f"{stem.name}-{name}.png"))
        figure.savefig(pictures[-1], dpi=130)
        plt.close(figure)
    return pictures
