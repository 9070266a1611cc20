"""The last pass of a tile: sums in registers, through the epilogue, to the result.

A step works on one vector of outputs `v` in place `at` of row `m`, `count` of them inside of the matrix. Behind a gate
the outputs of two vectors have become one: those before it know both places.
"""

from collections.abc import Sequence
from itertools import count

from ptqc.fusions import ACTIVATIONS, narrows, takes_operand

__all__ = ["EXPONENTIAL", "FUNCTIONS", "epilogue"]

EXPONENTIAL = """\
// 2^n e^f: the exponent by integers, the rest by its series. Relative error below 3e-7 on [-87, 88].
static inline vf exponential(vf x) {
    x = x > 88.f ? spread(88.f) : x < -87.f ? spread(-87.f) : x;
    vf n = (x * 1.44269504f + 12582912.f) - 12582912.f;
    vf f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = f * (1.f / 720) + 1.f / 120;
    p = p * f + 1.f / 24, p = p * f + 1.f / 6, p = p * f + 0.5f, p = p * f + 1.f, p = p * f + 1.f;
    return p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
}
"""
FUNCTIONS = EXPONENTIAL + """\
static inline vf act_sigmoid(vf x) { return 1.f / (1.f + exponential(-x)); }
static inline vf act_silu(vf x) { return x * act_sigmoid(x); }
static inline vf act_tanh(vf x) { return 1.f - 2.f / (exponential(2.f * x) + 1.f); }
static inline vf act_relu(vf x) { return x < 0.f ? spread(0.f) : x; }
static inline vf act_relu2(vf x) { return act_relu(x) * act_relu(x); }
static inline vf act_gelu_tanh(vf x) {
    return x * act_sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
}
// erf by Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7.
static inline vf act_gelu(vf x) {
    vf z = (vf)((vi)x & 0x7fffffff) * 0.707106781f, t = 1.f / (1.f + 0.3275911f * z);
    vf p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f, p = p * t - 0.284496736f, p = p * t + 0.254829592f;
    vf tail = 0.5f * p * t * exponential(-z * z);
    return x * (x < 0.f ? tail : 1.f - tail);
}
"""
_WITH_OPERAND = {
    "bias": "v += take(job.operands[{operand}], {at}, count);",
    "scale": "v *= take(job.operands[{operand}], {at}, count);",
    "add": "v += take(job.operands[{operand}], m * {width} + {at}, count);",
    "mul": "v *= take(job.operands[{operand}], m * {width} + {at}, count);",
}
_PLAIN = """\
template <int NV> static inline void finish(const Job &job, long m, long column, const vf *y) {{
    UNROLL
    for (int j = 0; j < NV; j++) {{
        long at = column + j * L, count = job.n - at;
        if (count <= 0) return;
        vf v = y[j] * load<vf>(job.columns + at);
{steps}        write((Number *)job.y + m * job.n + at, v, count);
    }}
}}
"""
_GATED = """\
template <int NV> static inline void finish(const Job &job, long m, long column, const vf *y) {{
    const long half = job.n / 2;
    UNROLL
    for (int j = 0; j < NV; j += 2) {{
        long at = (column + j * L) / 2, count = half - at;
        if (count <= 0) return;
        vf gate = y[j] * load<vf>(job.columns + column + j * L);
        vf other = y[j + 1] * load<vf>(job.columns + column + (j + 1) * L);
        {{ vf &v = gate;
{first}        }}
        {{ vf &v = other;
{second}        }}
        vf v = act_{activation}(gate) * other;
{steps}        write((Number *)job.y + m * half + at, v, count);
    }}
}}
"""


def epilogue(names: Sequence[str], first_operand: int) -> str:
    """The function `finish`, which writes NV vectors of row m. first_operand: number of the first operand."""
    numbers = count(first_operand)
    operands = [next(numbers) if takes_operand(name) else None for name in names]
    steps = list(zip(names, operands, strict=True))
    gate = next((index for index, name in enumerate(names) if narrows(name)), None)
    if gate is None:
        return _PLAIN.format(steps=_lines(steps, "at", "job.n"))
    before = steps[:gate]
    return _GATED.format(
        first=_lines(before, "at", "job.n"),
        second=_lines(before, "(half + at)", "job.n"),
        activation=names[gate].removeprefix("gate_"),
        steps=_lines(steps[gate + 1 :], "at", "half"),
    )


def _lines(steps: Sequence[tuple[str, int | None]], at: str, width: str) -> str:
    return "".join(f"        {_line(name, operand, at, width)}\n" for name, operand in steps)


def _line(name: str, operand: int | None, at: str, width: str) -> str:
    if name in ACTIVATIONS:
        return f"v = act_{name}(v);"
    return _WITH_OPERAND[name].format(operand=operand, at=at, width=width)
