"""The doctor names planted faults and those of installed losses, and raises no false alarm."""

import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mmi_loss import MMILoss, doctor
from mmi_loss.doctor.examination import CHECKS
from mmi_loss.doctor.isolation import CannotForkError, isolated

SMALL = {"batch": 32, "dim": 48}
"""Where the numbers of a text do not matter."""


def found(criterion, *only, **options):
    return [(f.severity, f.check, f.text) for f in doctor.check(criterion, only=only, **options).findings]


def mean_square(z_a, z_b):
    """A loss without any fault."""
    return (z_a - z_b).float().square().mean() + z_a.float().square().mean() + z_b.float().square().mean()


def exact_mean_square(z_a, z_b):
    return (z_a - z_b).square().mean() + z_a.square().mean() + z_b.square().mean()


class Halved(torch.autograd.Function):
    """A square whose derivative lacks the 2, in one of its features."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        factor = torch.full_like(x, 2)
        factor[:, 0] = 1
        return grad * factor * x


class Deaf(torch.autograd.Function):
    """A mean that assumes to be the last operation."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return x.mean()

    @staticmethod
    def backward(ctx, grad):
        return torch.full(ctx.shape, 1 / torch.Size(ctx.shape).numel(), dtype=grad.dtype)


def wrong_gradient(z_a, z_b):
    return Halved.apply(z_a - z_b).mean() + Halved.apply(z_a).mean()


def twice_the_gradient(z_a, z_b):
    loss = exact_mean_square(z_a, z_b)
    return 2 * loss - loss.detach()


def partly_detached(z_a, z_b):
    return exact_mean_square(z_a, z_b) * z_a.detach().std()


def one_sided(z_a, z_b):
    return (z_a - z_b.detach()).square().mean()


def deaf(z_a, z_b):
    return Deaf.apply((z_a - z_b).square())


def of_the_order(z_a, z_b):
    return ((z_a - z_b).square().mean(1) * torch.linspace(1, 2, len(z_a)).to(z_a)).mean()


