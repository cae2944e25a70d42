"""Characters as classes, type designs as what varies: several hundred classes of 28 x 28 grey images.

A class is a character, an image is that character in one design (a family in one weight and slant). Designs of the
query are by other makers than those of training and bank: a representation is good here if it knows a character in
type it has never seen. The fonts that matplotlib ships are the default: DejaVu is learnt, STIX is asked. Views are
mild random crops, never flipped: a mirrored character is another one.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.data import Task
from benchmarks.data.views import Augmentation, PairsOfCrops, plain_batches

SIZE, EM, BASELINE = 28, 20, 21
"""Pixels of an image, of the font's em, and from the top to the baseline."""

MIN_CLASSES, MAX_CLASSES, MIN_COMMON, MIN_DESIGNS, MAX_DESIGNS = 500, 800, 600, 15, 32
QUERY_EVERY = 5
VISIBLE = "LNPS"  # Unicode's letters, numbers, punctuation, symbols
AUGMENTATION = Augmentation(area=(0.8, 1.0), slant=0.3, jitter=0.4)
REMEDY = """{found}: the task needs at least {least} characters common to designs of two makers or more. More are had by
    apt-get download fonts-freefont-ttf fonts-noto-core fonts-sil-charis fonts-roboto-unhinted
    for package in fonts-*.deb; do dpkg -x $package DIR; done
and compare --fonts DIR, or demo --data glyphs DIR; without a folder the fonts of matplotlib are taken."""


def files(folders: Sequence[Path]) -> list[Path]:
    """The fonts in ``folders``, or those of matplotlib that have more than mathematics."""
    if folders:
        return [p for folder in folders for p in sorted(folder.rglob("*.[to]tf"))]
    shipped = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted([*shipped.glob("DejaVu*.ttf"), *shipped.glob("STIXGeneral*.ttf")])


def designs(paths: Sequence[Path]) -> tuple[dict[Path, str], list[int]]:
    """Font files with their makers (a family's first word), and the code points that all of them have.

    The design of every family that covers most comes first, then the second of each, as long as enough is common.
    """
    fonts = {p: FT2Font(str(p)) for p in paths}
    covered = {p: set(filter(_is_visible, font.get_charmap())) for p, font in fonts.items()}
    families: dict[str, list[Path]] = defaultdict(list)
    for p in sorted(fonts, key=lambda p: (-len(covered[p]), p.name)):
        families[fonts[p].family_name].append(p)
    order = sorted(fonts, key=lambda p: (families[fonts[p].family_name].index(p), -len(covered[p]), p.name))
    chosen: list[Path] = []
    common: set[int] = set()
    for p in order:
        both = common & covered[p] if chosen else covered[p]
        if len(both) >= MIN_COMMON and len(chosen) < MAX_DESIGNS:
            chosen, common = [*chosen, p], both
    return sorted(chosen), sorted(common)


def _is_visible(code_point: int) -> bool:
    return unicodedata.category(chr(code_point))[0] in VISIBLE


def render(path: Path, code_points: Sequence[int]) -> Tensor:
    """8-bit images (characters, 1, SIZE, SIZE): centred, at one size, on one baseline, by Pillow."""
    font = ImageFont.truetype(str(path), EM, layout_engine=ImageFont.Layout.BASIC)
    images = torch.zeros(len(code_points), 1, SIZE, SIZE, dtype=torch.uint8)
    for image, code_point in zip(images, code_points, strict=True):
        canvas = Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(canvas).text((SIZE / 2, BASELINE), chr(code_point), 255, font, anchor="ms")
        image[0] = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(SIZE, SIZE)
    return images


def distinct(images: Tensor) -> list[int]:
    """Characters of ``images`` (designs, characters, ...) that are blank in no design and like an earlier one in none:
    many of Latin, Greek and Cyrillic share their glyphs.
    """
    seen, kept = {(d, bytes(images[0, 0].numel())) for d in range(len(images))}, []
    for character in range(images.shape[1]):
        drawn = {(d, image[character].numpy().tobytes()) for d, image in enumerate(images)}
        if not drawn & seen:
            kept.append(character)
            seen |= drawn
    return kept


def load(folders: Sequence[Path] = ()) -> Task:
    """Every fifth design in the order of file names makes the query, the others training and bank."""
    paths = files(folders)
    chosen, common = designs(paths)
    images = torch.stack([render(p, common) for p in chosen]) if chosen else torch.zeros(0, 0, 1, SIZE, SIZE)
    kept = distinct(images)[:MAX_CLASSES]
    if len(kept) < MIN_CLASSES or len(chosen) < MIN_DESIGNS:
        where = ", ".join(map(str, folders)) or "matplotlib"
        raise SystemExit(REMEDY.format(found=f"{where}: {len(paths)} fonts give {len(chosen)} designs of {len(kept)}"))
    is_query = torch.arange(len(chosen)) % QUERY_EVERY == 0
    bank, query = (images[mask][:, kept].flatten(0, 1) for mask in (~is_query, is_query))
    labels = torch.arange(len(kept))
    bank_labels, query_labels = (labels.repeat(len(part) // len(kept)) for part in (bank, query))
    return Task(
        name="glyphs",
        num_classes=len(kept),
        channels=1,
        image_size=SIZE,
        num_images=len(bank),
        pretrain_batches=lambda batch_size, seed: PairsOfCrops(bank, bank_labels, batch_size, seed, AUGMENTATION),
        train=lambda: plain_batches(bank, bank_labels),
        test=lambda: plain_batches(query, query_labels),
    )
