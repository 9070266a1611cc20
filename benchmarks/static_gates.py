"""What the GPU kernels compile to, counted without a GPU: instructions per weight, registers, spills, shared memory.

    python -m benchmarks.static_gates [--quick] [--json FILE] [--spec NAME ..]

Every kernel variant is cross-compiled for sm_80 and sm_90 with the Triton that is installed, and its machine code is
read. A kernel that issues more instructions per weight than a processor can while memory delivers the weight cannot be
memory-bound (docs/kernels.md has the budgets). Gates that fail are marked and make the exit status 1. With --amd the
kernels are compiled for gfx942 as well, in their plain form; that is a report only.
"""

import argparse
import itertools
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks._sass import MachineCode, compile_kernel, read_machine_code
from ptqc.act_spec import ActSpec
from ptqc.codegen.build import load_text
from ptqc.codegen.gpu.chains import operand_names
from ptqc.codegen.gpu.eight_bit import eight_bit_arguments, eight_bit_form, summed_group
from ptqc.codegen.gpu.forms import WeightForm, form_of
from ptqc.codegen.gpu.inputs import prologue_pointers
from ptqc.codegen.gpu.tiles import Tile, tile_for
from ptqc.codegen.gpu.weight_only import POINTER_TYPES, product_arguments
from ptqc.codegen.targets.triton_eight_bit import TritonEightBit
from ptqc.codegen.targets.triton_linear import TritonLinear
from ptqc.requests import KernelRequest
from ptqc.spec import WeightSpec

__all__ = ["Case", "Row", "compile_around", "measure"]

SPECS = (
    "int4g128", "int4g64", "int4g32", "int4", "int4g128z", "int4g64z", "int4g64f", "int4g32m", "int8", "int8g128",
    "int6g64", "int5g64", "int3g64", "int2g64", "int1g64", "ternaryg64", "nf4g64", "mxfp4", "iq4_xs", "fp8e4m3",
    "fp8e5m2", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "e8p", "e8p3", "e8p4",
)  # fmt: skip
EIGHT_BIT = (
    ("int8", "int8-token"), ("int8g128z", "int8-token"), ("int4g128", "int8-token"), ("int4g64f", "int8-token"),
    ("ternaryg64", "int8-token"), ("fp8e4m3", "fp8e4m3-token"), ("fp8e4m3b128x128", "fp8e4m3-token"),
)  # fmt: skip
QUICK = ("int4g128", "int4g64z", "nf4g64")
ROWS = (1, 16, 64)
SHARED = {80: 163, 90: 227}
"""KiB of shared memory of a processor."""
MOST_INSTRUCTIONS: dict[str, dict[int, float]] = {"int4g128": {1: 2.4, 16: 2.4, 64: 3.0}, "int4g64z": {1: 2.4, 16: 2.4},
                                                  "nf4g64": {1: 4.0, 16: 4.0}}  # fmt: skip
"""Per weight in the main loop, float16, by spec and rows. At 64 rows for sm_90 only: on sm_80 the products alone are
one instruction for every weight."""


@dataclass(frozen=True)
class Case:
    """One variant of a kernel, for a weight of 4096 x 4096."""

    spec: str
    dtype: torch.dtype
    rows: int
    capability: int
    act: str = "float"


@dataclass(frozen=True)
class Row:
    """What was counted."""

    spec: str
    act: str
    dtype: str
    target: str
    tile: str
    per_weight: float
    registers: int
    spills: int
    shared: int
    programs: int
    matrices: str
    failures: tuple[str, ...]


def measure(case: Case) -> Row:
    """Compile a variant and hold it against the gates."""
    from triton.backends.compiler import GPUTarget

    request, form, tile = _request(case)
    steps = form.layout.rows if request.act.dtype else form.layout.rows_for(tile.inputs)
    compiled = _compile(request, form, tile, GPUTarget("cuda", case.capability, 32), is_plain=False)
    code = read_machine_code(compiled)
    weights = tile.outputs * steps * form.layout.fields / (32 * tile.warps)
    per_weight = code.loop_length / weights
    programs = _programs(code, tile, case.capability)
    failures = tuple(_failures(case, code, per_weight, programs))
    return Row(
        case.spec, case.act, str(case.dtype).removeprefix("torch."), f"sm_{case.capability}",
        f"{tile.rows}x{tile.outputs}x{steps * form.layout.fields} w{tile.warps} s{tile.stages}", round(per_weight, 2),
        code.registers, code.spills, code.shared, programs, " ".join(code.matrices), failures,
    )  # fmt: skip


