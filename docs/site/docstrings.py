"""Docstrings as Markdown: they are written in reStructuredText's inline marks, which ``help`` shows well too."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))
from formulas import picture

ROOT = Path(__file__).parents[2]
DISPLAYED = re.compile(r"^( *)\.\. math:: (.+(?:\n\1 +\S.*)*)", re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")


def markdown(text: str) -> str:
    """A docstring's text with Markdown's marks."""
    text = DISPLAYED.sub(lambda match: f"{match[1]}{picture(match[2])}", text)
    text = re.sub(r":math:`([^`]+)`", lambda match: picture(match[1], is_inline=True), text)
    text = ROLE.sub(r"`\1`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)  # the name under which code is seen
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def option_parameters() -> list[griffe.Parameter]:
    """What ``**options: Unpack[OptionTypes]`` stands for: every option with its type and default."""
    tree = ast.parse((ROOT / "mmi_loss" / "options.py").read_text())
    types, defaults = (
        {ast.literal_eval(key): value for key, value in zip(node.keys, node.values, strict=True)}
        for node in (
            next(x for x in ast.walk(statement) if isinstance(x, ast.Dict) and x.keys)
            for statement in tree.body
            if re.match(r"(OptionTypes|DEFAULTS)\b", ast.unparse(statement))
        )
    )
    kind = griffe.ParameterKind.keyword_only
    return [
        griffe.Parameter(name, annotation=ast.unparse(types[name]).strip("'"), kind=kind, default=ast.unparse(default))
        for name, default in defaults.items()
    ]


class Markdown(griffe.Extension):
    """Converts every docstring as it is read, and shows the options in the signatures that take them."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Runs for every function and method."""
        has_defaults = func.name != "paper"  # which has defaults of its own
        if has_defaults and any("OptionTypes" in str(parameter.annotation) for parameter in func.parameters):
            given = [parameter for parameter in func.parameters if parameter.name != "options"]
            func.parameters = griffe.Parameters(*given, *option_parameters())

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Runs for every object."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
