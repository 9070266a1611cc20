"""The C++ text of an encoder: the search of `_gguf_search`, with the rows of `_gguf_layouts`, for one type.

A lane of a vector is a block (superblock): L of them are searched at once, every number as [weight][lane]. Each
operation, and the order of each sum, is that of the NumPy search, so the bytes are the same on every machine; hence
products and sums are never contracted (-ffp-contract=off), and sums begin with their first term.
"""

from collections.abc import Sequence

import numpy as np

from ptqc.codegen.cpp.isa import Isa, vectors
from ptqc.codegen.export._gguf_blocks import BlockType
from ptqc.codegen.export._gguf_layouts import RUNS_OF_DIGITS, Layout, Plane
from ptqc.codegen.export._gguf_search import PEAKS_OF_SCALES, Levels, Search

__all__ = ["FLAGS", "encoder_source"]

FLAGS = ("-ffp-contract=off",)

_BASICS = """\
typedef vi vm;  // what comparisons give
constexpr int LANE_BITS = L == 4 ? 2 : L == 8 ? 3 : 4;
constexpr float HALF_MAX = 65504.f, TINY = 0x1p-120f, ROUND = 0x1.8p23f;
static inline vf less(vf a, vf b) { return a < b ? a : b; }
static inline vf more(vf a, vf b) { return a > b ? a : b; }
static inline vf within(vf v, float low, float high) { return less(more(v, spread(low)), spread(high)); }
static inline vf whole(vf v, float low, float high) { return within(v, low, high) + ROUND - ROUND; }
static inline vf magnitude(vf v) { return (vf)((vi)v & 0x7fffffff); }
static inline vf inverse(vf v) { return magnitude(v) > TINY ? 1.f / v : spread(0.f); }
static inline vf half(vf v) {
    uint16_t bits[L];
    to_half(bits, within(v, -HALF_MAX, HALF_MAX));
    return from_half(bits);
}
static inline vi bits_of_half(vf v) {
    uint16_t bits[L];
    to_half(bits, v);
    return (vi)__builtin_convertvector(load<vw>(bits), vu);
}
static inline vi integer(vf v) { return __builtin_convertvector(v, vi); }

// Columns of L rows, by exchanging halves, quarters, ... of pairs of rows.
template <int S, int... I> struct Lanes {
    static vf low(vf a, vf b) { return SHUFFLE(a, b, (I & S ? I - S + L : I)...); }
    static vf high(vf a, vf b) { return SHUFFLE(a, b, (I & S ? I + L : I + S)...); }
};
template <int S, class N> struct Exchange;
template <int S, int... I> struct Exchange<S, std::integer_sequence<int, I...>> : Lanes<S, I...> {};
template <int S> static inline void exchange(vf *rows) {
    typedef Exchange<S, std::make_integer_sequence<int, L>> Pair;
    UNROLL for (int i = 0; i < L; i++)
        if (!(i & S)) {
            vf a = rows[i], b = rows[i + S];
            rows[i] = Pair::low(a, b), rows[i + S] = Pair::high(a, b);
        }
}
static inline void transpose(vf *rows) {
    if (L == 16) exchange<L / 2>(rows);
    if (L >= 8) exchange<4>(rows);
    exchange<2>(rows);
    exchange<1>(rows);
}
// Weights `first` to `first + L` of each of L blocks.
static inline void columns(const float *const *blocks, int first, vf *out) {
    vf rows[L];
    UNROLL for (int i = 0; i < L; i++) rows[i] = load<vf>(blocks[i] + first);
    transpose(rows);
    UNROLL for (int i = 0; i < L; i++) out[i] = rows[i];
}
"""
_PACKING = """\
template <int OFFSET, int RUN, int WIDTH, int START, int SHIFT, int FLIP, int FIRST, int LAST>
static inline void put(const vi *values, vu *out) {
    constexpr int MOST = (LAST - FIRST) / RUN, FITTING = (8 - SHIFT) / WIDTH, STACK = FITTING < MOST ? FITTING : MOST;
    for (int chunk = 0; chunk < (LAST - FIRST) / (STACK * RUN); chunk++)
        UNROLL for (int k = 0; k < STACK; k++)
            UNROLL for (int r = 0; r < RUN; r++) {
                const int byte = OFFSET + chunk * RUN + r, shift = byte % 4 * 8 + SHIFT + k * WIDTH;
                vu bits = ((vu)values[FIRST + (chunk * STACK + k) * RUN + r] >> START ^ FLIP) & ((1u << WIDTH) - 1);
                out[byte / 4] |= bits << shift;
            }
}
// Digits to the base of 3 as a fraction of 243, scaled to 256 and rounded up.
template <int OFFSET, int FIRST, int RUN, int COUNT> static inline void put_digits(const vi *values, vu *out) {
    for (int r = 0; r < RUN; r++) {
        const int places[] = {81, 27, 9, 3, 1};
        vi number = spread(0);
        UNROLL for (int k = 0; k < COUNT; k++) number += values[FIRST + k * RUN + r] * places[k];
        const int byte = OFFSET + r;
        out[byte / 4] |= (vu)((number * 256 + 242) / 243) << byte % 4 * 8;
    }
}
static inline void put_half(vf value, int offset, vu *out) { out[offset / 4] |= (vu)bits_of_half(value) << offset % 4 * 8; }
static inline void write(const vu *words, uint8_t *out, int count) {
    for (int lane = 0; lane < count; lane++, out += NBYTES) {
        const uint8_t *from = (const uint8_t *)words + 4 * lane;
        UNROLL for (int word = 0; word < NBYTES / 4; word++) memcpy(out + 4 * word, from + 4 * L * word, 4);
        if (NBYTES % 4) memcpy(out + NBYTES / 4 * 4, from + 4 * L * (NBYTES / 4), NBYTES % 4);
    }
}
"""
_SEARCH = """\
struct Sums { vf wl, ll, l, w, one; };
struct Fit { vf scale, minimum; };
struct Stored {  // floats as stored; codes of scales and minima where floats are but their units
    vf outer[2], codes[2][GROUPS];
    Fit fit(int group) const {
        if (IS_NESTED) return {outer[0] * codes[0][group], HAS_MINIMUM ? outer[1] * codes[1][group] : spread(0.f)};
        return {outer[0], HAS_MINIMUM ? -outer[1] : spread(0.f)};
    }
};
static inline vi place_of(vf v) { return integer(within((v - LOW) * 2.f, 0.f, 2 * (HIGH - LOW))); }
static inline vf level_of(vf v) {
    if (!IS_TABLE) return whole(v, LOW, HIGH);
    vi place = place_of(v);
    vf level;
    for (int i = 0; i < L; i++) level[i] = LEVELS[place[i]];
    return level;
}
static inline vi code_of(vf v) {
    if (!IS_TABLE) return integer(whole(v, LOW, HIGH) - LOW);
    vi place = place_of(v), code;
    for (int i = 0; i < L; i++) code[i] = CODES[place[i]];
    return code;
}
// The sums of N choices of levels at once: their chains of additions do not wait for each other.
template <int N, class Values> static inline void sums_of(const vf *w, const vf *v, Values values, Sums *sums) {
    vf wl[N], ll[N], l[N];
    UNROLL for (int n = 0; n < N; n++) {
        vf level = level_of(values(0, n)), counted = IS_WEIGHTED ? v[0] * level : level;
        wl[n] = counted * w[0], ll[n] = counted * level, l[n] = counted;
    }
    for (int i = 1; i < GROUP; i++)
        UNROLL for (int n = 0; n < N; n++) {
            vf level = level_of(values(i, n)), counted = IS_WEIGHTED ? v[i] * level : level;
            wl[n] += counted * w[i], ll[n] += counted * level;
            if (HAS_MINIMUM) l[n] += counted;
        }
    UNROLL for (int n = 0; n < N; n++) sums[n].wl = wl[n], sums[n].ll = ll[n], sums[n].l = l[n];
}
static inline Fit solve(const Sums &s) {
    vf plain = s.wl / more(s.ll, spread(TINY));
    if (!HAS_MINIMUM) return {plain, plain};
    vf determinant = s.one * s.ll - s.l * s.l;
    vm is_even = determinant > 0x1.0c6f7ap-20f * s.one * s.ll;
    vf scale = (s.one * s.wl - s.l * s.w) * (is_even ? 1.f / determinant : spread(0.f));
    vf minimum = (s.l * scale - s.w) / s.one;
    if (IS_NESTED) {
        scale = ((minimum > 0.f) & is_even) ? scale : plain;
        minimum = is_even ? more(minimum, spread(0.f)) : spread(0.f);
        minimum = ((s.ll == 0.f) & (s.w < 0.f)) ? -s.w / s.one : minimum;
    }
    return {scale, minimum};
}
static inline vf gain_of(const Sums &s, const Fit &f) {
    vf gain = f.scale * (2.f * s.wl - f.scale * s.ll);
    if (HAS_MINIMUM) gain -= f.minimum * (2.f * (s.w - f.scale * s.l) + f.minimum * s.one);
    return gain;
}
struct Best { Sums sums; vf most; };
template <int N> static inline void consider(const vf *w, const vf *v, const vf *unit, int first, Best &best) {
    Sums sums[N];
    sums_of<N>(w, v, [=](int i, int n) {
        vf value = unit[i] * STRETCHES[first + n];
        return HAS_ENDS ? value - SHIFTS[first + n] : value;
    }, sums);
    UNROLL for (int n = 0; n < N; n++) {
        sums[n].w = best.sums.w, sums[n].one = best.sums.one;
        vf gain = gain_of(sums[n], solve(sums[n]));
        if (first + n == 0) { best.sums = sums[n], best.most = gain; continue; }
        vm is_better = gain > best.most;
        best.most = more(gain, best.most);
        best.sums.wl = is_better ? sums[n].wl : best.sums.wl;
        best.sums.ll = is_better ? sums[n].ll : best.sums.ll;
        if (HAS_MINIMUM) best.sums.l = is_better ? sums[n].l : best.sums.l;
    }
}
static inline Sums best_of(const vf *w, const vf *v, vf sum_w, vf one) {
    vf low = w[0], high = w[0], unit[GROUP];
    for (int i = 1; i < GROUP; i++) low = less(low, w[i]), high = more(high, w[i]);
    if (HAS_ENDS) {
        if (IS_NESTED) low = less(low, spread(0.f)), high = more(high, spread(0.f));
        vf wide = inverse(high - low);
        for (int i = 0; i < GROUP; i++) unit[i] = (w[i] - low) * wide;
    } else {
        vf wide = inverse(-low > high ? low : high);
        for (int i = 0; i < GROUP; i++) unit[i] = w[i] * wide;
    }
    Best best;
    best.sums.w = sum_w, best.sums.one = one;
    int first = 0;
    for (; first + 2 <= CANDIDATES; first += 2) consider<2>(w, v, unit, first, best);
    if (CANDIDATES % 2) consider<1>(w, v, unit, CANDIDATES - 1, best);
    return best.sums;
}
static inline Sums sums_at(const vf *w, const vf *v, const Fit &fit, vf sum_w, vf one) {
    Sums sums;
    vf wide = inverse(fit.scale);
    sums_of<1>(w, v, [=](int i, int) { return (HAS_MINIMUM ? w[i] + fit.minimum : w[i]) * wide; }, &sums);
    sums.w = sum_w, sums.one = one;
    return sums;
}
// Integers low..high under one float16 number.
template <int COUNT>
static void nested(const vf *scale, const vf *weight, float low, float high, const float *peaks, vf &outer, vf *codes) {
    vf largest = scale[0], smallest = scale[0], unit[GROUPS], counted[GROUPS];
    for (int g = 1; g < GROUPS; g++) largest = more(largest, scale[g]), smallest = less(smallest, scale[g]);
    if (low < 0) largest = -smallest > largest ? smallest : largest;
    vf wide = inverse(largest), best = spread(0.f), most = spread(-1.f);
    for (int g = 0; g < GROUPS; g++) unit[g] = scale[g] * wide, counted[g] = scale[g] * weight[g];
    for (int p = 0; p < COUNT; p++) {
        vf product, square;
        for (int g = 0; g < GROUPS; g++) {
            vf code = whole(unit[g] * peaks[p], low, high);
            vf one = code * counted[g], other = code * code * weight[g];
            product = g ? product + one : one, square = g ? square + other : other;
        }
        vf fitted = product / more(square, spread(TINY)), gain = product * fitted;
        vm is_better = gain > most;
        most = is_better ? gain : most, best = is_better ? fitted : best;
    }
    outer = half(best), wide = inverse(outer);
    for (int g = 0; g < GROUPS; g++) codes[g] = whole(scale[g] * wide, low, high);
}
static inline Stored stored_of(const Sums *sums) {
    Stored stored;
    vf scale[GROUPS], minimum[GROUPS], weight[GROUPS];
    for (int g = 0; g < GROUPS; g++) {
        Fit fit = solve(sums[g]);
        scale[g] = fit.scale, minimum[g] = fit.minimum, weight[g] = sums[g].ll;
    }
    if (!IS_NESTED) {
        stored.outer[0] = half(scale[0]);
        if (HAS_MINIMUM) stored.outer[1] = half(-minimum[0]);
        return stored;
    }
    nested<SCALE_PEAKS>(scale, weight, SCALE_LOW, SCALE_HIGH, PEAKS, stored.outer[0], stored.codes[0]);
    if (!HAS_MINIMUM) return stored;
    for (int g = 0; g < GROUPS; g++) {
        const Sums &s = sums[g];
        minimum[g] = more((s.l * (stored.outer[0] * stored.codes[0][g]) - s.w) / s.one, spread(0.f));
        weight[g] = s.one;
    }
    nested<FLOOR_PEAKS>(minimum, weight, 0.f, FLOOR_HIGH, FLOORS, stored.outer[1], stored.codes[1]);
    return stored;
}
static inline void choose(vm chosen, Stored &best, const Stored &other) {
    for (int n = 0; n < 1 + HAS_MINIMUM; n++) {
        best.outer[n] = chosen ? other.outer[n] : best.outer[n];
        if (IS_NESTED)
            for (int g = 0; g < GROUPS; g++) best.codes[n][g] = chosen ? other.codes[n][g] : best.codes[n][g];
    }
}
static inline void search(const vf *w, const vf *v, vu *out) {
    Sums sums[GROUPS];
    vf sum_w[GROUPS], one[GROUPS];
    for (int g = 0; g < GROUPS; g++) {
        const vf *own = w + g * GROUP, *counts = v + g * GROUP;
        vf total = IS_WEIGHTED ? counts[0] * own[0] : own[0], all = IS_WEIGHTED ? counts[0] : spread((float)GROUP);
        for (int i = 1; i < GROUP; i++) {
            if (HAS_MINIMUM) total += IS_WEIGHTED ? counts[i] * own[i] : own[i];
            if (IS_WEIGHTED) all += counts[i];
        }
        sum_w[g] = total, one[g] = all;
        sums[g] = best_of(own, counts, total, all);
    }
    Stored stored = stored_of(sums), best = stored;
    vf most;
    for (int turn = 0; turn < TURNS; turn++) {
        vf gain;
        for (int g = 0; g < GROUPS; g++) {
            Fit fit = stored.fit(g);
            sums[g] = sums_at(w + g * GROUP, v + g * GROUP, fit, sum_w[g], one[g]);
            vf own = gain_of(sums[g], fit);
            gain = g ? gain + own : own;
        }
        if (turn) choose(gain > most, best, stored);
        most = turn ? more(gain, most) : gain;
        if (turn + 1 < TURNS) stored = stored_of(sums);
    }
    vi codes[WEIGHTS], scales[2 * GROUPS];
    for (int g = 0; g < GROUPS; g++) {
        Fit fit = best.fit(g);
        vf wide = inverse(fit.scale);
        const vf *own = w + g * GROUP;
        for (int i = 0; i < GROUP; i++)
            codes[g * GROUP + i] = code_of((HAS_MINIMUM ? own[i] + fit.minimum : own[i]) * wide);
        if (IS_NESTED) scales[g] = integer(best.codes[0][g] - SCALE_LOW);
        if (IS_NESTED && HAS_MINIMUM) scales[GROUPS + g] = integer(best.codes[1][g]);
    }
    pack(codes, scales, best.outer, out);
}
"""
_STEPS = """\
// The largest magnitude becomes 127; where float16 rounds the scale too far down, the next greater one is taken.
static inline void search(const vf *w, const vf *v, vu *out) {
    vf peak = magnitude(w[0]);
    for (int i = 1; i < WEIGHTS; i++) peak = more(peak, magnitude(w[i]));
    uint16_t bits[L];
    to_half(bits, peak / 127.f);
    vm is_short = from_half(bits) * 127.5f < peak;
    for (int i = 0; i < L; i++) bits[i] -= is_short[i];
    vf scale = from_half(bits), wide = scale > 0.f ? 1.f / scale : spread(0.f);
    vi codes[WEIGHTS];
    for (int i = 0; i < WEIGHTS; i++) codes[i] = integer(whole(w[i] * wide, -127.f, 127.f)) + 128;
    pack(codes, codes, &scale, out);
}
"""
_RUN = """\
// Blocks of rows of `per_row`; counts: of the weights of a row. Returns 0 if a weight is above LARGEST, or NaN.
extern "C" long encode(const float *weights, const float *counts, uint8_t *out, long blocks, long per_row) {
    vi is_sound = spread(-1);
    for (long first = 0; first < blocks; first += L) {
        const int count = blocks - first < L ? blocks - first : L;
        const float *rows[L], *counted[L];
        for (int i = 0; i < L; i++) {
            const long block = first + (i < count ? i : count - 1);
            rows[i] = weights + block * WEIGHTS, counted[i] = counts + block % per_row * WEIGHTS;
        }
        vf w[WEIGHTS], v[IS_WEIGHTED ? WEIGHTS : L];
        for (int i = 0; i < WEIGHTS; i += L) {
            columns(rows, i, w + i);
            if (IS_WEIGHTED) columns(counted, i, v + i);
        }
        for (int i = 0; i < WEIGHTS; i++) is_sound &= magnitude(w[i]) <= LARGEST;
        vu words[(NBYTES + 3) / 4] = {};
        search(w, v, words);
        write(words, out + first * NBYTES, count);
    }
    for (int i = 0; i < L; i++)
        if (!is_sound[i]) return 0;
    return 1;
}
"""


