"""The vector instructions of each CPU behind a few small functions; all else is written in GCC's vector types.

    from_half, to_half      a vector of float16 in memory, to and from float
    fused                   a * b + c, rounded once or twice: for products that are exact
    least, greatest         of two vectors of float that are not NaN
    scaled, pairs           of two vectors of int16: products over 2^15, rounded; sums of the products of neighbours
    shuffle                 table[index] for 16 bytes, index below 16
    gather                  table[index] for 16 floats
    Sum, none, dot, total   sum of products of four weights (bytes) with four inputs (int8), per lane

Weights are unsigned up to `span`, or (wide) signed where the instruction wants that. Instructions that add in 16 bits
overflow after some steps, which `steps` counts: `total` then makes 32 bits of the sum.
"""

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["ISAS", "Isa", "cpu_flags", "running_isa", "vectors"]

_VECTORS = """\
#include <cstdint>
#include <cstring>
#define UNROLL _Pragma("GCC unroll 32")
constexpr int L = {lanes};
typedef float vf __attribute__((vector_size(4 * L)));
typedef int32_t vi __attribute__((vector_size(4 * L)));
typedef uint32_t vu __attribute__((vector_size(4 * L)));
typedef uint8_t vb __attribute__((vector_size(4 * L)));
typedef int16_t vs __attribute__((vector_size(4 * L)));
typedef uint16_t vh __attribute__((vector_size(4 * L)));
typedef int8_t vc __attribute__((vector_size(L)));
typedef uint16_t vw __attribute__((vector_size(2 * L)));
template <class V> static inline V load(const void *p) {{ V v; memcpy(&v, p, sizeof v); return v; }}
template <class V> static inline void store(void *p, V v) {{ memcpy(p, &v, sizeof v); }}
static inline vf spread(float x) {{ return vf{{{x}}}; }}
static inline vi spread(int32_t x) {{ return vi{{{x}}}; }}
"""
_AVX2 = """\
#include <immintrin.h>
static inline vf from_half(const uint16_t *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline void to_half(uint16_t *p, vf v) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, 0)); }
static inline vs scaled(vs a, vs b) { return (vs)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b); }
static inline vi pairs(vs a, vs b) { return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
static inline vf fused(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline vf least(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
static inline vf greatest(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
static inline vb shuffle(vb table, vb index) { return (vb)_mm256_shuffle_epi8((__m256i)table, (__m256i)index); }
static inline vf gather(const float *table, vi index) {
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(index << 28));
}
"""
_AVX512 = """\
#include <immintrin.h>
static inline vf from_half(const uint16_t *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline void to_half(uint16_t *p, vf v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, 0)); }
static inline vs scaled(vs a, vs b) { return (vs)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b); }
static inline vi pairs(vs a, vs b) { return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
static inline vf fused(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline vf least(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
static inline vf greatest(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vb shuffle(vb table, vb index) { return (vb)_mm512_shuffle_epi8((__m512i)table, (__m512i)index); }
static inline vf gather(const float *table, vi index) {
    return (vf)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
}
"""
_NEON = """\
#include <arm_neon.h>
static inline vf from_half(const uint16_t *p) { return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline void to_half(uint16_t *p, vf v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v))); }
static inline vs scaled(vs a, vs b) { return (vs)vqrdmulhq_s16((int16x8_t)a, (int16x8_t)b); }
static inline vi pairs(vs a, vs b) {
    int16x8_t one = (int16x8_t)a, other = (int16x8_t)b;
    return (vi)vpaddq_s32(vmull_s16(vget_low_s16(one), vget_low_s16(other)), vmull_high_s16(one, other));
}
static inline vf fused(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
static inline vf least(vf a, vf b) { return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b); }
static inline vf greatest(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
static inline vb shuffle(vb table, vb index) { return (vb)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index); }
"""
_PLAIN_GATHER = """\
__attribute__((noinline)) static vf gather(const float *table, vi index) {
    vf v;
    for (int i = 0; i < L; i++) v[i] = table[index[i]];
    return v;
}
"""
_PLAIN = """\
static inline vs scaled(vs a, vs b) {
    vs v;
    for (int i = 0; i < 2 * L; i++) v[i] = (a[i] * b[i] + (1 << 14)) >> 15;
    return v;
}
static inline vi pairs(vs a, vs b) {
    vi v;
    for (int i = 0; i < L; i++) v[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return v;
}
static inline vf fused(vf a, vf b, vf c) { return a * b + c; }
static inline vf least(vf a, vf b) { return a < b ? a : b; }
static inline vf greatest(vf a, vf b) { return a > b ? a : b; }
static inline vf from_half(const uint16_t *p) {  // exponents moved by a product, so that subnormals come out right
    vi bits;
    for (int i = 0; i < L; i++) bits[i] = p[i];
    vi magnitude = bits & 0x7fff;
    vf value = (vf)(magnitude << 13) * 0x1p112f;
    value = magnitude >= 0x7c00 ? (vf)(magnitude << 13 | 0x7f800000) : value;
    return (vf)((vi)value | (bits & 0x8000) << 16);
}
static inline void to_half(uint16_t *p, vf v) {
    for (int i = 0; i < L; i++) {
        uint32_t bits, sign, magnitude;
        memcpy(&bits, &v[i], 4);
        sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
        float scaled, value;
        memcpy(&value, &magnitude, 4);
        if (magnitude > 0x7f800000) bits = 0x7e00;
        else if (magnitude >= 0x477ff000) bits = 0x7c00;
        else if (magnitude < 0x38800000) { scaled = value + 0.5f; memcpy(&bits, &scaled, 4); bits -= 0x3f000000; }
        else bits = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
        p[i] = sign | bits;
    }
}
__attribute__((noinline)) static vb shuffle(vb table, vb index) {  // inline, it compiles for half a minute
    vb v;
    for (int i = 0; i < 4 * L; i++) v[i] = table[index[i]];
    return v;
}
""" + _PLAIN_GATHER

