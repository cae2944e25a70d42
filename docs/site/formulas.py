"""Formulas as pictures: matplotlib draws them, so that a page loads no script."""

from __future__ import annotations

import base64
import html
import io
import re

from matplotlib import mathtext
from matplotlib.font_manager import FontProperties

SIZE = 13


def picture(formula: str, is_inline: bool = False) -> str:
    """An HTML image of a TeX formula."""
    formula = " ".join(formula.split())
    tex = re.sub(r"\\tfrac(\d)(\d)", r"\\frac{\1}{\2}", formula)  # of what matplotlib does not know
    file = io.BytesIO()
    size = FontProperties(size=SIZE, math_fontfamily="cm")
    mathtext.math_to_image(f"${tex}$", file, prop=size, format="svg")
    data = base64.b64encode(file.getvalue()).decode()
    kind = "formula inline" if is_inline else "formula"
    return f'<img class="{kind}" alt="{html.escape(formula)}" src="data:image/svg+xml;base64,{data}">'
