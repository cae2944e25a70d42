"""``make fuzz``: the properties of test_properties.py on many thousand examples, in rounds that can be interrupted.

Every finished round is a row of ``OUT/rounds.csv``; the same command goes on after the last one, as long as the
package and the property are the same. A failing example is written to ``OUT/failures`` and kept in hypothesis's
database in ``OUT/examples``, from where it is tried first the next time.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis.database import DirectoryBasedExampleDatabase
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import environment
from tests import test_properties

ROUND = 50
"""Examples of a round: some seconds, and few enough for an interruption to cost little."""


def properties(module: Any = test_properties) -> dict[str, Any]:
    """The hypothesis tests of a module by name."""
    return {name: test for name, test in vars(module).items() if hasattr(test, "hypothesis")}


def sources_digest(test: Any) -> str:
    """Names the tested code: rounds of another core or of an earlier form of the property do not count."""
    source = environment.core_digest() + inspect.getsource(test.hypothesis.inner_test)
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def run_round(test: Any, index: int, size: int, database: Path) -> tuple[int, str]:
    """One round with its own seed: the number of examples that passed, and the report of a failure or ''."""
    inner, passed = test.hypothesis.inner_test, 0

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal passed
        inner(*args, **kwargs)
        passed += 1

    test.hypothesis.inner_test = counted
    settings = hypothesis.settings(
        max_examples=size,
        deadline=None,
        derandomize=False,
        database=DirectoryBasedExampleDatabase(database),
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=True,
    )
    try:
        test._hypothesis_internal_use_settings = settings
        test._hypothesis_internal_use_seed = index
        test()
    except (Exception, pytest.fail.Exception):
        return passed, traceback.format_exc()
    finally:
        test.hypothesis.inner_test = inner
    return passed, ""


def main(arguments: list[str]) -> int:
    """Run what is missing, then print and write the figure; 1 if an example failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=20_000, help="in all, spread evenly over the properties")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="properties whose name holds one of the words")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="folder for rounds, failures and examples")
    parser.add_argument("--summary", type=Path, help="CSV file of the figure (default OUT/fuzz.csv)")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="(objective|num_slices)=")
    warnings.filterwarnings("ignore", category=hypothesis.errors.NonInteractiveExampleWarning)
    console, rounds = Console(), options.out / "rounds.csv"
    chosen = {
        name: test for name, test in properties().items() if not options.only or any(w in name for w in options.only)
    }
    target, where = -(-options.examples // len(chosen)), environment.columns()
    digests = {name: sources_digest(test) for name, test in chosen.items()}

    def finished() -> list[dict[str, str]]:
        return [row for row in environment.read(rounds) if row["sources"] == digests.get(row["property"])]

    done = finished()
    counts = {name: sum(int(row["examples"]) for row in done if row["property"] == name) for name in chosen}
    indices = {name: sum(row["property"] == name for row in done) for name in chosen}
    columns = [TextColumn("{task.description:50}"), BarColumn(), MofNCompleteColumn(), TextColumn("examples")]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=target * len(chosen), completed=sum(min(c, target) for c in counts.values()))
        # In turns: wherever it is interrupted, all properties have been tried about equally often.
        while behind := [name for name in chosen if counts[name] < target]:
            for name in behind:
                progress.update(bar, description=name)
                begin = time.perf_counter()
                passed, report = run_round(chosen[name], indices[name], ROUND, options.out / "examples")
                row = {
                    "property": name,
                    "round": indices[name],
                    "examples": passed,
                    "failures": int(bool(report)),
                    "seconds": round(time.perf_counter() - begin, 2),
                    "sources": digests[name],
                    **where,
                }
                if report:
                    path = options.out / "failures" / f"{name}-{indices[name]}.txt"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(report)
                    console.print(f"failed: {name}, see {path}")
                    counts[name] = target  # it would only be found again
                environment.append(rounds, row)
                progress.update(bar, advance=min(passed, max(0, target - counts[name])))
                counts[name] += passed
                indices[name] += 1
    summary = summarise(finished())
    path = options.summary or options.out / "fuzz.csv"
    path.unlink(missing_ok=True)
    for row in summary:
        environment.append(path, row)
    show(summary, console)
    return int(any(row["failures"] for row in summary))


def summarise(rounds: list[dict[str, str]]) -> list[dict[str, Any]]:
    """One row per property and one of all."""
    names = list(dict.fromkeys(row["property"] for row in rounds))
    summary = []
    for name in [*names, "all"]:
        rows = [row for row in rounds if name in (row["property"], "all")]
        summary.append(
            {
                "property": name.removeprefix("test_"),
                "examples": sum(int(row["examples"]) for row in rows),
                "failures": sum(int(row["failures"]) for row in rows),
                "minutes": round(sum(float(row["seconds"]) for row in rows) / 60, 2),
                **{column: rows[-1][column] for column in environment.columns() if rows},
            }
        )
    return summary


def show(summary: list[dict[str, Any]], console: Console) -> None:
    """The table; its last row is the figure."""
    table = Table(title="examples drawn per property; one that failed is counted once")
    table.add_column("property", no_wrap=True)
    for column in ("examples", "failures", "minutes"):
        table.add_column(column, justify="right")
    for row in summary:
        table.add_row(*(str(row[column]) for column in ("property", "examples", "failures", "minutes")))
    console.print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