_IN_32_BITS = """\
typedef vi Sum;
static inline vi total(Sum t) { return t; }
"""
_MADDUBS = """\
typedef vs Sum;
static inline Sum dot(Sum t, vb w, int32_t x) {
    t += (vs)_mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x));
    asm("" : "+x"(t));  // add now: GCC would keep all the products of a block first, in memory
    return t;
}
static inline vi total(Sum t) { return (vi)_mm256_madd_epi16((__m256i)t, _mm256_set1_epi16(1)); }
"""
# |w| * sign(x, w): the largest sum of two is 2 * 128 * 127, which 16 bits hold.
_MADDUBS_WIDE = _IN_32_BITS + """\
static inline Sum dot(Sum t, vb w, int32_t x) {
    __m256i signs = _mm256_sign_epi8(_mm256_set1_epi32(x), (__m256i)w);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), signs);
    t += (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    asm("" : "+x"(t));
    return t;
}
"""
_AVX_VNNI = _IN_32_BITS + """\
static inline Sum dot(Sum t, vb w, int32_t x) {
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)t, (__m256i)w, _mm256_set1_epi32(x));
}
"""
_AVX512_VNNI = _IN_32_BITS + """\
static inline Sum dot(Sum t, vb w, int32_t x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)t, (__m512i)w, _mm512_set1_epi32(x));
}
"""
_SDOT = _IN_32_BITS + """\
static inline Sum dot(Sum t, vb w, int32_t x) {
    return (vi)vdotq_s32((int32x4_t)t, (int8x16_t)w, vreinterpretq_s8_s32(vdupq_n_s32(x)));
}
"""
_PLAIN_DOT = _IN_32_BITS + """\
static inline Sum dot(Sum t, vb w, int32_t x) {
    vi weights = (vi)w;
    for (int i = 0; i < 4; i++) t += (weights << (24 - 8 * i) >> 24) * (int8_t)(x >> 8 * i);
    return t;
}
"""


@dataclass(frozen=True, slots=True)
class Isa:
    """One set of instructions.

    lanes: of 32 bits in a vector. flags: for the compiler. needs: the CPU's flags as Linux names them. functions: the
    text of the small functions; narrow, wide: of the sums of products for levels up to 127, and above. takes_unsigned:
    wide levels stay unsigned. adds_in_16_bits: narrow sums overflow. tiles: (rows, vectors of outputs) computed
    at a time, the tallest first, down to one row.
    """

    name: str
    lanes: int
    flags: tuple[str, ...]
    needs: frozenset[str]
    functions: str
    narrow: str
    wide: str
    takes_unsigned: bool = False
    adds_in_16_bits: bool = False
    tiles: tuple[tuple[int, int], ...] = ((4, 2), (2, 4), (1, 4))

    @property
    def columns(self) -> int:
        """Outputs of the widest tile."""
        return self.lanes * max(vectors for _, vectors in self.tiles)

    def steps(self, span: int, limit: int) -> int:
        """How many sums of four products fit before `total`, at most `limit`."""
        return min(limit, 32767 // (2 * 127 * span)) if self.adds_in_16_bits and span <= 127 else limit


_X86 = ("-mavx2", "-mfma", "-mf16c")
_ZMM = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512")

ISAS: dict[str, Isa] = {
    isa.name: isa
    for isa in (
        Isa("avx512vnni", 16, (*_X86, *_ZMM),
            frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma", "f16c"}),
            _AVX512, _AVX512_VNNI, _AVX512_VNNI, takes_unsigned=True, tiles=((4, 4), (2, 4), (1, 4))),
        Isa("avxvnni", 8, (*_X86, "-mavxvnni"), frozenset({"avx2", "fma", "f16c", "avx_vnni"}),
            _AVX2, _AVX_VNNI, _AVX_VNNI, takes_unsigned=True),
        Isa("avx2", 8, _X86, frozenset({"avx2", "fma", "f16c"}), _AVX2, _MADDUBS, _MADDUBS_WIDE, adds_in_16_bits=True),
        Isa("neon", 4, ("-march=armv8.2-a+dotprod",), frozenset({"asimd", "asimddp"}), _NEON + _PLAIN_GATHER,
            _SDOT, _SDOT, tiles=((4, 4), (2, 8), (1, 8))),
        Isa("portable", 4, (), frozenset(), _PLAIN, _PLAIN_DOT, _PLAIN_DOT, tiles=((4, 4), (1, 4))),
    )
}  # fmt: skip
"""From the best to what every CPU has."""


def vectors(lanes: int) -> str:
    """The text that names vectors of so many lanes of 32 bits; the functions of an `Isa` follow it."""
    return _VECTORS.format(lanes=lanes, x=", ".join(["x"] * lanes))


@cache
def cpu_flags() -> frozenset[str]:
    """What this CPU can do, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    told = [line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))]
    return frozenset(flag for line in told for flag in line.split())


def running_isa() -> Isa | str:
    """The best instructions of this CPU, those that PTQC_CPU_ISA names; else why there are none."""
    wanted = os.environ.get("PTQC_CPU_ISA")
    if wanted is None:
        return next(isa for isa in ISAS.values() if isa.needs <= cpu_flags())
    if wanted not in ISAS:
        return f"PTQC_CPU_ISA is {wanted!r}; use one of {', '.join(ISAS)}"
    missing = ISAS[wanted].needs - cpu_flags()
    if missing:
        return f"PTQC_CPU_ISA is {wanted!r}, but this CPU ({platform.machine()}) lacks {', '.join(sorted(missing))}"
    return ISAS[wanted]
