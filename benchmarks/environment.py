"""The columns that say where a number was measured, and the CSV files they go to."""

from __future__ import annotations

import csv
import datetime
import functools
import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import mmi_loss

RESULTS = Path(__file__).parent / "results"


@functools.cache
def core_digest() -> str:
    """Names the source of ``mmi_loss`` without its integrations: rows of another digest measured other code."""
    root = Path(mmi_loss.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*.py") if "integrations" not in path.parts):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def columns(device: str = "cpu") -> dict[str, Any]:
    """Version, commit, torch, device, threads and date of this process."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = output([*git, "rev-parse", "--short", "HEAD"])
    dirty = "+" if output([*git, "status", "--porcelain", "--untracked-files=no"]) else ""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    return {
        "version": mmi_loss.__version__,
        "commit": commit + dirty,
        "torch": torch.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row, whole and at once, so that an interrupted run leaves only finished rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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
