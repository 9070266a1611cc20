"""Products of inputs that are quantized at run time to 8 bits: the form of the weight, and the text of the kernel.

The operands of 8-bit tensor cores must lie along the inputs, so the weight keeps that order: w [outputs, inputs] int8
holds levels, or two 4-bit levels to a byte, of inputs r and rows + r of a block; a shift or a mask leaves 16 times the
level. What is subtracted from codes is taken away behind the product, with the sums over groups of the input's codes:

    y[m, o] = x_scale[m] * sum over groups g of scale[o, g] * (sum of x[m, k] level[o, k] - zero[o, g] * sums[m, g])

8-bit floats multiply each other as they are, and are added up in float32 after every block: the accumulators of
tensor cores keep fewer bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ptqc.codebooks import Codebook
from ptqc.codegen.gpu.chains import operand_names
from ptqc.codegen.gpu.decode import Subtracted
from ptqc.codegen.gpu.forms import WeightForm, fields_per_scale
from ptqc.codegen.gpu.levels import whole_levels
from ptqc.codegen.gpu.loop import group_lines, number_lines
from ptqc.codegen.gpu.parts import logical_parts, pack_scales, padded
from ptqc.codegen.gpu.ptx import HALVES
from ptqc.codegen.gpu.split import summed_by_last
from ptqc.codegen.gpu.weight_only import POINTER_TYPES, tail_arguments, tail_text
from ptqc.codegen.gpu.words import WordLayout
from ptqc.requests import KernelRequest

__all__ = [
    "codes_of_bytes",
    "eight_bit_arguments",
    "eight_bit_form",
    "eight_bit_modes",
    "eight_bit_text",
    "pack_bytes",
    "summed_group",
]

_MATMUL = """@triton.jit
def product(a, b, EMULATED: tl.constexpr):
    if EMULATED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32)).to({total})
    return tl.dot(a, b, out_dtype={total})


@triton.jit
def product_added(a, b, total, EMULATED: tl.constexpr):
    if EMULATED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32)).to({total}) + total
    return tl.dot(a, b, total, out_dtype={total})


{helpers}


{tail_text}


@triton.jit(do_not_specialize=["M", "CHUNK", "SPLIT"])
def matmul({pointers}, out_ptr, part_ptr, lock_ptr, M, N, K, NP, BLOCKS, CHUNK, SPLIT, BM: tl.constexpr,
           BN: tl.constexpr, IS_FENCED: tl.constexpr, IS_SPLIT: tl.constexpr, PTX: tl.constexpr,
           EMULATED: tl.constexpr):
    row_tiles = tl.cdiv(M, BM)
    tile = tl.program_id(0) // row_tiles
    rm = (tl.program_id(0) % row_tiles) * BM + tl.arange(0, BM)
    rn = tile * BN + tl.arange(0, BN)
    rows_in = rm[None, :] < M
    rq = tl.arange(0, {rows})
    w_tile = w_ptr + rn[:, None] * (BLOCKS * {rows}) + rq[None, :]
    x_tile = x_ptr + rm[None, :] * K + rq[:, None]
    first = tl.program_id(1) * CHUNK
    last = tl.minimum(first + CHUNK, BLOCKS)
    acc = tl.zeros((BN, BM), {start})
    for block in range(first, last):
        w = tl.load(w_tile + block * {rows}, eviction_policy="evict_first")
        x_from = block * {block}
        {loop}
    {after}
    {split}"""

_HELPERS = """@triton.jit
def low(words):
    return (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)[:, None]


@triton.jit
def high(words):
    return (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)[:, None]


@triton.jit
def halves(w, PTX: tl.constexpr):
    # The two fields of a byte, times 16.
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 up; shl.b32 up, $2, 4; and.b32 $1, $2, 0xf0f0f0f0; and.b32 $0, up, 0xf0f0f0f0; }",
            "=r,=r,r", [w], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    return ((w << 4) & -16).to(tl.int8), (w & -16).to(tl.int8)