def encoder_source(kind: BlockType, is_weighted: bool, isa: Isa) -> str:
    """The text for a type that stores codes. is_weighted: whether columns count differently."""
    assert kind.layout is not None
    search = kind.search
    header = {
        "WEIGHTS": kind.weights, "NBYTES": kind.nbytes, "IS_WEIGHTED": is_weighted and search is not None,
        "LARGEST": kind.largest,
    }  # fmt: skip
    tables: dict[str, Sequence[float]] = {}
    if search is not None:
        header |= _constants(search, kind.weights)
        tables = _tables(search)
    lines = [
        *(f"constexpr {_kind(value)} {name} = {_literal(value)};\n" for name, value in header.items()),
        *(f"constexpr float {name}[] = {{{', '.join(map(_literal, row))}}};\n" for name, row in tables.items()),
    ]
    return "".join((
        "#include <utility>\n", vectors(isa.lanes), isa.functions, _SHUFFLE, *lines, _BASICS, _PACKING,
        _pack(kind.layout), _STEPS if search is None else _SEARCH, _RUN,
    ))  # fmt: skip


_SHUFFLE = """\
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif
"""


def _kind(value: float) -> str:
    return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"


def _literal(value: float) -> str:
    if isinstance(value, (bool, int)):
        return str(value).lower()
    return f"{float(np.float32(value)).hex()}f"


