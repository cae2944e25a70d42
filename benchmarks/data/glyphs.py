"""Several hundred characters as classes, type designs as what varies: 28 x 28 grey images.

An image is a character in one design: a family in one weight and slant. The query's designs are not in training and
bank. By default they are of the fonts that matplotlib ships: DejaVu Sans, Sans Mono and Serif and STIX, one style each.
Views are mild random crops, slanted, never flipped: a mirrored character is another one.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from itertools import chain, zip_longest
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.data import Task
from benchmarks.data.images import Augmentation, task

SIZE, EM, BASELINE = 28, 20, 21  # pixels; the baseline's are from the top
MIN_CLASSES, MAX_CLASSES, MIN_DESIGNS, MAX_DESIGNS = 500, 800, 15, 32
MIN_COMMON = 680  # some are left out: Latin, Greek and Cyrillic share glyphs, styles share signs
QUERY_EVERY = 5  # families mostly have four styles: the query gets a different one of each
AUGMENTATION = Augmentation(area=(0.8, 1.0), slant=0.3, jitter=0.4)
REMEDY = """{} fonts of {} give {} designs that share {} characters; glyphs needs {} that share {}. On Debian get more:
    apt-get download fonts-freefont-ttf fonts-noto-core fonts-sil-gentiumplus && for f in *.deb; do dpkg -x $f DIR; done
and name the folder: compare or demo --fonts DIR."""


def shipped() -> list[Path]:
    """The fonts of matplotlib that have letters."""
    fonts = (Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("*.ttf")
    return sorted(p for p in fonts if p.name.startswith(("DejaVu", "STIXGeneral")))


def designs(paths: list[Path]) -> tuple[list[Path], list[int]]:
    """The fonts to take, in the order of their names, and the letters, numbers, signs and symbols all of them have.
    Each family's font that has most comes first, then the second of each, as long as enough is common.
    """
    fonts = {p: FT2Font(str(p)) for p in paths}
    has = {p: {c for c in fonts[p].get_charmap() if unicodedata.category(chr(c))[0] in "LNPS"} for p in paths}
    families: dict[str, list[Path]] = defaultdict(list)
    for p in sorted(paths, key=lambda p: (-len(has[p]), p.name)):
        families[fonts[p].family_name].append(p)
    chosen: list[Path] = []
    common = set(range(0x110000))
    for p in filter(None, chain(*zip_longest(*families.values()))):
        if len(common & has[p]) >= MIN_COMMON and len(chosen) < MAX_DESIGNS:
            chosen, common = [*chosen, p], common & has[p]
    return sorted(chosen, key=lambda p: p.name), sorted(common)


def render(path: Path, code_points: list[int]) -> Tensor:
    """8-bit images (characters, 1, SIZE, SIZE) by Pillow, all at one size, on one baseline, in the middle."""
    font = ImageFont.truetype(str(path), EM, layout_engine=ImageFont.Layout.BASIC)
    canvases = [Image.new("L", (SIZE, SIZE)) for _ in code_points]
    for canvas, code_point in zip(canvases, code_points, strict=True):
        ImageDraw.Draw(canvas).text((SIZE / 2, BASELINE), chr(code_point), 255, font, anchor="ms")
    return torch.from_numpy(np.stack([np.asarray(canvas) for canvas in canvases]))[:, None]


def distinct(images: Tensor) -> list[int]:
    """Characters of ``images`` (designs, characters, ...) that each design draws its own way, unlike all before."""
    seen, kept = {bytes(SIZE**2)}, []
    for character in range(images.shape[1]):
        drawn = {image[character].numpy().tobytes() for image in images}
        if len(drawn) == len(images) and not drawn & seen:
            kept.append(character)
        seen |= drawn
    return kept


def load(folders: list[Path] | None = None) -> Task:
    """Every fifth design in the order of file names makes the query, the others training and bank."""
    found = [p for folder in folders for p in sorted(folder.rglob("*.[to]tf"))] if folders else shipped()
    paths = list({p.name: p for p in found}.values())  # a font in two folders is one design
    chosen, common = designs(paths)
    images = torch.stack([render(p, common) for p in chosen]) if chosen else torch.zeros(0, 0)
    kept = distinct(images)[:MAX_CLASSES]
    if len(kept) < MIN_CLASSES or len(chosen) < MIN_DESIGNS:
        where = ", ".join(map(str, folders or ())) or "matplotlib"
        raise SystemExit(REMEDY.format(len(paths), where, len(chosen), len(kept), MIN_DESIGNS, MIN_CLASSES))
    is_query = torch.arange(len(chosen)) % QUERY_EVERY == 0
    parts = (images[which][:, kept] for which in (~is_query, is_query))
    bank, query = ((part.flatten(0, 1), torch.arange(len(kept)).repeat(len(part))) for part in parts)
    return task("glyphs", len(kept), bank, query, AUGMENTATION)