def _request(case: Case) -> tuple[KernelRequest, WeightForm, Tile]:
    spec = WeightSpec.parse(case.spec)
    act = ActSpec.parse(case.act)
    request = KernelRequest(spec, 4096, 4096, case.dtype, "cuda", act, (), ("bias", "silu"))
    form = eight_bit_form(request) if act.dtype else form_of(spec, request.k, case.dtype)
    if isinstance(form, str):
        raise SystemExit(f"{case.spec}: {form}")
    return request, form, tile_for(case.rows, form.decoding, case.capability)


def _compile(request: KernelRequest, form: WeightForm, tile: Tile, target: Any, is_plain: bool) -> Any:
    is_quantized = request.act.dtype is not None
    module = load_text((TritonEightBit() if is_quantized else TritonLinear()).emit(request).text)
    signature = (eight_bit_arguments if is_quantized else product_arguments)(request, form)
    signature |= {"out_ptr": POINTER_TYPES[request.dtype], "part_ptr": "*fp32", "lock_ptr": "*i32"}
    aligned = [*signature, "N", "K", "NP"]
    signature |= dict.fromkeys(("M", "N", "K", "NP", "BLOCKS", "CHUNK", "SPLIT"), "i32")
    constants = {
        "BM": tile.rows, "BN": tile.outputs, "IS_SPLIT": True, "PTX": not is_plain, "EMULATED": False,
        **({} if is_quantized else {"ROWS": form.layout.rows_for(tile.inputs)}),
    }  # fmt: skip
    signature |= dict.fromkeys(constants, "constexpr")
    registers = {"maxnreg": tile.registers} if tile.registers and not is_plain else {}
    return compile_kernel(
        module.matmul, signature, constants, aligned, target, num_warps=tile.warps, num_stages=tile.stages, **registers
    )


