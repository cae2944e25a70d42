"""Pictures: lines with a range over seeds, maps of differences, effects with intervals."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "mmi": "#d62728",
    "vicreg": "#1f77b4",
    "barlow_twins": "#2ca02c",
    "simclr": "#17becf",
    "lejepa": "#e377c2",
    "visreg": "#bcbd22",
    "frossl": "#9467bd",
    "mmcr": "#8c564b",
    "mmi_all": "#ff7f0e",
    "mmi_joint_all": "#ff9896",
    "mmi_paper": "#f7b6d2",
    "mmi_exchangeable": "#ffbb78",
    "mmi_joint": "#aec7e8",
    "supervised": "#7f7f7f",
    "untrained": "#bbbbbb",
}
MAP_RANGE = 0.1


class Line(NamedTuple):
    """Values at ``x``, one array per seed; ``style`` goes to matplotlib. Without ``x`` it is a level."""

    x: list[float]
    y: list[list[float]]
    style: dict[str, Any] = {}  # noqa: RUF012


Panels = Mapping[str, Mapping[str, Line]]
"""Title of a panel, label of a line."""


def style(method: str) -> dict[str, Any]:
    """Colour and width of a method's line, the same in all pictures."""
    is_ours = method == "mmi"
    return {"color": COLOURS.get(method), "linewidth": 2.4 if is_ours else 1.3, "zorder": 5 if is_ours else 3}


def save(figure: Any, path: Path) -> Path:
    """Write and close the figure, in 256 colours: a third of the bytes, and no difference to the eye."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    return path


def lines(panels: Panels, path: Path, **axis_options: Any) -> Path:
    """A panel per title: every line's mean over seeds, the range over seeds shaded."""
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (4.6 * columns, 3.4 * rows + 0.8)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    entries: dict[str, Any] = {}
    for axis, (title, by_label) in zip(axes.flat, panels.items(), strict=False):
        for label, line in by_label.items():
            values = np.array(line.y, dtype=float)
            if not line.x:
                entries.setdefault(label, axis.axhline(values.mean(), linestyle=":", **line.style))
                continue
            drawn = axis.plot(line.x, values.mean(0), **{"marker": "o", "markersize": 3, **line.style})
            axis.fill_between(line.x, values.min(0), values.max(0), color=drawn[0].get_color(), alpha=0.14, linewidth=0)
            entries.setdefault(label, drawn[0])
        axis.set_title(title, fontsize=10)
        axis.set(**axis_options)
        axis.grid(alpha=0.3)
    in_a_line = 2 if max(map(len, entries), default=0) > 25 else 4
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=in_a_line, fontsize=8, frameon=False
    )
    return save(figure, path)


class Patch(NamedTuple):
    """A cell of a difference map: the difference to a rival, whether its interval leaves zero out, its seeds."""

    difference: float
    is_clear: bool
    seeds: int
    rival: str


def difference_maps(maps: Mapping[tuple[str, str], Mapping[tuple[int, int], Patch]], path: Path) -> Path:
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
            is_dark = abs(patch.difference) > 0.7 * MAP_RANGE
            axis.text(
                *(j, i, f"{patch.difference:+.3f}\n{patch.rival}"),
                ha="center",
                va="center",
                fontsize=7,
                weight="bold" if patch.is_clear else "normal",
                color="white" if is_dark else "#666666" if patch.seeds == 1 else "black",
            )
        picture = axis.imshow(values, cmap="RdBu", vmin=-MAP_RANGE, vmax=MAP_RANGE, aspect="auto")
        axis.set_xticks(range(len(batches)), labels=map(str, batches))
        axis.set_yticks(range(len(dims)), labels=map(str, dims))
        axis.set_title(f"{task}: {metric}", fontsize=10)
        axis.set(xlabel="batch size, N", ylabel="width of the projector, D")
    figure.colorbar(picture, ax=axes, label="MMI minus the best rival", extend="both")  # all have one range
    return save(figure, path)
