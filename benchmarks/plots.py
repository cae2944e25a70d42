"""Pictures drawn from the CSV files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

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
    "vicreg_fast": "#1f77b4",
    "barlow_twins_fast": "#2ca02c",
    "simclr": "#17becf",
    "lejepa": "#e377c2",
    "frossl": "#9467bd",
    "wmse": "#8c564b",
    "mmi_exchangeable": "#ff7f0e",
    "mmi_joint": "#bcbd22",
    "mmi_paper": "#f7b6d2",
}


def accuracy_over_steps(rows: list[dict[str, str]], titles: dict[str, str], path: Path) -> Path:
    """KNN accuracy over steps and over seconds of training: the mean over seeds, with the range shaded."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, constrained_layout=True)
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
    _legend(figure, axes)
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


Row = dict[str, str]
MIDDLE_DIM, MIDDLE_BATCH = 512, 256
MAP_RANGE = 0.1


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _sizes(row: Row) -> tuple[int, int]:
    return int(row["projector_dim"]), int(row["batch_size"])


def _tasks(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in rows))


def _style(method: str) -> dict[str, Any]:
    ours = method == "mmi"
    return {"color": COLOURS.get(method), "linewidth": 2.4 if ours else 1.3, "zorder": 5 if ours else 3}


def _middle(rows: list[Row]) -> tuple[int, int]:
    """D = 512, N = 256, or what was run instead."""
    sizes = sorted({_sizes(row) for row in rows if row["method"] == "mmi"} or {_sizes(row) for row in rows})
    return (MIDDLE_DIM, MIDDLE_BATCH) if (MIDDLE_DIM, MIDDLE_BATCH) in sizes else sizes[len(sizes) // 2]


def steps_grid(rows: list[Row], titles: dict[str, str]) -> bytes:
    """KNN accuracy over steps at the middle width: a column per batch size and a row per task; tasks side by side
    where there is one size.
    """
    dim, tasks = _middle(rows)[0], _tasks(rows)
    sizes = sorted({_sizes(row)[1] for row in rows if row["method"] == "mmi"} or {_sizes(row)[1] for row in rows})
    rows_of_axes, columns = (len(tasks), len(sizes)) if len(sizes) > 1 else (1, len(tasks))
    figure, axes = plt.subplots(
        rows_of_axes,
        columns,
        figsize=(3.6 * columns + 1.8, 2.7 * rows_of_axes),
        layout="constrained",
        squeeze=False,
    )
    for task, axes_of_task in zip(tasks, axes.reshape(len(tasks), len(sizes)), strict=True):
        for axis, n in zip(axes_of_task, sizes, strict=True):
            untrained: list[float] = []
            for method in titles:
                found = [r for r in rows if (r["task"], r["method"], *_sizes(r)) == (task, method, dim, n)]
                if method == "untrained":
                    found = [r for r in rows if (r["task"], r["method"]) == (task, method)]
                    untrained = [float(r["knn"]) for r in found]
                    continue
                if not found:
                    continue
                histories = [json.loads(r["history"]) for r in found]
                length = min(map(len, histories))
                knn = np.array([[point["knn"] for point in h[:length]] for h in histories])
                step = [point["step"] for point in histories[0][:length]]
                axis.plot(step, knn.mean(0), label=titles[method], marker="o", markersize=2.5, **_style(method))
                axis.fill_between(step, knn.min(0), knn.max(0), color=COLOURS.get(method), alpha=0.12, linewidth=0)
            axis.set_title(f"{task}, D = {dim}, N = {n}", fontsize=10)
            axis.grid(alpha=0.3)
            _untrained(axis, untrained)
    for axis in axes[:, 0]:
        axis.set_ylabel("kNN accuracy")
    for axis in axes[-1]:
        axis.set_xlabel("optimiser steps")
    _legend(figure, axes)
    return _png(figure)


def _untrained(axis: Any, values: list[float]) -> None:
    """The untrained backbone's level: a line, or a number where a line would squeeze the curves."""
    if not values:
        return
    level, (low, high) = float(np.mean(values)), axis.get_ylim()
    if low - level < high - low:
        axis.axhline(level, color=COLOURS["untrained"], linestyle=":", label="untrained")
    else:
        axis.text(
            0.98, 0.03, f"untrained: {level:.2f}", transform=axis.transAxes, ha="right", color="#888888", fontsize=8
        )


def _legend(figure: Any, axes: Any) -> None:
    """One legend beside all axes, without repetitions."""
    entries: dict[str, Any] = {}
    for axis in np.ravel(axes):
        handles, labels = axis.get_legend_handles_labels()
        entries |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in entries}
    figure.legend(entries.values(), entries.keys(), loc="outside right center", fontsize=9, frameon=False)


