"""The first pass of a kernel: rows of the activation, through the prologue, to what the product reads.

Each row goes through a buffer of floats, one per thread. Integer kernels then get int8 codes; per block: the step of
the codes (`step`), what the centre of the weight's levels subtracts (`first`, an integer), and for weights with an
offset the sum of the numbers that the codes stand for (`sum`). Float kernels get the buffer and its sums.

Steps are the largest magnitude of a block, of a row (int8-token) or calibrated, over 127. A block that holds a NaN or
an infinity gets NaN for its step, which reaches the result.
"""

from collections.abc import Sequence

from ptqc.act_spec import ActSpec

__all__ = ["float_rows", "integer_rows"]

_STEPS = {
    "rms_norm": """\
    {{  // rms_norm
        vf squares = spread(0.f);
        float total = 0;
        long i = 0;
        for (; i + L <= job.k; i += L) {{ vf v = load<vf>(row + i); squares += v * v; }}
        for (; i < job.k; i++) total += row[i] * row[i];
        for (int l = 0; l < L; l++) total += squares[l];
        vf factor = spread(1.f / __builtin_sqrtf(total / job.k + {number}f));
        for (i = 0; i < job.k; i += L) store(row + i, load<vf>(row + i) * factor * take({operand}, i, job.k - i));
    }}
""",
    "scale": """\
    for (long i = 0; i < job.k; i += L) store(row + i, load<vf>(row + i) * take({operand}, i, job.k - i));  // scale
""",
    "order": """\
    {{  // order
        const int32_t *order = (const int32_t *){operand}.data;
        float *other = row + job.scratch / 2;
        for (long i = 0; i < job.k; i++) other[i] = row[order[i]];
        row = other;
    }}
""",
}
_FETCH = """\
// Row m of the activation behind the prologue: k floats at the start or in the middle of the buffer.
static float *fetch(const Job &job, long m, float *row) {{
    const Number *x = (const Number *)job.x + m * job.k;
    for (long i = 0; i < job.k; i += L) store(row + i, read(x + i, job.k - i));
{steps}    return row;
}}
// Where a block begins among the inputs, and how many of its inputs there are.
static inline long begin(const Job &job, long b) {{ return b / PER_GROUP * job.group + b % PER_GROUP * BLOCK; }}
static inline long filled(const Job &job, long b) {{
    long end = (b / PER_GROUP + 1) * job.group, left = (end < job.k ? end : job.k) - begin(job, b);
    return left < 0 ? 0 : left < BLOCK ? left : BLOCK;
}}
"""
_INTEGER = """\
static inline float largest(const float *values, long count) {{
    vf most = spread(0.f), spoilt = spread(0.f);
    for (long i = 0; i < count; i += L) {{
        vf v = part(values + i, count - i), size = (vf)((vi)v & 0x7fffffff);
        most = most > size ? most : size;
        spoilt += v - v;
    }}
    float all = 0, bad = 0;
    for (int l = 0; l < L; l++) {{ all = most[l] > all ? most[l] : all; bad += spoilt[l]; }}
    return all + bad;
}}
static void rows(const Job &job, long m, float *buffer) {{
    float *row = fetch(job, m, buffer);
    int8_t *codes = job.codes_of(m);
{per_row}    for (long b = 0; b < job.blocks; b++) {{
        const float *values = row + begin(job, b);
        long count = filled(job, b);
{per_block}        vi sum = {{}};
        for (long i = 0; i < BLOCK; i += L) {{
            vi step_count = nearest({steps_of});
            sum += step_count;
            put(codes + b * BLOCK + i, step_count);
        }}
        int32_t all = 0;
        for (int l = 0; l < L; l++) all += sum[l];
        job.step(m)[b] = step;
        job.first(m)[b] = -CENTRE * all;
        job.sum(m)[b] = step * all;
    }}
}}
"""
_PER_BLOCK = """\
        float step = largest(values, count) / 127.f;
        vf inverse = spread(step > 0 ? 1.f / step : 0.f);
"""
_PER_ROW = """\
    float step = largest(row, job.k);
    step = (step < 1e-30f ? 1e-30f : step) / 127.f;
"""
_STATIC = """\
    float step = take({operand}, 0, 1)[0];
    float spoilt = largest(row, job.k);
    spoilt -= spoilt;
"""
_CLAMPED = "clamp(part(values + i, count - i) / spread(step))"

_FLOAT = """\
static void rows(const Job &job, long m, float *buffer) {{
    float *row = fetch(job, m, buffer), *out = job.floats_of(m);
    for (long b = 0; b < job.blocks; b++) {{
        const float *values = row + begin(job, b);
        long count = filled(job, b);
        vf sum = spread(0.f);
        for (long i = 0; i < BLOCK; i += L) {{
            vf v = part(values + i, count - i);
            sum += v;
            store(out + b * BLOCK + i, v);
        }}
        float all = 0;
        for (int l = 0; l < L; l++) all += sum[l];
        job.sum(m)[b] = all;
    }}
}}
"""


def integer_rows(prologue: Sequence[str], act: ActSpec, scale_operand: int | None) -> str:
    """The text of the first pass of an integer kernel. scale_operand: number of the operand with a static step."""
    if act.dtype is None:
        pieces = {"per_row": "", "per_block": _PER_BLOCK, "steps_of": "part(values + i, count - i) * inverse"}
    elif act.is_static:
        operand = f"job.operands[{scale_operand}]"
        pieces = {"per_row": _STATIC.format(operand=operand), "per_block": "", "steps_of": _CLAMPED}
    else:
        pieces = {"per_row": _PER_ROW, "per_block": "", "steps_of": _CLAMPED}
    text = _fetch(prologue) + _INTEGER.format(**pieces)
    return text.replace("= step;", "= step + spoilt;") if act.is_static else text


def float_rows(prologue: Sequence[str]) -> str:
    """The text of the first pass of a float kernel."""
    return _fetch(prologue) + _FLOAT.format()


def _fetch(prologue: Sequence[str]) -> str:
    steps = []
    for index, name in enumerate(prologue):
        bare, _, number = name.partition(":")
        value = repr(float(number)) if number else ""
        steps.append(_STEPS[bare].format(operand=f"job.operands[{index}]", number=value))
    return _FETCH.format(steps="".join(steps))
