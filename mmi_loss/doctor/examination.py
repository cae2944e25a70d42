"""What :mod:`mmi_loss.doctor` examines: the table :data:`CHECKS`; a check yields severities and texts.

A loss is measured against itself: the gradient against its own finite differences, half precision against its own
float64, several ranks against its own loss of their batches together.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import itertools
import math
import os
import pickle
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmi_loss.doctor.isolation import isolated, words

WRONG, FRAGILE, NOTE = SEVERITIES = ("wrong", "fragile", "note")
Views = Sequence[Tensor]
Found = Iterator[tuple[str, str]]

EXACT = 1e-6  # a relative error in float64 that rounding does not make
SLOPE = 1e-4  # a relative error that finite differences do not make
TOLERANCE = 1e-2  # of a relative error in coarser dtypes; four of their roundings are allowed if that is more
HEALTHY = 0.1  # errors are relative to this share of usual views' value and gradient at least: exact ones may be 0
UNCALLABLE = "cannot be called"

FORWARDS: dict[str, tuple[int, Callable[[Any, Views], Any]]] = {
    "two": (2, lambda loss, z: loss(*z)),
    "list": (2, lambda loss, z: loss(list(z))),
    "multicrop": (4, lambda loss, z: loss(local_proj=torch.stack([*z[2:]]), global_proj=torch.stack([*z[:2]]))),
    "nested": (2, lambda loss, z: loss(*(x[:, None] for x in z))),
    "labels": (2, lambda loss, z: loss(torch.cat([*z]), _images(len(z[0])).repeat(len(z)))),
}
"""How many views a criterion is given, and how. ``nested``: (N, 1, D) each; ``labels``: all views under one
another, and the image of each row.
"""


def _images(n: int) -> Tensor:
    """Numbers of the images of a batch, others on every rank."""
    return torch.arange(n) + (1_000_000 * dist.get_rank() if dist.is_initialized() else 0)


@dataclass(frozen=True)
class Outcome:
    """Value of a loss and gradients of its views, or the error it raised."""

    loss: Tensor
    grads: Views = ()
    error: str = ""

    @property
    def finite(self) -> tuple[bool, bool]:
        """Whether loss and gradients are; gradients of empty batches tell nothing and follow the loss."""
        loss = bool(self.loss.isfinite()) and not self.error
        return loss, all(bool(g.isfinite().all()) for g in self.grads) if any(map(torch.numel, self.grads)) else loss


@dataclass(frozen=True)
class Patient:
    """A criterion, or the class of one, and how it is called."""

    criterion: Any
    forward: str = "two"
    batch: int = 64
    dim: int = 192
    ranks: int = 2
    timeout: float = 60.0
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, gather: bool = False) -> Any:
        """A fresh criterion; ``gather`` turns its ``gather_distributed`` on, if it has one."""
        _seed(0)  # its parameters
        if isinstance(self.criterion, type):
            takes_gather = gather and "gather_distributed" in inspect.signature(self.criterion).parameters
            return self.criterion(**self.options | ({"gather_distributed": True} if takes_gather else {}))
        made = copy.deepcopy(self.criterion)
        if gather and getattr(made, "gather_distributed", None) is False:
            made.gather_distributed = True
        return made

    def views(self, n: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Correlated views (N, D) of unit scale."""
        generator, shape = torch.Generator().manual_seed(seed), (self.batch if n is None else n, self.dim)
        content, *noise = torch.randn(FORWARDS[self.forward][0] + 1, *shape, generator=generator).double()
        return [((content + 0.5 * e) / 1.25**0.5).to(dtype) for e in noise]

    def value(self, views: Views, criterion: Any = None, seed: int = 0) -> Tensor:
        """The loss, by a fresh criterion unless one is given; in float64 if all views are, its constants too."""
        is_double, before = all(z.dtype == torch.float64 for z in views), torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if is_double else torch.float32)
        try:
            criterion = self.make() if criterion is None else criterion
            criterion = criterion.double() if is_double and isinstance(criterion, nn.Module) else criterion
            _seed(seed)
            loss = FORWARDS[self.forward][1](criterion, views)
        finally:
            torch.set_default_dtype(before)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"the loss is no scalar tensor but {getattr(loss, 'shape', type(loss).__name__)}")
        return loss.reshape(())

    def frozen(self, views: Views) -> Callable[[Views], Tensor]:
        """The function whose gradient at the views the loss claims to have: the loss itself, or what its ``frozen_at``
        gives, with all fixed there that the gradient takes for a constant.
        """
        criterion = self.make()
        if not hasattr(criterion, "frozen_at"):
            return self.value
        fixed = FORWARDS[self.forward][1](criterion.frozen_at, views)
        return lambda moved: self.value(moved, copy.deepcopy(fixed))

    def run(
        self, views: Views, criterion: Any = None, seed: int = 0, half: torch.dtype | None = None, arriving: float = 1
    ) -> Outcome:
        """Value and gradients, forward under autocast to ``half``, backward from the gradient ``arriving``."""
        leaves = [z.detach().clone().requires_grad_() for z in views]
        try:
            with torch.autocast("cpu", half) if half else contextlib.nullcontext():
                loss = self.value(leaves, criterion, seed)
            (arriving * loss).backward()
        except Exception as error:  # whatever it is, it is the loss's answer
            return Outcome(torch.tensor(math.nan), error=words(error))
        return Outcome(loss.detach(), _grads(leaves))

    def sound(self, views: Views, criterion: Any = None, seed: int = 0, **options: Any) -> Outcome:
        """The outcome for views that have one; of others a RuntimeError."""
        outcome = self.run(views, criterion, seed, **options)
        if outcome.error:
            raise RuntimeError(outcome.error)
        return outcome

    def alone(self) -> float:
        """The value of one batch by this process."""
        return float(self.sound(self.views()).loss)

    def draws(self) -> bool:
        """Whether a call draws from a global random state."""
        criterion, views, numpy = self.make(), self.views(dtype=torch.float32), sys.modules.get("numpy")
        states = []
        for call in (_seed, lambda seed: self.value(views, criterion, seed)):
            call(0)
            states.append([torch.get_rng_state().tolist(), random.getstate(), numpy and str(numpy.random.get_state())])
        return states[0] != states[1]


