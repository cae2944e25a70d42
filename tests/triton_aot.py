"""Compiles every kernel for NVIDIA GPUs without having one: ``python -m tests.triton_aot [PROBLEMS...]``.

The launchers run on meta tensors; each launch is compiled to machine code, for every one of TARGETS, with the signature
and the hints it would have on the device. Prints a JSON object a line: kernel, registers, stack and shared memory.
"""

import json
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mmi_loss.ops.triton import operators

TARGETS = [GPUTarget("cuda", arch, 32) for arch in (90, 100)]
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
FLOAT32, BFLOAT16, HALF = torch.float32, torch.bfloat16, torch.float16
# name: (n, dim, dtype, slice_dim or None, num_slices)
PROBLEMS = {
    "256x2048": (256, 2048, FLOAT32, 128, 1),
    "256x8192-bf16": (256, 8192, BFLOAT16, 128, 1),
    "4096x8192": (4096, 8192, FLOAT32, 128, 1),
    "4096x8192-bf16": (4096, 8192, BFLOAT16, 128, 1),
    "1024x2048-fp16-4-slices": (1024, 2048, HALF, 128, 4),
    "1000x999-k100": (1000, 999, FLOAT32, 100, 1),
    "256x512-k32": (256, 512, FLOAT32, 32, 1),
    "100x65-k8": (100, 65, FLOAT32, 8, 1),
    "256x128-all": (256, 128, BFLOAT16, None, 1),
    "4096x2048-all": (4096, 2048, FLOAT32, None, 1),
    "256x2048-all": (256, 2048, BFLOAT16, None, 1),
    "999x4095-all": (999, 4095, FLOAT32, None, 1),
}
_compiled: set = set()
_launches: list = []


def _resources(binary, arch: int) -> dict:
    """Registers and stack of a thread, in bytes, as the machine code declares them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(part.split(":") for part in text.split() if part.count(":") == 1 and not part.endswith(":"))
    ptx = binary.asm["ptx"]
    is_tensor_core = any(name in ptx for name in ("mma.sync", "wgmma", "tcgen05.mma"))
    return {"registers": int(usage["REG"]), "stack": int(usage["STACK"]), "tensor_cores": is_tensor_core}


def _compile(fn, problem: str, args: tuple, options: dict) -> None:
    _launches.append(fn.__name__)
    named = {**dict(zip(fn.arg_names, args, strict=False)), **options}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(fn.params):
        value = named[parameter.name]
        is_specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_specialised and type(value) is int and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = "*" + TYPES[value.dtype] if is_tensor else "fp32" if type(value) is float else "i32"
        if is_tensor or (is_specialised and type(value) is int and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    settings = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    for target in TARGETS:
        key = (fn.__name__, target.arch, str((signature, constants, attributes, settings)))
        if key not in _compiled:
            _compiled.add(key)
            binary = triton.compile(ASTSource(fn, signature, constants, attributes), target=target, options=settings)
            row = {"problem": problem, "kernel": fn.__name__, "arch": target.arch, "shared": binary.metadata.shared}
            print(json.dumps({**row, **_resources(binary, target.arch)}), flush=True)


def compile_problem(name: str) -> list[str]:
    """Runs forward and backward of a problem on meta tensors; the names of the launches."""
    n, dim, dtype, slice_dim, num_slices = PROBLEMS[name]
    JITFunction.__getitem__ = lambda fn, grid: lambda *args, **options: _compile(fn, name, args, options)
    z_a, z_b = torch.empty(2, n, dim, dtype=dtype, device="meta")
    step, upstream = torch.empty((), dtype=torch.int64, device="meta"), torch.empty((), device="meta")
    block_dim = slice_dim // 4 if slice_dim else 0
    _launches.clear()
    _, _, _, *saved = operators.content_loss._init_fn(
        z_a, z_b, step, [0, 0], slice_dim or dim, num_slices, block_dim, [1.0, 0.1], [-0.5, 0.5]
    )
    operators.content_loss_backward._init_fn(upstream, z_a, z_b, *saved, block_dim, True, True)
    return list(_launches)


if __name__ == "__main__":
    for problem in sys.argv[1:] or PROBLEMS:
        print(json.dumps({"problem": problem, "launches": compile_problem(problem)}), flush=True)
