"""The options of the loss: their names, types and defaults, written once, and what they may be."""

from __future__ import annotations

import inspect
import math
import numbers
import typing
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from mmi_loss.objectives import OBJECTIVES, Objective
from mmi_loss.ops.covariance import Cholesky, LogDet
from mmi_loss.ops.series import Series
from mmi_loss.ops.slices import block_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


class OptionTypes(TypedDict, total=False):
    """Name and type of every option; :class:`mmi_loss.MMILoss` says what they mean."""

    objective: str
    slice_dim: int | None
    num_slices: int
    seed: int
    snr: float | None
    ridge: float | None
    logdet: str
    order: int
    beta: float
    gather_distributed: bool
    process_group: ProcessGroup | None
    impl: str
    slice_kind: str


# Evidence: `python -m benchmarks ablate` (benchmarks/results/ablate.csv), 100 steps, D = 512, N = 256. Numbers are
# differences of a score, the mean of kNN and linear accuracy, to the default's, on the latent task / on digits; from
# one seed, with a 95 % interval of .09 on digits, or from two (*) with .06. Slices had 8 mixtures then.
DEFAULT_SNR = 64.0
"""Where neither ``snr`` nor ``ridge`` is given; at most one direction per sample, see
:func:`mmi_loss.functional.noise_floor`. 16, 32, 128 and 256 at N = 256 (two seeds): -.01, .00, .00, .01 / -.01, .01,
.00, -.03; at N = 1024: -.02, -.01, .01, .01 / .01, .01, .01, -.01. 4 and a ridge of 0.01 (12800): -.05, .00 / -.14,
-.10. Smaller batches want one direction per sample: after 300 steps at N = 64, 32 and 128 are -.04 and -.05 on digits;
after 424 at N = 32, the scores of 16, 24, 32 and 64 are .53, .57, .58 and .53 there, on the latent task .87 each.
"""
DEFAULTS: OptionTypes = {
    "objective": "content",
    # Slices of 32, 64, 256 and all 512 features: -.01, .00*, .00*, .00* / -.10, -.03*, +.03*, +.05*. At N = 1024 the
    # last two are +.02 and +.06 on digits, at N = 32 -.01 and .00, on the latent task nothing differs. All features
    # learn faster then; but a slice already learns no worse than other losses do, and a determinant's cost grows with
    # its cube.
    "slice_dim": 128,
    # Four slices, two seeds: .00 / +.03, at N = 32 .00 / -.01, at N = 1024 .00 / +.04, for four times the determinants.
    "num_slices": 1,
    "seed": 0,
    "snr": None,
    "ridge": None,
    "logdet": "cholesky",
    # The paper's. Orders 1 to 6 against the exact loss, first seed: -.03, -.02, -.02, -.01, -.01, .00 / -.14, -.09,
    # -.10, -.07, -.06, -.04: each costs one more product of matrices at most and comes nearer.
    "order": 4,
    # 0.5, 0.75, 1, 1.5 and 1.75 against the exact loss, first seed: -.02, -.02, -.01, .00, .00 / -.13, -.11, -.07,
    # -.04, -.05. 1.5 was better than 1 on both tasks, by .01 / .03*, within the interval; 1 is the largest at which
    # the series is a lower bound for every objective and order.
    "beta": 1.0,
    "gather_distributed": False,
    "process_group": None,
    "impl": "auto",
    "slice_kind": "kronecker",
}
LOGDETS = ("cholesky", "taylor")
SLICE_KINDS = ("kronecker", "gaussian", "coordinates")
IMPLS = ("auto", "eager", "triton", "reference")