def _grads(leaves: Views) -> list[Tensor]:
    return [torch.zeros_like(z) if z.grad is None else z.grad for z in leaves]


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


def _together(tensors: Views | Tensor) -> Tensor:
    return torch.cat([x.detach().double().flatten() for x in ([tensors] if isinstance(tensors, Tensor) else tensors)])


def _norm(tensors: Views | Tensor) -> float:
    return float(_together(tensors).norm())


def _difference(values: Views | Tensor, exact: Views | Tensor) -> float:
    """The distance of all together, relative to the exact ones."""
    return float((_together(values) - _together(exact)).norm()) / (_norm(exact) or 1.0)


def _unlike(severity: str, text: str, values: Views | Tensor, exact: Views | Tensor, tolerance: float = EXACT) -> Found:
    """A finding if what should be equal is not: both values, or how far off gradients are."""
    if not (off := _difference(values, exact)) <= tolerance:  # it may be NaN
        is_value = isinstance(values, Tensor) and values.ndim == 0
        yield severity, f"{text}: {f'{values:.6g}, not {exact:.6g}' if is_value else f'{off:.2g} (relative) off'}"


def _first(*founds: Found) -> Found:
    """The findings of the first that has some: those after it would say the same."""
    yield from next(filter(None, map(list, founds)), [])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain_use(p: Patient) -> Found:
    cases = [(p.batch, torch.float32), (p.batch, torch.float64), (2 * p.dim, torch.float64)]
    errors = {}
    for n, dtype in cases:
        views, shape = p.views(n, dtype=dtype), f"({n}, {p.dim}) views of {_name(dtype)}"
        outcome = p.run(views)
        if outcome.error:
            errors[shape] = outcome.error
            continue
        if not all(outcome.finite):
            yield FRAGILE, f"not finite for {shape}"
        with torch.no_grad():
            p.value(views)
        yield from _unlike(WRONG, "changes the views it is given", views, p.views(n, dtype=dtype), 0.0)
    if errors:
        where = "" if len(errors) == len(cases) else f" with {', '.join(errors)}"
        yield FRAGILE, f"{UNCALLABLE}{where}: {next(iter(errors.values()))}"


