"""A kernel's whole text: fragments for CPU, levels, activation, tile and epilogue, in that order."""

from dataclasses import dataclass

import torch

from ptqc.codegen.cpp.blocks import Blocks
from ptqc.codegen.cpp.epilogue import FUNCTIONS, epilogue
from ptqc.codegen.cpp.isa import Isa, vectors
from ptqc.codegen.cpp.layout import Layout
from ptqc.codegen.cpp.levels import Level, exact_level, integer_level
from ptqc.codegen.cpp.prologue import float_rows, integer_rows
from ptqc.codegen.cpp.tiles import float_tile, integer_tile, level_bytes, number_of
from ptqc.fusions import narrows
from ptqc.requests import KernelRequest

__all__ = ["KINDS", "MEMORY", "NUMBERS", "Plan", "plan", "source"]

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int32: 3}
"""What texts call a type."""
MEMORY = """\
struct Operand { const void *data; long kind; };  // 0: float32, 1: float16, 2: bfloat16, 3: int32
template <int KIND> static inline vf read_full(const void *p, long at) {
    if (KIND == 0) return load<vf>((const float *)p + at);
    if (KIND == 1) return from_half((const uint16_t *)p + at);
    if (KIND == 3) return __builtin_convertvector(load<vi>((const int32_t *)p + at), vf);
    return (vf)(__builtin_convertvector(load<vw>((const uint16_t *)p + at), vu) << 16);
}
// `count` numbers, no more than a vector; the rest are zero.
template <int KIND> static inline vf read_some(const void *p, long at, long count) {
    if (count >= L) return read_full<KIND>(p, at);
    int32_t lanes[L] = {};
    const int size = KIND == 0 || KIND == 3 ? 4 : 2;
    memcpy(lanes, (const char *)p + at * size, count * size);
    return read_full<KIND>(lanes, 0);
}
static inline vf take(const Operand &o, long at, long count) {
    switch (o.kind) {
        case 0: return read_some<0>(o.data, at, count);
        case 1: return read_some<1>(o.data, at, count);
        case 3: return read_some<3>(o.data, at, count);
        default: return read_some<2>(o.data, at, count);
    }
}
static inline vf part(const float *p, long count) { return count <= 0 ? spread(0.f) : read_some<0>(p, 0, count); }
static inline vi nearest(vf v) { return (vi)(v + 12582912.f) - 0x4b400000; }  // ties to even, below 2**22
static inline vf clamp(vf v) { return v > 127.f ? spread(127.f) : v < -127.f ? spread(-127.f) : v; }
static inline void put(int8_t *p, vi v) { store(p, __builtin_convertvector(v, vc)); }
"""
NUMBERS = {
    torch.float32: """\
typedef float Number;
static inline vf read(const Number *p, long count) { return read_some<0>(p, 0, count); }
static inline void write_full(Number *p, vf v) { store(p, v); }
""",
    torch.float16: """\
typedef uint16_t Number;
static inline vf read(const Number *p, long count) { return read_some<1>(p, 0, count); }
static inline void write_full(Number *p, vf v) { to_half(p, v); }
""",
    torch.bfloat16: """\
typedef uint16_t Number;
static inline vf read(const Number *p, long count) { return read_some<2>(p, 0, count); }
static inline void write_full(Number *p, vf v) {  // to nearest, ties to even; NaN stays NaN
    vu bits = (vu)v;
    bits = v == v ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
    store(p, __builtin_convertvector(bits >> 16, vw));
}
""",
}
_WRITE = """\
static inline void write(Number *p, vf v, long count) {
    if (count >= L) return write_full(p, v);
    Number lanes[L];
    write_full(lanes, v);
    memcpy(p, lanes, count * sizeof(Number));
}
"""
_JOB = """\
struct Job {
    const void *x;
    void *y;
    char *work;
    const uint8_t *codes;
    const void *scales, *offsets;
    const float *columns;
    const Operand *operands;
    long rows, n, k, group, groups, blocks, padded, columns_padded, scratch;
    int8_t *codes_of(long m) const { return (int8_t *)work + m * padded; }
    float *floats_of(long m) const { return (float *)work + m * padded; }
    char *sums() const { return work + rows * padded * ACTIVATION; }
    float *sum(long m) const { return (float *)sums() + m * blocks; }
    float *step(long m) const { return (float *)sums() + (rows + m) * blocks; }
    int32_t *first(long m) const { return (int32_t *)sums() + (2 * rows + m) * blocks; }
    float *buffer(int thread) const { return (float *)sums() + 3 * rows * blocks + thread * scratch; }
};
"""
_RUN = """\
static void block_of_rows(const Job &job, long m, long end, long column) {{
{loops}}}
// sizes: n, k, group, groups, blocks, padded inputs, padded columns, floats of a row's buffer.
extern "C" void run(const void *x, void *y, void *work, const void *codes, const void *scales, const void *offsets,
                    const void *columns, const void *operands, const long *sizes, long rows_of_x, long threads) {{
    const Job job = {{x, y, (char *)work, (const uint8_t *)codes, scales, offsets, (const float *)columns,
                     (const Operand *)operands, rows_of_x, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
                     sizes[6], sizes[7]}};
    const long tiles = job.columns_padded / COLUMNS, row_blocks = (job.rows + ROWS - 1) / ROWS;
    const long chunk = tiles * row_blocks / (threads * 8) + 1;
    const bool is_shared = threads > 1 && job.rows > 1;
    if (!is_shared)
        for (long m = 0; m < job.rows; m++) rows(job, m, job.buffer(0));
    if (threads == 1) {{
        for (long t = 0; t < tiles * row_blocks; t++) {{
            long m = t % row_blocks * ROWS, end = m + ROWS < job.rows ? m + ROWS : job.rows;
            block_of_rows(job, m, end, t / row_blocks * COLUMNS);
        }}
        return;
    }}
#pragma omp parallel num_threads(threads)
    {{
        if (is_shared) {{
#pragma omp for schedule(static)
            for (long m = 0; m < job.rows; m++) rows(job, m, job.buffer(omp_get_thread_num()));
        }}
#pragma omp for schedule(dynamic, chunk) nowait
        for (long t = 0; t < tiles * row_blocks; t++) {{
            long m = t % row_blocks * ROWS, end = m + ROWS < job.rows ? m + ROWS : job.rows;
            block_of_rows(job, m, end, t / row_blocks * COLUMNS);
        }}
    }}
}}
"""
_ROWS_AT_ONCE = 64
"""Rows of the activation that one piece of work multiplies: they stay in the second cache with the tile's weights."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a kernel for a request is made of. scale: how scales come ("none": one per column, applied at the end)."""

    request: KernelRequest
    isa: Isa
    level: Level
    layout: Layout
    is_float: bool
    scale: str

    @property
    def has_offset(self) -> bool:
        """True if the weight has a zero or a minimum."""
        return self.request.spec.zero != "none"


