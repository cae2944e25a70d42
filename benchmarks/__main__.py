"""``python -m benchmarks COMMAND [OPTIONS]``: one command per question."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "demo": "MMI beside its rivals on real images, in minutes",
    "compare": "methods x widths x batch sizes x seeds on several tasks, in hours",
    "rates": "accuracy against the learning rate: which one a loss wants, how far off it may be",
    "ablate": "options of the loss in place of the default's",
    "speed": "time and memory on the CPU against every rival, to the floor",
    "speed_cuda": "the kernels on a GPU: checked against float64, then timed beside every rival; --dry-run without one",
    "selection": "which label-free measure picks the better run: rank correlations with kNN and linear accuracy",
    "doctor": "mmi-loss doctor on every loss of lightly, stable-pretraining, solo-learn, pytorch-metric-learning",
    "figures": "the paper's figures, and how much information chance alone shows",
    "solo_learn": "Barlow Twins, VICReg and MMI in an unmodified clone of solo-learn",
    "report": "a table of the stored results, and --write into the documents",
}


def main() -> int:
    """Run a command's module: its ``main(arguments)`` parses the rest."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__, *(f"  {name:11} {text}" for name, text in COMMANDS.items()), sep="\n")
        return 0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2
    # Only the chosen command's dependencies are imported.
    importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
