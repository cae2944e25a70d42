#!/usr/bin/env bash
# DCLWLoss(gather_distributed=True) of lightly 1.6.0 is not the loss of the gathered batch (torch 2.14.1, two gloo ranks).
#
# Guess: with gather_distributed=True and equal batches the ranks' averaged loss and gradient are those of one process on
# all samples together, as they are for NTXentLoss and DCLLoss. Seen: DCLW gathers the negatives, but divides the weights
# of the positives by their mean over the samples of the rank alone. Where one rank has easier pairs than the other, as
# with data sorted by source, loss and gradient are of another weighting. 64 pairs of views, float64, the first half
# with little noise, the second with much. Expected output:
#   NTXentLoss: loss 3.8243 of 3.8243, gradient off by 0.000
#   DCLLoss: loss 1.5323 of 1.5323, gradient off by 0.000
#   DCLWLoss: loss 2.1732 of 4.3672, gradient off by 0.359
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'torchvision==0.29.1' 'lightly==1.6.0' 'numpy==2.4.0'
cat >"$folder/ranks.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightly.loss import DCLLoss, DCLWLoss, NTXentLoss


def value_and_gradient(criterion, views):
    leaves = [view.clone().requires_grad_() for view in views]
    loss = criterion(*leaves)
    loss.backward()
    return loss.detach(), torch.stack([leaf.grad for leaf in leaves])


def rank(number, views, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    for kind in (NTXentLoss, DCLLoss, DCLWLoss):
        loss, gradient = value_and_gradient(kind(gather_distributed=True), views.chunk(2, dim=1)[number])
        gradients = [torch.empty_like(gradient) for _ in range(2)]
        dist.all_gather(gradients, gradient)
        dist.all_reduce(loss)
        if number == 0:
            whole, expected = value_and_gradient(kind(), views)
            error = float((torch.cat(gradients, 1) / 2 - expected).norm() / expected.norm())
            print(f"{kind.__name__}: loss {loss / 2:.4f} of {whole:.4f}, gradient off by {error:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.manual_seed(0)
    content = torch.randn(64, 16, dtype=torch.float64)
    noise = torch.tensor([0.1, 2.0], dtype=torch.float64).repeat_interleave(32)[:, None]
    views = torch.stack([content + noise * torch.randn_like(content) for _ in range(2)])
    mp.spawn(rank, (views, sys.argv[1]), 2)
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore "$folder/ranks.py" "$folder/store" >"$folder/seen"
cat "$folder/seen"
diff <(sed -n 's/^#   //p' "$0") "$folder/seen" && echo "as stated"