def plan(request: KernelRequest, isa: Isa) -> Plan | str:
    """How to serve a request, or why not: what spec, activation and exactness leave."""
    is_float = request.act.dtype is None and (request.exact or integer_level(request.spec) is None)
    level = exact_level(request.spec) if is_float else integer_level(request.spec)
    if level is None and is_float:
        return f"the levels of {request.spec} have no exact form of 8 bits"
    if level is None:
        return f"{request.spec} weights have no integer form: give them a floating-point activation"
    is_signed = not is_float and level.is_wide and not isa.takes_unsigned
    multiple = max(isa.lanes, 4 * level.per_byte)
    blocks = Blocks.cut(request.k, request.spec.group, multiple)
    is_gated = any(map(narrows, request.epilogue))
    layout = Layout(
        request.spec, level, blocks, request.n, isa.columns, isa.lanes, is_gated, request.exact, is_signed
    )
    has_one_scale = blocks.groups == 1 and request.spec.zero == "none"
    return Plan(request, isa, level, layout, is_float, "none" if has_one_scale else "f32" if request.exact else "f16")


def source(plan: Plan) -> str:
    """The C++ text of a kernel; shapes are arguments of the call, so weights of one spec share it."""
    request, isa, level = plan.request, plan.isa, plan.level
    blocks, layout = plan.layout.blocks, plan.layout
    operands = request.operands
    before = sum(name.startswith("prologue") for name in operands)
    first = before + (1 if request.act.is_static else 0)
    chunks = blocks.length // (4 * level.per_byte)
    most = max(1, isa.steps(max(level.span, 1), 8 * level.per_byte) // level.per_byte)
    at_once = next(size for size in range(min(most, chunks), 0, -1) if chunks % size == 0)
    centre = level.centre - (128 if layout.is_signed else 0)
    constants = {
        "BLOCK": blocks.length, "PER_GROUP": blocks.per_group, "WIDTH": level.width, "PER_BYTE": level.per_byte,
        "MASK": 2**level.width - 1, "CENTRE": centre, "CHUNKS": at_once, "COLUMNS": isa.columns,
        "ROWS": _ROWS_AT_ONCE, "ACTIVATION": 4 if plan.is_float else 1,
    }  # fmt: skip
    if plan.is_float:
        product = number_of(level) + float_rows(request.prologue)
        tile = float_tile(plan.scale, plan.has_offset)
    else:
        narrow = isa.wide if level.is_wide else isa.narrow
        product = narrow + level_bytes(level, layout.is_signed) + integer_rows(request.prologue, request.act, before)
        tile = integer_tile(plan.scale, plan.has_offset)
    return "".join((
        "#include <omp.h>\n", vectors(isa.lanes),
        *(f"constexpr int {name} = {value};\n" for name, value in constants.items()),
        "#define PREFETCH(p) __builtin_prefetch((p) + 1024)\n",
        isa.functions, MEMORY, NUMBERS[request.dtype], _WRITE, _JOB, FUNCTIONS, product,
        epilogue(request.epilogue, first), tile, _RUN.format(loops=_loops(isa)),
    ))  # fmt: skip


def _loops(isa: Isa) -> str:
    """Rows in steps of the tallest tile, then of the lower ones; each over the columns of the widest."""
    lines = []
    for rows, width in isa.tiles:
        tiles = "".join(
            f" tile<{rows}, {width}>(job, m, column + {at * isa.lanes});"
            for at in range(0, isa.columns // isa.lanes, width)
        )
        lines.append(f"    for (; m + {rows} <= end; m += {rows}) {{{tiles} }}\n")
    return "".join(lines)
