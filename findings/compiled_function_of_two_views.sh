#!/usr/bin/env bash
# torch.compile drops the first argument of an autograd.Function whose forward takes *views, where nothing needs a
# gradient (torch 2.14.1, CPU, backend="eager"; 2.6.0 too).
#
# A loss of V views is naturally `forward(ctx, *views)`. Guess: compiled, its value is that of eager mode, or an error.
# Seen: under no_grad, or if no input requires a gradient, and if there are exactly as many arguments as the signature
# has parameters (two views; or `forward(ctx, scale, *views)` with three arguments), the call becomes forward(*args)
# without ctx: the first view stands in for ctx, the mean of (a, b) is b. No error, no warning: a validation loss is
# another number than eager's. One or three views are right, and so is `forward(ctx, a, b)`. Unpacking one *arguments of
# which there are always more than two avoids it. Expected output:
#   1 views: right
#   2 views: [10.0, 20.0] in place of [5.5, 11.0]
#   3 views: right
#   2 views, one requires a gradient: right
#   scale and 2 views: [10.0, 40.0] in place of [13.0, 26.0]
#   2 named views: right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'numpy==2.4.0' 'setuptools==80.9.0'
"$folder/venv/bin/python" -W ignore - >"$folder/seen" <<'PYTHON'
import torch


class Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *views):
        ctx.views = len(views)
        return torch.stack(views).mean(0)

    @staticmethod
    def backward(ctx, grad):
        return (grad / ctx.views,) * ctx.views


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, *views):
        return scale * views[0] + sum(views[1:])

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


class Named(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        return (a + b) / 2

    @staticmethod
    def backward(ctx, grad):
        return grad / 2, grad / 2


def show(name, function, *arguments):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *values: function.apply(*values), fullgraph=True, backend="eager")
    eager, seen = function.apply(*arguments).tolist(), compiled(*arguments).tolist()
    print(f"{name}: {'right' if seen == eager else f'{seen} in place of {eager}'}")


a, b = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
show("1 views", Mean, a)
show("2 views", Mean, a, b)
show("3 views", Mean, a, b, b)
show("2 views, one requires a gradient", Mean, a, b.clone().requires_grad_())
show("scale and 2 views", Scaled, 3.0, a, b)
show("2 named views", Named, a, b)
PYTHON
cat "$folder/seen"
diff <(sed -n '/^# *Expected output\|Expected output:$/,/^set/{s/^#   //p}' "$0") "$folder/seen" && echo "as stated"