def against_sizes(rows: list[Row], titles: dict[str, str]) -> bytes:
    """Linear accuracy against D at the middle N, and against N at the middle D: a column per task."""
    middle, tasks = _middle(rows), _tasks(rows)
    figure, axes = plt.subplots(
        2, len(tasks), figsize=(3.6 * len(tasks) + 1.8, 5.6), layout="constrained", squeeze=False
    )
    for column, task in enumerate(tasks):
        for axis, free in zip(axes[:, column], (0, 1), strict=True):
            ticks: set[int] = set()
            untrained: list[float] = []
            for method in titles:
                found = [r for r in rows if (r["task"], r["method"]) == (task, method)]
                if method == "untrained":
                    untrained = [float(r["linear"]) for r in found]
                    continue
                found = [r for r in found if _sizes(r)[1 - free] == middle[1 - free]]
                x = sorted({_sizes(r)[free] for r in found})
                if len(x) < 2:
                    continue
                ticks |= set(x)
                y = [[float(r["linear"]) for r in found if _sizes(r)[free] == size] for size in x]
                means = [np.mean(v) for v in y]
                errors = [
                    [m - min(v) for m, v in zip(means, y, strict=True)],
                    [max(v) - m for m, v in zip(means, y, strict=True)],
                ]
                axis.errorbar(
                    x, means, errors, label=titles[method], marker="o", markersize=3, capsize=2, **_style(method)
                )
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted(ticks), labels=[str(t) for t in sorted(ticks)])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_xlabel(("width of the projector, D", "batch size, N")[free])
            axis.set_title(f"{task}, {'N' if free == 0 else 'D'} = {middle[1 - free]}", fontsize=10)
            _untrained(axis, untrained)
    for axis in axes[:, 0]:
        axis.set_ylabel("linear probe")
    _legend(figure, axes)
    return _png(figure)


def _first_seed(rows: list[Row], task: str) -> dict[str, Row]:
    """The middle cell's row of the first seed, by method."""
    dim, n = _middle(rows)
    found: dict[str, Row] = {}
    for row in sorted(rows, key=lambda r: int(r["seed"])):
        if row["task"] == task and (row["method"] == "untrained" or _sizes(row) == (dim, n)):
            found.setdefault(row["method"], row)
    return found


def spectra(rows: list[Row], titles: dict[str, str]) -> bytes:
    """Shares of variance per principal direction of features and projections, a column per task."""
    tasks = _tasks(rows)
    figure, axes = plt.subplots(2, len(tasks), figsize=(4.6 * len(tasks), 9.6), layout="constrained", squeeze=False)
    for column, task in enumerate(tasks):
        by_method = _first_seed(rows, task)
        for axis, which in zip(axes[:, column], ("features", "projections"), strict=True):
            for method in titles:
                measured = json.loads(by_method[method]["measures"]).get(which) if method in by_method else None
                if not measured or (method == "untrained" and which == "projections"):
                    continue
                shares = np.array(measured["shares"])
                shares = shares[shares > 1e-7]
                label = f"{titles[method]}: {measured['effective_rank']:.0f}"
                axis.semilogy(np.arange(1, len(shares) + 1), shares, label=label, **_style(method))
            axis.set_title(f"{task}: {'backbone features' if which == 'features' else 'projections'}", fontsize=10)
            axis.set_ylim(bottom=1e-6)
            axis.grid(alpha=0.3)
            axis.set_xlabel("principal direction")
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
            axis.legend(fontsize=7, title="effective rank", title_fontsize=7, ncols=2, frameon=False, **below)
    for axis in axes[:, 0]:
        axis.set_ylabel("share of variance")
    return _png(figure)


def information(rows: list[Row], titles: dict[str, str]) -> bytes:
    """Mutual information of held-out pairs over steps: corrected solid, plug-in dotted; a panel per task."""
    tasks = _tasks(rows)
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(3.6 * len(tasks) + 1.8, 3.4), layout="constrained", squeeze=False
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        for method, row in _first_seed(rows, task).items():
            points = [point for point in json.loads(row["history"]) if "mi" in point]
            if method == "untrained" or not points or method not in titles:
                continue
            step = [point["step"] for point in points]
            axis.plot(
                step,
                [p["mi_corrected"] for p in points],
                label=titles[method],
                marker="o",
                markersize=2.5,
                **_style(method),
            )
            axis.plot(step, [p["mi"] for p in points], linestyle=":", **{**_style(method), "linewidth": 1})
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("optimiser steps")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("mutual information, nats")
    _legend(figure, axes)
    return _png(figure)