class Options:
    """Everything that defines the loss but the data and the step, validated and immutable.

    Attributes are the options, resolved: ``snr`` is None where ``ridge`` is given.

    Raises:
        TypeError: An option is unknown or of another type.
        ValueError: Its value does not fit; the message names the remedy.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    row: Objective
    """The objective's row of the table."""
    log_det: LogDet
    """How log-determinants are taken."""
    block_dim: int
    """Features that a slice leaves together: :func:`mmi_loss.ops.slices.block_of`."""
    gathers: bool
    """Whether statistics are those of several processes, where there are several."""
    fingerprint: int
    """32 bits that differ, but for chance, where two ranks compute other losses."""

    def __init__(self, **options: Unpack[OptionTypes]) -> None:
        unknown = [name for name in options if name not in DEFAULTS]
        if unknown:
            raise TypeError(f"unknown option {unknown[0]!r}; known are {', '.join(DEFAULTS)}")
        values: dict[str, Any] = {**DEFAULTS, **options}
        _validate(values)
        if values["snr"] is None and values["ridge"] is None:
            values["snr"] = DEFAULT_SNR
        vars(self).update(values)
        shared = {name: value for name, value in values.items() if name not in ("gather_distributed", "process_group")}
        vars(self).update(
            row=OBJECTIVES[values["objective"]],
            log_det=Series(values["order"], values["beta"]) if values["logdet"] == "taylor" else Cholesky(),
            block_dim=block_of(values["slice_dim"] or 1, values["slice_kind"]),
            gathers=values["gather_distributed"] or values["process_group"] is not None,
            fingerprint=zlib.crc32(repr(shared).encode()),
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"options are immutable: make a new MMILoss({name}=...) instead")

    def __deepcopy__(self, memo: object) -> Options:
        return self  # a process group cannot be copied, and nothing here changes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and self.given() == other.given()

    __hash__ = None  # type: ignore[assignment]

    def given(self) -> OptionTypes:
        """The options by name, resolved: what makes an equal object."""
        return typing.cast(OptionTypes, {name: getattr(self, name) for name in DEFAULTS})

    def __repr__(self) -> str:
        hidden = {"process_group"} if self.process_group is None else set()
        if self.logdet != "taylor":
            hidden |= {"order", "beta"}
        hidden.add("snr" if self.snr is None else "ridge")
        return ", ".join(f"{name}={value!r}" for name, value in self.given().items() if name not in hidden)


def _validate(values: dict[str, Any]) -> None:
    known: dict[str, Sequence[str]] = {
        "objective": tuple(OBJECTIVES),
        "logdet": LOGDETS,
        "slice_kind": SLICE_KINDS,
        "impl": IMPLS,
    }
    for name, choices in known.items():
        if values[name] not in choices:
            raise ValueError(f"{name}={values[name]!r} is not one of {', '.join(map(repr, choices))}")
    for name in ("seed", "slice_dim", "num_slices", "order"):
        value = values[name]
        if name == "slice_dim" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1 and name != "seed":
            hint = "; slice_dim=None takes all features" if name == "slice_dim" else ""
            raise ValueError(f"{name} must be at least 1, got {value}{hint}")
    if values["slice_dim"] is None and values["num_slices"] != 1:
        raise ValueError(
            f"num_slices={values['num_slices']} has no effect on all features (slice_dim=None): leave it out, or give "
            "the features of a slice, for example slice_dim=128"
        )
    if not isinstance(values["gather_distributed"], bool):
        raise TypeError(f"gather_distributed must be True or False, got {values['gather_distributed']!r}")
    for name in ("snr", "ridge", "beta"):
        value = values[name]
        if isinstance(value, bool) or not (value is None or isinstance(value, numbers.Real)):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if values["beta"] is None or not 0 < values["beta"] < 2:
        raise ValueError(f"beta must lie in (0, 2), where the series of the logarithm converges, got {values['beta']}")
    if values["snr"] is not None and values["ridge"] is not None:
        raise ValueError(
            f"snr={values['snr']} and ridge={values['ridge']} set the same noise floor: give only one of them"
        )
    for name in ("snr", "ridge"):
        value = values[name]
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a positive number, got {value}")
    group = values["process_group"]
    if group is not None and not hasattr(group, "rank"):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup, got {group!r}; a DeviceMesh has one for each "
            "dimension: mesh.get_group('dp')"
        )


Call = TypeVar("Call", bound=Callable[..., Any])


def shows_options(function: Call) -> Call:
    """Lists the options in the signature of a function of ``**options``: for ``help`` and other readers of it."""
    signature = inspect.signature(function)
    fixed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=DEFAULTS.get(name), annotation=annotation)
        for name, annotation in OptionTypes.__annotations__.items()
    ]
    function.__signature__ = signature.replace(parameters=[*fixed, *options])  # type: ignore[attr-defined]
    return function