def _gradient(p: Patient) -> Found:
    for n in (p.batch, 2 * p.dim):
        views, shape = p.views(n), f"({n}, {p.dim})"
        outcome = p.sound(views)
        moved = [i for i, g in enumerate(outcome.grads) if bool((g != 0).any())]
        for i in set(range(len(views))) - set(moved):
            yield NOTE, f"view {i + 1} of {shape} gets no gradient: a target"
        if not moved:
            continue
        value = p.frozen(views)
        if value != p.value and n == p.batch:
            yield NOTE, "something is held constant: it was compared with the finite difference of frozen_at(*views)"
        found = [_against_slope(value, views, outcome.grads, chosen) for chosen in (moved, *([i] for i in moved))]
        if (off := max(error for error, _ in found)) > SLOPE:
            ratio = found[0][1]
            is_factor = abs(ratio - 1) > 1e-3 and all(abs(r / ratio - 1) < SLOPE / 10 for _, r in found)
            is_wrong = is_factor or _has_backward_by_hand(p, views)
            what = f"{ratio:.3g} times" if is_factor else f"{off:.2g} (relative) off"
            severity, why = (WRONG, "") if is_wrong else (NOTE, "; something is detached, which may be meant")
            yield severity, f"not that of the value: it is {what} the finite difference at {shape}{why}"
        scaled, text = p.sound(views, arriving=2.0**16), "does not follow the gradient that arrives at the loss, at"
        yield from _unlike(WRONG, f"{text} {shape}", scaled.grads, [2.0**16 * g for g in outcome.grads])
        for i in moved[1:]:
            alone = [z.clone().requires_grad_(j == i) for j, z in enumerate(views)]
            p.value(alone).backward()
            text = f"view {i + 1} of {shape} has another gradient if the other views need none"
            yield from _unlike(WRONG, text, _grads(alone)[i], outcome.grads[i])


def _against_slope(
    value: Callable[[Views], Tensor], views: Views, grads: Views, chosen: Sequence[int]
) -> tuple[float, float]:
    """Of gradient and finite difference the relative error and the ratio, moving the chosen views along the gradient
    mixed with a random direction. Losses have kinks: of three directions the best counts.
    """
    found = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(z.shape, generator=generator, dtype=torch.float64) for z in views]
        size, length, reach = (_norm([x[i] for i in chosen]) for x in (grads, drawn, views))
        direction = {i: grads[i] / size + drawn[i] / length for i in chosen}
        values, step = [], 1e-6 * reach
        with torch.no_grad():
            for h in (step, -step):
                values.append(float(value([z + h * direction.get(i, 0.0) for i, z in enumerate(views)])))
        slope, said = (values[0] - values[1]) / (2 * step), sum(float((grads[i] * direction[i]).sum()) for i in chosen)
        found.append((abs(slope - said) / size, said / slope if slope else math.nan))
        if found[-1][0] < SLOPE:
            break
    return min(found)


def _has_backward_by_hand(p: Patient, views: Views) -> bool:
    """Whether there is a custom autograd.Function: autograd's own gradients are right but for what is detached."""
    loss = p.value([z.clone().requires_grad_() for z in views])
    todo, seen = [loss.grad_fn], set()
    while todo:
        if (node := todo.pop()) is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in seen)


def _order(p: Patient) -> Found:
    views, order = p.views(), torch.randperm(p.batch, generator=torch.Generator().manual_seed(1))
    plain, permuted = p.sound(views), p.sound([z[order] for z in views])
    severity, why = (NOTE, ", under one random state") if p.draws() else (WRONG, "")
    text = f"depends on the order of the samples{why}"
    yield from _first(
        _unlike(severity, f"the value {text}", permuted.loss, plain.loss),
        _unlike(severity, f"the gradient {text}", permuted.grads, [g[order] for g in plain.grads]),
    )


def _invariances(p: Patient) -> Found:
    views, shift = p.views(), torch.linspace(-3, 3, p.dim).double()
    changed = {
        "exchanging the views": views[::-1],
        "a shift of all embeddings": [z + shift for z in views],
        "ten times the scale of the embeddings": [10 * z for z in views],
    }
    for what, inputs in changed.items():
        yield from _unlike(NOTE, f"{what} changes the value", p.sound(inputs).loss, p.sound(views).loss)


