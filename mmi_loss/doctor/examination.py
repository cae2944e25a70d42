"""What :mod:`mmi_loss.doctor` examines: every check takes a :class:`Patient` and yields severities and texts.

A loss is measured against itself: the gradient against its own finite differences, half precision against its own
float64, several ranks against its own loss of their batches together.
"""

from __future__ import annotations

import contextlib
import copy
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmi_loss.doctor.isolation import isolated, words

WRONG, FRAGILE, NOTE = SEVERITIES = ("wrong", "fragile", "note")
Views = Sequence[Tensor]
Found = Iterator[tuple[str, str]]
CHECKS: dict[str, Callable[[Patient], Found]] = {}
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


EXACT = 1e-6
"""A relative error in float64 that rounding does not make."""
SLOPE = 1e-4
"""A relative error that finite differences do not make."""
TOLERANCE = 1e-2
"""Of a relative error in coarser dtypes; four of their roundings are allowed if that is more."""
HEALTHY = 0.1
"""Errors are relative to at least this share of what views in good health have: an exact gradient may be 0."""


@dataclass(frozen=True)
class Outcome:
    """What came out of a loss: its value and the views' gradients, or the error it raised."""

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
            return self.criterion(**{**self.options, **({"gather_distributed": True} if takes_gather else {})})
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

    def run(
        self,
        views: Views,
        criterion: Any = None,
        seed: int = 0,
        *,
        half: torch.dtype | None = None,
        arriving: float = 1.0,
    ) -> Outcome:
        """Forward, under autocast to ``half``, and backward from the gradient ``arriving``."""
        leaves = [z.detach().clone().requires_grad_() for z in views]
        try:
            with torch.autocast("cpu", half) if half else contextlib.nullcontext():
                loss = self.value(leaves, criterion, seed)
            (arriving * loss).backward()
        except Exception as error:  # whatever it is, it is the loss's answer
            return Outcome(torch.tensor(math.nan), error=words(error))
        return Outcome(loss.detach(), [torch.zeros_like(z) if z.grad is None else z.grad for z in leaves])

    def sound(self, views: Views, criterion: Any = None, seed: int = 0, **options: Any) -> Outcome:
        """The outcome for views that have one.

        Raises:
            RuntimeError: They have none.
        """
        outcome = self.run(views, criterion, seed, **options)
        if outcome.error:
            raise RuntimeError(outcome.error)
        return outcome

    def alone(self) -> float:
        """The value of one batch by this process."""
        return float(self.sound(self.views()).loss)


def _check(name: str) -> Callable[[Callable[[Patient], Found]], Callable[[Patient], Found]]:
    def register(function: Callable[[Patient], Found]) -> Callable[[Patient], Found]:
        CHECKS[name] = function
        return function

    return register


@_check("plain use")
def _plain_use(p: Patient) -> Found:
    for n, dtype in ((p.batch, torch.float32), (p.batch, torch.float64), (2 * p.dim, torch.float64)):
        shape, views = f"({n}, {p.dim}) views of {_name(dtype)}", p.views(n, dtype=dtype)
        outcome, before = p.run(views), [z.clone() for z in views]
        if outcome.error:
            yield FRAGILE, f"cannot be called with {shape}: {outcome.error}"
            continue
        if not all(outcome.finite):
            yield FRAGILE, f"not finite for {shape}"
        with torch.no_grad():
            p.value(views)
        if not all(map(torch.equal, views, before)):
            yield WRONG, "changes the views it is given"


