"""A real solo-learn: the clone that SOLO_LEARN_CHECKOUT names, or an importable ``solo``. Without one, tests skip."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def solo():
    """solo-learn's package, imported. A clone that is named but broken fails the tests."""
    checkout = os.environ.get("SOLO_LEARN_CHECKOUT")
    if checkout:
        sys.path.insert(0, checkout)
    elif importlib.util.find_spec("solo") is None:
        pytest.skip("no solo-learn: SOLO_LEARN_CHECKOUT names no clone of it and `solo` is not importable")
    importlib.import_module("solo.methods")
    return sys.modules["solo"]


@pytest.fixture(scope="session")
def checkout(solo):
    """The clone's root: its scripts are in no package."""
    root = Path(solo.__file__).parent.parent
    if not (root / "main_pretrain.py").exists():
        pytest.skip(f"{root} has no main_pretrain.py: set SOLO_LEARN_CHECKOUT to a clone of solo-learn")
    return root