@triton.jit
def fenced(w, IS_FENCED: tl.constexpr):
    # Costs nothing, and keeps the compiler from reading the operands of the next step ahead, byte by byte.
    if IS_FENCED:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [w, w], dtype=w.dtype, is_pure=True, pack=4)
    return w"""


def eight_bit_form(request: KernelRequest) -> WeightForm | str:
    """The form of a weight for 8-bit inputs, or the reason why it has none."""
    spec = request.spec
    group = None if spec.group is None or spec.group >= request.k else spec.group
    book = spec.book
    if request.act.dtype == "fp8e4m3":
        if spec.codebook != "fp8e4m3":
            return f"float8 inputs are multiplied with float8 weights, not {spec}"
    elif book is not None and whole_levels(book.levels) is None:
        return f"int8 inputs are multiplied with integer levels, which {spec} has not"
    fields = 2 if book is None and spec.bits == 4 else 1
    allowed = [rows for rows in (128 // fields, 64 // fields, 32) if group is None or group % rows == 0]
    if not allowed:
        return f"tensor cores multiply 32 bytes at a time, which do not divide group {group}"
    layout = WordLayout(allowed[0], 1, ((),) * fields)
    shared = None if group is None else fields_per_scale(layout, group)
    whole = whole_levels(book.levels) if book else None
    factor = 1 / 16 if fields == 2 else 1 / (whole.unit if whole else 1)
    subtracted = Subtracted(is_tile=spec.zero != "none", has_fractions=True)
    return WeightForm(
        spec, HALVES[torch.float16], layout, shared, subtracted, "", (), factor=factor,
        words_type="*fp8e4nv" if request.act.dtype == "fp8e4m3" else "*i8",
    )  # fmt: skip


def summed_group(request: KernelRequest, form: WeightForm) -> int | None:
    """Inputs over which the input's codes are summed: what is multiplied at a time, or the row; None if nobody asks."""
    if not form.subtracted.is_tile:
        return None
    return request.k if form.fields_per_scale is None else form.fields_per_scale * form.layout.rows


def pack_bytes(parts: Sequence[Tensor], form: WeightForm, shape: tuple[int, int], is_interleaved: bool) -> list[Tensor]:
    """The stored parts as the kernel reads them: w [outputs, blocks * rows] int8 or float8, scales and zeros."""
    spec, layout = form.spec, form.layout
    codes, scale, zero = logical_parts(parts, spec, shape, is_interleaved)
    filling = (0, -shape[1] % layout.block, 0, padded(shape[0]) - shape[0])
    centre = 1 << (spec.bits - 1)
    if form.words_type == "*fp8e4nv":
        words = pad(codes, filling).view(torch.float8_e4m3fn)
    elif spec.book is not None:
        levels = torch.tensor(_whole(spec.book), dtype=torch.int8, device=codes.device)
        words = pad(levels[codes.int()], filling)
    elif layout.fields == 1:
        words = pad((codes.to(torch.int16) - centre).to(torch.int8), filling)
    else:
        nibbles = pad((codes.int() - centre) & 15, filling).unflatten(1, (-1, 2, layout.rows))
        words = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).flatten(1).to(torch.uint8).view(torch.int8)
    zero = None if zero is None else (zero - centre) * (1 / form.factor if spec.book is None else 1)
    found = {"w_ptr": words.contiguous()} | pack_scales(scale * form.factor, zero, form, shape[1])
    return [found[name] for name in form.pointers]


def codes_of_bytes(words: Tensor, form: WeightForm, outputs: Tensor, inputs: int) -> Tensor:
    """Codes [outputs, inputs] uint8 of some outputs: `pack_bytes` backwards."""
    spec, layout = form.spec, form.layout
    found, centre = words.view(torch.uint8)[outputs], 1 << (spec.bits - 1)
    if form.words_type == "*fp8e4nv":
        return found[:, :inputs]
    if spec.book is not None:
        code_of = torch.zeros(256, dtype=torch.uint8, device=words.device)
        levels = torch.tensor(_whole(spec.book), device=words.device) % 256
        code_of[levels] = torch.arange(len(levels), dtype=torch.uint8, device=words.device)
        return code_of[found.int()][:, :inputs]
    if layout.fields == 2:
        blocks = found.unflatten(1, (-1, 1, layout.rows))
        found = torch.cat([blocks & 15, blocks >> 4], 2).flatten(1)
    return (found[:, :inputs] + centre) & ((1 << spec.bits) - 1)


def _whole(book: Codebook) -> tuple[int, ...]:
    whole = whole_levels(book.levels)
    assert whole is not None
    return whole.levels