@_check("gradient")
def _gradient(p: Patient) -> Found:
    for n in (p.batch, 2 * p.dim):
        views, shape = p.views(n), f"({n}, {p.dim})"
        outcome = p.sound(views)
        moved = [i for i, g in enumerate(outcome.grads) if bool((g != 0).any())]
        for i in set(range(len(views))) - set(moved):
            yield NOTE, f"view {i + 1} of {shape} gets no gradient: a target"
        if not moved:
            continue
        each = [[i] for i in moved] if n == p.batch else []
        found = [_disagreement(p, views, outcome.grads, chosen) for chosen in (moved, *each)]
        if (off := max(error for error, _ in found)) > SLOPE:
            ratio = found[0][1]
            is_factor = (
                len(found) > 1 and abs(ratio - 1) > 1e-3 and all(abs(r / ratio - 1) < SLOPE / 10 for _, r in found)
            )
            is_wrong = is_factor or _has_backward_by_hand(p, views)
            what = f"it is {ratio:.3g} times" if is_factor else f"it is {off:.2g} (relative) off"
            why = "" if is_wrong else "; something is detached, which may be meant"
            yield WRONG if is_wrong else NOTE, f"not that of the value: {what} the finite difference at {shape}{why}"
        scaled = p.sound(views, arriving=2.0**16)
        if (off := _error(scaled.grads, [2.0**16 * g for g in outcome.grads])) > EXACT:
            yield WRONG, f"does not follow the gradient that arrives at the loss: {off:.2g} (relative) off at {shape}"
        for i in moved[1:]:
            fixed = [z.detach() for z in views]
            p.value([*fixed[:i], fixed[i].requires_grad_(), *fixed[i + 1 :]]).backward()
            if (grad := fixed[i].grad) is None or _error(grad, outcome.grads[i]) > EXACT:
                yield WRONG, f"view {i + 1} of {shape} has another gradient if the other views need none"


@_check("order")
def _order(p: Patient) -> Found:
    views, order = p.views(), torch.randperm(p.batch, generator=torch.Generator().manual_seed(1))
    plain, permuted = p.sound(views), p.sound([z[order] for z in views])
    severity, why = (NOTE, ", under one random state") if _draws(p) else (WRONG, "")
    if (off := _error(permuted.loss, plain.loss)) > EXACT:
        yield severity, f"the value depends on the order of the samples: by {off:.2g} (relative){why}"
    elif (off := _error(permuted.grads, [g[order] for g in plain.grads])) > EXACT:
        yield severity, f"the gradient depends on the order of the samples: by {off:.2g} (relative){why}"


@_check("invariances")
def _invariances(p: Patient) -> Found:
    views, shift = p.views(), torch.linspace(-3, 3, p.dim).double()
    changed = {
        "exchanging the views": views[::-1],
        "a shift of all embeddings": [z + shift for z in views],
        "ten times the scale of the embeddings": [10 * z for z in views],
    }
    plain = p.sound(views).loss
    for what, inputs in changed.items():
        loss = p.sound(inputs).loss
        if _error(loss, plain) > EXACT:
            yield NOTE, f"{what} changes the value from {plain:.5g} to {loss:.5g}"


@_check("half precision")
def _half_precision(p: Patient) -> Found:
    sizes = {f"embeddings of size {s:g}": [s * z for z in p.views()] for s in (0.01, 1.0, 100.0)}
    for dtype in (torch.float16, torch.bfloat16):
        inputs = {name: [z.to(dtype) for z in views] for name, views in sizes.items()}
        yield from _compared(p, inputs, f"{_name(dtype)}, ", refused=NOTE)
        yield from _compared(p, inputs, f"{_name(dtype)} under autocast, ", half=dtype)
    mixed = {}
    for first, second in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
    ):
        dtypes = itertools.cycle((first, second))
        mixed[f"{_name(first)} beside {_name(second)}"] = [z.to(d) for z, d in zip(p.views(), dtypes, strict=False)]
    yield from _compared(p, mixed, refused=NOTE)


@_check("degenerate")
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
    yield from _compared(p, inputs, kinks=True)


