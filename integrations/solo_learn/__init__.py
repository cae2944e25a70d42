"""``method=mmi`` in solo-learn, with no edit to solo-learn.

Installed beside a clone of solo-learn (https://github.com/vturrisi/solo-learn, tried with commit 9187ea39, version
1.0.6, lightning 2.1.2, torchmetrics 0.11.4, timm 1.0.31, hydra-core 1.3.8, torch 2.14 and Python 3.11)::

    git clone https://github.com/vturrisi/solo-learn && cd solo-learn
    pip install -r requirements.txt 'setuptools<82'  # torchmetrics 0.11 needs pkg_resources, gone in setuptools 82
    pip install '/path/to/mmi-loss[solo]'  # a clone: the package is on no index

Pretraining, from the clone's root, with a ready configuration or with any of solo-learn's own::

    python main_pretrain.py --config-name mmi_cifar10
    python main_pretrain.py --config-path scripts/pretrain/cifar --config-name mmi_cifar10   # + its wandb/private.yaml
    python main_pretrain.py --config-path scripts/pretrain/cifar --config-name barlow method=mmi

Ready are ``mmi_cifar10``, ``mmi_cifar100``, ``mmi_imagenet100``, ``mmi_imagenet`` and ``mmi_custom`` (a folder of
images). They are solo-learn's ``barlow.yaml`` of that data set with another method: same network, augmentations,
optimiser, schedule. ``method_kwargs`` takes ``proj_hidden_dim`` and ``proj_output_dim`` as there, and all options of
:class:`mmi_loss.MMILoss` but ``process_group`` under their own names, for example ``+method_kwargs.slice_dim=null``. As
solo-learn's own losses do, the method takes its statistics over the batches of all GPUs (``gather_distributed``). What
a borrowed configuration holds for its own method (``lamb``, ``scale_loss``, ``sim_loss_weight``...) is ignored with a
warning; a name that belongs to no method is an error.

Evaluation of a checkpoint. Linear evaluation never looks a method up; the scripts without Hydra do, and are run by a
launcher that registers the method first::

    python main_linear.py --config-path scripts/linear/imagenet-100 --config-name barlow \
        pretrain_method=mmi pretrained_feature_extractor=trained_models/mmi/ID/NAME.ckpt
    python -m mmi_loss.integrations.solo_learn main_knn.py  --pretrained_checkpoint_dir trained_models/mmi/ID ...
    python -m mmi_loss.integrations.solo_learn main_umap.py --pretrained_checkpoint_dir trained_models/mmi/ID ...

Both of these scripts ask for CUDA by name; the launcher keeps those calls on the CPU where there is no CUDA device.
An interrupted pretraining resumes by the same command (``auto_resume``) or by ``resume_from_checkpoint=PATH``: the
loss's step counter is in the checkpoint.

How it works: Hydra asks the plugin ``hydra_plugins.mmi_loss_solo_learn`` where configurations lie; only if the program
has already imported ``solo.methods`` does it call :func:`register` and name the folder ``conf`` beside this file.

solo-learn's release on PyPI, 1.0.2 of 2021, is not supported (it has no configuration files): :func:`register` says so.
"""

from __future__ import annotations

import importlib
from typing import Any

from mmi_loss.integrations import __name__ as _package  # refuses a second copy of this folder

__all__ = ["NAME", "register"]

NAME = "mmi"
"""The method's name: ``method=mmi``."""


def register() -> Any:
    """Add the method to ``solo.methods.METHODS``, once, and return its class.

    Raises:
        ImportError: solo-learn cannot be imported, or is a version without configuration files.
    """
    try:
        methods = importlib.import_module("solo.methods")
    except Exception as error:  # old versions fail in their own ways on recent dependencies
        raise ImportError(_unsupported(f"importing it raised {type(error).__name__}: {error}")) from error
    if not hasattr(methods.BaseMethod, "add_and_assert_specific_cfg"):
        raise ImportError(_unsupported(f"{methods.__file__} is of an older version"))
    if NAME not in methods.METHODS:
        methods.METHODS[NAME] = importlib.import_module(f"{_package}.solo_learn.method").MMI
    return methods.METHODS[NAME]


def _unsupported(reason: str) -> str:
    return (
        f"method=mmi cannot be added to solo-learn: {reason}. It needs the version on GitHub (1.0.6), run from the "
        "root of a clone after `pip install -r requirements.txt 'setuptools<82'`; the release on PyPI, 1.0.2, is not "
        "supported"
    )
