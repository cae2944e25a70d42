"""Draws the pictures of the concepts: ``python docs/site/pictures.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Ellipse

OUT = Path(__file__).parents[1] / "pictures"
IMAGES, VIEWS = 12, 8


def ellipse(covariance: np.ndarray, centre: np.ndarray, **style: object) -> Ellipse:
    """Two standard deviations of a covariance."""
    values, vectors = np.linalg.eigh(covariance)
    angle = np.degrees(np.arctan2(*vectors[::-1, -1]))
    return Ellipse(centre, *(4 * np.sqrt(values[::-1])), angle=angle, fill=False, linewidth=1.8, **style)


def views() -> None:
    """Embeddings of a few images' views before and after training, with the covariances C and W."""
    rng = np.random.default_rng(3)
    angles, radii = np.arange(IMAGES) * 2.4, np.sqrt(4 * (np.arange(IMAGES) + 0.5) / IMAGES)  # a sunflower's seeds
    directions = radii[:, None, None] * np.stack([np.cos(angles), np.sin(angles)], -1)[:, None]
    noises = rng.standard_normal((IMAGES, VIEWS, 2))
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.4))
    for axis, title, spread, noise in ((axes[0], "before training", 0.35, 0.8), (axes[1], "after", 1.0, 0.17)):
        z = spread * directions + noise * noises
        total = np.cov(z.reshape(-1, 2).T)
        within = np.mean([np.cov(of_image.T) for of_image in z], axis=0)
        for i, of_image in enumerate(z):
            axis.scatter(*of_image.T, s=12, color=plt.cm.tab20(i))
        axis.add_patch(ellipse(total, z.mean((0, 1)), color="black"))
        axis.add_patch(ellipse(within, z.mean((0, 1)), color="crimson"))
        axis.set(title=title, xticks=[], yticks=[], aspect="equal", xlim=(-3.2, 3.2), ylim=(-3.2, 3.2))
    handles = [plt.Line2D([], [], color=color, linewidth=1.8) for color in ("black", "crimson")]
    names = ["C: all views", "W: views of one image"]
    figure.legend(handles, names, loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(OUT / "views.png", dpi=100)


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    views()
