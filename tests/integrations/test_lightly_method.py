"""The method for lightly: by a plain Trainer, in lightly's own classes, and in its unmodified main.py."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

lightly = pytest.importorskip("lightly", reason="lightly is not installed: pip install mmi-loss[lightly]")
pl = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")

from lightly.loss import VICRegLoss  # noqa: E402
from lightly.utils.benchmarking import BenchmarkModule, KNNClassifier, LinearClassifier, MetricCallback  # noqa: E402
from mmi_loss.integrations.lightly import (  # noqa: E402
    MMI,
    MMIDiagnostics,
    MMIProjectionHead,
    MMITransform,
    register,
    transform,
)
from pytorch_lightning.demos.boring_classes import BoringModel  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from mmi_loss import MMILoss, diagnostics  # noqa: E402

FEATURES = 16


def backbone():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, FEATURES, 3, 2),
        torch.nn.BatchNorm2d(FEATURES),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
    )


def model(**changes):
    torch.manual_seed(0)
    arguments = {"batch_size_per_device": 16, "num_classes": 10, "backbone": backbone(), "feature_dim": FEATURES}
    arguments["projection_head"] = MMIProjectionHead(FEATURES, 32, 24)
    return MMI(**{**arguments, **changes})


def loader(views=True, size=48):
    drawn = torchvision.datasets.FakeData(
        size, (3, 16, 16), transform=MMITransform(input_size=16) if views else torchvision.transforms.ToTensor()
    )
    return torch.utils.data.DataLoader(drawn, batch_size=16, drop_last=views)


def trainer(path, **changes):
    options = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": path}
    return pl.Trainer(**{**options, **changes})


class Logged(pl.Callback):
    """Keeps what was logged in every step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, *_):
        self.steps.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def test_trains_and_evaluates_by_lightlys_classes(tmp_path):
    module, metrics = model(), MetricCallback()
    before = [p.detach().clone() for p in module.parameters()]
    fit = trainer(tmp_path, max_epochs=2, callbacks=[metrics])
    fit.fit(module, loader(), loader(views=False))
    assert "train_loss" in fit.callback_metrics
    assert len(metrics.val_metrics["val_online_cls_top1"]) == 2
    assert module.criterion.step == 6
    assert all((p != q).any() for p, q in zip(before, module.parameters(), strict=True) if p.ndim > 1)
    knn = KNNClassifier(module, 10, knn_k=5, knn_t=0.1, train_dataloader_idx=0, val_dataloader_idx=1)
    found = trainer(tmp_path).validate(knn, [loader(views=False)] * 2, verbose=False)
    assert any("val_knn_top1" in name or "val_top1" in name for entry in found for name in entry)
    linear = LinearClassifier(module, 16, feature_dim=module.online_classifier.feature_dim, num_classes=10)
    trainer(tmp_path).fit(linear, loader(views=False), loader(views=False))


