"""The product itself: MR rows times NV vectors of outputs, block by block.

Integer tiles add products of four bytes in 32 (or first in 16) bits over a block, then scale once:

    y += float(sum over the block) * (scale * step)        sum starts at -centre * sum of the activation's codes
    y -= offset * (sum of the activation)                  for weights with a zero or a minimum

Float tiles turn each code into a float in its lane and multiply with the activation itself. Either way one load of
weights serves MR rows, and one broadcast of the activation NV vectors.
"""

from ptqc.codegen.cpp.levels import Level

__all__ = ["float_tile", "integer_tile", "level_bytes", "number_of"]

_SCALES = {"f16": "from_half((const uint16_t *){what} + {at})", "f32": "load<vf>((const float *){what} + {at})"}

_TILE = """\
template <int MR, int NV> static void tile(const Job &job, long m0, long column) {{
    vf y[MR][NV];
    UNROLL
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++) y[m][v] = spread(0.f);
    const uint8_t *w[NV];
    long entry[NV];  // of this vector's first scale
    UNROLL
    for (int v = 0; v < NV; v++) {{
        long at = column + v * L;
        w[v] = job.codes + at / 16 * job.padded * 16 / PER_BYTE + at % 16 * 4;
        entry[v] = at / 16 * job.groups * 16 + at % 16;
    }}
{activation}
    for (long b = 0; b < job.blocks; b++) {{
{block}{scale}    }}
    UNROLL
    for (int m = 0; m < MR; m++) finish<NV>(job, m0 + m, column, y[m]);
}}
"""
_INTEGER_ROWS = """\
    const int8_t *x[MR];
    const float *step[MR], *sum[MR];
    const int32_t *first[MR];
    for (int m = 0; m < MR; m++) {
        x[m] = job.codes_of(m0 + m), step[m] = job.step(m0 + m), sum[m] = job.sum(m0 + m), first[m] = job.first(m0 + m);
    }"""
_INTEGER_BLOCK = """\
        vi total_of[MR][NV];
        UNROLL
        for (int m = 0; m < MR; m++)
            for (int v = 0; v < NV; v++) total_of[m][v] = spread(first[m][b]);
        for (int chunk = 0; chunk < BLOCK / (4 * PER_BYTE); chunk += CHUNKS) {
            Sum t[MR][NV];
            UNROLL
            for (int m = 0; m < MR; m++)
                for (int v = 0; v < NV; v++) t[m][v] = Sum{};
            UNROLL
            for (int c = 0; c < CHUNKS; c++) {
                vb packed[NV];
                UNROLL
                for (int v = 0; v < NV; v++) {
                    packed[v] = load<vb>(w[v] + (chunk + c) * 64);
                    PREFETCH(w[v] + (chunk + c) * 64);
                }
                UNROLL
                for (int j = 0; j < PER_BYTE; j++) {
                    vb weights[NV];
                    UNROLL
                    for (int v = 0; v < NV; v++) weights[v] = level(packed[v], j);
                    UNROLL
                    for (int m = 0; m < MR; m++) {
                        int32_t four = load<int32_t>(x[m] + (chunk + c) * 4 * PER_BYTE + 4 * j);
                        UNROLL
                        for (int v = 0; v < NV; v++) t[m][v] = dot(t[m][v], weights[v], four);
                    }
                }
            }
            UNROLL
            for (int m = 0; m < MR; m++)
                for (int v = 0; v < NV; v++) total_of[m][v] += total(t[m][v]);
        }
        UNROLL
        for (int m = 0; m < MR; m++) x[m] += BLOCK;
        UNROLL
        for (int v = 0; v < NV; v++) w[v] += BLOCK / PER_BYTE * 16;
"""
_FLOAT_ROWS = """\
    const float *x[MR], *sum[MR];
    for (int m = 0; m < MR; m++) x[m] = job.floats_of(m0 + m), sum[m] = job.sum(m0 + m);"""
