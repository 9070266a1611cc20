"""C++ of the searches of an encoder: what `_gguf_search`, `_gguf_quick` and Q8_0 do, an operation for an operation."""

__all__ = ["FIT", "QUICK", "SEARCH", "STEPS"]

FIT = """\
struct Sums { vf wl, ll, l, w, one; };
struct Fit { vf scale, minimum; };
static inline Fit solve(const Sums &s) {
    vf plain = s.wl / greatest(s.ll, spread(TINY));
    if (!HAS_MINIMUM) return {plain, plain};
    vf determinant = s.one * s.ll - s.l * s.l;
    vm is_even = determinant > 0x1.0c6f7ap-20f * s.one * s.ll;
    vf scale = (s.one * s.wl - s.l * s.w) * (is_even ? 1.f / determinant : spread(0.f));
    vf minimum = (s.l * scale - s.w) / s.one;
    if (IS_NESTED) {
        scale = ((minimum > 0.f) & is_even) ? scale : plain;
        minimum = is_even ? greatest(minimum, spread(0.f)) : spread(0.f);
        minimum = ((s.ll == 0.f) & (s.w < 0.f)) ? -s.w / s.one : minimum;
    }
    return {scale, minimum};
}
static inline vf gain_of(const Sums &s, const Fit &f) {
    vf gain = f.scale * (2.f * s.wl - f.scale * s.ll);
    if (HAS_MINIMUM) gain -= f.minimum * (2.f * (s.w - f.scale * s.l) + f.minimum * s.one);
    return gain;
}
"""
SEARCH = """\
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
            // Integers times integers, and signs times anything, are exact: fused or not, the sum is the same.
            wl[n] = IS_TERNARY && !IS_WEIGHTED ? fused(counted, w[i], wl[n]) : wl[n] + counted * w[i];
            ll[n] = IS_TERNARY || !IS_WEIGHTED ? fused(counted, level, ll[n]) : ll[n] + counted * level;
            if (HAS_MINIMUM) l[n] += counted;
        }
    UNROLL for (int n = 0; n < N; n++) sums[n].wl = wl[n], sums[n].ll = ll[n], sums[n].l = l[n];
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
        best.most = greatest(gain, best.most);
        best.sums.wl = is_better ? sums[n].wl : best.sums.wl;
        best.sums.ll = is_better ? sums[n].ll : best.sums.ll;
        if (HAS_MINIMUM) best.sums.l = is_better ? sums[n].l : best.sums.l;
    }
}
static inline Sums best_of(const vf *w, const vf *v, vf sum_w, vf one) {
    vf low = w[0], high = w[0], unit[GROUP];
    for (int i = 1; i < GROUP; i++) low = least(low, w[i]), high = greatest(high, w[i]);
    if (HAS_ENDS) {
        if (IS_NESTED) low = least(low, spread(0.f)), high = greatest(high, spread(0.f));
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
    for (int g = 1; g < GROUPS; g++) largest = greatest(largest, scale[g]), smallest = least(smallest, scale[g]);
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
        vf fitted = product / greatest(square, spread(TINY)), gain = product * fitted;
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
        minimum[g] = greatest((s.l * (stored.outer[0] * stored.codes[0][g]) - s.w) / s.one, spread(0.f));
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
        most = turn ? greatest(gain, most) : gain;
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
QUICK = """\
typedef vs Units;  // two neighbours of a block in each lane
static inline Units both(vi v) { return (Units)(v & 0xffff | v << 16); }
static inline Units levels_of(Units u, Units factor, Units bias) {
    const Units low = both(spread((int)LOW)), high = both(spread((int)HIGH));
    Units level = (scaled(u, factor) + bias) >> FRACTION;
    level = level < low ? low : level;
    return level > high ? high : level;
}
template <int N> static inline void consider(const Units *u, int first, vf sum_u, Sums &best, vf &most) {
    vi wl[N] = {}, ll[N] = {};
    Units l[N] = {}, factor[N], bias[N];
    UNROLL for (int n = 0; n < N; n++)
        factor[n] = both(spread(FACTORS[first + n])), bias[n] = both(spread(BIASES[first + n]));
    for (int i = 0; i < WEIGHTS / 2; i++)
        UNROLL for (int n = 0; n < N; n++) {
            Units level = levels_of(u[i], factor[n], bias[n]);
            wl[n] += pairs(level, u[i]), ll[n] += pairs(level, level);
            if (HAS_MINIMUM) l[n] += level;
        }
    UNROLL for (int n = 0; n < N; n++) {
        Sums sums = {number(wl[n]), number(ll[n]), number(pairs(l[n], both(spread(1)))), sum_u, spread((float)WEIGHTS)};
        vf gain = gain_of(sums, solve(sums));
        if (first + n == 0) { best = sums, most = gain; continue; }
        vm is_better = gain > most;
        most = greatest(gain, most);
        best.wl = is_better ? sums.wl : best.wl, best.ll = is_better ? sums.ll : best.ll;
        if (HAS_MINIMUM) best.l = is_better ? sums.l : best.l;
    }
}
static inline void search(const vf *w, const vf *v, vu *out) {
    vf low = w[0], high = w[0];
    for (int i = 1; i < WEIGHTS; i++) low = least(low, w[i]), high = greatest(high, w[i]);
    const vf span = HAS_MINIMUM ? high - low : -low > high ? low : high, wide = inverse(span);
    if (!HAS_MINIMUM) low = spread(0.f);
    Units u[WEIGHTS / 2], sum = {};
    for (int i = 0; i < WEIGHTS / 2; i++) {
        vf one = HAS_MINIMUM ? w[2 * i] - low : w[2 * i], other = HAS_MINIMUM ? w[2 * i + 1] - low : w[2 * i + 1];
        // Rounded to integers, which are the low bits of these floats.
        one = one * wide * UNITS + ROUND, other = other * wide * UNITS + ROUND;
        u[i] = (Units)((vi)one & 0xffff | (vi)other << 16);
    }
    vi total = spread(0);
    if (HAS_MINIMUM)
        for (int i = 0; i < WEIGHTS / 2; i++) total += pairs(u[i], both(spread(1)));
    Sums best;
    vf most, sum_u = number(total);
    for (int first = 0; first + 2 <= CANDIDATES; first += 2) consider<2>(u, first, sum_u, best, most);
    if (CANDIDATES % 2) consider<1>(u, CANDIDATES - 1, sum_u, best, most);
    const Fit fit = solve(best);
    const vf step = span * (1.f / UNITS);
    vf outer[2] = {half(fit.scale * step), HAS_MINIMUM ? half(low - fit.minimum * step) : low};
    const vf per_level = inverse(outer[0]) * (float)(1 << FRACTION);
    const Units factor = both(integer(whole(step * per_level * 32768.f, -LARGEST_FACTOR, LARGEST_FACTOR)));
    const vf bias = whole((low - outer[1]) * per_level, -LARGEST_BIAS, LARGEST_BIAS) + (1 << FRACTION) * 0.5f;
    vi codes[WEIGHTS];
    for (int i = 0; i < WEIGHTS / 2; i++) {
        vi level = (vi)(levels_of(u[i], factor, both(integer(bias))) - both(spread((int)LOW)));
        codes[2 * i] = level & 0xffff, codes[2 * i + 1] = (vi)((vu)level >> 16);
    }
    pack(codes, codes, outer, out);
}
"""
STEPS = """\
// The largest magnitude becomes 127; where float16 rounds the scale too far down, the next greater one is taken.
static inline void search(const vf *w, const vf *v, vu *out) {
    vf peak = magnitude(w[0]);
    for (int i = 1; i < WEIGHTS; i++) peak = greatest(peak, magnitude(w[i]));
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