def eight_bit_arguments(request: KernelRequest, form: WeightForm) -> dict[str, str]:
    """Pointers that `matmul` takes before the result, in order, and their types as Triton's compiler wants them."""
    found = {"x_ptr": form.words_type, "x_scale_ptr": "*fp32"}
    found |= {"sums_ptr": "*fp32"} if form.subtracted.is_tile else {}
    return found | form.pointers | dict.fromkeys(operand_names(request), POINTER_TYPES[request.dtype])


def eight_bit_modes(has_ptx: bool, capability: int) -> dict[str, bool]:
    """The constants of the product that depend on the GPU; has_ptx: that it takes assembler.

    Before sm_90 operands of tensor cores are read into registers.
    """
    return {"IS_FENCED": has_ptx and capability < 90}


def eight_bit_text(request: KernelRequest, form: WeightForm) -> str:
    """The kernel `matmul`, and what it calls."""
    is_integer = form.words_type == "*i8"
    is_deferred = is_integer and form.fields_per_scale is None
    total = "tl.int32" if is_integer else "tl.float32"
    return _MATMUL.format(
        total=total,
        start=total if is_deferred else "tl.float32",
        helpers=_HELPERS,
        tail_text=tail_text(request),
        pointers=", ".join(eight_bit_arguments(request, form)),
        rows=form.layout.rows,
        block=form.layout.block,
        loop="\n        ".join([*group_lines(form), *number_lines(form), *_sum_lines(request, form, is_deferred)]),
        after="\n    ".join(_after_lines(request, form)),
        split=summed_by_last(f"tail({tail_arguments(request)})"),
    )


def _sum_lines(request: KernelRequest, form: WeightForm, is_deferred: bool) -> list[str]:
    layout, shared = form.layout, form.fields_per_scale
    lines = ["f0 = fenced(w, IS_FENCED)" if layout.fields == 1 else "f0, f1 = halves(w, PTX)"]
    for j in range(layout.fields):
        inside = "rows_in"
        if request.k % layout.block:
            inside += f" & ((x_from + {j * layout.rows} + rq) < K)[:, None]"
        # float8 has no literal: an integer zero becomes one of any type.
        other = "0.0" if form.words_type == "*fp8e4nv" else "0"
        lines.append(f"x{j} = tl.load(x_tile + (x_from + {j * layout.rows}), mask={inside}, other={other})")
    for j in range(layout.fields):
        if is_deferred:
            lines.append(f"acc = product_added(f{j}, x{j}, acc, EMULATED)")
            continue
        per_scale = shared or layout.fields
        begins, ends = j % per_scale == 0, j % per_scale == per_scale - 1
        lines.append(f"t = product(f{j}, x{j}, EMULATED)" if begins else f"t = product_added(f{j}, x{j}, t, EMULATED)")
        if ends:
            lines += _scaled_lines(request, form, j // per_scale)
    return lines


def _scaled_lines(request: KernelRequest, form: WeightForm, i: int) -> list[str]:
    if form.fields_per_scale is None:
        return ["acc += t"]
    if not form.subtracted.is_tile:
        return [f"acc += t.to(tl.float32) * s{i}"]
    run = form.fields_per_scale * form.layout.rows
    runs, at = f"((K + {run} - 1) // {run})", f"(x_from // {run} + {i})"
    # Behind the last input of a row nothing was summed.
    return [
        f"sums = tl.load(sums_ptr + rm * {runs} + {at}, mask=(rm < M) & (rm * 0 + {at} < {runs}), other=0.0)[None, :]",
        f"acc += (t.to(tl.float32) - z{i} * sums) * s{i}",
    ]


def _after_lines(request: KernelRequest, form: WeightForm) -> list[str]:
    lines = ["y = acc.to(tl.float32)"]
    if form.fields_per_scale is not None:
        lines.append("y = y * tl.load(norm_ptr)")
    else:
        if form.subtracted.is_tile:
            lines += [
                "sums = tl.load(sums_ptr + rm, mask=rm < M, other=0.0)[None, :]",
                "share = tl.where(tl.program_id(1) == 0, 1.0, 0.0)  # of several runs, one subtracts",
                "y = y - tl.load(z_ptr + rn)[:, None] * (sums * share)",
            ]
        lines.append("y = y * tl.load(s_ptr + rn)[:, None]")
    return [*lines, "acc = y * tl.load(x_scale_ptr + rm, mask=rm < M, other=0.0)[None, :]"]
