"""Cross-compiling Triton kernels and reading their machine code: what `static_gates` counts.

Triton's wheels carry ptxas, nvdisasm and cuobjdump, so neither a GPU nor a toolkit is needed.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MachineCode", "compile_kernel", "read_machine_code"]

_INSTRUCTION = re.compile(
    r"^\s+(?:/\*[0-9a-f]{4,}\*/)?\s*(?:@!?U?P\d+\s+|@!?UPT\s+)?(?P<name>[A-Z][A-Za-z0-9_.]*)(?P<rest>.*);"
)
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_TARGET = re.compile(r"\(?`?\(?(\.L_\w+)")
_TENSOR_CORE = ("HMMA", "HGMMA", "IMMA", "IGMMA", "QGMMA", "WGMMA")
_MEMORY = ("LDG", "LDGSTS", "STG", "LDS", "STS", "LDSM")


@dataclass(frozen=True)
class MachineCode:
    """registers per thread, shared and stack in bytes; loop: instructions of the main loop by name; uses_matrices:
    which tensor core instructions the kernel holds."""

    registers: int
    stack: int
    shared: int
    spills: int
    loop: Mapping[str, int]
    matrices: tuple[str, ...]

    @property
    def loop_length(self) -> int:
        """Instructions of the main loop."""
        return sum(self.loop.values())


def compile_kernel(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], aligned: Sequence[str], target: Any,
    **options: int,
) -> Any:  # fmt: skip
    """Compile a Triton function for a target. signature: Triton's type of every argument, in order.

    aligned: arguments that are multiples of 16, which Triton finds out by itself when it launches a kernel.
    """
    import triton
    from triton.compiler import ASTSource

    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature=dict(signature), constexprs=dict(constants), attrs=attributes)
    return triton.compile(source, target=target, options=options)


def read_machine_code(compiled: Any) -> MachineCode:
    """What a compiled kernel is made of."""
    listing, resources = _disassemble(compiled.asm["cubin"])
    instructions, labels = _parse(listing)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", resources)}
    names = [name for name, _ in instructions]
    matrices = sorted({_matrix_name(name) for name in names if name.startswith(_TENSOR_CORE)})
    return MachineCode(
        registers=found.get("REG", 0),
        stack=found.get("STACK", 0),
        shared=int(compiled.metadata.shared),
        spills=sum(name.startswith(("LDL", "STL")) for name in names),
        loop=dict(Counter(_short(name) for name, _ in _main_loop(instructions, labels)).most_common()),
        matrices=tuple(matrices),
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    import triton

    tools = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
        usage = [os.fspath(tools / "cuobjdump"), "-res-usage", file.name]
        resources = subprocess.run(usage, capture_output=True, text=True, check=True)
    return listing.stdout, resources.stdout + resources.stderr


def _parse(listing: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        label, instruction = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            labels[label[1]] = len(instructions)
        if instruction:
            instructions.append((instruction["name"], instruction["rest"]))
    return instructions, labels


def _main_loop(instructions: Sequence[tuple[str, str]], labels: Mapping[str, int]) -> Sequence[tuple[str, str]]:
    """The body of the backward branch that holds most tensor core instructions, else most loads and products."""
    best: tuple[int, Sequence[tuple[str, str]]] = (-1, [])
    for end, (name, rest) in enumerate(instructions):
        target = _TARGET.search(rest) if name.startswith("BRA") else None
        start = labels.get(target[1]) if target else None
        if start is None or start > end:
            continue
        body = instructions[start : end + 1]
        weight = sum(10000 * name.startswith(_TENSOR_CORE) + name.startswith(("LDG", "FFMA", "HFMA2"))
                     for name, _ in body)  # fmt: skip
        best = max(best, (weight, body), key=lambda pair: pair[0])
    return best[1]


def _short(name: str) -> str:
    base = name.split(".")[0]
    if base in _MEMORY:
        width = re.search(r"\.(128|64|U8|U16|S8)\b", name)
        return f"{base}.{width[1] if width else 32}"
    return base


def _matrix_name(name: str) -> str:
    """HGMMA.64x16x16, HMMA.16816: the kind and the shape."""
    return ".".join(name.split(".")[:2])