def test_loss_falls(tmp_path):
    """On images with something to learn: each class has a colour of its own."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(64, 3, 1, 1, generator=generator)
    views = [colours + 0.1 * torch.randn(64, 3, 16, 16, generator=generator) for _ in range(2)]
    batches = [(views, torch.zeros(64, dtype=torch.long))] * 40
    logged = Logged()
    module = model(learning_rate=4.0, batch_size_per_device=64)
    trainer(tmp_path, callbacks=[logged]).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    losses = [step["train_loss"] for step in logged.steps]
    assert losses[-1] < losses[0] - 0.5


def test_resumes_from_a_checkpoint_with_its_slices(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(16, 3, 16, 16, generator=generator) for _ in range(2)]
    batches = [(images, torch.arange(16) % 10)] * 3

    def finish(checkpoint=None):
        module = model(criterion=MMILoss(slice_dim=8, gather_distributed=True), learning_rate=1.0)
        every = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1) if checkpoint is None else None
        fit = trainer(tmp_path, max_epochs=4, callbacks=every, enable_checkpointing=every is not None)
        fit.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=checkpoint, weights_only=True)
        return module

    whole, resumed = finish(), finish(tmp_path / "epoch=1.ckpt")
    state = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert state._metadata["criterion"]["step"] == 6
    assert resumed.criterion.step == whole.criterion.step == 12
    assert all(map(torch.equal, resumed.parameters(), whole.parameters()))


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (10, 3), (300, 30)])
def test_warmup_is_clamped(epochs, warmup, tmp_path):
    """Ten epochs of three steps, at most a tenth of the run."""
    module = model()
    fit = trainer(tmp_path, max_epochs=epochs, callbacks=[_Stop()])
    fit.fit(module, loader())
    schedule = fit.lr_scheduler_configs[0].scheduler
    assert (schedule.warmup_epochs, schedule.max_epochs) == (warmup, 3 * epochs)


class _Stop(pl.Callback):
    def on_train_batch_start(self, trainer, *_):
        trainer.should_stop = True


def test_by_steps_and_without_end(tmp_path):
    fit = trainer(tmp_path, max_epochs=-1, max_steps=20, callbacks=[_Stop()])
    fit.fit(model(), loader())
    assert fit.lr_scheduler_configs[0].scheduler.warmup_epochs == 2
    with pytest.raises(ValueError, match="max_epochs or max_steps"):
        trainer(tmp_path, max_epochs=-1).fit(model(), loader())


def test_defaults_are_lightlys_contract():
    import inspect

    parameters = inspect.signature(MMI.__init__).parameters
    assert {"batch_size_per_device", "num_classes"} <= set(parameters)
    assert {"knn_k", "knn_t"} <= set(parameters)  # these names switch main.py to two validation loaders
    with torch.device("meta"):
        default = MMI(batch_size_per_device=8, num_classes=3)
        assert default(torch.empty(2, 3, 64, 64)).shape == (2, 2048)
    assert default.online_classifier.feature_dim == 2048
    assert default.online_classifier.topk == (1,)
    assert default.criterion.options.gather_distributed
    image = torchvision.transforms.functional.to_pil_image(torch.rand(3, 40, 40))
    assert [view.shape for view in transform(image)] == [(3, 224, 224)] * 2


def test_register():
    methods = {"vicreg": {}}
    register(methods)
    register(methods)
    assert methods["mmi"] == {"model": MMI, "transform": transform}
    with pytest.raises(ValueError, match="another method called 'mmi'"):
        register({"mmi": {"model": object}})


def test_one_view_is_refused():
    with pytest.raises(ValueError, match="two or more views per image, got 1"):
        model().training_step(([torch.randn(4, 3, 16, 16)], torch.zeros(4, dtype=torch.long)), 0)


def test_multicrop(tmp_path):
    """Two global and three local views: the loss of all, the online classifier of the global ones."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(16, 3, size, size, generator=generator) for size in (16, 16, 8, 8, 8)]
    seen, module = [], model()
    step = module.online_classifier.training_step
    module.online_classifier.training_step = lambda batch, i: seen.append(batch[0].shape) or step(batch, i)
    logged = Logged()
    batches = [(views, torch.arange(16) % 10)] * 2
    trainer(tmp_path, callbacks=[logged, MMIDiagnostics(every_n_steps=1)]).fit(
        module, torch.utils.data.DataLoader(batches, batch_size=None)
    )
    assert seen == [(32, FEATURES)] * 2
    assert module.criterion.step == 2
    module, z = model(), []
    hook = module.projection_head.register_forward_hook(lambda _, inputs, output: z.append(output.detach()))
    trainer(tmp_path, max_steps=1).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    hook.remove()
    expected = MMILoss()(list(z[0].chunk(5)))
    assert logged.steps[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("sizes", [(16, 16, 16), (16, 8, 16), (16, 16, 8, 8, 8, 8)], ids=str)
def test_diagnostics_of_multicrop_are_of_two_views(sizes, tmp_path):
    """In any order of sizes: of the same images, which the halves of all outputs are not."""
    generator = torch.Generator().manual_seed(0)
    colours, classified = torch.rand(64, 3, 1, 1, generator=generator), []
    views = [colours + 0.1 * torch.randn(64, 3, size, size, generator=generator) for size in sizes]
    pair, found = [view for view in views if view.shape[-1] == 16][:2], []
    for given in (views, pair):
        logged, module = Logged(), model(criterion=MMILoss(slice_dim=8))
        step = module.online_classifier.training_step
        module.online_classifier.training_step = lambda b, i, s=step: classified.append(len(b[0])) or s(b, i)
        batches = torch.utils.data.DataLoader([(given, torch.arange(64) % 10)], batch_size=None)
        trainer(tmp_path, callbacks=[MMIDiagnostics(every_n_steps=1), logged]).fit(module, batches)
        found.append(logged.steps[0])
    assert classified == [64 * sizes.count(16), 128]
    for name in ("mmi/mutual_information", "mmi/lidar", "mmi/backbone/content_information"):
        assert found[0][name] == pytest.approx(found[1][name], rel=0.25)  # batch norm sees other views


def test_knn_asks_for_its_loaders(tmp_path):
    for changes, loaders in (({"knn_k": 5}, 1), ({"knn_k": 5}, 3), ({}, 2)):
        with pytest.raises(ValueError, match=rf"validation loader\(s\), got {loaders}: .*val_dataloaders="):
            trainer(tmp_path).fit(model(**changes), loader(), [loader(views=False)] * loaders)


def test_knn_and_diagnostics_of_two_loaders(tmp_path):
    """A bank smaller than k gives all, as in the check before training; the diagnostics are of the validation set."""
    values = {}
    for name, sizes, changes in (("both", (48, 32), {"knn_k": 200}), ("alone", (32,), {})):
        loaders = [torch.utils.data.DataLoader(Drawn(seed=size, size=size), batch_size=16) for size in sizes]
        fit = trainer(tmp_path, callbacks=[MMIDiagnostics(validation_samples=48)])
        fit.validate(model(**changes), loaders, verbose=False)
        values[name] = dict(fit.callback_metrics)
    assert "val_knn_top1" in values["both"]
    assert values["both"]["mmi/val/rank_me"] == values["alone"]["mmi/val/rank_me"]


class Drawn(torch.utils.data.Dataset):
    def __init__(self, seed, size):
        self.images = torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index % 10


def test_knn_in_validation_by_a_second_loader(tmp_path):
    """The bank's loader first: the numbers of lightly's own evaluation of the same network, anew in every epoch."""
    module, metrics = model(knn_k=5, knn_t=0.1), MetricCallback()
    loaders = [loader(views=False), loader(views=False, size=32)]
    trainer(tmp_path, max_epochs=2, callbacks=[metrics]).fit(module, loader(), loaders)
    assert len(metrics.val_metrics["val_knn_top1"]) == len(metrics.val_metrics["val_online_cls_top1"]) == 2
    knn = KNNClassifier(module, 10, knn_k=5, knn_t=0.1, train_dataloader_idx=0, val_dataloader_idx=1)
    found = trainer(tmp_path).validate(knn, loaders, verbose=False)[1]
    expected = next(value for name, value in found.items() if name.startswith("val_knn_top1"))
    assert metrics.val_metrics["val_knn_top1"][-1] == pytest.approx(expected, abs=1e-6)


NAMES = [
    "mutual_information",
    "entropy_a",
    "entropy_b",
    "conditional_entropy",
    "min_canonical_correlation",
    "rank_me",
    "effective_rank",
    "participation_ratio",
    "alpha_req",
    "lidar",
    "content_information",
]


def test_diagnostics_log_off_the_hot_path(tmp_path):
    logged, module = Logged(), model()
    trainer(tmp_path, max_epochs=2, callbacks=[MMIDiagnostics(every_n_steps=4), logged]).fit(module, loader())
    measured = [all(f"mmi/{name}" in step for name in NAMES) for step in logged.steps]
    # Lightning keeps a logged value until the next; steps 0 and 4 of 6 measure.
    assert measured[0]
    changed = [
        i for i in range(1, 6) if logged.steps[i]["mmi/effective_rank"] != logged.steps[i - 1]["mmi/effective_rank"]
    ]
    assert changed == [4]
    assert not module.projection_head._forward_hooks


def test_diagnostics_values():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4096, 4, generator=generator)
    noise = [torch.randn(4096, 4, generator=generator) for _ in range(2)]
    measured = MMIDiagnostics().measure(*(0.8**0.5 * shared + 0.2**0.5 * e for e in noise))
    # Four independent pairs of correlation 0.8; slices of all four dimensions lose nothing.
    expected = -0.5 * 4 * torch.log(torch.tensor(1 - 0.8**2))
    assert measured["mmi/mutual_information"] == pytest.approx(float(expected), abs=0.1)
    assert measured["mmi/min_canonical_correlation"] == pytest.approx(0.8, abs=0.03)
    assert measured["mmi/effective_rank"] == pytest.approx(4, abs=0.02)
    # Through the loss's noise floor: less information, and no more entropy than of 4 uncorrelated features.
    entropy_a, entropy_b, conditional = (
        measured[f"mmi/{name}"] for name in ("entropy_a", "entropy_b", "conditional_entropy")
    )
    assert 0.5 < entropy_a - conditional < expected
    assert entropy_a == pytest.approx(float(entropy_b), abs=0.1)
    assert entropy_a < 2 * math.log(2 * math.pi * math.e * (1 + 4 / 64))
    independent = MMIDiagnostics().measure(*(torch.randn(512, 256, generator=generator) for _ in range(2)))
    assert abs(independent["mmi/mutual_information"]) < 1.5  # the plug-in estimate would be about 4.6


