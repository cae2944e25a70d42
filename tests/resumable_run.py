"""A training run that can be killed at any moment: ``python tests/resumable_run.py FOLDER``.

It checkpoints every step and goes on from the checkpoint it finds; at the end it writes ``parameters.pt``. With
``--world`` it is one rank of a group of processes.
"""

from __future__ import annotations

import argparse
import datetime
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mmi_loss import MMILoss

STEPS = 40


def batch(step: int, rank: int) -> list[torch.Tensor]:
    """Two views, (16, 8) each, of the step's images on a rank."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    content = torch.randn(16, 8, generator=generator)
    return [content + 0.5 * torch.randn(16, 8, generator=generator) for _ in range(2)]


def save(state: dict, path: Path) -> None:
    """Whole or not at all: a kill while writing leaves the file of the step before."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def main() -> None:
    """Train to the last step, from the checkpoint if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=10, help="of the process group, in seconds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.world > 1:
        store = dist.FileStore(str(options.folder / "store"), options.world)
        store.set(f"rank {options.rank}", "ready")
        # Slow starts are not what the timeout is about.
        store.wait([f"rank {rank}" for rank in range(options.world)], datetime.timedelta(minutes=2))
        timeout = datetime.timedelta(seconds=options.timeout)
        dist.init_process_group("gloo", store=store, rank=options.rank, world_size=options.world, timeout=timeout)
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(8, 32), MMILoss(slice_dim=8, gather_distributed=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    parts = {"model": model, "loss": loss_fn, "optimizer": optimizer}
    checkpoint, start = options.folder / f"checkpoint{options.rank}.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        start = state.pop("step")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for step in range(start, options.steps):
        loss = loss_fn(*map(model, batch(step, options.rank)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        save({"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}}, checkpoint)
        print(step, flush=True)
    save(model.state_dict(), options.folder / "parameters.pt")


if __name__ == "__main__":
    main()