def _constants(search: Search, weights: int) -> dict[str, float]:
    spec, levels = search.spec, Levels.of(search.spec)
    group, bits = spec.group or weights, spec.scale.bits
    low, high = search.range_of_scales
    return {
        "GROUP": group, "GROUPS": weights // group, "TURNS": search.turns,
        "CANDIDATES": len(search.ends or search.peaks), "HAS_ENDS": bool(search.ends),
        "HAS_MINIMUM": spec.zero == "min", "IS_NESTED": bits is not None, "IS_TABLE": bool(levels.table),
        "LOW": float(levels.low), "HIGH": float(levels.high), "SCALE_LOW": float(low), "SCALE_HIGH": float(high),
        "FLOOR_HIGH": float(high - low), "SCALE_PEAKS": len(PEAKS_OF_SCALES.get(high, (0,))),
        "FLOOR_PEAKS": len(PEAKS_OF_SCALES.get(high - low, (0,))),
    }  # fmt: skip


def _tables(search: Search) -> dict[str, Sequence[float]]:
    levels, (low, high) = Levels.of(search.spec), search.range_of_scales
    codes, near = levels.places if levels.table else (np.zeros(1, np.uint8), np.zeros(1, np.float32))
    return {
        "STRETCHES": [float(stretch) for stretch, _ in search.candidates],
        "SHIFTS": [float(shift) for _, shift in search.candidates],
        "PEAKS": [peak * (low or high) for peak in PEAKS_OF_SCALES.get(high, (0,))],
        "FLOORS": [peak * (high - low) for peak in PEAKS_OF_SCALES.get(high - low, (0,))],
        "LEVELS": [float(level) for level in near], "CODES": [float(code) for code in codes],
    }  # fmt: skip


def _pack(layout: Layout) -> str:
    """The function that puts codes, scales and floats of a block where the layout has them."""
    lines = [f"    put_half(outer[{number}], {offset}, out);\n" for number, offset in enumerate(layout.floats)]
    lines += [_put(plane, layout) for plane in layout.planes]
    if layout.digits is not None:
        start = 0
        for first, run, count in RUNS_OF_DIGITS:
            lines.append(f"    put_digits<{start}, {first}, {run}, {count}>(codes, out);\n")
            start += run
    return f"static inline void pack(const vi *codes, const vi *scales, const vf *outer, vu *out) {{\n{''.join(lines)}}}\n"


def _put(plane: Plane, layout: Layout) -> str:
    first, last = plane.entries or (0, layout.weights if plane.field == "codes" else layout.scales)
    numbers = (plane.offset, plane.run, plane.width, plane.start, plane.shift, plane.flip, first, last)
    return f"    put<{', '.join(map(str, numbers))}>({plane.field}, out);\n"
