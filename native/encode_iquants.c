/* Encoders of IQ4_NL and IQ4_XS. Formulas: ggml-quants.c of llama.cpp (quantize_row_iq4_nl_impl); layouts and the code
   book: ggml-common.h. */
#include "batch.h"
#include "search.h"

#define GROUP 32
#define REACH 7
#define N_CODES 16

/* The code book, kvalues_iq4nl. Where one value becomes the next, a midpoint is the upper one's. */
static const float VALUES[N_CODES] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

#if LANES == 16
/* Cells of 8, of which the first begins at -126.5, have at most one midpoint each, and none near a border: what cell y
   is in may be rounded. Cell -> its midpoint, or none, and the code below that. */
#define NONE INFINITE
static const float CELL_MIDPOINTS[32] = {
    NONE,   -115.5f, NONE, NONE,   -93.5f, NONE,  -74,  NONE,  -57,  NONE, -42,  NONE, -28.5f, -16,  NONE, -4.5f,
    7,      NONE,    19,   31.5f,  NONE,   45.5f, NONE, 61,    NONE, 79,   NONE, NONE, 101,    NONE, NONE, NONE,
};
static const int32_t CELL_CODES[32] = {
    0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 9, 10, 11, 11, 12, 12, 13, 13, 14, 14, 14, 15, 15, 15,
};
#undef NONE

INLINE vi nearest_code(vf y) {
    const vf place = greater(lesser(y * 0.125f + 15.8125f, splat(31)), splat(0)); /* NaN is above all */
    const __m512i cell = _mm512_cvttps_epi32((__m512)place);
    const __m512 midpoint =
        _mm512_permutex2var_ps(_mm512_loadu_ps(CELL_MIDPOINTS), cell, _mm512_loadu_ps(CELL_MIDPOINTS + 16));
    const __m512i code =
        _mm512_permutex2var_epi32(_mm512_loadu_si512(CELL_CODES), cell, _mm512_loadu_si512(CELL_CODES + 16));
    const mask above = _mm512_cmp_ps_mask((__m512)y, midpoint, _CMP_GE_OQ);
    return (vi)_mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1));
}

INLINE vf nearest_value(vf y) {
    return (vf)_mm512_permutexvar_ps((__m512i)nearest_code(y), _mm512_loadu_ps(VALUES));
}
#else
static const float MIDPOINTS[N_CODES - 1] = {-115.5f, -93.5f, -74,   -57,   -42, -28.5f, -16, -4.5f,
                                             7,       19,     31.5f, 45.5f, 61,  79,     101};

INLINE vi nearest_code(vf y) {
    vi code = splat_int(N_CODES - 1); /* for NaN, too */
    for (int i = 0; i < N_CODES - 1; i++) code += less(y, splat(MIDPOINTS[i]));
    return code;
}

INLINE vf nearest_value(vf y) {
    vf value = splat(VALUES[N_CODES - 1]); /* for NaN, too */
    for (int i = N_CODES - 2; i >= 0; i--) value = choose(less(y, splat(MIDPOINTS[i])), splat(VALUES[i]), value);
    return value;
}
#endif

INLINE Sums code_sums(const vf *x, const vf *weight, vf inverse) {
    Sums sums = {{0}, {0}};
    for (int i = 0; i < GROUP; i++) {
        const vf value = nearest_value(inverse * x[i]), weighted = weight[i] * value;
        sums.xl += weighted * x[i];
        sums.ll += weighted * value;
    }
    return sums;
}

/* x ~ scale * value: weighted least squares for 16 scales around that of the largest element. */
INLINE vf fit_code_book(const vf *x, const vf *weight) {
    vf peak = largest(x, GROUP);
    const mask zero = less(magnitude(peak), splat(TINY));
    peak = choose(zero, splat(INFINITE), peak);
    /* 1 / (peak / -127): rounded twice, unlike -127 / peak. */
    Sums sums = code_sums(x, weight, 1.0f / (-peak / VALUES[0]));
    vf scale = choose(less(splat(0), sums.ll), sums.xl / sums.ll, splat(0)), best = scale * sums.xl;
    for (int step = -REACH; step <= REACH; step++) {
        sums = code_sums(x, weight, splat((float)step + VALUES[0]) / peak);
        const mask better = both(less(splat(0), sums.ll), less(best * sums.ll, sums.xl * sums.xl));
        scale = choose(better, sums.xl / sums.ll, scale);
        best = choose(better, scale * sums.xl, best);
    }
    return choose(zero, splat(0), scale);
}

/* Squares, or importance * sqrt(2 * mean square of the block + x^2). */
INLINE void group_weights(const Batch *batch, const vf *x, int at, vf variance, int weighted, vf *weight) {
    if (!weighted) {
        squares(x, GROUP, weight);
        return;
    }
    load_importance(batch, at, GROUP, weight);
    weigh(x, weight, variance, GROUP, weight);
}

/* The codes of a group at an inverse scale, 1 / scale, or 0 where scale is 0. */
INLINE void codes(const vf *x, vf scale, vi *out) {
    const vf inverse = choose(equal(scale, splat(0)), splat(0), 1.0f / scale);
    for (int i = 0; i < GROUP; i++) out[i] = nearest_code(inverse * x[i]);
}

/* IQ4_NL: f16 d; 16 bytes of nibbles. Codes are those for the scale before its rounding to float16. */
INLINE void iq4_nl(const Batch *batch, int weighted) {
    vf x[GROUP], weight[GROUP];
    vi out[GROUP];
    load_lanes(batch->x, GROUP, x);
    group_weights(batch, x, 0, sum_of_squares(x, GROUP) * (2.0f / (float)GROUP), weighted, weight);
    const vf scale = fit_code_book(x, weight);
    codes(x, scale, out);
    store_half(batch, 0, to_half(scale));
    store_planes(batch, 2, out, GROUP, 1, 4, 0);
}

/* IQ4_XS: f16 d; u16 of upper bits of the scales; 4 bytes of their nibbles; 128 bytes of nibbles: 8 groups. The scale
   of the largest magnitude becomes -32 d; codes are those for d before its rounding to float16. */
INLINE void iq4_xs(const Batch *batch, int weighted) {
    vf x[8 * GROUP], weight[GROUP], scale[8];
    vi out[8 * GROUP], high = {0}, low = {0};
    load_lanes(batch->x, 8 * GROUP, x);
    const vf variance = sum_of_squares(x, 8 * GROUP) * (2.0f / (float)(8 * GROUP));
    for (int group = 0; group < 8; group++) {
        group_weights(batch, x + GROUP * group, GROUP * group, variance, weighted, weight);
        scale[group] = fit_code_book(x + GROUP * group, weight);
    }
    const vf d = -largest(scale, 8) / 32.0f;
    const vf inverse = choose(equal(d, splat(0)), splat(0), 1.0f / d);
    for (int group = 0; group < 8; group++) {
        const vi level = clamp_int(nearest(inverse * scale[group]), -32, 31), stored = level + 32;
        codes(x + GROUP * group, d * to_float(level), out + GROUP * group);
        low |= (stored & 0x0F) << 4 * group;
        high |= stored >> 4 << 2 * group;
    }
    store_half(batch, 0, to_half(d));
    store_half(batch, 2, high);
    store_word(batch, 4, low);
    store_planes(batch, 8, out, 8 * GROUP, 8, 4, 0);
}

BATCH_ENCODER(iq4_nl, GROUP, 18)
BATCH_ENCODER(iq4_xs, 8 * GROUP, 136)