def test_diagnostics_of_another_method(tmp_path):
    logged = Logged()
    other = model(criterion=VICRegLoss())
    trainer(tmp_path, callbacks=[MMIDiagnostics(every_n_steps=1), logged]).fit(other, loader())
    assert "mmi/effective_rank" in logged.steps[0]


def test_diagnostics_errors(tmp_path):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        MMIDiagnostics(every_n_steps=0)
    with pytest.raises(ValueError, match="listens to projection_head or backbone, which BoringModel"):
        trainer(tmp_path, callbacks=[MMIDiagnostics()]).fit(BoringModel())


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def plane(seed=0):
    """512 samples of 32 features that fill two directions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(512, 2, generator=generator) @ normal(2, 32)


def test_diagnostics_show_collapse():
    for constant in (torch.zeros(512, 64), torch.full((512, 64), 0.3), normal(64).expand(512, 64)):
        measured = MMIDiagnostics().measure(constant, constant)
        assert measured["mmi/mutual_information"] == measured["mmi/effective_rank"] == 0
        assert measured["mmi/min_canonical_correlation"].isnan()
        entropies = [measured[f"mmi/{name}"] for name in ("entropy_a", "entropy_b", "conditional_entropy")]
        assert all(entropy.isfinite() for entropy in entropies)
        assert entropies[0] == pytest.approx(float(entropies[2]))
    views = plane(), 0.6 * plane() + 0.8 * plane(seed=1)
    measured = MMIDiagnostics().measure(*views)
    # Rounding of float32 is not a direction: 2 of 64 correlate, both by about 0.6.
    assert measured["mmi/min_canonical_correlation"] == pytest.approx(0.6, abs=0.1)
    assert measured["mmi/mutual_information"] == pytest.approx(-math.log(1 - 0.6**2), abs=0.1)
    assert 1 < measured["mmi/effective_rank"] <= 2


VIEWS = {f"{n} samples": (normal(n, 32), normal(2 * n, 32)[n:]) for n in (0, 1, 2, 5, 7, 8, 9, 16)}
VIEWS |= {
    "zeros": (torch.zeros(64, 32),) * 2,
    "equal": (normal(64, 32),) * 2,
    "a NaN": (normal(64, 32).index_fill(0, torch.tensor(3), math.nan), normal(64, 32)),
    "a NaN in the second": (normal(64, 32), normal(64, 32).index_fill(0, torch.tensor(3), math.nan)),
    "infinity": (torch.full((64, 32), math.inf), normal(64, 32)),
    "overflow": (3e38 * normal(64, 32).clamp(-1, 1), normal(64, 32)),
    "half precision": (normal(64, 32).half(), torch.full((64, 32), 6e4, dtype=torch.float16)),
    "bfloat16": (normal(64, 32).bfloat16(), normal(65, 32)[1:].bfloat16()),
    "double": (1e308 * normal(64, 32).double().clamp(-1, 1), 5e-324 * normal(64, 32).double()),
    "one feature": (normal(64, 1), normal(65, 1)[1:]),
    "no features": (normal(64, 0), normal(64, 0)),
    "unequal length": (normal(64, 32), normal(63, 32)),
    "unequal width": (normal(64, 32), normal(64, 16)),
    "one axis": (normal(64), normal(64)),
    "three axes": (normal(64, 8, 4), normal(64, 8, 4)),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_diagnostics_measure_what_they_can(kind):
    views = VIEWS[kind]
    measured = MMIDiagnostics().measure(*views)
    assert list(measured) == [f"mmi/{name}" for name in NAMES]
    assert all(value.shape == () and value.dtype == torch.float32 for value in measured.values())
    assert not any(value.isinf() for value in measured.values())
    if kind in ("8 samples", "16 samples", "bfloat16", "one feature", "unequal width"):
        # A power law needs more than ten eigenvalues, LiDAR views of one network.
        exempt = {"mmi/alpha_req", "mmi/lidar" if kind == "unequal width" else ""}
        assert all(value.isfinite() for name, value in measured.items() if name not in exempt)
    if len(views[0]) < 8 or kind in ("infinity", "no features", "unequal length", "one axis", "three axes"):
        assert all(value.isnan() for value in measured.values())


class Projecting(pl.LightningModule):
    """Its batches are lists of projections; the head passes them on, in one call each."""

    def __init__(self, head=None, checkpointed=False):
        super().__init__()
        self.projection_head, self.checkpointed = head or torch.nn.Identity(), checkpointed
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        for z in batch:
            if self.checkpointed:
                z = checkpoint(lambda x: self.projection_head(x).square(), z * self.weight.exp(), use_reentrant=False)
            else:
                self.projection_head(z)
        return z.mean() if self.checkpointed else self.weight * 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def run(tmp_path, batches, **changes):
    logged, module = Logged(), Projecting(**changes)
    callbacks = [MMIDiagnostics(every_n_steps=1), logged]
    batches = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=None)
    trainer(tmp_path, callbacks=callbacks).fit(module, batches)
    assert not module.projection_head._forward_hooks
    return logged.steps


def test_diagnostics_never_end_a_run(tmp_path):
    """Every step logs the same names, whatever came out of the head."""
    good = [normal(64, 32), normal(65, 32)[1:]]
    views = [list(pair) for kind, pair in VIEWS.items() if "ax" not in kind]
    halves = [[normal(n, 32)] for n in (0, 1, 2, 15, 16, 17, 64)]
    steps = run(tmp_path, [good, *views, *halves, good])
    assert all(set(step) == {f"mmi/{name}" for name in NAMES} for step in steps)
    assert steps[0] == steps[-1]
    assert all(map(math.isfinite, steps[-1].values()))
    assert not math.isnan(steps[-2]["mmi/mutual_information"])  # two halves of 32
    assert math.isnan(steps[-3]["mmi/mutual_information"])  # 9 and 8 rows


class Pair(torch.nn.Module):
    def forward(self, z):
        return z, z


@pytest.mark.parametrize(
    ("batch", "shapes", "head"),
    [
        ([], r"\[\]", None),
        ([normal(16, 4)] * 3, r"\[\(16, 4\), \(16, 4\), \(16, 4\)\]", None),
        ([normal(16, 4, 2)], r"\[\(16, 4, 2\)\]", None),
        ([normal(16), normal(16)], r"\[\(16,\), \(16,\)\]", None),
        ([torch.zeros(())], r"\[\(\)\]", None),
        ([normal(16, 4)] * 2, r"\[\]", Pair()),
    ],
    ids=["no call", "three views", "maps", "scalars of samples", "a scalar", "tuples"],
)
def test_diagnostics_of_no_two_views_warn_once(batch, shapes, head, tmp_path):
    with pytest.warns(UserWarning, match=f"MMIDiagnostics logs nothing: .* it gave {shapes}") as warned:
        steps = run(tmp_path, [batch] * 3, head=head)
    assert sum("MMIDiagnostics" in str(warning.message) for warning in warned) == 1
    assert steps == [{}] * 3


def test_diagnostics_do_not_hear_a_recomputed_head(tmp_path):
    """Activation checkpointing calls the head in backward again: of one call of both views that makes two."""
    both = torch.cat([normal(64, 32), normal(65, 32)[1:]])
    plain, recomputed = (run(tmp_path, [[both]], checkpointed=c) for c in (False, True))
    assert recomputed == [pytest.approx(plain[0])]


class Validating(Projecting):
    """Validation passes one view or two through the backbone, and never through the projector."""

    def __init__(self, head=None):
        super().__init__(head)
        self.backbone = torch.nn.Identity()

    def validation_step(self, batch, batch_idx):
        for z in batch:
            self.backbone(z)


@pytest.mark.parametrize("views", [1, 2])
def test_diagnostics_of_validation(views, tmp_path):
    """Of the first images of all batches together, of the features and, from them, of the projections."""
    logged = Logged()
    batches = [[normal(64, 32) + i * normal(65, 32)[1:] for _ in range(views)] for i in range(3)]
    loaders = [
        torch.utils.data.DataLoader(b, batch_size=None, collate_fn=None) for b in ([[normal(8, 4)] * 2], batches)
    ]
    module = Validating(torch.nn.Linear(32, 8))
    module.training_step = lambda batch, batch_idx: module.weight * 1
    fit = trainer(tmp_path, callbacks=[MMIDiagnostics(validation_samples=100), logged], num_sanity_val_steps=1)
    with pytest.warns(UserWarning, match="in this step it gave"):
        fit.fit(module, *loaders)
    values = {name: float(value) for name, value in fit.callback_metrics.items()}
    kept = torch.cat([batch[0] for batch in batches])[:100]
    assert values["mmi/val/backbone/rank_me"] == pytest.approx(float(diagnostics.rank_me(kept)), rel=1e-5)
    assert values["mmi/val/rank_me"] == pytest.approx(
        float(diagnostics.rank_me(module.projection_head(kept))), rel=1e-4
    )
    assert ("mmi/val/lidar" in values) == (views == 2)
    assert not module.backbone._forward_hooks


def test_diagnostics_of_a_projector_that_takes_no_features_do_not_end_a_run(tmp_path):
    batches = torch.utils.data.DataLoader([[normal(64, 32)]], batch_size=None, collate_fn=None)
    module = Validating(torch.nn.Linear(3, 8))
    module.training_step = lambda batch, batch_idx: module.weight * 1
    with pytest.warns(UserWarning, match="in this step it gave|in validation: "):
        trainer(tmp_path, callbacks=[MMIDiagnostics()]).fit(module, batches, batches)


def test_diagnostics_of_the_backbone_in_training(tmp_path):
    logged = Logged()
    trainer(tmp_path, callbacks=[MMIDiagnostics(every_n_steps=1), logged]).fit(model(), loader())
    assert {f"mmi/backbone/{name}" for name in NAMES} <= set(logged.steps[0])


def test_diagnostics_survive_a_skipped_batch():
    """A batch that was started and never ended leaves no listener behind."""
    callback, module = MMIDiagnostics(every_n_steps=1), Projecting()
    state = type("State", (), {"global_step": 0})()
    for _ in range(3):
        callback.on_train_batch_start(state, module, None, 0)
        module.projection_head(normal(16, 4))
    assert len(module.projection_head._forward_hooks) == 1


def test_in_a_benchmark_module(tmp_path):
    """The style of lightly's CIFAR-10 benchmark: kNN at the end of every epoch by its own class."""

    class Model(BenchmarkModule):
        def __init__(self, bank):
            super().__init__(bank, num_classes=10, knn_k=5)
            self.backbone, self.projection_head = backbone(), MMIProjectionHead(FEATURES, 32, 24)
            self.criterion = MMILoss()

        def training_step(self, batch, batch_idx):
            z_a, z_b = (self.projection_head(self.backbone(view).flatten(1)) for view in batch[0])
            return self.criterion(z_a, z_b)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.06)

    class Named(torch.utils.data.Dataset):
        """lightly's loaders give file names too."""

        def __len__(self):
            return 32

        def __getitem__(self, index):
            return torch.rand(3, 16, 16), index % 10, "name"

    plain = torch.utils.data.DataLoader(Named(), batch_size=16)
    module = Model(plain)
    logged = Logged()
    trainer(tmp_path, callbacks=[MMIDiagnostics(every_n_steps=1), logged]).fit(module, loader(), plain)
    assert 0 <= module.max_accuracy <= 1
    assert "mmi/mutual_information" in logged.steps[-1]


