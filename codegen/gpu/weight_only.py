"""Text of the kernels for floating-point activations: the product, and a weight unpacked for a dense one.

The product is computed transposed, acc [BN outputs, BM rows] = W [BN, .] @ x.T: the weight is the operand that tensor
cores take from registers, where it was decoded, and one row of x costs as little as eight. A step of the loop reads
the words of one block:

    words  [BN, rows]  once         f_j = level of field j      [BN, rows]
    x      [rows, BM]  per field    acc += scale * (f_0 @ x_0 + f_1 @ x_1 ..)

Where levels do not come scaled from their decoder, scales are applied to the product of the fields that share them, in
float32. Programs: one for BN outputs and BM rows, times SPLIT runs of blocks. ROWS may be fewer than the rows of a
block, which is then taken in parts, one in a step or several PIECES one after the other. Those of one tile leave their
sums in a workspace; the last to arrive, told by a counter, adds them in the order of the runs and goes on to the
epilogue, so the result does not depend on who was last.
"""

import torch

from ptqc.codegen.gpu.chains import EPILOGUE_HELPERS, epilogue_lines, operand_names
from ptqc.codegen.gpu.forms import WeightForm
from ptqc.codegen.gpu.loop import decode_lines, group_lines, loop_lines
from ptqc.codegen.gpu.split import summed_by_last
from ptqc.requests import KernelRequest

__all__ = [
    "POINTER_TYPES",
    "finish_text",
    "product_arguments",
    "product_functions",
    "product_text",
    "tail_arguments",
    "tail_text",
]

_TYPES = {torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16", torch.float32: "tl.float32"}

POINTER_TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}

_PRODUCTS = """@triton.jit
def product(a, b, EMULATED: tl.constexpr):
    if EMULATED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b{precision})


@triton.jit
def product_added(a, b, total, EMULATED: tl.constexpr):
    if EMULATED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total{precision})"""

_SCALES = """@triton.jit
def low(words):
    return (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)[:, None]


@triton.jit
def high(words):
    return (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)[:, None]


@triton.jit
def full(words):
    return words.to(tl.float32, bitcast=True)[:, None]"""

_MATMUL = """@triton.jit(do_not_specialize=["M", "CHUNK", "SPLIT"])
def matmul({pointers}, out_ptr, part_ptr, lock_ptr, M, N, K, NP, BLOCKS, CHUNK, SPLIT, BM: tl.constexpr,
           BN: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, IS_SPLIT: tl.constexpr, PTX: tl.constexpr,
           EMULATED: tl.constexpr):
    PARTS: tl.constexpr = {rows} // (ROWS * PIECES)
    row_tiles = tl.cdiv(M, BM)
    tile = tl.program_id(0) // row_tiles
    rm = (tl.program_id(0) % row_tiles) * BM + tl.arange(0, BM)
    rn = tile * BN + tl.arange(0, BN)
    rows_in = rm[None, :] < M
    rq = tl.arange(0, ROWS)
    w_tile = w_ptr + rq[None, :] * NP + rn[:, None]
    x_tile = x_ptr + rm[None, :] * K + rq[:, None] * {stride}
    first = tl.program_id(1) * CHUNK * PARTS
    last = tl.minimum(first + CHUNK * PARTS, BLOCKS * PARTS)
    acc = tl.zeros((BN, BM), tl.float32)
    {before}
    for step in range(first, last):
        block = step // PARTS
        {groups}
        for piece in tl.static_range(PIECES):
            part = (step % PARTS * PIECES + piece) * ROWS
            w_at = w_tile + (block * {tall} + part) * NP
            x_from = block * {block} + part * {stride}
            {loop}
    {after}
    {split}"""

_UNPACK = """@triton.jit
def unpack({pointers}, out_ptr, N, K, NP, BN: tl.constexpr, PTX: tl.constexpr, EMULATED: tl.constexpr):
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    block = tl.program_id(1)
    rq = tl.arange(0, {rows})
    w_at = w_ptr + (block * {tall} + rq[None, :]) * NP + rn[:, None]
    {body}"""

_FINISH = """@triton.jit(do_not_specialize=["M"])
def finish(y_ptr, {pointers}out_ptr, M, N, NP, BM: tl.constexpr, BN: tl.constexpr):
    row_tiles = tl.cdiv(M, BM)
    tile = tl.program_id(0) // row_tiles
    rm = (tl.program_id(0) % row_tiles) * BM + tl.arange(0, BM)
    rn = tile * BN + tl.arange(0, BN)
    rows_in = rm[None, :] < M
    y = tl.load(y_ptr + rm[None, :] * NP + rn[:, None], mask=rows_in, other=0.0).to(tl.float32)
    tail({tail})"""


