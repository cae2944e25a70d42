"""Compiles every kernel for an NVIDIA GPU without having one: ``python -m tests.triton_aot [SHAPES...]``.

The launchers run on meta tensors; each launch is compiled to a cubin with the signature and the hints it would have on
the device. Prints one JSON object a line: kernel, problem, registers, spilled bytes, shared memory.
"""

import json
import re
import subprocess
import sys
import tempfile
import time

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mmi_loss.ops import triton as kernels
from mmi_loss.ops.triton import operators

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
FLOAT32, BFLOAT16, HALF = torch.float32, torch.bfloat16, torch.float16
# name: (n, dim, dtype, slice_dim or None, slice_kind, objective)
PROBLEMS = {
    "256x2048": (256, 2048, FLOAT32, 128, 16, 1, "content"),
    "256x2048-bf16": (256, 2048, BFLOAT16, 128, 16, 1, "content"),
    "256x8192-bf16": (256, 8192, BFLOAT16, 128, 16, 1, "content"),
    "4096x8192": (4096, 8192, FLOAT32, 128, 16, 1, "content"),
    "4096x8192-bf16": (4096, 8192, BFLOAT16, 128, 16, 1, "content"),
    "1024x2048-fp16-4-slices": (1024, 2048, HALF, 128, 16, 4, "content"),
    "256x512-exchangeable-k32": (256, 512, FLOAT32, 32, 4, 1, "exchangeable"),
    "1000x999-k100": (1000, 999, FLOAT32, 100, 12, 1, "content"),
    "1024x2048-gaussian": (1024, 2048, FLOAT32, 128, 1, 1, "content"),
    "256x128-all": (256, 128, BFLOAT16, 128, 0, 1, "content"),
    "1024x2048-joint": (1024, 2048, FLOAT32, 128, 16, 1, "joint"),
    "4096x2048-all": (4096, 2048, BFLOAT16, None, 0, 1, "content"),
    "4096x512-all-exchangeable": (4096, 512, FLOAT32, None, 0, 1, "exchangeable"),
    "4096x512-all-joint": (4096, 512, HALF, None, 0, 1, "joint"),
    "256x2048-gram": (256, 2048, BFLOAT16, None, 0, 2, "gram"),
    "256x2048-gram-of-one": (256, 2048, FLOAT32, None, 0, 1, "gram"),
}
_compiled: dict = {}
_launches: list = []


def _resources(binary) -> dict:
    """Registers and local memory as the assembler reports them; the driver is not there to ask."""
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(binary.asm["ptx"])
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name=sm_{TARGET.arch}a", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text).groups())
    registers = int(re.search(r"Used (\d+) registers", text).group(1))
    return {"registers": registers, "spill_stores": stores, "spill_loads": loads}


def _compile(fn, problem: str, args: tuple, options: dict) -> None:
    named = {**dict(zip(fn.arg_names, args, strict=False)), **options}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(fn.params):
        value = named[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[(index,)] = "constexpr", 1
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    compiler_options = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    key = (fn.__name__, str(signature), str(constants), str(attributes), str(compiler_options))
    _launches.append(fn.__name__)
    if key in _compiled:
        return
    start = time.perf_counter()
    source = ASTSource(fn, signature, constants, attributes)
    binary = triton.compile(source, target=TARGET, options=compiler_options)
    _compiled[key] = True
    row = {"problem": problem, "kernel": fn.__name__, **compiler_options, "shared": binary.metadata.shared}
    seconds = round(time.perf_counter() - start, 1)
    is_tensor_core = "mma.sync" in binary.asm["ptx"] or "wgmma" in binary.asm["ptx"]
    print(json.dumps({**row, **_resources(binary), "tensor_cores": is_tensor_core, "seconds": seconds}), flush=True)


def compile_problem(name: str) -> list[str]:
    """Runs forward and backward of a problem on meta tensors; the names of the launches."""
    n, dim, dtype, slice_dim, block_dim, slices, objective = PROBLEMS[name]
    JITFunction.__getitem__ = lambda fn, grid: lambda *args, **options: _compile(fn, name, args, options)
    z_a, z_b = torch.empty(2, n, dim, dtype=dtype, device="meta")
    step = torch.empty((), dtype=torch.int64, device="meta")
    one = torch.empty((), device="meta")
    keys = kernels.seed_keys(0)
    _launches.clear()
    if objective == "gram":
        second = z_b if slices == 2 else None
        gram, mean, inverse_std = operators.gram._init_fn(z_a, second)
        operators.gram_backward._init_fn(gram, mean, inverse_std, z_a, second, True, slices == 2)
    elif objective == "joint" or slice_dim is None:
        a, b = z_a[None], z_b[None]
        if block_dim:
            sliced, drawn = operators.project._init_fn(z_a, z_b, step, keys, slice_dim, slices, block_dim)
            a, b = sliced
            operators.project_backward._init_fn(sliced, drawn, z_a, z_b, block_dim, True, True)
        moments, mean = operators.moments._init_fn(a, b, objective)
        operators.moments_backward._init_fn(moments, mean, a, b, objective, True, True)
    else:
        _, _, *saved = operators.sliced_loss._init_fn(
            z_a, z_b, step, keys, slice_dim, slices, block_dim, slice_dim / 64, objective
        )
        operators.sliced_loss_backward._init_fn(one, z_a, z_b, *saved, dim, block_dim, objective, True, True)
    return list(_launches)


if __name__ == "__main__":
    for problem in sys.argv[1:] or PROBLEMS:
        print(json.dumps({"problem": problem, "launches": compile_problem(problem)}), flush=True)
