"""The options of the loss: their names, types and defaults, written once, and what they may be."""

from __future__ import annotations

import inspect
import math
import numbers
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

from mmi_loss.objectives import OBJECTIVES, Objective
from mmi_loss.ops.covariance import LogDet, cholesky
from mmi_loss.ops.series import Series
from mmi_loss.ops.slices import MIXTURES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


OptionTypes = TypedDict(  # noqa: UP013 - a table of two dozen words is no class of a page
    "OptionTypes",
    {
        "objective": str, "logdet": str, "slice_kind": str, "impl": str,
        "slice_dim": "int | None", "num_slices": int, "seed": int, "snr": "float | None", "ridge": "float | None",
        "order": int, "beta": float, "gather_distributed": bool, "process_group": "ProcessGroup | None",
    },
    total=False,
)  # fmt: skip
"""Name and type of every option; :class:`mmi_loss.MMILoss` says what they mean, docs/defaults.md why the defaults."""
DEFAULTS: OptionTypes = {
    "objective": "content", "logdet": "cholesky", "slice_kind": "kronecker", "impl": "auto",
    "slice_dim": 128, "num_slices": 1, "seed": 0,
    "snr": None, "ridge": None,  # the noise is what differs between views of an image
    "order": 4, "beta": 1.0,  # the paper's order; the largest scale at which every series is a lower bound
    "gather_distributed": False, "process_group": None,
}  # fmt: skip
LOGDETS = ("cholesky", "taylor")
SLICE_KINDS = ("kronecker", "gaussian", "coordinates")
IMPLS = ("auto", "eager", "triton", "reference")


class Options:
    """Everything that defines the loss but the data and the step, validated and immutable: as attributes the options,
    and what follows from them.

    Raises:
        TypeError, ValueError: An option is unknown, or does not fit; the message names the remedy.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    row: Objective  # of the table
    log_det: LogDet  # how log-determinants are taken
    block_dim: int  # features that a slice leaves together
    gathers: bool  # whether statistics are those of several processes, where there are several
    fingerprint: int  # 32 bits that differ, but for chance, where two ranks compute different losses

    def __init__(self, **options: Unpack[OptionTypes]) -> None:
        for name in options:
            if name not in DEFAULTS:
                raise TypeError(f"unknown option {name!r}; known are {', '.join(DEFAULTS)}")
        given: dict[str, Any] = {**DEFAULTS, **options}
        _validate(given)
        given.update({name: float(given[name]) for name in ("snr", "ridge", "beta") if given[name] is not None})
        shared = {name: value for name, value in given.items() if name not in ("gather_distributed", "process_group")}
        self.__dict__.update(
            given,
            row=OBJECTIVES[given["objective"]],
            log_det=Series(given["order"], given["beta"]) if given["logdet"] == "taylor" else cholesky,
            block_dim={"kronecker": max(1, (given["slice_dim"] or 1) // MIXTURES), "gaussian": 1}.get(
                given["slice_kind"], 0
            ),
            gathers=given["gather_distributed"] or given["process_group"] is not None,
            fingerprint=zlib.crc32(repr(shared).encode()),
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"options are immutable: make a new MMILoss({name}=...) instead")

    def __deepcopy__(self, memo: object) -> Options:  # a process group could not be copied
        return self

    def given(self) -> OptionTypes:
        """The options by name: ``Options(**options.given())`` equals them."""
        return cast(OptionTypes, {name: self.__dict__[name] for name in DEFAULTS})

    def __repr__(self) -> str:
        hidden = {name for name in ("snr", "ridge", "process_group") if self.__dict__[name] is None}
        hidden |= set() if self.logdet == "taylor" else {"order", "beta"}
        return ", ".join(f"{name}={value!r}" for name, value in self.given().items() if name not in hidden)


def _validate(given: dict[str, Any]) -> None:
    for name, known in {"objective": OBJECTIVES, "logdet": LOGDETS, "slice_kind": SLICE_KINDS, "impl": IMPLS}.items():
        if given[name] not in list(known):  # a list is not hashable
            raise ValueError(f"{name}={given[name]!r} is not one of {', '.join(map(repr, known))}")
    for name in ("seed", "slice_dim", "num_slices", "order"):
        value = given[name] if name != "slice_dim" or given[name] is not None else 1
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1 and name != "seed":
            hint = "; slice_dim=None takes all features" if name == "slice_dim" else ""
            raise ValueError(f"{name} must be at least 1, got {value}{hint}")
    if given["slice_dim"] is None and given["num_slices"] != 1:
        hint = "leave it out, or give the features of a slice, for example slice_dim=128"
        raise ValueError(f"num_slices={given['num_slices']} has no effect on all features (slice_dim=None): {hint}")
    if not isinstance(given["gather_distributed"], bool):
        raise TypeError(f"gather_distributed must be True or False, got {given['gather_distributed']!r}")
    for name in ("snr", "ridge", "beta"):
        value = given[name]
        if isinstance(value, bool) or not (value is None or isinstance(value, numbers.Real)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if name != "beta" and value is not None and not 0 < float(value) < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value}")
    value = given["beta"]
    if value is None or not 0 < float(value) < 2:
        raise ValueError(f"beta must lie in (0, 2), where the series of the logarithm converges, got {value}")
    snr, ridge, group = given["snr"], given["ridge"], given["process_group"]
    if snr is not None and ridge is not None:
        raise ValueError(f"snr={snr} and ridge={ridge} set the same noise floor: give only one of them")
    if group is not None and not hasattr(group, "rank"):
        hint = "a DeviceMesh has one for each dimension: mesh.get_group('dp')"
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {group!r}; {hint}")


Call = TypeVar("Call", bound=Callable[..., Any])


def shows_options(function: Call) -> Call:
    """Lists the options in the signature of a function of ``**options``: for ``help`` and other readers of it."""
    signature = inspect.signature(function)
    fixed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    kinds = {name: getattr(kind, "__forward_arg__", kind) for name, kind in OptionTypes.__annotations__.items()}
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kinds[name])
        for name, default in DEFAULTS.items()
    ]
    function.__signature__ = signature.replace(parameters=[*fixed, *options])  # type: ignore[attr-defined]
    return function
