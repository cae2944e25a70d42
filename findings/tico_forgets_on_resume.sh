#!/usr/bin/env bash
# TiCoLoss of lightly 1.6.0 keeps its moving covariance where no checkpoint sees it (torch 2.14.1, CPU).
#
# Guess: a criterion with a moving average saves it, as BatchNorm does, so that a resumed run goes on with the loss it
# had. Seen: state_dict() is empty and loading one with strict=True succeeds; on the same two views the loss was 1.3746
# where the run went on and is 1.0638 where it was resumed, the value of a first step. The average is an attribute, made
# by the first call, so that no buffer is broadcast to the ranks of DDP either. Expected output:
#   three calls on the same views: 1.0638 1.1785 1.2817
#   entries of the state_dict: 0, buffers: 0
#   fourth call: 1.3746, resumed from the checkpoint: 1.0638
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'torchvision==0.29.1' 'lightly==1.6.0' 'numpy==2.4.0'
"$folder/venv/bin/python" -W ignore - >"$folder/seen" <<'PYTHON'
import torch
from lightly.loss import TiCoLoss

torch.manual_seed(0)
views = torch.randn(2, 16, 8)
criterion = TiCoLoss()
values = [f"{criterion(*views):.4f}" for _ in range(3)]
state = criterion.state_dict()
resumed = TiCoLoss()
resumed.load_state_dict(state, strict=True)
print("three calls on the same views:", *values)
print(f"entries of the state_dict: {len(state)}, buffers: {len(list(criterion.buffers()))}")
print(f"fourth call: {criterion(*views):.4f}, resumed from the checkpoint: {resumed(*views):.4f}")
PYTHON
cat "$folder/seen"
diff <(sed -n 's/^#   //p' "$0") "$folder/seen" && echo "as stated"