@_check("not finite")
def _not_finite(p: Patient) -> Found:
    read = p.sound(p.views(dtype=torch.float32)).grads[-1].abs().sum(0) > 0  # some losses read the first features alone
    for value in (math.nan, math.inf):
        for feature in read.nonzero().flatten().tolist()[:: max(1, p.dim // 16)]:
            views = p.views(dtype=torch.float32)
            views[-1][p.batch // 3, feature] = value
            outcome = p.run(views)
            if not outcome.error and any(outcome.finite):
                what = {(True, True): "loss and gradient are", (True, False): "the loss is"}
                yield WRONG, f"hides a {value} in a view: {what.get(outcome.finite, 'the gradient is')} finite"
                break


@_check("batches")
def _batches(p: Patient) -> Found:
    """Tiny ones, and views of unlike lengths."""
    for n in (0, 1, 2, 3):
        views = p.views(n, dtype=torch.float32)
        outcome = p.run(views)
        if outcome.error:
            if n > 1:
                yield FRAGILE, f"N = {n} is an error: {outcome.error}"
        elif n == 0:
            yield NOTE, f"an empty batch gives a loss of {outcome.loss:.3g}, no error"
        elif not all(outcome.finite):
            yield FRAGILE, f"N = {n}: the loss is {outcome.loss:.3g}" + ", its gradient not finite" * outcome.finite[0]
        else:
            yield from _compared(p, {f"N = {n}": views})
    for n in (p.batch // 2, 1):
        views = p.views(dtype=torch.float32)
        outcome = p.run([*views[:-1], views[-1][:n]])
        if not outcome.error:
            severity = WRONG if any(outcome.finite) else FRAGILE
            yield severity, f"views of {p.batch} and {n} samples give a loss of {outcome.loss:.3g}, no error"


@_check("batch size")
def _batch_size(p: Patient) -> Found:
    small, large = p.sound(p.views()), p.sound(p.views(4 * p.batch))
    # Of N samples with gradients g_i the weights' gradient is their sum: a mean over samples keeps N sum |g_i|^2.
    sizes = [math.sqrt(len(o.grads[0]) * sum(float(g.square().sum()) for g in o.grads)) for o in (small, large)]
    if min(sizes) > 0 and abs(exponent := math.log(sizes[1] / sizes[0], 4)) > 0.45:
        yield NOTE, f"the gradient grows as N^{exponent:.1f}: the learning rate has to follow the batch size"
    halves = [p.sound([z[half] for z in p.views()]).grads for half in (slice(p.batch // 2), slice(p.batch // 2, None))]
    if (off := _error([torch.cat([a, b]) / 2 for a, b in zip(*halves, strict=True)], small.grads)) > EXACT:
        yield NOTE, f"the gradient of two half batches accumulated is {off:.2g} (relative) off that of the whole"


@_check("random state")
def _random_state(p: Patient) -> Found:
    first, again, other = (p.sound(p.views(), seed=seed).loss for seed in (0, 0, 1))
    if not torch.equal(first, again):
        yield WRONG, f"two calls alike, under one seed, give {first:.6g} and {again:.6g}"
    elif not torch.equal(first, other):
        yield NOTE, f"draws from the global random state: under two seeds the value is {first:.5g} and {other:.5g}"
    elif _draws(p):
        yield NOTE, "draws from the global random state"


@_check("state")
def _state(p: Patient) -> Found:
    criterion, views = p.make(), p.views(dtype=torch.float32)
    values = [p.value(p.views(seed=seed, dtype=torch.float32), criterion).detach() for seed in (1, 2, 0)]
    if _error(values[-1], fresh := p.value(views)) > EXACT:
        yield NOTE, f"has a state: the value is {fresh:.5g} on the first call and {values[-1]:.5g} after two others"
    resumed = p.make()
    if isinstance(criterion, nn.Module):
        file = io.BytesIO()
        torch.save(criterion.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        held = {id(t) for t in (*criterion.parameters(), *criterion.buffers())}
        attributes = [(f"{n}.{k}".lstrip("."), v) for n, m in criterion.named_modules() for k, v in vars(m).items()]
        plain = [name for name, value in attributes if isinstance(value, Tensor) and id(value) not in held]
        if plain:
            yield NOTE, f"tensors in plain attributes, which .to() and state_dict leave out: {', '.join(plain)}"
    before, after = (p.value(views, c).detach() for c in (criterion, resumed))
    if _error(after, before) > EXACT:
        yield WRONG, f"resumed from its state_dict the value is {after:.5g}, not {before:.5g}: state is lost"


@_check("inference")
def _inference(p: Patient) -> Found:
    """As of a validation loss, whose criterion nobody puts in evaluation mode."""
    views, criterion = p.views(dtype=torch.float32), p.make()
    with torch.inference_mode():
        p.value(views, criterion)
    after = p.run(views, criterion)
    if after.error:
        yield FRAGILE, f"a call in inference mode breaks the training step after it: {after.error}"


@_check("compile")
def _compile(p: Patient) -> Found:
    views = p.views(dtype=torch.float32)
    usual, compiled = p.sound(views), p.run(views, torch.compile(p.make(), backend="aot_eager", fullgraph=True))
    if compiled.error:
        yield NOTE, f"torch.compile(fullgraph=True) fails: {compiled.error}"
    elif max(_error(compiled.loss, usual.loss), _error(compiled.grads, usual.grads)) > TOLERANCE:
        yield WRONG, "another value or gradient under torch.compile"


@_check("cost")
def _cost(p: Patient) -> Found:
    def seconds(n: int, dim: int) -> float:
        resized, times = replace(p, batch=n, dim=dim), []
        views = resized.views(dtype=torch.float32)
        for _ in range(3):
            start = time.process_time()
            resized.sound(views)
            times.append(time.process_time() - start)
        return min(times)

    narrow, tall = seconds(256, p.dim), seconds(1024, p.dim)
    text = f"forward and backward of (256, {p.dim}) take {1e3 * narrow:.1f} ms on one thread; the cost grows as"
    text += f" N^{math.log(tall / narrow, 4):.1f}"
    with contextlib.suppress(RuntimeError):  # made for one width
        text += f" and D^{math.log(seconds(256, 8 * p.dim) / seconds(256, 2 * p.dim), 4):.1f}"
    yield NOTE, text


# Checks that start processes themselves, and never call the criterion in their own.


@_check("processes")
def _processes(p: Patient) -> Found:
    """In a new interpreter, whose ``hash`` has another seed; only what pickles can be sent there."""
    code = "import pickle, sys; p = pickle.load(sys.stdin.buffer); print(p.alone())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    with contextlib.suppress(Exception):  # a local class, or one of __main__
        command, sent = [sys.executable, "-c", code], pickle.dumps(p)
        done = subprocess.run(command, input=sent, capture_output=True, env=environment, timeout=4 * p.timeout)
        there, (here,) = float(done.stdout.split()[-1]), isolated(p.timeout, (p.alone, ()))
        if abs(here - there) > EXACT * abs(here):
            yield WRONG, f"in another process the same batch and seed give {there:.6g}, not {here:.6g}"


@_check("ranks, equal")
def _ranks_equal(p: Patient) -> Found:
    yield from _over_ranks(p, [p.batch] * p.ranks)


@_check("ranks, unequal")
def _ranks_unequal(p: Patient) -> Found:
    yield from _over_ranks(p, [*[p.batch] * (p.ranks - 1), p.batch // 2])


ORCHESTRATED = ("processes", "ranks, equal", "ranks, unequal")


def _over_ranks(p: Patient, sizes: list[int]) -> Found:
    """What DDP's averaging makes of the ranks' gradients, against the gradient of the concatenated batch."""
    with tempfile.TemporaryDirectory() as folder:
        answers = isolated(2 * p.timeout, *((_rank, (p, sizes, rank, folder)) for rank in range(len(sizes))))
    where = f"batches of {', '.join(map(str, sizes))} on {len(sizes)} ranks"
    if errors := {answer for answer in answers if isinstance(answer, str)}:
        first = {
            error for error in errors if not error.startswith("gives no answer")
        } or errors  # others may wait for it
        yield FRAGILE, f"{where}: {'; '.join(sorted(first))}"
        return
    alone = [answer["alone"] for answer in answers]
    if max(alone) - min(alone) > EXACT * abs(alone[0]):
        yield (
            WRONG,
            f"in another process or on another host the same batch and seed give {alone[1]:.6g}, not {alone[0]:.6g}",
        )
        return
    averaged, exact, local = (torch.tensor([x for a in answers for x in a["other"][i]]) for i in range(3))
    if _error(averaged, local) < EXACT:
        if (off := _error(averaged, exact)) > EXACT:
            yield (
                NOTE,
                f"{where}: each loss is of the rank's own batch, the gradient {off:.2g} off that of all together",
            )
        return
    if "same" in answers[0]:  # with one batch on all ranks no statistics differ: what is left is a factor
        of_same, exact_of_same, _ = (torch.tensor([x for a in answers for x in a["same"][i]]) for i in range(3))
        factor = float(of_same @ exact_of_same / exact_of_same.square().sum())
        if abs(factor - 1) > EXACT and _error(of_same / factor, exact_of_same) < EXACT:
            inverse = " (1 / the number of ranks)" if abs(factor * len(sizes) - 1) < EXACT else ""
            yield WRONG, f"{where}: after DDP's averaging the gradient is {factor:.3g}{inverse} times the right one"
            averaged = averaged / factor
    if (off := _error(averaged, exact)) > EXACT:
        yield (
            WRONG,
            f"{where}: the gradient is {off:.2g} (relative) off that of all together, as by statistics per rank",
        )
    elif (off := abs(sum(a["loss"] for a in answers) / len(sizes) / alone[0] - 1)) > EXACT:
        yield NOTE, f"{where}: the mean of the ranks' values is {off:.2g} (relative) off the value of all together"


def _rank(p: Patient, sizes: list[int], rank: int, folder: str) -> dict[str, Any] | str:
    """One rank: averaged, exact and local gradients of its rows, of other data on every rank and of the same."""
    if rank:  # another host, for whoever asks Python
        socket.gethostname = platform.node = lambda: f"host-{rank}"
    world, rows = len(sizes), slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    whole, same = p.views(sum(sizes)), p.views()
    cases = {"other": ([z[rows] for z in whole], whole)}
    if len(set(sizes)) == 1:
        cases["same"] = same, [z.repeat(world, 1) for z in same]
    before = {name: (p.sound(own), p.sound(every)) for name, (own, every) in cases.items()}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(sizes)))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    found: dict[str, Any] = {"alone": float(before["other"][1].loss)}
    for name, (own, _) in cases.items():
        outcome, (local, exact) = p.run(own, p.make(gather=True)), before[name]
        if outcome.error:
            return outcome.error
        three = [g / world for g in outcome.grads], [g[rows] for g in exact.grads], [g / world for g in local.grads]
        found[name] = [torch.cat([g.flatten() for g in grads]).tolist() for grads in three]
        found.setdefault("loss", float(outcome.loss))
    dist.barrier()
    return found


# What the checks share


def _compared(
    p: Patient,
    inputs: dict[str, list[Tensor]],
    kind: str = "",
    half: torch.dtype | None = None,
    refused: str = FRAGILE,
    kinks: bool = False,
) -> Found:
    """Each input's loss and gradient against those of the same criterion in float64 on the same numbers.

    Only whether they are finite, if it draws from a global random state: that gives other numbers in float64. Where a
    loss has ``kinks`` rounding may decide on the gradient.
    """
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    draws = _draws(p)
    for name, views in inputs.items():
        exact, outcome = p.run([z.double() for z in views]), p.run(views, half=half)
        if outcome.error:
            verdict = None if exact.error else (refused, "is an error", f": {outcome.error}")
        elif exact.error or not all(exact.finite):
            verdict = None if all(outcome.finite) else (FRAGILE, "is not finite, in float64 neither", "")
        elif outcome.finite != (True, True):
            hidden = {(True, False): "the gradient alone is", (False, True): "the loss alone is"}.get(outcome.finite)
            verdict = (WRONG if hidden else FRAGILE, f"{hidden or 'loss and gradient are'} not finite", "")
        else:
            of_loss, of_gradient = (0.0, 0.0) if draws else _excess(p, views, outcome, exact)
            what = "the loss is off" if of_loss else "the gradient is off"
            severity = WRONG if of_loss or not kinks else NOTE
            off = f" by {of_loss or of_gradient:.2g} (relative to float64)"
            verdict = (severity, what, off) if of_loss or of_gradient else None
        if verdict:
            found.setdefault(verdict[:2], []).append((name, verdict[2]))
    for (severity, text), cases in found.items():
        yield severity, f"{kind}{', '.join(name for name, _ in cases)}: {text}{max(more for _, more in cases)}"


def _excess(p: Patient, views: Views, outcome: Outcome, exact: Outcome) -> tuple[float, float]:
    """The relative errors of loss and gradients, each 0 if it is no more than what the dtype leaves unavoidable."""
    healthy = p.views(max(len(views[0]), 8))
    usual, size = p.run(healthy), float(_norm(views) / _norm(healthy[: len(views)])) or 1.0
    worst, eps = [0.0, 0.0], max(torch.finfo(z.dtype).eps for z in views)
    typical = [usual.loss, *(g / size for g in usual.grads)] if not usual.error else [exact.loss, *exact.grads]
    triples = zip([outcome.loss, *outcome.grads], [exact.loss, *exact.grads], typical, strict=True)
    for i, (value, target, of_healthy) in enumerate(triples):
        scale = max(float(target.norm()), HEALTHY * float(of_healthy.norm())) or 1.0
        # The exact gradient may be too small for half precision: nobody can return it.
        unavoidable = float((target.to(value.dtype).double() - target).norm()) / scale
        error = float((value.double() - target).norm()) / scale
        if error > max(TOLERANCE, 4 * max(eps, torch.finfo(value.dtype).eps)) + 4 * unavoidable:
            worst[min(i, 1)] = max(worst[min(i, 1)], error)
    return worst[0], worst[1]


def _disagreement(p: Patient, views: Views, grads: Views, chosen: Sequence[int]) -> tuple[float, float]:
    """Of gradient and finite difference the relative error and the ratio, moving the chosen views along the gradient
    mixed with a random direction. Losses have kinks: of three directions the best counts.
    """
    found = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(z.shape, generator=generator, dtype=torch.float64) for z in views]
        size, length, reach = (float(_norm([x[i] for i in chosen])) for x in (grads, drawn, views))
        direction = {i: grads[i] / size + drawn[i] / length for i in chosen}
        values, step = [], 1e-6 * reach
        with torch.no_grad():
            for h in (step, -step):
                values.append(float(p.value([z + h * direction.get(i, 0.0) for i, z in enumerate(views)])))
        slope, said = (values[0] - values[1]) / (2 * step), sum(float((grads[i] * direction[i]).sum()) for i in chosen)
        found.append((abs(slope - said) / size, said / slope if slope else math.nan))
        if found[-1][0] < SLOPE:
            break
    return min(found)


def _has_backward_by_hand(p: Patient, views: Views) -> bool:
    """Whether there is a custom autograd.Function: autograd's own gradients are right but for what is detached."""
    todo, seen = [p.value([z.clone().requires_grad_() for z in views]).grad_fn], set()
    while todo:
        node = todo.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return False


def _draws(p: Patient) -> bool:
    """Whether a call draws from a global random state."""
    criterion, views = p.make(), p.views(dtype=torch.float32)
    _seed(0)
    before = _random_states()
    p.value(views, criterion)
    return before != _random_states()


def _random_states() -> list[Any]:
    numpy = sys.modules.get("numpy")
    return [torch.get_rng_state().tolist(), random.getstate(), numpy and str(numpy.random.get_state())]


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


def _norm(tensors: Views) -> Tensor:
    return torch.cat([x.double().flatten() for x in tensors]).norm()


def _error(values: Views | Tensor, exact: Views | Tensor) -> float:
    """The distance of all together, relative to the exact ones."""
    values, exact = ([x] if isinstance(x, Tensor) else x for x in (values, exact))
    return float(_norm([v.double() - e.double() for v, e in zip(values, exact, strict=True)]) / (_norm(exact) or 1.0))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
