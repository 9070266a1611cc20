"""Attention of few queries over many keys, as in decoding: a C++ text.

Queries that share a key-value head are handled together, at most MR at a time, so a key is read once for all of them.
Keys are taken KEYS at a time with a running maximum (Milakov and Gimelshein 2018, arXiv:1805.02867); blocks in which
a boolean mask hides every key are not read, so what a static cache holds beyond its filled part costs nothing. Long
caches are cut in pieces whose number depends on the shapes alone, and joined in order (Dao, Haziza, Massa and Sizov
2023, "Flash-Decoding"): any number of threads gives the same bits. Everything is computed in float32.
"""

import torch

from ptqc.attention import AttentionRequest
from ptqc.codegen.cpp.epilogue import EXPONENTIAL
from ptqc.codegen.cpp.isa import Isa, vectors
from ptqc.codegen.cpp.source import KINDS, MEMORY, NUMBERS

__all__ = ["SIZES", "attention_source"]

SIZES = (
    "batch", "heads", "shared", "queries", "keys", "pieces",
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
    "mask_batch", "mask_head", "mask_row", "mask_key",
)  # fmt: skip
"""What the kernel is told, in order: heads of keys, queries' heads that share one, strides in elements."""

_MASKS = {
    None: ("0.f", "true"),
    torch.bool: ("0.f", "((const uint8_t *)j.mask)[at]"),
    torch.float32: ("((const float *)j.mask)[at]", "true"),
    torch.bfloat16: ("one<2>(j.mask, at)", "true"),
    torch.float16: ("one<1>(j.mask, at)", "true"),
}
_TEXT = """\
constexpr int D = {head}, DV = {value}, KIND = {kind}, MR = 4, KEYS = 32;
constexpr float HIDDEN = -__builtin_inff();
struct Job {{
    const Number *q, *k, *v;
    const void *mask;
    Number *y;
    float *pieces_of;
    long {sizes};
    float scale;
}};
template <int KIND> static inline float one(const void *p, long at) {{ return read_some<KIND>(p, at, 1)[0]; }}
static inline float bias(const Job &j, long at) {{ return {bias}; }}
static inline bool is_seen(const Job &j, long at) {{ return {seen}; }}
static inline float sum(vf v) {{
#ifndef __clang__
    UNROLL
    for (int width = L / 2; width; width /= 2) v += __builtin_shuffle(v, LANES ^ width);
    return v[0];
#else
    float all = 0;
    for (int l = 0; l < L; l++) all += v[l];
    return all;
#endif
}}
static inline float most(vf v) {{
    float all = v[0];
    for (int l = 1; l < L; l++) all = v[l] > all ? v[l] : all;
    return all;
}}
// Rows first .. first + R of the queries that share a head, over keys from .. to: sums [R][DV], maxima and weights.
template <int R> static void attend(const Job &j, long b, long h, long first, long from, long to, float *out) {{
    alignas(64) float q[R][D], s[R][KEYS], y[R][DV];
    float top[R], weight[R];
    long mask[R];
    for (int r = 0; r < R; r++) {{
        const long head = h * j.shared + (first + r) / j.queries, row = (first + r) % j.queries;
        const Number *row_of = j.q + b * j.q_batch + head * j.q_head + row * j.q_row;
        for (int d = 0; d < D; d += L) store(q[r] + d, read_full<KIND>(row_of, d) * j.scale);
        for (int d = 0; d < DV; d += L) store(y[r] + d, spread(0.f));
        mask[r] = b * j.mask_batch + head * j.mask_head + row * j.mask_row;
        top[r] = HIDDEN, weight[r] = 0;
    }}
    for (long start = from; start < to; start += KEYS) {{
        const int count = to - start < KEYS ? to - start : KEYS;
        bool is_any = false;
        for (int r = 0; r < R; r++)
            for (int i = 0; i < KEYS; i++) {{
                const long at = mask[r] + (start + i) * j.mask_key;
                const bool seen = i < count && is_seen(j, at);
                s[r][i] = seen ? bias(j, at) : HIDDEN;
                is_any |= s[r][i] > HIDDEN || s[r][i] != s[r][i];
            }}
        if (!is_any) continue;
        const Number *k = j.k + b * j.k_batch + h * j.k_head + start * j.k_row;
        for (int i = 0; i < count; i++, k += j.k_row) {{
            vf dot[R];
            UNROLL
            for (int r = 0; r < R; r++) dot[r] = spread(0.f);
            UNROLL
            for (int d = 0; d < D; d += L) {{
                const vf key = read_full<KIND>(k, d);
                UNROLL
                for (int r = 0; r < R; r++) dot[r] += key * load<vf>(q[r] + d);
            }}
            UNROLL
            for (int r = 0; r < R; r++)
                if (s[r][i] != HIDDEN) s[r][i] += sum(dot[r]);
        }}
        UNROLL
        for (int r = 0; r < R; r++) {{
            vf high = spread(top[r]);
            for (int i = 0; i < KEYS; i += L) {{
                const vf v = load<vf>(s[r] + i);
                high = v > high ? v : high;
            }}
            const float now = most(high);
            vf total = spread(0.f);
            for (int i = 0; i < KEYS; i += L) {{
                const vf v = load<vf>(s[r] + i), p = v == HIDDEN ? spread(0.f) : exponential(v - now);
                store(s[r] + i, p);
                total += p;
            }}
            const float faded = top[r] == HIDDEN ? 0.f : exponential(spread(top[r] - now))[0];
            top[r] = now, weight[r] = weight[r] * faded + sum(total);
            for (int d = 0; d < DV; d += L) store(y[r] + d, load<vf>(y[r] + d) * faded);
        }}
        constexpr int STEP = DV % (2 * L) ? L : 2 * L;
        for (int d = 0; d < DV; d += STEP) {{
            vf t[R][STEP / L];
            UNROLL
            for (int r = 0; r < R; r++)
                for (int e = 0; e < STEP / L; e++) t[r][e] = load<vf>(y[r] + d + e * L);
            const Number *v = j.v + b * j.v_batch + h * j.v_head + start * j.v_row + d;
            for (int i = 0; i < count; i++, v += j.v_row) {{
                vf value[STEP / L];
                UNROLL
                for (int e = 0; e < STEP / L; e++) value[e] = read_full<KIND>(v, e * L);
                UNROLL
                for (int r = 0; r < R; r++)
                    for (int e = 0; e < STEP / L; e++) t[r][e] += value[e] * s[r][i];
            }}
            UNROLL
            for (int r = 0; r < R; r++)
                for (int e = 0; e < STEP / L; e++) store(y[r] + d + e * L, t[r][e]);
        }}
    }}
    for (int r = 0; r < R; r++) {{
        memcpy(out + r * (DV + 2), y[r], sizeof y[r]);
        out[r * (DV + 2) + DV] = top[r], out[r * (DV + 2) + DV + 1] = weight[r];
    }}
}}
static void piece(const Job &j, long task) {{
    const long rows = j.shared * j.queries, p = task % j.pieces, h = task / j.pieces % j.heads;
    const long length = (j.keys + j.pieces - 1) / j.pieces, from = p * length;
    const long to = from + length < j.keys ? from + length : j.keys, b = task / j.pieces / j.heads;
    float *out = j.pieces_of + task * rows * (DV + 2);
    long r = 0;
    for (; r + MR <= rows; r += MR) attend<MR>(j, b, h, r, from, to, out + r * (DV + 2));
    for (; r < rows; r++) attend<1>(j, b, h, r, from, to, out + r * (DV + 2));
}}
// The pieces of one head, in order. A row that sees nothing is zero.
static void join(const Job &j, long head) {{
    const long rows = j.shared * j.queries, b = head / j.heads, h = head % j.heads;
    for (long r = 0; r < rows; r++) {{
        const float *in = j.pieces_of + (head * j.pieces * rows + r) * (DV + 2);
        const long next = rows * (DV + 2);
        float top = HIDDEN, weight = 0;
        for (long p = 0; p < j.pieces; p++) top = in[p * next + DV] > top ? in[p * next + DV] : top;
        alignas(64) float y[DV] = {{}};
        for (long p = 0; p < j.pieces; p++) {{
            const float *one = in + p * next;
            if (one[DV + 1] == 0) continue;
            const float share = exponential(spread(one[DV] - top))[0];
            weight += one[DV + 1] * share;
            for (int d = 0; d < DV; d += L) store(y + d, load<vf>(y + d) + load<vf>(one + d) * share);
        }}
        const float factor = weight == 0 ? 0.f : 1.f / weight;
        Number *out = j.y + ((b * j.queries + r % j.queries) * j.heads * j.shared + h * j.shared + r / j.queries) * DV;
        for (int d = 0; d < DV; d += L) write_full(out + d, load<vf>(y + d) * factor);
    }}
}}
extern "C" void run(const void *q, const void *k, const void *v, const void *mask, void *y, void *work,
                    const long *sizes, float scale, long threads) {{
    const Job j = {{(const Number *)q, (const Number *)k, (const Number *)v, mask, (Number *)y, (float *)work,
                    {arguments}, scale}};
    const long heads = j.batch * j.heads;
    if (threads == 1) {{
        for (long task = 0; task < heads * j.pieces; task++) piece(j, task);
        for (long head = 0; head < heads; head++) join(j, head);
        return;
    }}
#pragma omp parallel num_threads(threads)
    {{
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < heads * j.pieces; task++) piece(j, task);
#pragma omp for schedule(static)
        for (long head = 0; head < heads; head++) join(j, head);
    }}
}}
"""


def attention_source(request: AttentionRequest, isa: Isa) -> str:
    """The C++ text; shapes and strides but for the features of a head are arguments of the call."""
    bias, seen = _MASKS[request.mask]
    lanes = ", ".join(map(str, range(isa.lanes)))
    text = _TEXT.format(
        head=request.head_features, value=request.value_features, kind=KINDS[request.dtype],
        sizes=", ".join(SIZES), bias=bias, seen=seen,
        arguments=", ".join(f"sizes[{index}]" for index in range(len(SIZES))),
    )  # fmt: skip
    return "".join((
        "#include <omp.h>\n", vectors(isa.lanes), f"static const vi LANES = {{{lanes}}};\n", isa.functions, MEMORY,
        NUMBERS[request.dtype], EXPONENTIAL, text,
    ))  # fmt: skip
