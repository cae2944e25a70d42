#!/usr/bin/env bash
# One NaN in a batch: SupConLoss, CircleLoss and FastAPLoss of pytorch-metric-learning 2.9.0 (torch 2.14.1) give a NaN
# loss with a gradient of exactly 0 for every sample, so that a GradScaler sees nothing and does not skip the step.
#
# Guess: an overflow in the network makes the loss NaN and its gradients with it; torch.amp.GradScaler looks for
# non-finite gradients, skips the step and halves its scale. Seen: for these three losses the gradients are 0, the
# scaler steps (weight decay and momentum move the weights on) and keeps its scale, step after step, while the log shows
# NaN. NTXentLoss and MultiSimilarityLoss of the same library give NaN gradients, and the step is skipped. Expected
# output, by loss: its value, the gradient's rows that are not finite, whether the optimiser stepped, the scale after it:
#   SupConLoss: nan, 0 of 8, stepped, 1024
#   CircleLoss: nan, 0 of 8, stepped, 1024
#   FastAPLoss: nan, 0 of 8, stepped, 1024
#   NTXentLoss: nan, 8 of 8, skipped, 512
#   MultiSimilarityLoss: nan, 8 of 8, skipped, 512
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'pytorch-metric-learning==2.9.0' 'numpy==2.4.0'
"$folder/venv/bin/python" -W ignore - >"$folder/seen" <<'PYTHON'
import torch
from pytorch_metric_learning import losses

for name in ("SupConLoss", "CircleLoss", "FastAPLoss", "NTXentLoss", "MultiSimilarityLoss"):
    torch.manual_seed(0)
    embeddings = torch.randn(8, 16)
    embeddings[0, 0] = float("nan")
    weight = torch.nn.Parameter(embeddings)
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = getattr(losses, name)()(weight, torch.arange(4).repeat(2))
    scaler.scale(loss).backward()
    rows = int((~weight.grad.isfinite()).any(1).sum())
    scaler.step(optimizer)
    scaler.update()
    stepped = "skipped" if torch.equal(weight[1:], before[1:]) else "stepped"
    print(f"{name}: {loss.item()}, {rows} of 8, {stepped}, {scaler.get_scale():g}")
PYTHON
cat "$folder/seen"
diff <(sed -n 's/^#   //p' "$0") "$folder/seen" && echo "as stated"
