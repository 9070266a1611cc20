"""C++ of an encoder around its search: lanes of blocks out of rows of weights, and fields into their bytes."""

__all__ = ["BASICS", "PACKING", "RUN", "SHUFFLE"]

SHUFFLE = """\
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif
"""
BASICS = """\
typedef vi vm;  // what comparisons give
constexpr float HALF_MAX = 65504.f, TINY = 0x1p-120f, ROUND = 0x1.8p23f;
static inline vf within(vf v, float low, float high) { return least(greatest(v, spread(low)), spread(high)); }
static inline vf whole(vf v, float low, float high) { return within(v, low, high) + ROUND - ROUND; }
static inline vf magnitude(vf v) { return (vf)((vi)v & 0x7fffffff); }
static inline vf inverse(vf v) { return magnitude(v) > TINY ? 1.f / v : spread(0.f); }
static inline vf half(vf v) {
    uint16_t bits[L];
    to_half(bits, within(v, -HALF_MAX, HALF_MAX));
    return from_half(bits) + 0.f;  // no zero with a sign
}
static inline vi bits_of_half(vf v) {
    uint16_t bits[L];
    to_half(bits, v);
    return (vi)__builtin_convertvector(load<vw>(bits), vu);
}
static inline vi integer(vf v) { return __builtin_convertvector(v, vi); }
static inline vf number(vi v) { return __builtin_convertvector(v, vf); }

// Columns of L rows: of the squares of four lanes, then squares are exchanged.
enum Step { LOW_LANES, HIGH_LANES, LOW_PAIRS, HIGH_PAIRS, LOW_HALVES, HIGH_HALVES };
constexpr int from_lane(Step step, int size, int i) {
    int k = i % 4, square = i - k;
    switch (step) {
        case LOW_LANES: return square + k / 2 + k % 2 * L;
        case HIGH_LANES: return square + 2 + k / 2 + k % 2 * L;
        case LOW_PAIRS: return square + k % 2 + k / 2 * L;
        case HIGH_PAIRS: return square + 2 + k % 2 + k / 2 * L;
        case LOW_HALVES: return i & size ? (i - size + 2 * L) % L + L : i;
        default: return (i & size ? i + L : i + size) % (2 * L);
    }
}
template <Step STEP, int SIZE, int... I> static inline vf mixed(vf a, vf b, std::integer_sequence<int, I...>) {
    return SHUFFLE(a, b, from_lane(STEP, SIZE, I)...);
}
template <Step STEP, int SIZE = 0> static inline vf mix(vf a, vf b) {
    return mixed<STEP, SIZE>(a, b, std::make_integer_sequence<int, L>());
}
template <int S> static inline void exchange(vf *rows) {
    UNROLL for (int i = 0; i < L; i++)
        if (!(i & S)) {
            vf a = rows[i], b = rows[i + S];
            rows[i] = mix<LOW_HALVES, S>(a, b), rows[i + S] = mix<HIGH_HALVES, S>(a, b);
        }
}
static inline void transpose(vf *rows) {
    UNROLL for (int i = 0; i < L; i += 4) {
        vf a = mix<LOW_LANES>(rows[i], rows[i + 1]), b = mix<HIGH_LANES>(rows[i], rows[i + 1]);
        vf c = mix<LOW_LANES>(rows[i + 2], rows[i + 3]), d = mix<HIGH_LANES>(rows[i + 2], rows[i + 3]);
        rows[i] = mix<LOW_PAIRS>(a, c), rows[i + 1] = mix<HIGH_PAIRS>(a, c);
        rows[i + 2] = mix<LOW_PAIRS>(b, d), rows[i + 3] = mix<HIGH_PAIRS>(b, d);
    }
    if (L >= 8) exchange<4>(rows);
    if (L >= 16) exchange<8>(rows);
}
// Weights `first` to `first + L` of each of L blocks.
static inline void columns(const float *const *blocks, int first, vf *out) {
    vf rows[L];
    UNROLL for (int i = 0; i < L; i++) rows[i] = load<vf>(blocks[i] + first);
    transpose(rows);
    UNROLL for (int i = 0; i < L; i++) out[i] = rows[i];
}
"""
PACKING = """\
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
static inline void put_half(vf value, int offset, vu *out) {
    out[offset / 4] |= (vu)bits_of_half(value) << offset % 4 * 8;
}
static inline void write(const vu *words, uint8_t *out, int count) {
    for (int lane = 0; lane < count; lane++, out += NBYTES) {
        const uint8_t *from = (const uint8_t *)words + 4 * lane;
        UNROLL for (int word = 0; word < NBYTES / 4; word++) memcpy(out + 4 * word, from + 4 * L * word, 4);
        if (NBYTES % 4) memcpy(out + NBYTES / 4 * 4, from + 4 * L * (NBYTES / 4), NBYTES % 4);
    }
}
"""
RUN = """\
// Blocks of rows of `per_row`; counts: of the weights of a row. Returns 0 if a weight is above LARGEST, or NaN.
extern "C" long encode(const float *weights, const float *counts, uint8_t *out, long blocks, long per_row) {
    vi largest = spread(0);  // as bits: larger floats have larger ones, and NaN the largest
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
        for (int i = 0; i < WEIGHTS; i++) {
            vi bits = (vi)magnitude(w[i]);
            largest = bits > largest ? bits : largest;
        }
        vu words[(NBYTES + 3) / 4] = {};
        search(w, v, words);
        write(words, out + first * NBYTES, count);
    }
    int32_t limit;
    memcpy(&limit, &LARGEST, 4);
    for (int i = 0; i < L; i++)
        if (largest[i] > limit) return 0;
    return 1;
}
"""