def factors(rows: list[Row], titles: dict[str, str]) -> bytes | None:
    """R^2 of every content factor, and the nuisance factors' mean, per method, at the middle cell: a heat map."""
    dim, n = _middle(rows)
    lines: dict[str, list[float]] = {}
    names: list[str] = []
    for method in titles:
        found = [
            json.loads(row["measures"]).get("factors")
            for row in rows
            if row["method"] == method and (method == "untrained" or _sizes(row) == (dim, n))
        ]
        found = [r2 for r2 in found if r2]
        if found:
            names = [name for name in found[0] if name.startswith("c")]
            content = [float(np.mean([r2[name] for r2 in found])) for name in names]
            nuisance = float(np.mean([value for r2 in found for name, value in r2.items() if name.startswith("n")]))
            lines[titles[method]] = [*content, nuisance]
    if not lines:
        return None
    values = np.array(list(lines.values()))
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(lines) + 1.2), layout="constrained")
    picture = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value < 0.6 else "black")
    axis.set_xticks(range(len(names) + 1), labels=[*names, "nuisance"])
    axis.set_yticks(range(len(lines)), labels=list(lines))
    figure.colorbar(picture, label="R²")
    return _png(figure)


Panel = dict[str, dict[str, tuple[list[float], float]]]
"""Setting, task: differences by seed, half the interval of their mean."""
Map = dict[tuple[str, str], float]
"""A score by row and column."""
TASK_COLOURS = {"latent": "#1f77b4", "digits": "#d62728", "clutter": "#2ca02c"}


