"""lightly's own example scripts with one line changed: the criterion. On drawn images, CPU, a few steps."""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torchvision

lightly = pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[lightly]")

from lightly.models.modules import BarlowTwinsProjectionHead  # noqa: E402
from lightly.models.modules.heads import VICRegProjectionHead  # noqa: E402
from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform  # noqa: E402
from lightly.transforms.vicreg_transform import VICRegTransform  # noqa: E402

from mmi_loss import MMILoss  # noqa: E402


def barlow_twins_transform():
    return BYOLTransform(
        view_1_transform=BYOLView1Transform(input_size=32, gaussian_blur=0.0),
        view_2_transform=BYOLView2Transform(input_size=32, gaussian_blur=0.0),
    )


EXAMPLES = {
    "barlowtwins": (lambda: BarlowTwinsProjectionHead(512, 512, 512), barlow_twins_transform),
    "vicreg": (lambda: VICRegProjectionHead(512, 512, 512, num_layers=2), lambda: VICRegTransform(input_size=32)),
}


class Model(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        resnet = torchvision.models.resnet18()
        self.backbone = torch.nn.Sequential(*list(resnet.children())[:-1])
        self.projection_head = head

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))


def loader(transform):
    drawn = torchvision.datasets.FakeData(24, (3, 32, 32), transform=transform)
    return torch.utils.data.DataLoader(drawn, batch_size=12, shuffle=True, drop_last=True)


@pytest.mark.parametrize("example", EXAMPLES)
def test_pytorch_example(example):
    torch.manual_seed(0)
    head, transform = EXAMPLES[example]
    model = Model(head())
    criterion = MMILoss()  # the changed line
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        for batch in loader(transform()):
            x0, x1 = batch[0]
            loss = criterion(model(x0), model(x1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert loss.isfinite()
    assert all((p != q).any() for p, q in zip(before, model.parameters(), strict=True) if p.ndim > 1)
    assert criterion.step == 4


@pytest.mark.parametrize("example", EXAMPLES)
def test_lightning_example(example, tmp_path):
    pl = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    head, transform = EXAMPLES[example]

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model(head())
            self.criterion = MMILoss()  # the changed line
            self.losses = []

        def training_step(self, batch, batch_index):
            (x0, x1) = batch[0]
            loss = self.criterion(self.model(x0), self.model(x1))
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.06)

    module = Module()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(model=module, train_dataloaders=loader(transform()))
    assert len(module.losses) == 4
    assert all(torch.tensor(module.losses).isfinite())
    # The counter travels with Lightning's checkpoint.
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert torch.load(checkpoint, weights_only=False)["state_dict"]._metadata["criterion"]["step"] == 4


@pytest.mark.parametrize("script", ["pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_scripts_of_a_checkout(script, example, tmp_path, monkeypatch):
    """The files themselves: the criterion exchanged by one substitution, the data set by drawn images."""
    checkout = os.environ.get("LIGHTLY_CHECKOUT")
    if not checkout:
        pytest.skip("LIGHTLY_CHECKOUT names no checkout of lightly: its example scripts are not in the wheel")
    source = (Path(checkout) / "examples" / script / f"{example}.py").read_text()
    source, changed = re.subn(r"= (BarlowTwinsLoss|VICRegLoss)\(\)", "= __import__('mmi_loss').MMILoss()", source)
    assert changed == 1
    source = source.replace("range(10)", "range(1)").replace("max_epochs=10", "max_epochs=1")
    source = source.replace("num_workers=8", "num_workers=0").replace("batch_size=256", "batch_size=8")
    path = tmp_path / f"{example}.py"
    path.write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.setattr(
        torchvision.datasets,
        "CIFAR10",
        lambda *_, transform, **__: torchvision.datasets.FakeData(16, (3, 32, 32), transform=transform),
    )
    runpy.run_path(str(path), run_name="__main__")