def product_arguments(request: KernelRequest, form: WeightForm) -> dict[str, str]:
    """Pointers that `matmul` takes before the result, in order, and their types as Triton's compiler wants them."""
    kind = POINTER_TYPES[request.dtype]
    return {"x_ptr": kind, **form.pointers, **dict.fromkeys(operand_names(request), kind)}


def product_text(request: KernelRequest, form: WeightForm) -> str:
    """The kernels `matmul` and `unpack`, and what they call."""
    layout = form.layout
    numbers = {"rows": layout.rows, "tall": layout.rows * layout.words, "block": layout.block, "stride": form.stride}
    matmul = _MATMUL.format(
        pointers=", ".join(product_arguments(request, form)),
        before="\n    ".join(_lines_before(form)),
        groups="\n        ".join(group_lines(form)),
        loop="\n            ".join(loop_lines(form, request.k)),
        after="\n    ".join(_scale_lines(form)),
        split=summed_by_last(f"tail({tail_arguments(request)})"),
        **numbers,
    )
    body = [*_lines_before(form), *decode_lines(form), *_unpack_lines(form, _TYPES[request.dtype])]
    unpack = _UNPACK.format(pointers=", ".join(form.pointers), body="\n    ".join(body), **numbers)
    functions = [product_functions(request.dtype), _SCALES, form.functions]
    return "\n\n\n".join([*functions, tail_text(request), matmul, unpack])


def product_functions(dtype: torch.dtype) -> str:
    """The functions `product` and `product_added` of tiles in `dtype`; float32 keeps its precision on tensor cores."""
    return _PRODUCTS.format(precision=', input_precision="tf32x3"' if dtype == torch.float32 else "")


def finish_text(request: KernelRequest) -> str:
    """The kernel `finish`: the epilogue of a product that was computed elsewhere."""
    pointers = "".join(f"{name}, " for name in operand_names(request))
    return _FINISH.format(pointers=pointers, tail=tail_arguments(request).replace("acc", "y", 1))


def tail_text(request: KernelRequest) -> str:
    """The function `tail`: epilogue and store."""
    tail = epilogue_lines(request)
    lines = [
        *tail.lines,
        f"tl.store(out_ptr + rm[None, :] * {tail.width} + index[:, None], y.to({_TYPES[request.dtype]}), "
        f"mask=rows_in & (index < {tail.width})[:, None])",
    ]
    return f"""{EPILOGUE_HELPERS}


@triton.jit
def tail({tail_arguments(request).replace("acc", "y", 1).replace("BM, BN", "BM: tl.constexpr, BN: tl.constexpr")}):
    {chr(10).join(lines).replace(chr(10), chr(10) + "    ")}"""


def tail_arguments(request: KernelRequest) -> str:
    """What `tail` is called with."""
    return ", ".join(["acc", *operand_names(request), "out_ptr", "tile", "rm", "rn", "rows_in", "N", "BM, BN"])


# -------------------------------------------------------------------- pieces of the loop


def _lines_before(form: WeightForm) -> list[str]:
    """A zero of whole rows is read once, and so are tables."""
    has_zero = form.fields_per_scale is None and form.subtracted.is_tile
    return [*form.before, *(["z0 = tl.load(z_ptr + rn)[:, None]"] if has_zero else [])]


def _scale_lines(form: WeightForm) -> list[str]:
    if form.fields_per_scale is None:
        return ["acc = acc * tl.load(s_ptr + rn)[:, None]"]
    return [f"acc = acc * {_norm(form)}"]


def _norm(form: WeightForm) -> str:
    return "tl.load(norm_ptr + rn)[:, None]" if form.is_scaled else "tl.load(norm_ptr)"


def _unpack_lines(form: WeightForm, kind: str) -> list[str]:
    layout, shared = form.layout, form.fields_per_scale
    step = 1 if form.stride > 1 else layout.rows
    lines = [f"norm = {_norm(form)}"] if shared is not None else ["s0 = tl.load(s_ptr + rn)[:, None]"]
    for j in range(layout.fields):
        scale = "s0" if shared is None else "norm" if form.is_scaled else f"(s{j // shared} * norm)"
        lines += [
            f"k = block * {layout.block} + {j * step} + rq * {form.stride}",
            f"tl.store(out_ptr + k[None, :] * NP + rn[:, None], (f{j}.to(tl.float32) * {scale}).to({kind}), "
            f"mask=(k < K)[None, :])",
        ]
    return lines