def _half_precision(p: Patient) -> Found:
    views = p.views()
    for dtype in (torch.float16, torch.bfloat16):
        inputs = {f"embeddings of size {size:g}": [(size * z).to(dtype) for z in views] for size in (0.01, 1.0, 100.0)}
        yield from _against_float64(p, inputs, f"{_name(dtype)}, ", error=NOTE)
        yield from _against_float64(p, inputs, f"{_name(dtype)} under autocast, ", half=dtype)
    mixed = {}
    for narrow in (torch.float16, torch.bfloat16, torch.float32):
        dtypes = narrow, torch.float64 if narrow == torch.float32 else torch.float32
        name = " beside ".join(map(_name, dtypes))
        mixed[name] = [z.to(dtype) for z, dtype in zip(views, itertools.cycle(dtypes), strict=False)]
    yield from _against_float64(p, mixed, error=NOTE)


def _degenerate(p: Patient) -> Found:
    views, spot = p.views(dtype=torch.float32), torch.zeros(p.batch, p.dim)
    spot[p.batch // 2, p.dim // 2] = 1e6
    inputs = {
        "embeddings of size 1e-4": [1e-4 * z for z in views],
        "embeddings of size 1e4": [1e4 * z for z in views],
        "a constant feature": [torch.where(torch.arange(p.dim) == 3, 7.1, z) for z in views],
        "constant embeddings": [torch.full_like(z, 3.1) for z in views],
        "every sample twice": [z[torch.arange(len(z)) // 2] for z in views],
        "embeddings on a line": [z[:, :1] * torch.linspace(0.5, 2, p.dim) for z in views],
        "identical views": [views[0]] * len(views),
        "an outlier of 1e6": [z + spot for z in views],
    }
    yield from _against_float64(p, inputs, gradient=NOTE)  # where it has kinks rounding may decide on it


PARTS = {
    (True, True): "loss and gradient are",
    (True, False): "the loss alone is",
    (False, True): "the gradient alone is",
}


def _against_float64(
    p: Patient, inputs: dict[str, list[Tensor]], kind: str = "", half: torch.dtype | None = None, *,
    error: str = FRAGILE, gradient: str = WRONG,
) -> Found:  # fmt: skip
    """Each input's loss and gradient against those of the same criterion in float64 on the same numbers; the severities
    are of an error and of a gradient alone that is off.

    Only whether they are finite, if it draws from a global random state: that gives other numbers in float64.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    draws, healthy = p.draws(), p.run(p.views(max(8, *(len(z[0]) for z in inputs.values()))))
    for name, views in inputs.items():
        exact, outcome = p.run([z.double() for z in views]), p.run(views, half=half)
        severity, what, detail = FRAGILE, "", ""
        if outcome.error:
            severity, what, detail = error, "is an error", f": {outcome.error}"
        elif not all(exact.finite):
            what = "is not finite, in float64 neither" * (not all(outcome.finite))
        elif not all(outcome.finite):
            severity = WRONG if any(outcome.finite) else FRAGILE
            what = f"{PARTS[not outcome.finite[0], not outcome.finite[1]]} not finite"
        elif not draws and any(errors := _excess(views, outcome, exact, healthy)):
            severity, part = (WRONG, "loss") if errors[0] else (gradient, "gradient")
            what, detail = f"the {part} is off", f" by {errors[0] or errors[1]:.2g} (relative to float64)"
        if what:
            found.setdefault((severity, what), {})[name] = detail
    for (severity, what), cases in found.items():
        yield severity, f"{kind}{', '.join(cases)}: {what}{max(cases.values())}"


def _excess(views: Views, outcome: Outcome, exact: Outcome, healthy: Outcome) -> tuple[float, float]:
    """The relative errors of loss and gradients, each 0 if it is no more than what the dtype leaves unavoidable."""
    size = _norm(views) / math.sqrt(sum(map(torch.numel, views))) or 1.0
    usual = exact if healthy.error else Outcome(healthy.loss, [g / size for g in healthy.grads])
    eps, found = max(torch.finfo(z.dtype).eps for z in views), []
    for value, target, typical in zip(*((o.loss, *o.grads) for o in (outcome, exact, usual)), strict=True):
        scale = max(_norm(target), HEALTHY * _norm(typical)) or 1.0
        # The exact gradient may be too small for half precision: nobody can return it.
        unavoidable, error = (_norm(x.double() - target) / scale for x in (target.to(value.dtype), value))
        allowed = max(TOLERANCE, 4 * max(eps, torch.finfo(value.dtype).eps)) + 4 * unavoidable
        found.append(error if error > allowed else 0.0)
    return found[0], max(found[1:])


def _not_finite(p: Patient) -> Found:
    read = p.sound(p.views(dtype=torch.float32)).grads[-1].abs().sum(0) > 0  # some losses read the first features alone
    for value in (math.nan, math.inf):
        for feature in read.nonzero().flatten().tolist()[:: max(1, p.dim // 16)]:
            views = p.views(dtype=torch.float32)
            views[-1][p.batch // 3, feature] = value
            outcome = p.run(views)
            if not outcome.error and any(outcome.finite):
                yield WRONG, f"hides a {value} in a view: {PARTS[outcome.finite]} finite"
                break


def _batches(p: Patient) -> Found:
    views = p.views(dtype=torch.float32)
    tiny = {f"N = {n}": [z[:n] for z in views] for n in (1, 2, 3)}
    if p.run(tiny["N = 1"]).error:
        del tiny["N = 1"]  # the right answer of a loss of variances
    yield from _against_float64(p, tiny)
    odd = {f"{n} samples beside {p.batch}": [*views[:-1], views[-1][:n]] for n in (p.batch // 2, 1)}
    for what, inputs in {"an empty batch": [z[:0] for z in views], **odd}.items():
        outcome = p.run(inputs)
        if not outcome.error:
            severity = NOTE if what not in odd else WRONG if any(outcome.finite) else FRAGILE
            yield severity, f"{what}: a loss of {outcome.loss:.3g}, no error"


def _batch_size(p: Patient) -> Found:
    views = p.views()
    small, large = p.sound(views), p.sound(p.views(4 * p.batch))
    # Of N samples with gradients g_i the weights' gradient is their sum: a mean over samples keeps N sum |g_i|^2.
    sizes = [math.sqrt(len(outcome.grads[0])) * _norm(outcome.grads) for outcome in (small, large)]
    if min(sizes) > 0 and abs(exponent := math.log(sizes[1] / sizes[0], 4)) > 0.45:
        yield NOTE, f"the gradient grows as N^{exponent:.1f}: the learning rate has to follow the batch size"
    halves = [p.sound(half).grads for half in zip(*(z.tensor_split(2) for z in views), strict=True)]
    text = "the gradient of two half batches accumulated is not that of the whole"
    yield from _unlike(NOTE, text, [torch.cat(pair) / 2 for pair in zip(*halves, strict=True)], small.grads)


def _random_state(p: Patient) -> Found:
    first, again, other = (p.sound(p.views(), seed=seed).loss for seed in (0, 0, 1))
    text = f"draws from the global random state: the value is {first:.6g}, under another seed {other:.6g}"
    yield from _first(
        _unlike(WRONG, "two calls alike, under one seed, differ", again, first, 0.0),
        iter([(NOTE, text)] * p.draws()),
    )


def _state(p: Patient) -> Found:
    criterion, resumed, views = p.make(), p.make(), p.views(dtype=torch.float32)
    fresh = p.value(views)
    *_, later = (p.value(p.views(seed=seed, dtype=torch.float32), criterion) for seed in (1, 2, 0))
    yield from _unlike(NOTE, "has a state, the value after two other calls is another", later, fresh)
    if isinstance(criterion, nn.Module):
        torch.save(criterion.state_dict(), file := io.BytesIO())
        resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        held = {id(t) for t in (*criterion.parameters(), *criterion.buffers())}
        attributes = [(f"{n}.{k}".lstrip("."), v) for n, m in criterion.named_modules() for k, v in vars(m).items()]
        if plain := [name for name, value in attributes if isinstance(value, Tensor) and id(value) not in held]:
            yield NOTE, f"tensors in plain attributes, which .to() and state_dict leave out: {', '.join(plain)}"
    before, after = p.value(views, criterion), p.value(views, resumed)
    yield from _unlike(WRONG, "resumed from its state_dict the value is another, state is lost", after, before)


def _inference(p: Patient) -> Found:
    views, criterion = p.views(dtype=torch.float32), p.make()
    with torch.inference_mode():  # a validation loss, whose criterion nobody puts in evaluation mode
        p.value(views, criterion)
    if error := p.run(views, criterion).error:
        yield FRAGILE, f"a call in inference mode breaks the training step after it: {error}"


def _compile(p: Patient) -> Found:
    views = p.views(dtype=torch.float32)
    usual, compiled = p.sound(views), p.run(views, torch.compile(p.make(), backend="aot_eager", fullgraph=True))
    if compiled.error:
        yield NOTE, f"torch.compile(fullgraph=True) fails: {compiled.error}"
        return
    yield from _unlike(WRONG, "the value is another under torch.compile", compiled.loss, usual.loss, TOLERANCE)
    yield from _unlike(WRONG, "the gradient is another under torch.compile", compiled.grads, usual.grads, TOLERANCE)


def _cost(p: Patient) -> Found:
    def seconds(n: int, dim: int) -> float:
        resized = replace(p, batch=n, dim=dim)
        views = resized.views(dtype=torch.float32)
        return min(timeit.repeat(lambda: resized.sound(views), number=1, repeat=3, timer=time.process_time))

    narrow, tall = seconds(256, p.dim), seconds(1024, p.dim)
    text = f"forward and backward of (256, {p.dim}) take {1e3 * narrow:.1f} ms on one thread; the cost grows as"
    text += f" N^{math.log(tall / narrow, 4):.1f}"
    with contextlib.suppress(RuntimeError):  # made for one width
        text += f" and D^{math.log(seconds(256, 8 * p.dim) / seconds(256, 2 * p.dim), 4):.1f}"
    yield NOTE, text


# Checks that start processes themselves, and never call the criterion in their own.


def _processes(p: Patient) -> Found:
    """In a new interpreter, whose ``hash`` has another seed; only what pickles can be sent there."""
    code = "import pickle, sys; p = pickle.load(sys.stdin.buffer); print(p.alone())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    with contextlib.suppress(Exception):  # a local class, or one of __main__
        command, sent = [sys.executable, "-c", code], pickle.dumps(p)
        done = subprocess.run(command, input=sent, capture_output=True, env=environment, timeout=4 * p.timeout)
        yield from _elsewhere(float(done.stdout.split()[-1]), isolated(p.timeout, (p.alone, ()))[0])


def _elsewhere(*values: float) -> Found:
    there, here = torch.tensor(values, dtype=torch.float64)
    return _unlike(WRONG, "in another process or on another host one batch and seed give another value", there, here)


def _ranks(p: Patient, share: int = 1) -> Found:
    """What DDP's averaging makes of the ranks' gradients, against the gradient of the concatenated batch; the last rank
    has a ``share``-th of the others' samples.
    """
    sizes = [p.batch] * (p.ranks - 1) + [p.batch // share]
    with tempfile.TemporaryDirectory() as folder:
        answers = isolated(2 * p.timeout, *((_rank, (p, sizes, rank, folder)) for rank in range(p.ranks)))
    where = f"batches of {', '.join(map(str, sizes))} on {p.ranks} ranks"
    if errors := [answer for answer in answers if isinstance(answer, str)]:
        yield FRAGILE, f"{where}: {min(errors, key=lambda error: error.startswith('gives no answer'))}"  # others wait
        return
    if elsewhere := [found for answer in answers[1:] for found in _elsewhere(answer["alone"], answers[0]["alone"])]:
        yield elsewhere[0]
        return
    (averaged, exact, local), (of_same, exact_of_same, _) = (
        [torch.tensor([x for a in answers for x in a[case][i]], dtype=torch.float64) for i in range(3)]
        for case in ("other", "same")
    )
    if _difference(averaged, local) < EXACT:
        text = f"{where}: each loss is of the rank's own batch, the gradient not that of all together"
        yield from _unlike(NOTE, text, averaged, exact)
        return
    # Where all ranks have the same batch no statistics differ: what is left is a factor.
    factor = float(of_same @ exact_of_same / exact_of_same.square().sum())
    if abs(factor - 1) > EXACT and _difference(of_same / factor, exact_of_same) < EXACT:
        inverse = " (1 / the number of ranks)" if abs(factor * p.ranks - 1) < EXACT else ""
        yield WRONG, f"{where}: after DDP's averaging the gradient is {factor:.3g}{inverse} times the right one"
        averaged = averaged / factor
    mean, value = torch.tensor([[a["loss"], a["alone"]] for a in answers], dtype=torch.float64).mean(0)
    yield from _first(
        _unlike(
            WRONG, f"{where}: the gradient is not that of all together, as by statistics per rank", averaged, exact
        ),
        _unlike(NOTE, f"{where}: the mean of the ranks' values is not the value of all together", mean, value),
    )


def _rank(p: Patient, sizes: list[int], rank: int, folder: str) -> dict[str, Any] | str:
    """One rank: averaged, exact and local gradients of its rows, of other data on every rank and of the same."""
    if rank:  # another host, for whoever asks Python
        socket.gethostname = platform.node = lambda: f"host-{rank}"
    world, first, same, whole = len(sizes), sum(sizes[:rank]), p.views(), p.views(sum(sizes))
    rows = slice(first, first + sizes[rank])
    cases = {
        "same": (same, [z.repeat(world, 1) for z in same], slice(p.batch)),
        "other": ([z[rows] for z in whole], whole, rows),
    }
    alone = {name: (p.sound(own), p.sound(every)) for name, (own, every, _) in cases.items()}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    found: dict[str, Any] = {"alone": float(alone["other"][1].loss)}
    for name, (own, _, chosen) in cases.items():
        outcome, (local, exact) = p.run(own, p.make(gather=True)), alone[name]
        if outcome.error:
            return outcome.error
        three = [g / world for g in outcome.grads], [g[chosen] for g in exact.grads], [g / world for g in local.grads]
        found[name] = [torch.cat([g.flatten() for g in grads]).tolist() for grads in three]
        found["loss"] = float(outcome.loss)
    dist.barrier()
    return found


class Check(NamedTuple):
    """What is examined, in words what its findings are, and whether it starts processes itself."""

    examine: Callable[[Patient], Found]
    severities: str
    forks: bool = False


CHECKS = {
    "plain use": Check(_plain_use, "fragile: an error or NaN on usual views; wrong: changes its input"),
    "gradient": Check(_gradient, "wrong: not that of the value; note: a part of it detached, a view without"),
    "order": Check(_order, "wrong: depends on the order of the samples; note: by its random state"),
    "invariances": Check(_invariances, "note: exchange of views, shift or scale change the value"),
    "half precision": Check(_half_precision, "wrong: off float64, half hidden overflow; fragile: NaN; note: refused"),
    "degenerate": Check(_degenerate, "wrong: off float64; fragile: error or NaN of collapse, outliers, extreme scales"),
    "not finite": Check(_not_finite, "wrong: hides NaN or infinity in a view"),
    "batches": Check(_batches, "wrong: broadcasts unlike views, N = 1, 2 or 3 off; fragile: error or NaN there"),
    "batch size": Check(_batch_size, "note: the gradient depends on it"),
    "random state": Check(_random_state, "wrong: differs under one seed; note: draws from the global random state"),
    "state": Check(_state, "wrong: lost in a checkpoint; note: has one"),
    "inference": Check(_inference, "fragile: a validation step breaks the training step after it"),
    "compile": Check(_compile, "wrong: differs under torch.compile; note: is an error there"),
    "cost": Check(_cost, "note: milliseconds, exponents of N and D"),
    "processes": Check(_processes, "wrong: another value in a new interpreter", forks=True),
    "ranks, equal": Check(_ranks, "wrong: not the gradient of all batches together; note: each rank's own", forks=True),
    "ranks, unequal": Check(functools.partial(_ranks, share=2), "as with equal batches", forks=True),
}
