"""The method in the real solo-learn, without its scripts."""

import re

import pytest
import torch

from mmi_loss.options import DEFAULTS


@pytest.fixture(scope="module")
def method(solo):
    from mmi_loss.integrations.solo_learn import register

    return register()


def config(**method_kwargs):
    from omegaconf import OmegaConf

    method_kwargs = {"proj_hidden_dim": 128, "proj_output_dim": 128, **method_kwargs}
    return OmegaConf.create(
        {
            "name": "test",
            "method": "mmi",
            "backbone": {"name": "resnet18"},
            "method_kwargs": {name: value for name, value in method_kwargs.items() if value != "absent"},
            "data": {"dataset": "custom", "num_large_crops": 2, "num_small_crops": 0, "num_classes": 10},
            "optimizer": {"name": "lars", "batch_size": 32, "lr": 0.3, "classifier_lr": 0.1, "weight_decay": 1e-4},
            "scheduler": {"name": "warmup_cosine"},
            "max_epochs": 2,
        }
    )


def test_registration_is_idempotent(solo, method):
    from mmi_loss.integrations.solo_learn import register
    from solo.methods import METHODS, BaseMethod

    assert METHODS["mmi"] is method
    assert register() is method
    assert issubclass(method, BaseMethod)


def test_outputs_and_parameters(method):
    model = method(config(proj_output_dim=64))
    out = model(torch.randn(4, 3, 32, 32))
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "logits": (4, 10),
        "feats": (4, 512),
        "z": (4, 64),
    }
    learnable = {id(p) for group in model.learnable_params for p in group["params"]}
    assert learnable == {id(p) for p in model.parameters()}


@pytest.mark.filterwarnings("ignore:.*self.log:UserWarning")
def test_training_reduces_the_loss_and_counts_steps(method):
    torch.manual_seed(0)
    model = method(config())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images = torch.randn(32, 3, 16, 16)
    batch = [torch.arange(32), [images, images + 0.1 * torch.randn_like(images)], torch.arange(32) % 10]
    losses = []
    for step in range(20):
        loss = model.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model.mmi_loss.step == 20
    # A checkpoint of another method has no place for the counter among its tensors.
    assert not any(name.startswith("mmi_loss") for name in model.state_dict())
    resumed = method(config())
    resumed.load_state_dict(model.state_dict())
    assert resumed.mmi_loss.step == 20


def test_options_arrive_under_their_own_names(method):
    cfg = config(slice_dim=64, num_slices=2, snr=32, objective="exchangeable")
    model = method(cfg)
    options = model.mmi_loss.options
    assert (options.slice_dim, options.num_slices, options.snr, options.objective) == (64, 2, 32, "exchangeable")
    assert options.gather_distributed  # statistics of the global batch, as solo-learn's own losses
    assert not method(config(gather_distributed=False)).mmi_loss.options.gather_distributed
    # Every option ends in the configuration, hence in a checkpoint's args.json; what is no plain value does not.
    assert set(DEFAULTS) - set(cfg.method_kwargs) == {"process_group"}


OTHER = {
    "objective": "exchangeable",
    "slice_dim": 32,
    "num_slices": 2,
    "seed": 3,
    "snr": 16,
    "ridge": 0.25,
    "logdet": "taylor",
    "order": 3,
    "beta": 1.5,
    "gather_distributed": False,
    "impl": "reference",
    "slice_kind": "gaussian",
}


def test_other_values_are_of_all_options():
    assert set(DEFAULTS) - set(OTHER) == {"process_group"}


@pytest.mark.parametrize("name", OTHER)
def test_every_option_can_be_set(method, name):
    """By its name alone, and again from the resolved options, which a checkpoint's args.json holds."""
    cfg = config(**{name: OTHER[name]})
    options = method(cfg).mmi_loss.options.given()
    assert options == {**DEFAULTS, "gather_distributed": True, name: OTHER[name]}
    resolved = dict(cfg.method_kwargs)
    assert dict(method.add_and_assert_specific_cfg(cfg).method_kwargs) == resolved


@pytest.mark.parametrize("none", [None, "None"])
def test_none_as_solo_learn_writes_it(method, none):
    options = method(config(slice_dim=none, snr=none, ridge=none)).mmi_loss.options
    assert (options.slice_dim, options.snr, options.ridge) == (None, None, None)


def test_keys_of_another_method_are_ignored_with_a_warning(method):
    with pytest.warns(UserWarning, match=r"ignores .* lamb=0.0051, scale_loss=0.1"):
        method(config(lamb=0.0051, scale_loss=0.1))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"slicedim": 64}, "does not know method_kwargs slicedim; it takes .*slice_dim"),
        ({"proj_hidden_dim": "absent"}, "method_kwargs.proj_hidden_dim is missing"),
        ({"objective": "contents"}, "objective='contents'"),
        ({"process_group": None}, "does not know method_kwargs process_group"),
        ({"snr": 16, "ridge": 0.1}, "give only one of them"),
    ],
)
def test_mistakes_are_named(method, kwargs, message):
    with pytest.raises(ValueError, match=message):
        method(config(**kwargs))


def test_every_key_of_solo_learns_configurations_is_known(method, checkout):
    from mmi_loss.integrations.solo_learn.method import FOREIGN, OPTIONS, PROJECTOR

    used = set()
    for path in (checkout / "scripts" / "pretrain").rglob("*.y*ml"):
        section = re.search(r"^method_kwargs:\n((?:  .*\n)*)", path.read_text(), re.MULTILINE)
        used |= set(re.findall(r"^  (\w+):", section.group(1), re.MULTILINE)) if section else set()
    assert "scale_loss" in used
    assert used - set(PROJECTOR) <= FOREIGN
    assert not FOREIGN & {*OPTIONS, *PROJECTOR}
