#!/usr/bin/env bash
# KNNClassifier of lightly 1.6.0, given features as part of a LightningModule, ends the run (pytorch-lightning 2.6.6,
# torch 2.14.1, CPU).
#
# Guess: model=None, "hands over the features directly", is made for kNN in the validation of a module that trains, as
# the SimCLR of lightly's ImageNet benchmark does it; what the classifier logs arrives with the module's own. Seen: a
# trainer whose module the classifier is evaluates well; inside another module its first batch of the validation set
# raises, in the sanity check before training. It logs by itself wherever it has a trainer, and Lightning gives one to
# every module inside the trained one, but lets only that one log. Expected output:
#   evaluated alone: val_knn_top1/dataloader_idx_1
#   inside a module that trains: MisconfigurationException
#   after 0 steps of training
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
    'torch==2.14.1' 'torchvision==0.29.1' 'lightly==1.6.0' 'pytorch-lightning==2.6.6' 'numpy==2.4.0'
"$folder/venv/bin/python" -W ignore - >"$folder/seen" 2>"$folder/log" <<'PYTHON'
import pytorch_lightning as pl
import torch
from lightly.utils.benchmarking import KNNClassifier
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
labels = torch.arange(40) % 4
images = torch.randn(40, 8) + 5 * torch.eye(8)[labels]
loaders = [DataLoader(TensorDataset(images, labels), batch_size=20) for _ in range(2)]
options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
options |= {"enable_progress_bar": False}


class Encoder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(8, 8)
        self.neighbours = KNNClassifier(None, 4, 5, 0.1, 0, 1, topk=(1,))

    def forward(self, images):
        return self.backbone(images)

    def training_step(self, batch, index):
        return self(batch[0]).square().mean()

    def validation_step(self, batch, index, dataloader_idx):
        self.neighbours.validation_step((self(batch[0]), batch[1]), index, dataloader_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


encoder = Encoder()
alone = KNNClassifier(encoder, 4, 5, 0.1, 0, 1, topk=(1,))
found = pl.Trainer(**options).validate(alone, loaders, verbose=False)
print("evaluated alone:", *(name for of_loader in found for name in of_loader))
trainer = pl.Trainer(**options)
try:
    trainer.fit(encoder, loaders[0], loaders)
    print("inside a module that trains: no error")
except Exception as error:
    print("inside a module that trains:", type(error).__name__)
print("after", trainer.global_step, "steps of training")
PYTHON
cat "$folder/seen"
diff <(sed -n 's/^#   //p' "$0") "$folder/seen" && echo "as stated"