def seeded_by(seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    return lambda z_a, z_b: ((z_a - z_b) @ torch.randn(z_a.shape[1], generator=generator).to(z_a)).square().mean()


def seeded_by_process(z_a, z_b):
    return seeded_by(os.getpid())(z_a, z_b)


def seeded_by_host(z_a, z_b):
    return seeded_by(sum(socket.gethostname().encode()))(z_a, z_b)


def seeded_by_hash(z_a, z_b):
    return seeded_by(hash("slices"))(z_a, z_b)


def seeded_by_time(z_a, z_b):
    return seeded_by(time.time_ns())(z_a, z_b)


def seeded_globally(z_a, z_b):
    return ((z_a - z_b) @ torch.randn(z_a.shape[1]).to(z_a)).square().mean()


def hides_nan(z_a, z_b):
    return mean_square(z_a.nan_to_num(0, 0, 0), z_b.nan_to_num(0, 0, 0))


def hides_nan_in_the_gradient_alone(z_a, z_b):
    return hides_nan(z_a, z_b) + (mean_square(z_a, z_b) * 0).detach()


def centres_its_input(z_a, z_b):
    with torch.no_grad():
        z_a.sub_(z_a.mean(0))
    return mean_square(z_a, z_b)


def summed(z_a, z_b):
    return exact_mean_square(z_a, z_b) * len(z_a)


def overflows(z_a, z_b):
    """Squares in the inputs' own dtype."""
    return exact_mean_square(z_a, z_b)


def divides_by_zero(z_a, z_b):
    return mean_square(z_a, z_b) / z_a.float().var(0).mean()


def one_less(z_a, z_b):
    return mean_square(z_a, z_b) / (len(z_a) - 1)


def wrong_under_autocast(z_a, z_b):
    return mean_square(z_a, z_b) * (1.1 if torch.is_autocast_enabled("cpu") else 1.0)


class ForgetsItsState(nn.Module):
    """Counts its calls, and loses the count in a checkpoint."""

    def __init__(self):
        super().__init__()
        self.calls, self.mean = 0, torch.zeros(3)

    def forward(self, z_a, z_b):
        self.calls += 1
        return mean_square(z_a, z_b) * self.calls


class HoldsItsScale(nn.Module):
    """A mean square over a scale that the gradient takes for a constant; ``error``: and is wrong besides."""

    def __init__(self, error=0.0, scale=None):
        super().__init__()
        self.error, self.scale = error, scale

    def frozen_at(self, z_a, z_b):
        return HoldsItsScale(scale=z_a.square().mean())

    def forward(self, z_a, z_b):
        scale = z_a.detach().square().mean() if self.scale is None else self.scale
        loss = exact_mean_square(z_a, z_b) / scale
        return loss + self.error * (z_a.sum() - z_a.sum().detach())


class HoldsItsScaleAndErrs(HoldsItsScale):
    def __init__(self):
        super().__init__(error=0.1)


class DiesAfterInference(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = None

    def forward(self, z_a, z_b):
        self.mean = z_a.mean(0) if self.mean is None else self.mean
        return (z_a - self.mean * z_b).square().mean()


class PerWorld(nn.Module):
    """A correlation reduced without autograd: as lightly's Barlow Twins up to 1.5.25."""

    def __init__(self, gather_distributed=False):
        super().__init__()
        self.gather_distributed = gather_distributed

    def forward(self, z_a, z_b):
        moment = z_a.T @ z_b / len(z_a)
        if self.gather_distributed and dist.is_initialized():
            moment = moment / dist.get_world_size()
            dist.all_reduce(moment)
        return (moment - torch.eye(len(moment)).to(moment)).square().sum()


def hangs(z_a, z_b):
    time.sleep(60)


def dies(z_a, z_b):
    os.kill(os.getpid(), signal.SIGKILL)


PLANTED = [
    (wrong_gradient, "gradient", "wrong", r"not that of the value: it is .* off the finite difference at \(64, 192\)"),
    (twice_the_gradient, "gradient", "wrong", "it is 2 times the finite difference"),
    (partly_detached, "gradient", "note", "something is detached, which may be meant"),
    (HoldsItsScale, "gradient", "note", r"compared with the finite difference of frozen_at\(\*views\)"),
    (HoldsItsScaleAndErrs, "gradient", "note", "off the finite difference"),
    (one_sided, "gradient", "note", r"view 2 of \(64, 192\) gets no gradient"),
    (deaf, "gradient", "wrong", "does not follow the gradient that arrives"),
    (of_the_order, "order", "wrong", "the value depends on the order of the samples"),
    (seeded_by_process, "ranks, equal", "wrong", "on another host one batch and seed give another"),
    (seeded_by_host, "ranks, equal", "wrong", "on another host one batch and seed give another"),
    (seeded_by_hash, "processes", "wrong", "in another process .* one batch and seed give another"),
    (seeded_by_time, "random state", "wrong", "two calls alike, under one seed"),
    (seeded_globally, "random state", "note", "draws from the global random state: .* under another seed"),
    (hides_nan, "not finite", "wrong", "hides a nan in a view: loss and gradient are finite"),
    (hides_nan_in_the_gradient_alone, "not finite", "wrong", "hides a inf in a view: the gradient alone is finite"),
    (centres_its_input, "plain use", "wrong", "changes the views"),
    (summed, "batch size", "note", r"grows as N\^1.0"),
    (overflows, "half precision", "wrong", "float16, embeddings of size 100: the loss alone is not finite"),
    (wrong_under_autocast, "half precision", "wrong", "bfloat16 under autocast.* off by 0.1"),
    (divides_by_zero, "degenerate", "fragile", "constant embeddings: is not finite"),
    (one_less, "batches", "fragile", "N = 1: is not finite"),
    (mean_square, "batches", "wrong", "1 samples beside 64: a loss of"),  # broadcast
    (ForgetsItsState, "state", "wrong", "resumed from its state_dict"),
    (ForgetsItsState, "state", "note", "plain attributes, .*: mean"),
    (DiesAfterInference, "inference", "fragile", "a call in inference mode breaks the training step"),
    (PerWorld, "ranks, equal", "wrong", r"the gradient is 0.5 \(1 / the number of ranks\) times the right one"),
    (nn.Linear(192, 1), "plain use", "fragile", "cannot be called"),
    (dies, "order", "fragile", r"the check ends the process \(SIGKILL\)"),
]


@pytest.mark.parametrize(
    ("criterion", "check", "severity", "text"), PLANTED, ids=lambda x: getattr(x, "__name__", None)
)
def test_planted_faults_are_named(criterion, check, severity, text):
    findings = found(criterion, check)
    assert any(s == severity and c == check and re.search(text, t) for s, c, t in findings), findings


def test_a_loss_that_hangs_does_not_hang_the_doctor():
    begin = time.perf_counter()
    assert found(hangs, "order", timeout=1) == [("fragile", "order", "the check gives no answer in 1 s")]
    assert time.perf_counter() - begin < 20


def test_what_cannot_be_called_is_examined_no_further():
    report = doctor.check(nn.Linear(192, 1))
    assert {f.check for f in report.findings} == {"plain use"}
    assert not report.passed


def test_mmi_loss_passes_whole():
    """Every check, and the default in its place among the notes: its random slices are a state."""
    report = doctor.check(MMILoss)
    assert report.checks == list(CHECKS)
    assert report.passed, str(report)
    assert {f.check for f in report.findings} == {"gradient", "batch size", "state", "cost"}


QUICK = [name for name in CHECKS if name not in ("compile", "processes", "cost")]


def test_what_frozen_at_holds_constant_is_no_fault():
    assert not any("off the finite difference" in text for _, _, text in found(HoldsItsScale, "gradient"))


def test_other_objectives_and_instances_pass():
    assert doctor.check(MMILoss, only=QUICK, objective="joint", slice_dim=None, **SMALL).passed
    assert doctor.check(MMILoss(slice_kind="gaussian"), "list", only=["gradient", "degenerate"], **SMALL).passed
    assert doctor.check(MMILoss, "multicrop", only=["gradient", "order"], **SMALL).passed


def test_a_faultless_loss_of_means_has_no_findings():
    unlike = {"batches", "invariances", "half precision", "ranks, unequal"}  # it broadcasts and overflows
    assert found(exact_mean_square, *set(QUICK) - unlike, **SMALL) == []


# lightly's, as installed


def lightly_loss(name):
    return getattr(
        pytest.importorskip("lightly.loss", reason="lightly is not installed: pip install mmi-loss[bench]"), name
    )


@pytest.mark.parametrize(
    ("name", "forward", "check", "severity", "text"),
    [
        ("BarlowTwinsLoss", "two", "ranks, equal", "wrong", "not that of all together, as by statistics per rank"),
        ("DCLLoss", "two", "batches", "fragile", "N = 1: is not finite"),
        ("VICRegLoss", "two", "half precision", "fragile", "float16, embeddings of size 100: .* not finite"),
        ("MMCRLoss", "nested", "invariances", "note", "ten times the scale of the embeddings changes the value"),
        ("TiCoLoss", "two", "state", "wrong", "state is lost"),
    ],
)
def test_known_faults_of_lightly_are_found(name, forward, check, severity, text):
    findings = found(lightly_loss(name), check, forward=forward, **SMALL)
    assert any(s == severity and re.search(text, t) for s, _, t in findings), findings


@pytest.mark.parametrize("name", ["VICRegLoss", "NTXentLoss"])
def test_no_false_alarm(name):
    """At equal batches both are exact over ranks; what overflows in half precision is real."""
    checks = [check for check in QUICK if check not in ("half precision", "ranks, unequal")]
    assert doctor.check(lightly_loss(name), only=checks, **SMALL).passed


def test_barlow_twins_of_stable_pretraining_is_found():
    losses = pytest.importorskip("stable_pretraining.losses", reason="stable-pretraining is not installed")
    findings = found(losses.BarlowTwinsLoss, "ranks, equal")
    assert [severity for severity, _, _ in findings] == ["wrong"]
    assert "as by statistics per rank" in findings[0][2]


# The command


def test_command(capsys):
    assert doctor.main(["doctor", "tests.test_doctor:of_the_order", "--only", "order", "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["passed"] is False
    assert [finding["severity"] for finding in shown["findings"]] == ["wrong"]
    assert doctor.main(["doctor", "mmi_loss:MMILoss(snr=32)", "--only", "order", "batch size"]) == 0
    out, err = capsys.readouterr()
    assert "mmi_loss:MMILoss(snr=32): 0 wrong, 0 fragile, 1 note; 2 checks" in out
    assert "order ..." in err
    assert doctor.main(["doctor", "mmi_loss:MMILoss", "--only", "batch size", "--fail-on", "note"]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_such_module:Loss", "No module named"),
        ("mmi_loss:Nothing", "has no attribute 'Nothing'"),
        ("mmi_loss:MMILoss(256)", "options are given by name"),
        ("mmi_loss:MMILoss(snr=open('x'))", "is not MODULE:CRITERION"),
        ("mmi_loss", "is not MODULE:CRITERION"),
    ],
)
def test_what_cannot_be_had_exits_with_2(text, message, capsys):
    assert doctor.main(["doctor", text]) == 2
    assert message in capsys.readouterr().err


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"forward must be one of two, list, multicrop.*got 'three'"):
        doctor.check(mean_square, "three")
    with pytest.raises(ValueError, match="only names nothing, which is none of plain use, gradient"):
        doctor.check(mean_square, only=["nothing"])


def _module(*arguments):
    """``python -m mmi_loss``, without a new interpreter."""
    sys.argv[1:] = arguments
    runpy.run_module("mmi_loss", run_name="__main__")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are listed in /proc")
def test_module_runs_as_a_command_and_leaves_no_child_behind():
    arguments = ("doctor", "tests.test_doctor:hangs", "--only", "order")
    doctors = multiprocessing.get_context("fork").Process(target=_module, args=arguments)
    doctors.start()
    while not (children := Path(f"/proc/{doctors.pid}/task/{doctors.pid}/children").read_text().split()):
        time.sleep(0.1)
    doctors.terminate()
    doctors.join(30)
    assert doctors.exitcode == 128 + signal.SIGTERM
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(child), 0)


def test_without_fork_the_error_names_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    assert doctor.main(["doctor", "tests.test_doctor:mean_square"]) == 2
    assert "cannot fork processes: run the doctor in Linux (WSL, a container)" in capsys.readouterr().err


@pytest.mark.parametrize("check", ["order", "ranks, equal"])
def test_without_autograd_in_the_processes_the_error_names_what_to_do(monkeypatch, check):
    def backward(tensor):
        raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing")

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with pytest.raises(CannotForkError, match=r"use the command mmi-loss doctor, a new process.*Unable to handle"):
        doctor.check(mean_square, only=[check])


def test_the_callers_sigterm_is_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    assert isolated(20, (_handles_sigterm, ())) == [False]
    assert signal.getsignal(signal.SIGTERM) == before


def _handles_sigterm():
    return signal.getsignal(signal.SIGTERM) != signal.SIG_DFL


def test_isolated_answers_of_all():
    assert isolated(20, (max, (1, 2)), (os.getpid, ()))[0] == 2
    (text,) = isolated(20, (lambda: 1 / 0, ()))
    assert text == "fails: ZeroDivisionError: division by zero"
    waits, fails = isolated(60, (time.sleep, (30,)), (int, ("x",)))  # a few seconds for the others
    assert waits == "gives no answer in 60 s"
    assert fails.startswith("fails: ValueError")
    one, other = isolated(20, (time.sleep, (30,)), (os._exit, (3,)))  # all are ended with the first
    assert one == other == "ends the process (3)"
