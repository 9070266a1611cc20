"""One variant of a GPU kernel, compiled, counted and held against its gate; `benchmarks.static_gates` runs all."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks._sass import MachineCode, compile_kernel, read_machine_code
from ptqc.act_spec import ActSpec
from ptqc.codegen.build import load_text
from ptqc.codegen.gpu.chains import operand_names
from ptqc.codegen.gpu.eight_bit import eight_bit_arguments, eight_bit_form, eight_bit_modes, summed_group
from ptqc.codegen.gpu.forms import WeightForm, form_of
from ptqc.codegen.gpu.inputs import prologue_pointers
from ptqc.codegen.gpu.tiles import Tile, pieces_of, tile_for
from ptqc.codegen.gpu.weight_only import POINTER_TYPES, product_arguments
from ptqc.codegen.targets.triton_eight_bit import TritonEightBit
from ptqc.codegen.targets.triton_linear import TritonLinear
from ptqc.requests import KernelRequest
from ptqc.spec import WeightSpec

__all__ = ["Case", "Row", "Variant", "compile_around", "compile_plain", "programs_of", "variant_of"]

SHARED = {80: 163, 90: 227}
"""KiB of shared memory of a processor."""
FEW_ROWS = 16


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
    """What was counted. rows: of the input; variant: `Variant.key`."""

    spec: str
    act: str
    dtype: str
    target: str
    rows: int
    tile: str
    per_weight: float
    registers: int
    spills: int
    shared: int
    programs: int
    matrices: str
    failures: tuple[str, ...]
    variant: str


@dataclass(frozen=True)
class Variant:
    """A case, and what is compiled for it."""

    case: Case
    request: KernelRequest
    form: WeightForm
    tile: Tile

    @property
    def text(self) -> str:
        """The module."""
        target = TritonLinear() if self.request.act.dtype is None else TritonEightBit()
        return target.emit(self.request).text

    @property
    def inputs(self) -> int:
        """Inputs of a step of the loop."""
        layout = self.form.layout
        return layout.fields * (layout.rows if self.request.act.dtype else layout.rows_for(self.tile.inputs))

    @property
    def key(self) -> str:
        """Equal for variants that compile to the same code: kernels, tile, types, target, Triton."""
        import triton

        kernels = self.text.partition("@triton.jit")[2].partition("LINEAR = ")[0]
        pointers, case = sorted(self.form.pointers.items()), self.case
        what = (kernels, self.tile, self.inputs, pointers, case.dtype, case.capability, triton.__version__)
        return hashlib.sha256(repr(what).encode()).hexdigest()[:16]

    def slow(self, per_weight: float) -> Iterator[str]:
        """Why so many instructions per weight are too many, if they are."""
        most = self.most_instructions
        if most and per_weight > most:
            yield f"{per_weight:.2f} instructions per weight, not {most}"

    def crowded(self, programs: int) -> Iterator[str]:
        """Why so few programs on a processor are too few, if they are."""
        planned = self.tile.programs if self.case.rows <= FEW_ROWS else 1
        if programs < planned:
            yield f"{programs} programs on a processor, not {planned}"

    @property
    def most_instructions(self) -> float | None:
        """Per weight in the main loop: the gate of this variant, if it has one."""
        if self.request.act.dtype is not None or self.request.spec.bits != 4 or self.form.half is None:
            return None
        is_few, is_half = self.case.rows <= FEW_ROWS, self.case.dtype == torch.float16
        if self.form.tables:
            return 4.0 if is_few and is_half else None
        if is_half:
            return 2.4 if is_few else 3.0
        return 2.8 if is_few else None

    def measure(self) -> Row:
        """Compile, count, and hold against the gates."""
        from triton.backends.compiler import GPUTarget

        case, tile = self.case, self.tile
        code = read_machine_code(_compile(self, GPUTarget("cuda", case.capability, 32), is_plain=False))
        per_weight = code.loop_length / (tile.outputs * self.inputs / (32 * tile.warps))
        programs = programs_of(code, tile.warps, case.capability)
        failures = tuple(_failures(self, code, round(per_weight, 2), programs))
        return Row(
            case.spec, case.act, str(case.dtype).removeprefix("torch."), f"sm_{case.capability}", case.rows,
            f"{tile.rows}x{tile.outputs}x{self.inputs} w{tile.warps} s{tile.stages}", round(per_weight, 2),
            code.registers, code.spills, code.shared, programs, " ".join(code.matrices), failures, self.key,
        )  # fmt: skip


def variant_of(case: Case) -> Variant:
    """What is compiled for a case; SystemExit if the spec has no form."""
    spec = WeightSpec.parse(case.spec)
    act = ActSpec.parse(case.act)
    request = KernelRequest(spec, 4096, 4096, case.dtype, "cuda", act, (), ("bias", "silu"))
    form = eight_bit_form(request) if act.dtype else form_of(spec, request.k, case.dtype)
    if isinstance(form, str):
        raise SystemExit(f"{case.spec}: {form}")
    return Variant(case, request, form, tile_for(case.rows, form.decoding, case.capability))


def compile_plain(variant: Variant, target: Any) -> Any:
    """Compile the form without assembler, with a small tile."""
    return _compile(
        Variant(variant.case, variant.request, variant.form, Tile(16, 64, variant.tile.inputs, 4, 2)), target, True
    )


def _compile(variant: Variant, target: Any, is_plain: bool) -> Any:
    request, form, tile = variant.request, variant.form, variant.tile
    is_quantized = request.act.dtype is not None
    module = load_text(variant.text)
    signature = (eight_bit_arguments if is_quantized else product_arguments)(request, form)
    signature |= {"out_ptr": POINTER_TYPES[request.dtype], "part_ptr": "*fp32", "lock_ptr": "*i32"}
    aligned = [*signature, "N", "K", "NP"]
    signature |= dict.fromkeys(("M", "N", "K", "NP", "BLOCKS", "CHUNK", "SPLIT"), "i32")
    constants = {
        "BM": tile.rows, "BN": tile.outputs, "IS_SPLIT": True, "PTX": not is_plain, "EMULATED": False,
        **(eight_bit_modes(not is_plain, variant.case.capability) if is_quantized else pieces_of(tile, form.layout)),
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


def programs_of(code: MachineCode, warps: int, capability: int) -> int:
    """Programs that fit on a processor at a time."""
    by_registers = 65536 // (max(code.registers, 32) * 32 * warps)
    return int(min(by_registers, SHARED[capability] * 1024 // (code.shared + 1024), 64 // warps))


def _failures(variant: Variant, code: MachineCode, per_weight: float, programs: int) -> Iterator[str]:
    yield from variant.slow(per_weight)
    yield from variant.crowded(programs)
    if code.spills or code.stack:
        yield f"{code.spills} spills, {code.stack} bytes of stack"
    if not code.matrices and variant.form.half is not None:
        yield "no tensor cores"