_FLOAT_BLOCK = """\
        vf total_of[MR][NV];
        UNROLL
        for (int m = 0; m < MR; m++)
            for (int v = 0; v < NV; v++) total_of[m][v] = spread(-(float)CENTRE * sum[m][b]);
        for (int chunk = 0; chunk < BLOCK / (4 * PER_BYTE); chunk++) {
            vu packed[NV];
            UNROLL
            for (int v = 0; v < NV; v++) packed[v] = load<vu>(w[v] + chunk * 64);
            UNROLL
            for (int k = 0; k < 4 * PER_BYTE; k++) {
                vf weights[NV];
                UNROLL
                for (int v = 0; v < NV; v++) weights[v] = number(packed[v] >> (8 * (k % 4) + WIDTH * (k / 4)) & MASK);
                UNROLL
                for (int m = 0; m < MR; m++) {
                    vf one = spread(x[m][chunk * 4 * PER_BYTE + k]);
                    UNROLL
                    for (int v = 0; v < NV; v++) total_of[m][v] += weights[v] * one;
                }
            }
        }
        UNROLL
        for (int m = 0; m < MR; m++) x[m] += BLOCK;
        UNROLL
        for (int v = 0; v < NV; v++) w[v] += BLOCK / PER_BYTE * 16;
"""
_APPLY = """\
        {{
            long group = b / PER_GROUP * 16;
            UNROLL
            for (int v = 0; v < NV; v++) {{
{loads}                UNROLL
                for (int m = 0; m < MR; m++) {{
{uses}                }}
            }}
        }}
"""


def integer_tile(scale: str, has_offset: bool) -> str:
    """The tile of an integer kernel; scale: "none", "f16" or "f32", the type in which scales and offsets come."""
    factor = "spread(step[m][b])" if scale == "none" else "scale * step[m][b]"
    apply = _apply(scale, has_offset, f"y[m][v] += __builtin_convertvector(total_of[m][v], vf) * ({factor});")
    return _TILE.format(activation=_INTEGER_ROWS, block=_INTEGER_BLOCK, scale=apply)


def float_tile(scale: str, has_offset: bool) -> str:
    """The tile of a float kernel."""
    product = "y[m][v] += total_of[m][v];" if scale == "none" else "y[m][v] += total_of[m][v] * scale;"
    return _TILE.format(activation=_FLOAT_ROWS, block=_FLOAT_BLOCK, scale=_apply(scale, has_offset, product))


def _apply(scale: str, has_offset: bool, product: str) -> str:
    loads, uses = [], [product]
    if scale != "none":
        loads.append(f"vf scale = {_SCALES[scale].format(what='job.scales', at='entry[v] + group')};")
    if has_offset:
        loads.append(f"vf offset = {_SCALES[scale].format(what='job.offsets', at='entry[v] + group')};")
        uses.append("y[m][v] -= offset * sum[m][b];")
    return _APPLY.format(
        loads="".join(f"                {line}\n" for line in loads),
        uses="".join(f"                    {line}\n" for line in uses),
    )


def level_bytes(level: Level, is_signed: bool) -> str:
    """The function `level`: bytes of one level each, from packed codes."""
    shift = 128 if is_signed else 0
    codes = "packed" if level.width == 8 else f"(vb)((vh)packed >> ({level.width} * j)) & MASK"
    codes = codes if level.width != 4 else "j ? packed >> 4 : packed & 15"
    text = ""
    if level.table:
        table = (*level.table, *[0] * (16 - len(level.table)))
        entries = ", ".join(str((step - shift) & 255) for step in table * 4)
        text += f"alignas(64) static const uint8_t TABLE[64] = {{{entries}}};\n"
        codes = f"shuffle(load<vb>(TABLE), {codes})"
    text += f"static inline vb level(vb packed, int j) {{ return {codes}; }}\n"
    return text


def number_of(level: Level) -> str:
    """The function `number`: the exact level of a code as a float, per lane."""
    if level.float_bits is not None:
        bias = {3: 120, 2: 112}[level.float_bits]
        return (
            "static inline vf number(vu code) {\n"
            f"    return (vf)((code & 127) << {23 - level.float_bits} | (code & 128) << 24) * 0x1p{bias}f;\n}}\n"
        )
    values = level.floats or tuple(float(step) for step in level.table)
    if not values:
        return "static inline vf number(vu code) { return __builtin_convertvector((vi)code, vf); }\n"
    table = ", ".join(f"{value!r}f" for value in (*values, *[0.0] * (16 - len(values))))
    return (
        f"static const float NUMBERS[16] = {{{table}}};\n"
        "static inline vf number(vu code) { return gather(NUMBERS, (vi)code); }\n"
    )
