"""Training runs that are killed: what was lost is no more than the step at hand, and nobody waits for the dead."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
GENEROUS = 120
"""Seconds after which a run counts as hanging."""


def start(folder, *arguments):
    command = [sys.executable, "-m", "tests.resumable_run", str(folder), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_after_step(process, step):
    """SIGKILL once the process says that it has finished a step; it is somewhere in the next."""
    for line in process.stdout:
        if int(line) >= step:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait(GENEROUS) == -signal.SIGKILL


def test_killed_run_resumes_to_the_same_parameters(tmp_path):
    folders = {name: tmp_path / name for name in ("whole", "killed")}
    for folder in folders.values():
        folder.mkdir()
    whole, killed = (start(folder) for folder in folders.values())
    kill_step = random.SystemRandom().randrange(5, 30)
    kill_after_step(killed, kill_step)
    assert not (folders["killed"] / "parameters.pt").exists()
    for process in (whole, start(folders["killed"])):
        _, errors = process.communicate(timeout=GENEROUS)
        assert process.returncode == 0, errors
    checkpoints = [torch.load(folder / "checkpoint0.pt", weights_only=True) for folder in folders.values()]
    for checkpoint in checkpoints:
        assert checkpoint["loss"]._metadata[""]["step"] == checkpoint["step"] == checkpoints[0]["step"]
    expected, resumed = (torch.load(folder / "parameters.pt", weights_only=True) for folder in folders.values())
    for name, parameter in expected.items():
        assert torch.equal(resumed[name], parameter), f"{name}, killed after step {kill_step}"


def test_a_rank_that_dies_ends_the_others_with_an_error(tmp_path):
    """And one that only stops does, by the process group's timeout."""
    ways = {"killed": (signal.SIGKILL, 3), "stopped": (signal.SIGSTOP, 2)}
    groups = {}
    for name, (_, world) in ways.items():
        folder = tmp_path / name
        folder.mkdir()
        arguments = ["--world", world, "--timeout", 5, "--steps", 10**6]
        groups[name] = [start(folder, *arguments, "--rank", rank) for rank in range(world)]
    try:
        for name, (*others, last) in groups.items():
            for line in last.stdout:
                if int(line) >= 3:
                    break
            last.send_signal(ways[name][0])
            for process in others:
                _, errors = process.communicate(timeout=GENEROUS)
                assert process.returncode == 1
                assert "RuntimeError" in errors or "DistBackendError" in errors, errors
                assert "mmi_loss/distributed.py" in errors, errors
    finally:
        for process in (process for group in groups.values() for process in group):
            process.kill()
            process.communicate()