def effects(studies: dict[str, Panel], path: Path) -> Path:
    """A panel per study: every setting's score less the default's, a dot per seed, mean and 95 % interval; by task."""
    columns = min(3, len(studies))
    lines = -(-len(studies) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.6 * columns, 2.9 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(studies) :]:
        axis.axis("off")
    for axis, (study, panel) in zip(axes.flat, studies.items(), strict=False):
        for i, by_task in enumerate(panel.values()):
            for j, (task, (differences, half)) in enumerate(by_task.items()):
                if not differences:
                    continue
                y, colour = i + 0.28 * (j - (len(by_task) - 1) / 2), TASK_COLOURS[task]
                axis.plot(differences, [y] * len(differences), ".", color=colour, alpha=0.45, markersize=5)
                interval = {"xerr": half} if half == half else {}
                style = {"color": colour, "markersize": 4, "capsize": 2, "linewidth": 1.2}
                axis.errorbar(np.mean(differences), y, fmt="o", label=task, **interval, **style)
        axis.axvline(0, color="black", linewidth=0.7)
        axis.set_yticks(range(len(panel)), labels=list(panel), fontsize=7)
        axis.set_ylim(len(panel) - 0.4, -0.6)
        axis.grid(alpha=0.3)
        axis.set_title(study, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("score less the default's", fontsize=8)
    _legend(figure, axes)
    path.write_bytes(_png(figure))
    return path


def heat_maps(maps: dict[str, Map], path: Path) -> Path:
    """Scores over the noise floor (down) and the slice (across), a map per task."""
    figure, axes = plt.subplots(1, len(maps), figsize=(4.2 * len(maps), 3.2), layout="constrained", squeeze=False)
    for axis, (task, scores) in zip(axes[0], maps.items(), strict=True):
        lines, columns = (list(dict.fromkeys(place[i] for place in scores)) for i in (0, 1))
        values = np.array([[scores[line, column] for column in columns] for line in lines])
        picture = axis.imshow(values, cmap="viridis", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if np.isnan(value):
                continue
            # The lighter half of the colours needs dark print.
            dark = 2 * value > np.nanmin(values) + np.nanmax(values)
            axis.text(j, i, f"{value:.3f}", ha="center", va="center", color="black" if dark else "white")
        axis.set_xticks(range(len(columns)), labels=columns)
        axis.set_yticks(range(len(lines)), labels=lines)
        axis.set(title=task, xlabel="slice_dim", ylabel="snr")
        figure.colorbar(picture, label="score")
    path.write_bytes(_png(figure))
    return path


class Patch(NamedTuple):
    """A cell of a difference map: the difference to a rival and its verdict (better, tie, worse, one run)."""

    difference: float
    verdict: str
    rival: str


def difference_maps(maps: dict[tuple[str, str], dict[tuple[int, int], Patch]], path: Path) -> Path:
    """Paired differences over D (down) and N (across): a column of maps per task, a line per metric.

    Blue: above the rival; red: below. Bold: the interval leaves zero out; in grey a single seed.
    """
    metrics, tasks = (list(dict.fromkeys(key[i] for key in maps)) for i in (0, 1))
    size = (4.6 * len(tasks) + 1, 3.4 * len(metrics))
    figure, axes = plt.subplots(len(metrics), len(tasks), figsize=size, layout="constrained", squeeze=False)
    for (metric, task), cells in maps.items():
        axis = axes[metrics.index(metric), tasks.index(task)]
        dims, batches = (sorted({sizes[i] for sizes in cells}) for i in (0, 1))
        values = np.full((len(dims), len(batches)), np.nan)
        for (dim, n), patch in cells.items():
            i, j = dims.index(dim), batches.index(n)
            values[i, j] = patch.difference
            is_clear, is_single = patch.verdict in ("better", "worse"), patch.verdict == "one run"
            axis.text(
                *(j, i, f"{patch.difference:+.3f}\n{patch.rival}"),
                ha="center",
                va="center",
                fontsize=7,
                weight="bold" if is_clear else "normal",
                color="white" if abs(patch.difference) > 0.7 * MAP_RANGE else "#666666" if is_single else "black",
            )
        picture = axis.imshow(values, cmap="RdBu", vmin=-MAP_RANGE, vmax=MAP_RANGE, aspect="auto")
        axis.set_xticks(range(len(batches)), labels=map(str, batches))
        axis.set_yticks(range(len(dims)), labels=map(str, dims))
        axis.set_title(f"{task}: {metric}", fontsize=10)
        axis.set(xlabel="batch size, N", ylabel="width of the projector, D")
    figure.colorbar(picture, ax=axes, label="MMI minus the best baseline", extend="both")  # all have one range
    path.write_bytes(_png(figure))
    return path


def series_gaps(rows: list[Row], times: list[Row], path: Path) -> Path:
    """The series' share of the exact information over its order, by beta, on trained embeddings; and its time."""
    trained = [row for row in rows if row["embedding"] != "step 1"]
    tasks = _tasks(trained)
    shown = (("content", "128"), ("joint", "32"))
    figure, axes = plt.subplots(1, 2 * len(tasks) + 1, figsize=(3.2 * (2 * len(tasks) + 1), 3.4), layout="constrained")
    places = [(task, *which) for task in tasks for which in shown]
    for axis, (task, objective, features) in zip(axes, places, strict=False):
        found = [r for r in trained if (r["task"], r["objective"], r["features"]) == (task, objective, features)]
        for beta in dict.fromkeys(row["beta"] for row in found):
            line = [(int(r["order"]), float(r["nats"]) / float(r["exact"])) for r in found if r["beta"] == beta]
            axis.plot(*zip(*line, strict=True), marker="o", markersize=3, label=f"beta {beta}")
        axis.axhline(1, color="black", linewidth=0.7)
        axis.axhline(0, color="black", linewidth=0.7, linestyle=":")
        axis.set_ylim(-0.5, 1.5)
        axis.grid(alpha=0.3)
        exact = f"{float(found[0]['exact']):.1f}" if found else "?"
        axis.set_title(f"{task}: {objective}, k = {features}\nexact {exact} nats", fontsize=9)
        axis.set_xlabel("order")
    axes[0].set_ylabel("share of the exact information")
    axes[0].legend(fontsize=7)
    for n in dict.fromkeys(row["n"] for row in times):
        line = [(int(r["order"]), float(r["ratio"])) for r in times if r["n"] == n and r["order"] != "0"]
        axes[-1].plot(*zip(*line, strict=True), marker="o", markersize=3, label=f"n = {n}")
    axes[-1].axhline(1, color="black", linewidth=0.7)
    axes[-1].set_ylim(bottom=0)
    axes[-1].set_title("time of log det and gradient\nover that of Cholesky", fontsize=9)
    axes[-1].set_xlabel("order")
    axes[-1].grid(alpha=0.3)
    axes[-1].legend(fontsize=7)
    path.write_bytes(_png(figure))
    return path
