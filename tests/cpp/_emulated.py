"""Instructions that this CPU may lack, in plain C++: everything around them is then tested as it is.

Not inlined: unrolled with the tiles they would compile for half a minute.
"""

from dataclasses import replace

from ptqc.codegen.cpp.isa import ISAS

_ZMM = """
static inline vf from_half(const uint16_t *p) {
    vf v;
    for (int i = 0; i < 2; i++) store((float *)&v + 8 * i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + i)));
    return v;
}
static inline void to_half(uint16_t *p, vf v) {
    for (int i = 0; i < 2; i++)
        _mm_storeu_si128((__m128i *)p + i, _mm256_cvtps_ph(_mm256_loadu_ps((float *)&v + 8 * i), 0));
}
__attribute__((noinline)) static vb shuffle(vb table, vb index) {
    vb v;
    for (int i = 0; i < 4 * L; i++) v[i] = table[i / 16 * 16 + index[i]];
    return v;
}
__attribute__((noinline)) static vf gather(const float *table, vi index) {
    vf v;
    for (int i = 0; i < L; i++) v[i] = table[index[i]];
    return v;
}
"""
_DOT = """
typedef vi Sum;
static inline vi total(Sum t) { return t; }
__attribute__((noinline)) static Sum dot(Sum t, vb w, int32_t x) {
    for (int i = 0; i < 4 * L; i++) t[i / 4] += w[i] * (int8_t)(x >> 8 * (i % 4));
    return t;
}
"""


def emulated(name):
    """An Isa of that name which any CPU with AVX2 runs."""
    isa, avx2 = ISAS[name], ISAS["avx2"]
    functions = "#include <immintrin.h>\n" + _ZMM if isa.lanes == 16 else isa.functions
    return replace(isa, flags=avx2.flags, needs=avx2.needs, functions=functions, narrow=_DOT, wide=_DOT)
