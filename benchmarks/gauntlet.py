"""What a training run can throw at a loss, thrown at ours and at its rivals.

Every verdict is computed: a loss is measured against its own definition, the same loss (ours: the plain-torch
reference) in float64 on the same numbers.

- ``right``: loss and gradient are those of the definition, to a few roundings of the coarsest dtype involved; or the
  input is not finite, and both loss and gradient show it, where a GradScaler looks.
- ``wrong by X``: finite but off by the relative error X, the larger one of loss and gradient.
- ``nan``: not finite though the input is; at least it shows in loss and gradient.
- ``silent``: a finite loss or gradient where there is no right one, or only one of the two shows that it is not finite.
- ``refuses:`` an error where there is no right number (for N = 1: where the definition has none).
- ``fails:`` an error where there is one.

All runs on the CPU. Its autocast leaves more operations in half precision than that of CUDA does (``exp``, ``pow`` and
``norm`` are float32 there), so that rivals may do better under autocast on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightly.loss
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from benchmarks import environment
from benchmarks.losses import solo_learn as solo_learn_functions
from mmi_loss import MMILoss

N, DIM = 64, 192
"""A batch, and a projector wide enough for the default to take a slice of it."""
RIGHT, REFUSED, NAN, FAILED, WRONG, SILENT = VERDICTS = ("right", "refuses", "nan", "fails", "wrong", "silent")
"""From the best to the worst."""
NUMBER, NOT_FINITE, NOTHING = "number", "not finite", "nothing"
"""What is to be seen of an input: the definition's number; that it is not finite; nothing, for it is no batch."""
TOLERANCE = 1e-3
"""Of a relative error, at least: ten thousand roundings of float32."""
ROUNDINGS = 4
"""Of the coarsest dtype among the views and what is returned."""
HEALTHY = 0.1
"""Errors are relative to at least this share of what views in good health have: an exact gradient may be 0."""

Criterion = Callable[[Tensor, Tensor], Tensor]
Views = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Contestant:
    """A loss: what makes it, and what makes its definition (by default the same, to be called in float64)."""

    name: str
    library: str
    make: Callable[[], Criterion]
    make_definition: Callable[[], Criterion] | None = None

    def definition(self) -> Criterion:
        """The loss to be called in float64."""
        return (self.make_definition or self.make)()


@dataclass(frozen=True)
class Outcome:
    """What came out of a loss: its value and its gradients, or the error it raised."""

    loss: Tensor | None = None
    grads: Sequence[Tensor] = ()
    error: str = ""

    @property
    def loss_is_finite(self) -> bool:
        """Whether the value is."""
        return self.loss is not None and bool(self.loss.isfinite().all())

    @property
    def grads_are_finite(self) -> bool:
        """Whether all are; gradients of empty batches tell nothing and follow the loss."""
        if not any(grad.numel() for grad in self.grads):
            return self.loss_is_finite
        return all(bool(grad.isfinite().all()) for grad in self.grads)


@dataclass(frozen=True)
class Verdict:
    """The judgement: its kind, the relative errors behind it, and the text of an error."""

    kind: str
    loss_error: float = math.nan
    grad_error: float = math.nan
    text: str = ""

    def __str__(self) -> str:
        if self.kind == WRONG:
            return f"wrong by {max(self.loss_error, self.grad_error):.2g}"
        return f"{self.kind}: {self.text}" if self.text else self.kind


Run = Callable[[Criterion, Views], Outcome]


@dataclass(frozen=True)
class Case:
    """One abuse: the inputs, and how the loss is run on them (default: forward and backward).

    Several ``inputs`` are tried one after the other, and the worst verdict counts.
    """

    name: str
    inputs: Callable[[], Iterator[Views]]
    run: Run = field(default_factory=lambda: forward_backward)
    wanted: str = NUMBER


# Running