def test_unmodified_main_of_a_checkout(tmp_path):
    """An epoch of `--methods mmi` on small drawn images, by lightly's own script."""
    checkout = os.environ.get("LIGHTLY_CHECKOUT")
    if not checkout:
        pytest.skip("LIGHTLY_CHECKOUT names no checkout of lightly: its main.py is not in the wheel")
    for package in ("tensorboard", "psutil"):
        pytest.importorskip(package, reason=f"lightly's main.py logs with {package}, which is not installed")
    for split, count in (("train", 4), ("val", 2)):
        for label in range(5):
            folder = tmp_path / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(100 * label + i))
                torchvision.utils.save_image(image, folder / f"{i}.png")
    command = "import main; from mmi_loss.integrations.lightly import register; register(main.METHODS); "
    command += "main.main(**vars(main.parser.parse_args()))"
    arguments = ["--methods", "mmi", "--epochs", "1", "--batch-size-per-device", "10", "--num-workers", "1"]
    arguments += [
        "--accelerator",
        "cpu",
        "--precision",
        "32",
        "--num-classes",
        "5",
        "--knn-k",
        "5",
        "--strategy",
        "auto",
    ]
    arguments += [
        "--train-dir",
        str(tmp_path / "train"),
        "--val-dir",
        str(tmp_path / "val"),
        "--log-dir",
        str(tmp_path),
    ]
    arguments += ["--skip-linear-eval", "--skip-finetune-eval"]
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments],
        cwd=Path(checkout) / "benchmarks" / "imagenet" / "resnet50",
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "Results for mmi" in done.stdout
