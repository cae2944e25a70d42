"""The columns that say where a number was measured and by which code, and the CSV files they go to."""

from __future__ import annotations

import ast
import csv
import datetime
import functools
import hashlib
import os
import platform
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import mmi_loss
from benchmarks.losses import WITHOUT_US

Row = dict[str, str]
RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs")
"""Ignored by git: histories, drawn views, checkpoints, and the results of whoever tries a command."""
NOT_OF_THE_LOSS = {"integrations", "diagnostics", "measures", "doctor", "__main__"}
BEFORE_DIGESTS = "before-digests"
"""In place of a digest, in rows that are older than the column."""


@functools.cache
def core_digest() -> str:
    """Names the code of the loss, without comments and docstrings: rows of another digest measured another loss.

    Integrations, measures of a representation and the doctor are not of the loss.
    """
    root, digest = Path(mmi_loss.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if not NOT_OF_THE_LOSS & {Path(part).stem for part in path.relative_to(root).parts}:
            tree = _WithoutText().visit(ast.parse(path.read_text()))
            digest.update(f"{path.relative_to(root).as_posix()}\n{ast.unparse(tree)}".encode())
    return digest.hexdigest()[:12]


class _WithoutText(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return ast.Pass() if is_text else node


@functools.cache
def _commit() -> str:
    """The commit when the process first asked; later ones are not the code in memory."""
    git = ["git", "-C", str(Path(__file__).parent)]
    dirty = "+" if output([*git, "status", "--porcelain", "--untracked-files=no"]) else ""
    return output([*git, "rev-parse", "--short", "HEAD"]) + dirty


def columns(device: str = "cpu") -> dict[str, Any]:
    """Digest of the core, version, commit, torch, device, threads and date of this process."""
    return {
        "core": core_digest(),
        "version": mmi_loss.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row, whole and at once, so that an interrupted run leaves only finished rows.

    Raises:
        ValueError: The file has other columns, as one written by an older form of the command has.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        file.seek(0)
        header = next(csv.reader(file), None)
        if header and set(header) != set(row):
            raise ValueError(f"{path} has the columns {header}, not {list(row)}: move it away or choose another file")
        writer = csv.DictWriter(file, header or list(row))
        if not header:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def provenance(rows: list[Row]) -> str:
    """Which core, commits and devices made the rows, in a line; several cores are counted, because they may differ.

    The core is that of our losses' rows: in a rival's it has no part.
    """
    of_ours = [row for row in rows if row.get("method") not in WITHOUT_US]
    cores = Counter(row["core"] for row in of_ours or rows if "core" in row)
    parts = [f"{len(rows)} rows", *(f"core {core}" for core in cores)]
    if len(cores) > 1:
        parts[1:] = ["MIXED CORES: " + ", ".join(f"{core} ({count} rows)" for core, count in cores.items())]
    text = ", ".join(parts)
    for name, label in {"commit": "; commit ", "torch": "; torch ", "device": "; "}.items():
        found = sorted({row[name] for row in rows if name in row})  # the doctor's rows have torch alone
        text += label + ", ".join(found) if found else ""
    return text


def output(command: list[str]) -> str:
    """What a command prints; nothing where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