def forward_backward(criterion: Criterion, views: Views) -> Outcome:
    """The plain use."""
    leaves = [z.detach().clone().requires_grad_() for z in views]
    loss = criterion(*leaves)
    loss.backward()
    return Outcome(loss.detach(), [_grad(z) for z in leaves])


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _attempt(run: Run, make: Callable[[], Criterion], views: Views) -> Outcome:
    try:
        return run(make(), views)
    except Exception as error:  # whatever it is, it is the loss's answer
        message = " ".join(str(error).split())
        message = re.sub(r"(/[^\s/:'\"]+)+/", "", message)  # no folder of this machine
        return Outcome(error=_short(f"{type(error).__name__}: {message}", 200))


@contextlib.contextmanager
def _double() -> Iterator[None]:
    """Buffers and constants that a definition makes are float64 too."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def judge(case: Case, contestant: Contestant) -> Verdict:
    """The worst verdict over the case's inputs."""
    verdicts = [_judge_one(case, contestant, views) for views in case.inputs()]
    return max(verdicts, key=lambda v: (VERDICTS.index(v.kind), max(_or(v.loss_error, 0), _or(v.grad_error, 0))))


def _or(value: float, default: float) -> float:
    return default if math.isnan(value) else value


def _judge_one(case: Case, contestant: Contestant, views: Views) -> Verdict:
    outcome = _attempt(case.run, contestant.make, views)
    if case.wanted != NUMBER:
        return verdict(outcome, None, case.wanted)
    with _double():
        exact = _attempt(_exactly(case.run), contestant.definition, _as_double(views))
    if exact.error or not (exact.loss_is_finite and exact.grads_are_finite):
        return verdict(outcome, None, NOTHING)
    with _double():
        healthy = healthy_views(max(len(views[0]), 8), views[0].shape[-1])
        usual = _attempt(forward_backward, contestant.definition, _as_double(healthy))
    size = _root_mean_square(views) / _root_mean_square(healthy) or 1.0
    usual = Outcome(usual.loss, [grad / size for grad in usual.grads], usual.error)
    return verdict(outcome, exact, NUMBER, usual, max(torch.finfo(z.dtype).eps for z in views))


def _as_double(views: Views) -> Views:
    return views[0].double(), views[1].double()


def _root_mean_square(views: Views) -> float:
    return torch.cat([z.double().flatten() for z in views]).square().mean().sqrt().item()


def _exactly(run: Run) -> Run:
    """How the definition is run: some abuses are of the run, and the definition is spared them."""
    return getattr(run, "exactly", run)


def verdict(
    outcome: Outcome, exact: Outcome | None, wanted: str = NUMBER, usual: Outcome | None = None, eps: float = 0.0
) -> Verdict:
    """The judgement of an outcome against the exact one (None: there is no right number).

    ``usual`` is the exact outcome of views in good health and of the same size, ``eps`` that of the views' dtype.
    """
    if outcome.error:
        return Verdict(FAILED if exact else REFUSED, text=outcome.error)
    is_finite = outcome.loss_is_finite, outcome.grads_are_finite
    if exact is None:
        if any(is_finite):
            return Verdict(SILENT)
        return Verdict(RIGHT if wanted == NOT_FINITE else NAN)
    if not all(is_finite):
        return Verdict(SILENT if any(is_finite) else NAN)
    loss_error, is_loss_right = _compare([outcome.loss], [exact.loss], [usual.loss] if usual else None, eps)
    grad_error, are_grads_right = _compare(outcome.grads, exact.grads, usual.grads if usual else None, eps)
    return Verdict(RIGHT if is_loss_right and are_grads_right else WRONG, loss_error, grad_error)