def compile_around(spec: str, act: str, prologue: tuple[str, ...], epilogue: tuple[str, ...], capability: int) -> None:
    """Compile the kernels before and behind a product, and the one that unpacks a weight; raises what Triton does."""
    from triton.backends.compiler import GPUTarget

    request = KernelRequest(
        WeightSpec.parse(spec), 4096, 4096, torch.float16, "cuda", ActSpec.parse(act), prologue, epilogue
    )
    target, operands = GPUTarget("cuda", capability, 32), dict.fromkeys(operand_names(request), "*fp16")
    types = {name: "*i32" if step == "order" else "*fp16" for name, step in zip(
        prologue_pointers(request), prologue, strict=False)}  # fmt: skip
    entry = {"x_ptr": "*fp16", **types, "v_ptr": "*fp16"}
    sizes = {"GROUPS": 1, "WIDTH": 4096}
    if request.act.dtype is not None:
        form = eight_bit_form(request)
        assert isinstance(form, WeightForm)
        module = load_text(TritonEightBit().emit(request).text)
        summed = summed_group(request, form)
        entry |= {"v_ptr": form.words_type, "scale_ptr": "*fp32"} | ({"sums_ptr": "*fp32"} if summed else {})
        sizes = {"GROUPS": 4096 // (summed or 4096), "WIDTH": summed or 4096}
    else:
        form = form_of(request.spec, request.k, request.dtype)
        assert isinstance(form, WeightForm)
        module = load_text(TritonLinear().emit(request).text)
        numbers = dict.fromkeys(("N", "K", "NP"), "i32")
        modes = {"BN": 128, "PTX": True, "EMULATED": False}
        _compile_plainly(module.unpack, form.pointers | {"out_ptr": "*fp16"} | numbers, modes, target)
        finish = {"y_ptr": "*fp16", **operands, "out_ptr": "*fp16", **dict.fromkeys(("M", "N", "NP"), "i32")}
        _compile_plainly(module.finish, finish, {"BM": 32, "BN": 64}, target)
    _compile_plainly(module.enter, entry | {"K": "i32"}, sizes, target)


def _compile_plainly(kernel: Any, signature: dict[str, str], constants: dict[str, Any], target: Any) -> None:
    aligned = [name for name in signature if name.endswith("_ptr")]
    compile_kernel(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned, target, num_warps=8)


def _programs(code: MachineCode, tile: Tile, capability: int) -> int:
    """Programs that fit on a processor at a time."""
    by_registers = 65536 // (max(code.registers, 32) * 32 * tile.warps)
    return int(min(by_registers, SHARED[capability] * 1024 // (code.shared + 1024), 64 // tile.warps))


def _failures(case: Case, code: MachineCode, per_weight: float, programs: int) -> Iterator[str]:
    is_gated = case.dtype == torch.float16 and case.act == "float"
    most = MOST_INSTRUCTIONS.get(case.spec, {}).get(case.rows) if is_gated else None
    if most and per_weight > most and (case.rows < 64 or case.capability == 90):
        yield f"{per_weight:.2f} instructions per weight, not {most}"
    if code.spills or code.stack:
        yield f"{code.spills} spills, {code.stack} bytes of stack"
    if not code.matrices:
        yield "no tensor cores"
    if (case.rows <= 16 and programs < 2) or programs < 1:
        yield f"{programs} programs on a processor"


def _cases(specs: tuple[str, ...], is_quick: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for spec, dtype, capability, rows in itertools.product(specs, dtypes, (80, 90), ROWS):
        yield Case(spec, dtype, rows, capability)
    for (spec, act), capability, rows in itertools.product(() if is_quick else EIGHT_BIT, (80, 90), (16, 64, 128)):
        if capability == 90 or act == "int8-token":
            yield Case(spec, torch.float16, rows, capability, act)


def _amd(specs: tuple[str, ...]) -> list[str]:
    """What becomes of the plain form on gfx942."""
    from triton.backends.compiler import GPUTarget

    lines = []
    for spec in specs:
        request, form, tile = _request(Case(spec, torch.float16, 16, 90))
        try:
            compiled = _compile(request, form, Tile(16, 64, tile.inputs, 4, 2), GPUTarget("hip", "gfx942", 64), True)
            lines.append(
                f"{spec}: gfx942, {compiled.asm['amdgcn'].count('v_mfma')} v_mfma, {compiled.metadata.shared} B"
            )
        except Exception as error:
            lines.append(f"{spec}: gfx942 fails: {str(error).strip().splitlines()[-1][:160]}")
    return lines


HEADER = (
    "spec            act           dtype    target tile                 i/w  regs spills shared programs tensor cores"
)


def _line(row: Row) -> str:
    failures = f"  FAILS: {'; '.join(row.failures)}" if row.failures else ""
    return (
        f"{row.spec:15s} {row.act:13s} {row.dtype:8s} {row.target:6s} {row.tile:18s} {row.per_weight:5.2f} "
        f"{row.registers:5d} {row.spills:6d} {row.shared:6d} {row.programs:8d} {row.matrices}{failures}"
    )


def main() -> None:
    """Print the table, write JSON, fail if a gate does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="float16 and three specs only")
    parser.add_argument("--float16", action="store_true", help="leave bfloat16 out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--spec", nargs="+", help="these specs only")
    parser.add_argument("--amd", action="store_true", help="compile for gfx942 too")
    given = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton

    specs = tuple(given.spec or (QUICK if given.quick else SPECS))
    print(f"Triton {triton.__version__}, torch {torch.__version__}")
    print(HEADER)
    rows = []
    dtypes = (torch.float16,) if given.quick or given.float16 else (torch.float16, torch.bfloat16)
    for case in _cases(specs, given.quick, dtypes):
        row = measure(case)
        rows.append(row)
        print(_line(row), flush=True)
    for line in _amd(specs) if given.amd else []:
        print(line)
    if given.json:
        about = {"triton": triton.__version__, "torch": torch.__version__, "date": date.today().isoformat(),
                 "machine": platform.processor() or platform.machine()}  # fmt: skip
        given.json.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    sys.exit(1 if any(row.failures for row in rows) else 0)


if __name__ == "__main__":
    main()
