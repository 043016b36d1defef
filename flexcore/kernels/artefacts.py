"""What the compiler makes of the kernels, without a GPU: registers, spills and shared memory of each launch.

A launch that `noting` collected is compiled for a named architecture exactly as it would be on one, arguments'
divisibility and unit strides included, and the numbers are read from the compiled artefact with NVIDIA's own tools.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .launch import Launch

TARGETS = (80, 90, 100)
# what one thread block may have on every GPU since Ampere, the small ones included
SHARED_LIMIT = 99 * 1024
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Artefact:
    """One compiled kernel.

    Args:
        kernel: Its name.
        target: Compute capability, 80 for sm_80.
        warps: Warps of a program.
        registers: Per thread.
        spilled: Bytes of local memory a thread moves because registers ran out (stores and loads).
        stack: Bytes of local memory per thread.
        shared: Bytes of shared memory per program.
    """

    kernel: str
    target: int
    warps: int
    registers: int
    spilled: int
    stack: int
    shared: int


def missing_tools(target: int) -> str:
    """What is missing to compile for a target and read the result, or "" if nothing is."""
    try:
        import triton
    except ImportError:
        return "triton isn't installed"
    for name in ("ptxas_blackwell" if target >= 100 else "ptxas", "cuobjdump", "nvdisasm"):
        try:
            tool = getattr(triton.knobs.nvidia, name)
            found = tool is not None and Path(tool.path).exists()
        except (AttributeError, RuntimeError):
            found = False
        if not found:
            return f"this triton comes without {name}"
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, so nothing is compiled"
    return ""


def compiled(launches: Iterable[Launch], target: int) -> Iterator[Artefact]:
    """Compile launches for a compute capability; equal ones once."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    done = set()
    for launch in launches:
        signature, constants, attributes, options = specialised(launch)
        key = launch.kernel, str(signature), str(constants), str(attributes), str(options)
        if key in done:
            continue
        done.add(key)
        source = ASTSource(launch.kernel, signature, constants, attributes)
        made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        registers, stack = _usage(made.asm["cubin"])
        yield Artefact(
            made.metadata.name,
            target,
            options["num_warps"],
            registers,
            _spilled(made.asm["cubin"]),
            stack,
            made.metadata.shared,
        )


def specialised(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any], dict[str, int]]:
    """Signature, constants, attributes and options that Triton's launcher would derive from the arguments."""
    given = dict(launch.arguments)
    options: dict[str, int] = {n: given.pop(n) for n in ("num_warps", "num_stages", "maxnreg") if n in given}
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = given[parameter.name]
        fixed = parameter.is_constexpr or value is None
        if fixed or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        divisible = False
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _POINTERS[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


_POINTERS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


def _run(tool: str, *arguments: str, cubin: bytes) -> str:
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [getattr(triton.knobs.nvidia, tool).path, *arguments, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _usage(cubin: bytes) -> tuple[int, int]:
    found = _USAGE.search(_run("cuobjdump", "-res-usage", cubin=cubin))
    assert found is not None
    return int(found[1]), int(found[2])


def _spilled(cubin: bytes) -> int:
    """Bytes that the machine code moves to and from local memory, each instruction once.

    The kernels have no arrays of their own, so whatever is local was a register that didn't fit.
    """
    total = 0
    for line in _run("nvdisasm", "-c", cubin=cubin).splitlines():
        found = re.search(r"\b(?:LDL|STL)(?:\.\w+)*", line)
        if found:
            wide = re.search(r"\.(16|64|128)\b", found[0])
            total += int(wide[1]) // 8 if wide else 4
    return total