def _compare(
    values: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    usual: Sequence[Tensor | None] | None,
    eps: float,
) -> tuple[float, bool]:
    """The largest relative error, and whether none exceeds what the dtype leaves unavoidable."""
    worst, is_right = 0.0, True
    for value, target, size in zip(values, exact, usual or [None] * len(values), strict=True):
        if value is None or target is None:
            continue
        scale = target.double().norm().item()
        if size is not None and size.isfinite().all():
            scale = max(scale, HEALTHY * size.double().norm().item())
        scale = scale or 1.0
        error = (value.double() - target.double()).norm().item() / scale
        # The exact gradient may be too small for half precision: nobody can return it.
        unavoidable = (target.to(value.dtype).double() - target.double()).norm().item() / scale
        allowed = max(TOLERANCE, ROUNDINGS * max(eps, torch.finfo(value.dtype).eps)) + ROUNDINGS * unavoidable
        worst, is_right = max(worst, error), is_right and error <= allowed
    return worst, is_right


# Inputs


def healthy_views(n: int = N, dim: int = DIM) -> Views:
    """Correlated views of unit scale, float32."""
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(n, dim, generator=generator)
    view_a, view_b = (content + 0.5 * torch.randn(n, dim, generator=generator) for _ in range(2))
    return view_a, view_b


def _once(make: Callable[[], Sequence[Tensor]]) -> Callable[[], Iterator[Views]]:
    def inputs() -> Iterator[Views]:
        view_a, view_b = make()
        yield view_a, view_b

    return inputs


def _scaled(dtype: torch.dtype, scale: float) -> Callable[[], Iterator[Views]]:
    return _once(lambda: [(z / 2 * scale).to(dtype) for z in healthy_views()])


def _in_both(change: Callable[[Tensor], Tensor]) -> Callable[[], Iterator[Views]]:
    return _once(lambda: [change(z.clone()) for z in healthy_views()])


def _dead(z: Tensor) -> Tensor:
    z[:, 3] = 7.1
    return z


def _duplicated(z: Tensor) -> Tensor:
    z[len(z) // 2 :] = z[: len(z) // 2]
    return z


def _rank_one(z: Tensor) -> Tensor:
    return z[:, :1] * torch.linspace(0.5, 2, z.shape[1])


def _with(value: float, features: Sequence[int] = range(0, DIM, 12)) -> Callable[[], Iterator[Views]]:
    """One element of the second view, in every one of some features in turn: a slice takes some and not others."""

    def inputs() -> Iterator[Views]:
        for feature in features:
            view_a, view_b = healthy_views()
            view_b[5, feature] = value
            yield view_a, view_b

    return inputs


def _outlier(z: Tensor) -> Tensor:
    z[5, 7] = 1e6
    return z


def _mixed(*dtypes: torch.dtype) -> Callable[[], Iterator[Views]]:
    return _once(lambda: [z.to(dtype) for z, dtype in zip(healthy_views(), dtypes, strict=True)])


# Abuses of the run


def _spares_the_definition(run: Run, exactly: Run = forward_backward) -> Run:
    """The definition in float64 is not run that way: under autocast, scaled, compiled."""
    run.exactly = exactly  # type: ignore[attr-defined]
    return run


def _under_autocast(dtype: torch.dtype) -> Run:
    def run(criterion: Criterion, views: Views) -> Outcome:
        leaves = [z.detach().clone().requires_grad_() for z in views]
        with torch.autocast("cpu", dtype=dtype):
            loss = criterion(*leaves)
        loss.backward()
        return Outcome(loss.detach(), [_grad(z) for z in leaves])

    return _spares_the_definition(run)


def _loss_scaled(scale: float) -> Run:
    def run(criterion: Criterion, views: Views) -> Outcome:
        leaves = [z.detach().clone().requires_grad_() for z in views]
        loss = criterion(*leaves)
        (loss * scale).backward()
        return Outcome(loss.detach(), [_grad(z) / scale for z in leaves])

    return _spares_the_definition(run)


def _grad_scaler(criterion: Criterion, views: Views) -> Outcome:
    """The GradScaler from 2^24, float32 weights, float16 embeddings: it halves its scale until it sees no infinity.

    The gradient is the change of the weights by one step of gradient descent.
    """
    leaves = [nn.Parameter(z.detach().half().float()) for z in views]
    starts = [leaf.detach().clone() for leaf in leaves]
    optimizer = torch.optim.SGD(leaves, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=10**6)
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            # A copy: the first step's random slice, whichever attempt succeeds.
            loss = copy.deepcopy(criterion)(*(leaf.half() for leaf in leaves))
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grads = [_grad(leaf).clone() for leaf in leaves]
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() == scale:  # accepted
            moved = [start - leaf.detach() for start, leaf in zip(starts, leaves, strict=True)]
            # The weights' own rounding is not the loss's: the gradient it accepted, if the weights followed it.
            followed = all(torch.allclose(m, g, rtol=1e-2, atol=1e-6) for m, g in zip(moved, grads, strict=True))
            return Outcome(loss.detach(), [g.half() for g in grads] if followed else moved)
    raise RuntimeError("the GradScaler never accepted a step")


def _accumulate(criterion: Criterion, views: Views) -> Outcome:
    """Two micro-batches, their losses halved, one gradient."""
    leaves = [z.detach().clone().requires_grad_() for z in views]
    total = torch.zeros(())
    for micro_batch in zip(*(leaf.chunk(2) for leaf in leaves), strict=True):
        loss = criterion(*micro_batch) / 2
        loss.backward()
        total = total + loss.detach()
    return Outcome(total, [_grad(z) for z in leaves])


def _train(criterion: Criterion, leaves: Sequence[Tensor], steps: int) -> Tensor:
    """Gradient descent by a tenth of the weights' norm a step, so that every loss moves them; the last loss."""
    loss = torch.zeros(())
    for _ in range(steps):
        loss = criterion(*leaves)
        for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
            with torch.no_grad():
                leaf.sub_(grad, alpha=0.1 * (leaf.norm() / grad.norm()).item())
    return loss.detach()


def _uninterrupted(criterion: Criterion, views: Views) -> Outcome:
    leaves = [nn.Parameter(z.detach().clone()) for z in views]
    return Outcome(_train(criterion, leaves, 6), [leaf.detach() for leaf in leaves])


def _resumed(criterion: Criterion, views: Views) -> Outcome:
    """Six steps with a checkpoint after three, loaded with ``weights_only`` into a new criterion; the weights' error
    counts as the gradient's.
    """
    fresh = copy.deepcopy(criterion)
    leaves = [nn.Parameter(z.detach().clone()) for z in views]
    _train(criterion, leaves, 3)
    state = criterion.state_dict() if isinstance(criterion, nn.Module) else {}
    file = io.BytesIO()
    torch.save({"criterion": state, "weights": [leaf.detach() for leaf in leaves]}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    if isinstance(fresh, nn.Module):
        fresh.load_state_dict(checkpoint["criterion"])
    leaves = [nn.Parameter(weights) for weights in checkpoint["weights"]]
    return Outcome(_train(fresh, leaves, 3), [leaf.detach() for leaf in leaves])


_resumed = _spares_the_definition(_resumed, _uninterrupted)


def _compiled(fullgraph: bool) -> Run:
    def run(criterion: Criterion, views: Views) -> Outcome:
        torch.compiler.reset()
        return forward_backward(torch.compile(criterion, fullgraph=fullgraph), views)

    return _spares_the_definition(run)


def _deterministic(criterion: Criterion, views: Views) -> Outcome:
    """With deterministic algorithms demanded; the gradient of a second run counts where it differs."""
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (forward_backward(copy.deepcopy(criterion), views) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    is_same = all(torch.equal(a, b) for a, b in zip(first.grads, second.grads, strict=True))
    return first if is_same else Outcome(first.loss, [torch.zeros_like(grad) for grad in first.grads])


def _after_inference_mode(criterion: Criterion, views: Views) -> Outcome:
    """A validation step in inference mode, whose loss counts, and then a step of training."""
    if isinstance(criterion, nn.Module):
        criterion.eval()
    with torch.inference_mode():
        loss = criterion(*views).clone()
    if isinstance(criterion, nn.Module):
        criterion.train()
    return Outcome(loss, forward_backward(criterion, views).grads)


def _trained_in_inference_mode(criterion: Criterion, views: Views) -> Outcome:
    """The same with a criterion that nobody has put in evaluation mode: lightly's have none."""
    with torch.inference_mode():
        criterion(*views)
    return forward_backward(criterion, views)


for _run in (_grad_scaler, _deterministic, _after_inference_mode):
    _spares_the_definition(_run)

# The course


def _plain(criterion: Criterion, views: Views) -> Outcome:
    """Two calls: what a call in inference mode would have been, and the step after it."""
    forward_backward(criterion, views)
    return forward_backward(criterion, views)


_spares_the_definition(_trained_in_inference_mode, _plain)
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
CASES = [
    Case("float32, views in good health", _once(healthy_views)),
    *(
        Case(f"{name}{how}, scale {scale:g}", _scaled(dtype, scale), run)
        for name, dtype in HALF.items()
        for how, run in (("", forward_backward), (" under autocast", _under_autocast(dtype)))
        for scale in (1e-4, 1e-2, 1.0, 1e2, 1e4)
    ),
    Case("one dead feature", _in_both(_dead)),
    Case("every sample twice", _in_both(_duplicated)),
    Case("rank-one embeddings", _in_both(_rank_one)),
    Case("constant embeddings", _in_both(lambda z: torch.full_like(z, 3.1))),
    Case("identical views", _once(lambda: [healthy_views()[0]] * 2)),
    *(Case(f"N = {n}", _once(lambda n=n: healthy_views(n))) for n in (0, 1, 2, 3)),
    Case("N = D", _once(lambda: healthy_views(DIM))),
    Case("N = 2 D", _once(lambda: healthy_views(2 * DIM))),
    Case("an outlier of 1e6", _in_both(_outlier)),
    Case("NaN in one element, whichever feature", _with(math.nan), wanted=NOT_FINITE),
    Case("inf in one element, whichever feature", _with(math.inf), wanted=NOT_FINITE),
    Case("batches of 64 and 32", _once(lambda: [healthy_views()[0], healthy_views()[1][:32]]), wanted=NOTHING),
    Case("batches of 64 and 1", _once(lambda: [healthy_views()[0], healthy_views()[1][:1]]), wanted=NOTHING),
    Case("fp16 and float32 views", _mixed(torch.float16, torch.float32)),
    Case("bf16 and float32 views", _mixed(torch.bfloat16, torch.float32)),
    Case("float32 and float64 views", _mixed(torch.float32, torch.float64)),
    *(Case(f"loss scaled by 2^{p}", _once(healthy_views), _loss_scaled(2.0**p)) for p in (16, 24)),
    Case("GradScaler from 2^24, fp16", _once(healthy_views), _grad_scaler),
    Case("gradient accumulation", _once(healthy_views), _accumulate),
    Case("checkpoint and resume", _once(healthy_views), _resumed),
    Case("torch.compile", _once(healthy_views), _compiled(fullgraph=False)),
    Case("torch.compile(fullgraph=True)", _once(healthy_views), _compiled(fullgraph=True)),
    Case("deterministic algorithms", _once(healthy_views), _deterministic),
    Case("validation in inference mode", _once(healthy_views), _after_inference_mode),
    Case("inference mode, then training", _once(healthy_views), _trained_in_inference_mode),
]


# The contestants


def _ours(name: str, **options: Any) -> Contestant:
    return Contestant(name, "mmi-loss", lambda: MMILoss(**options), lambda: MMILoss(**options, impl="reference"))


def _frossl() -> Criterion:
    criterion = lightly.loss.FroSSLLoss()
    return lambda z_a, z_b: criterion([z_a, z_b])


CONTESTANTS = [
    _ours("MMI (default)"),
    _ours("MMI, all features", slice_dim=None),
    _ours("MMI, coordinates", slice_kind="coordinates"),
    _ours("MMI, joint", objective="joint"),
    _ours("MMI, the paper's", objective="joint", slice_dim=None, logdet="taylor"),
    Contestant("BarlowTwinsLoss", "lightly", lightly.loss.BarlowTwinsLoss),
    Contestant("VICRegLoss", "lightly", lightly.loss.VICRegLoss),
    Contestant("NTXentLoss", "lightly", lightly.loss.NTXentLoss),
    Contestant("FroSSLLoss", "lightly", _frossl),
]


def solo_learn(checkout: Path | None) -> tuple[list[Contestant], str]:
    """The loss functions of a checkout of solo-learn, or none and the reason."""
    if checkout is None:
        return [], "no --solo-learn PATH given"
    if not (checkout / "solo" / "losses").is_dir():
        return [], f"{checkout} has no solo/losses"
    found = solo_learn_functions(checkout, ("barlow", "vicreg", "simclr"))
    functions = {f"{name}_loss_func": function for name, function in found.items()}
    of_batch = functions["simclr_loss_func"]

    def simclr(z_a: Tensor, z_b: Tensor) -> Tensor:
        return of_batch(torch.cat([z_a, z_b]), torch.arange(len(z_a)).repeat(2))

    functions["simclr_loss_func"] = simclr
    return [Contestant(name, "solo-learn", lambda f=f: f) for name, f in functions.items()], ""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gauntlet", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--solo-learn", type=Path, metavar="PATH", help="a checkout of solo-learn")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases whose name holds one of the words")
    parser.add_argument("--losses", nargs="+", metavar="WORD", help="losses whose name holds one of the words")
    parser.add_argument("--out", type=Path, default=environment.RESULTS, help="folder of gauntlet.csv and gauntlet.md")
    parser.add_argument("--report", action="store_true", help="only show the finished rows and write the page")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Run all cases, print and write the table; an error where one of ours is wrong or silent."""
    options, console = parse(arguments), Console()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    path = options.out / "gauntlet.csv"
    reason = "not in these rows" if options.report else measure(path, options, console)
    order = [case.name for case in CASES]
    rows = sorted(environment.read(path), key=lambda row: order.index(row["case"]))
    if not rows:
        raise SystemExit(f"{path} has no finished rows to report")
    console.print(console_table(rows))
    page = path.with_suffix(".md")
    page.write_text(markdown(rows, reason))
    console.print(f"table: {page}")
    bad = [row for row in rows if row["library"] == "mmi-loss" and row["verdict"] not in (RIGHT, REFUSED)]
    if bad:
        raise SystemExit("ours fails: " + "; ".join(f"{row['loss']}, {row['case']}: {row['verdict']}" for row in bad))


def measure(path: Path, options: argparse.Namespace, console: Console) -> str:
    """Append a row for every case and loss that has none of this commit yet; why solo-learn was skipped, or ''."""
    solo, reason = solo_learn(options.solo_learn)
    if reason:
        console.print(f"solo-learn skipped: {reason}")
    contestants = [c for c in (*CONTESTANTS, *solo) if _is_chosen(c.name, options.losses)]
    cases = [case for case in CASES if _is_chosen(case.name, options.only)]
    versions = {"lightly": lightly.__version__, "solo_learn": _commit(options.solo_learn) if solo else ""}
    where = environment.columns()
    rows = [row for row in environment.read(path) if row["commit"].rstrip("+") == where["commit"].rstrip("+")]
    finished = {(row["case"], row["loss"], row["library"]) for row in rows}
    path.unlink(missing_ok=True)
    for row in rows:
        environment.append(path, row)
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=len(cases) * len(contestants))
        for case, contestant in itertools.product(cases, contestants):
            progress.update(bar, description=f"{case.name}: {contestant.name}", advance=1)
            if (case.name, contestant.name, contestant.library) in finished:
                continue
            judged = judge(case, contestant)
            row = {
                "case": case.name,
                "library": contestant.library,
                "loss": contestant.name,
                "verdict": judged.kind,
                "loss_error": _number(judged.loss_error),
                "gradient_error": _number(judged.grad_error),
                "error": judged.text,
                **versions,
                **where,
            }
            environment.append(path, row)
    return reason


def _is_chosen(name: str, words: list[str] | None) -> bool:
    return not words or any(word.lower() in name.lower() for word in words)


def _commit(checkout: Path) -> str:
    return environment.output(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"])


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def _cells(rows: list[dict[str, str]]) -> tuple[list[tuple[str, str]], dict[str, list[str]]]:
    """The losses, and for each case the text of every loss's verdict."""
    losses = list(dict.fromkeys((row["library"], row["loss"]) for row in rows))
    texts: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        judged = Verdict(
            row["verdict"],
            float(row["loss_error"] or "nan"),
            float(row["gradient_error"] or "nan"),
            _short(row["error"]),
        )
        texts.setdefault(row["case"], {})[row["library"], row["loss"]] = str(judged)
    return losses, {case: [by_loss.get(loss, "") for loss in losses] for case, by_loss in texts.items()}


def _short(error: str, length: int = 40) -> str:
    return error if len(error) <= length else error[: length - 3].rstrip() + "..."


STYLES = {RIGHT: "green", REFUSED: "green", NAN: "yellow", FAILED: "yellow", WRONG: "red", SILENT: "bold red"}


def console_table(rows: list[dict[str, str]]) -> Table:
    """Cases by losses, coloured; the errors' texts are in the page."""
    losses, cells = _cells([{**row, "error": ""} for row in rows])
    table = Table(title="each loss against its own definition in float64")
    table.add_column("")
    for library, loss in losses:
        table.add_column(f"{library}\n{loss}")
    for case, texts in cells.items():
        table.add_row(case, *(Text(text, STYLES.get(text.split(" ")[0], "")) for text in texts))
    table.add_section()
    table.add_row("right, or refused with reason", *_totals(rows, losses))
    return table


def _totals(rows: list[dict[str, str]], losses: list[tuple[str, str]]) -> list[str]:
    kinds = {loss: [r["verdict"] for r in rows if (r["library"], r["loss"]) == loss] for loss in losses}
    return [f"{kind.count(RIGHT) + kind.count(REFUSED)} of {len(kind)}" for kind in kinds.values()]


def markdown(rows: list[dict[str, str]], reason: str = "") -> str:
    """The page that the README links."""
    losses, cells = _cells(rows)
    lines = ["# The gauntlet", "", *(__doc__ or "").strip().splitlines(), ""]
    first = rows[0]
    lines.append(
        f"Made by `python -m benchmarks gauntlet` (commit {first['commit']}, torch {first['torch']}, lightly "
        f"{first['lightly']}"
        + (f", solo-learn {first['solo_learn']}" if first["solo_learn"] else f", solo-learn skipped: {reason}")
        + f"); rows with all errors: [gauntlet.csv](gauntlet.csv). N = {N}, D = {DIM} unless the case says otherwise."
    )
    lines += ["", "| | " + " | ".join(f"{library} {loss}" for library, loss in losses) + " |"]
    lines.append("|---" * (len(losses) + 1) + "|")
    for case, texts in cells.items():
        escaped = [text.replace("|", r"\|").replace("<", "&lt;") for text in texts]
        lines.append(f"| {case} | " + " | ".join(f"**{t}**" if t == SILENT else t for t in escaped) + " |")
    lines.append("| right, or refused with reason | " + " | ".join(_totals(rows, losses)) + " |")
    return "\n".join(lines) + "\n"
