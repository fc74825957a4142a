/* Encoders of the K-quants: 256 weights with two levels of scales. Formulas: ggml-quants.c of llama.cpp
   (quantize_row_q*_K_ref without and quantize_row_q*_K_impl with an importance); layouts: ggml-common.h.

   First every group of 16 or 32 weights is fitted by itself; then the scales of a block are quantized, the header is
   packed, and the levels are taken anew from the scales as the decoder will see them. Where such a scale is 0, the
   levels of the first fit stay. */
#include "batch.h"
#include "search.h"

#define BLOCK 256
#define MAX_GROUPS 16

/* A type with a line for every group: of size weights and levels up to n_max. The search without importance is the
   type's own, the other is the same for all. */
typedef struct {
    int size, n_max, variance_factor;
    LineSearch plain;
} LineType;

/* The fits of a block's groups; their scales and minima as levels, and what these are to be multiplied with. */
typedef struct {
    LineFit fit[MAX_GROUPS];
    vi scale[MAX_GROUPS], low[MAX_GROUPS];
    vf d, dmin;
} Lines;

/* Without importance: the magnitudes themselves in groups of 16; in groups of 32 these and their root mean square. */
INLINE void plain_weights(const vf *x, int size, vf *weight) {
    const vf mean = size == 32 ? root(sum_of_squares(x, size) / 32.0f) : splat(0);
    for (int i = 0; i < size; i++) weight[i] = size == 32 ? mean + magnitude(x[i]) : magnitude(x[i]);
}

/* Values as bytes times a scale: the largest becomes n_max. Negative values wrap around, as in ggml. */
INLINE vf quantize_by_largest(const vf *values, int count, int n_max, vi *levels) {
    const vf peak = largest_positive(values, count);
    const vf inverse = choose(equal(peak, splat(0)), splat(0), splat((float)n_max) / peak);
    for (int i = 0; i < count; i++) levels[i] = nearest(inverse * values[i]) & 0xFF;
    return peak / (float)n_max;
}

/* Every group by itself, then the scales and the minima of all, as levels up to scale_max. */
INLINE void fit_lines(const Batch *batch, const vf *x, LineType type, int scale_max, int weighted, Lines *lines) {
    const int n_groups = BLOCK / type.size;
    const vf variance = weighted ? (float)type.variance_factor * sum_of_squares(x, BLOCK) / (float)BLOCK : splat(0);
    vf weight[MAX_GROUP], scale[MAX_GROUPS], low[MAX_GROUPS], sum_w[MAX_GROUPS];
    for (int group = 0; group < n_groups; group++) {
        const vf *part = x + group * type.size;
        if (weighted) {
            load_importance(batch, group * type.size, type.size, weight);
            weigh(part, weight, variance, type.size, weight);
            sum_w[group] = sum(weight, type.size);
        } else {
            plain_weights(part, type.size, weight);
        }
        lines->fit[group] = fit_line(part, weight, type.size, type.n_max, weighted ? WEIGHTED_LINES : type.plain);
        scale[group] = lines->fit[group].scale;
        low[group] = -lines->fit[group].low;
    }
    if (weighted) {
        lines->d = fit_positive(scale, sum_w, n_groups, scale_max, lines->scale);
        lines->dmin = fit_positive(low, sum_w, n_groups, scale_max, lines->low);
    } else {
        lines->d = quantize_by_largest(scale, n_groups, scale_max, lines->scale);
        lines->dmin = quantize_by_largest(low, n_groups, scale_max, lines->low);
    }
}

/* (x + offset) / scale to the nearest level in low..high, less low; `kept` where scale is 0. */
INLINE vi level_anew(vf x, vf offset, vf scale, int low, int high) {
    return clamp_int(nearest((x + offset) / scale), low, high) - low;
}

INLINE void line_levels(const vf *x, const LineFit *fit, vf scale, vf offset, int size, int n_max, vi *levels) {
    const mask kept = equal(scale, splat(0));
    for (int i = 0; i < size; i++) levels[i] = level_anew(x[i], offset, scale, 0, n_max);
    if (!any(kept)) return;
    for (int i = 0; i < size; i++) levels[i] = choose_int(kept, line_level(fit, x[i], n_max), levels[i]);
}

/* Q2_K: 16 bytes of (scale, min) nibbles; 64 of 2-bit levels; f16 d; f16 dmin. */
INLINE void q2_k(const Batch *batch, int weighted) {
    static const LineType type = {16, 3, 1, {-0.5f, 0.1f, 15, 1}};
    vf x[BLOCK];
    vi levels[BLOCK], packed[16];
    Lines lines;
    load_lanes(batch->x, BLOCK, x);
    fit_lines(batch, x, type, 15, weighted, &lines);
    const vi half = to_half(lines.d), half_min = to_half(lines.dmin);
    for (int group = 0; group < 16; group++) {
        packed[group] = (lines.scale[group] | lines.low[group] << 4) & 0xFF;
        const vf scale = from_half(half) * to_float(packed[group] & 0x0F);
        const vf offset = from_half(half_min) * to_float(packed[group] >> 4);
        line_levels(x + 16 * group, &lines.fit[group], scale, offset, 16, 3, levels + 16 * group);
    }
    for (int i = 0; i < 16; i += 4) store_bytes(batch, i, packed + i);
    store_planes(batch, 16, levels, BLOCK, 2, 2, 0);
    store_half(batch, 80, half);
    store_half(batch, 82, half_min);
}

/* The 12 bytes of the scales and mins of Q4_K and Q5_K, which are read back as the decoder does it: four of the first
   scales with the upper bits of the last, four of the mins likewise, four of the last ones' nibbles. */
INLINE void pack_six_bits(vi *scales, vi *mins, vi *packed) {
    for (int i = 0; i < 4; i++) {
        packed[i] = (scales[i] | scales[i + 4] >> 4 << 6) & 0xFF;
        packed[i + 4] = (mins[i] | mins[i + 4] >> 4 << 6) & 0xFF;
        packed[i + 8] = (scales[i + 4] & 0x0F) | (mins[i + 4] & 0x0F) << 4;
        scales[i] = packed[i] & 0x3F;
        mins[i] = packed[i + 4] & 0x3F;
        scales[i + 4] = (packed[i + 8] & 0x0F) | packed[i] >> 6 << 4;
        mins[i + 4] = packed[i + 8] >> 4 | packed[i + 4] >> 6 << 4;
    }
}

/* Levels and the header, f16 d; f16 dmin; 12 bytes of scales, of Q4_K and Q5_K: 8 groups of 32. */
INLINE void six_bit_levels(const Batch *batch, LineType type, int weighted, int limited, vi *levels) {
    vf x[BLOCK];
    vi packed[12];
    Lines lines;
    load_lanes(batch->x, BLOCK, x);
    fit_lines(batch, x, type, 63, weighted, &lines);
    vi *scales = lines.scale, *mins = lines.low;
    for (int group = 0; limited && group < 8; group++) {
        scales[group] = lesser_int(scales[group], splat_int(63));
        mins[group] = lesser_int(mins[group], splat_int(63));
    }
    pack_six_bits(scales, mins, packed);
    const vi half = to_half(lines.d), half_min = to_half(lines.dmin);
    for (int group = 0; group < 8; group++) {
        const vf scale = from_half(half) * to_float(scales[group]);
        const vf offset = from_half(half_min) * to_float(mins[group]);
        line_levels(x + 32 * group, &lines.fit[group], scale, offset, 32, type.n_max, levels + 32 * group);
    }
    store_half(batch, 0, half);
    store_half(batch, 2, half_min);
    for (int i = 0; i < 12; i += 4) store_bytes(batch, 4 + i, packed + i);
}

/* Q4_K: the header; 128 bytes of nibbles. With an importance a wrapped scale is not limited, as in ggml. */
INLINE void q4_k(const Batch *batch, int weighted) {
    static const LineType type = {32, 15, 2, {-1.0f, 0.1f, 20, 0}};
    vi levels[BLOCK];
    six_bit_levels(batch, type, weighted, !weighted, levels);
    store_planes(batch, 16, levels, BLOCK, 4, 4, 0);
}

/* Q5_K: the header; 32 bytes of fifth bits; 128 of nibbles. */
INLINE void q5_k(const Batch *batch, int weighted) {
    static const LineType type = {32, 31, 2, {-0.5f, 0.1f, 15, 0}};
    vi levels[BLOCK];
    six_bit_levels(batch, type, weighted, 1, levels);
    store_planes(batch, 16, levels, BLOCK, 1, 1, 4);
    store_planes(batch, 48, levels, BLOCK, 4, 4, 0);
}

/* Values times a scale, the one of the largest magnitude becoming -n_max; no scale and levels of 0 where `zero`. */
INLINE vf quantize_by_signed_largest(const vf *values, int n_max, vf least, vi *levels, mask *zero) {
    const vf peak = largest(values, 16);
    *zero = less(magnitude(peak), least);
    const vf inverse = splat((float)-n_max) / peak, used = choose(*zero, splat(0), inverse);
    for (int i = 0; i < 16; i++) levels[i] = nearest(used * values[i]);
    return choose(*zero, splat(0), 1.0f / inverse);
}

/* First the fit, whose levels stay where the scale is 0; then the levels anew: 16 groups of 16. */
INLINE void scaled_levels(const vf *x, const vf *scales, const vi *fitted, int n_max, vi *levels) {
    for (int group = 0; group < 16; group++) {
        const mask kept = equal(scales[group], splat(0));
        for (int i = 16 * group; i < 16 * (group + 1); i++) {
            const vi anew = clamp_int(nearest(x[i] / scales[group]), -n_max, n_max - 1) + n_max;
            levels[i] = choose_int(kept, fitted[i], anew);
        }
    }
}

/* Q3_K's fits: levels improved one after the other, and scales by the largest; or searches for both. */
INLINE vf q3_k_descent(const vf *x, vi *scales, vi *fitted) {
    vf level[16], scale[16];
    mask zero;
    for (int group = 0; group < 16; group++) {
        scale[group] = fit_scale_by_descent(x + 16 * group, 16, 4, level);
        for (int i = 0; i < 16; i++) fitted[16 * group + i] = nearest(level[i]);
    }
    /* All scales zero: ggml leaves the bytes at zero, which stand for -32. */
    const vf d = quantize_by_signed_largest(scale, 32, splat(0x1p-149f), scales, &zero);
    for (int group = 0; group < 16; group++)
        scales[group] = choose_int(zero, splat_int(0), clamp_int(scales[group], -32, 31) + 32);
    return d;
}

INLINE vf q3_k_search(const Batch *batch, const vf *x, vi *scales, vi *fitted) {
    vf weight[16], scale[16], sum_w[16];
    const vf variance = 2.0f * sum_of_squares(x, BLOCK) / (float)BLOCK;
    for (int group = 0; group < 16; group++) {
        const vf *part = x + 16 * group;
        load_importance(batch, 16 * group, 16, weight);
        weigh(part, weight, variance, 16, weight);
        const ScaleFit fit = fit_scale(part, weight, 16, 4, 1);
        for (int i = 0; i < 16; i++) fitted[16 * group + i] = level_of(&fit, part[i], 4);
        scale[group] = fit.scale;
        sum_w[group] = sum(weight, 16);
    }
    const ScaleFit fit = fit_scale(scale, sum_w, 16, 32, 0);
    for (int group = 0; group < 16; group++) scales[group] = level_of(&fit, scale[group], 32);
    return fit.scale;
}

/* Q3_K: 32 bytes of third bits; 64 of 2-bit levels; 12 of 6-bit scales; f16 d. */
INLINE void q3_k(const Batch *batch, int weighted) {
    vf x[BLOCK], decoded[16];
    vi levels[BLOCK], scales[16], packed[12];
    load_lanes(batch->x, BLOCK, x);
    const vi half = to_half(weighted ? q3_k_search(batch, x, scales, levels) : q3_k_descent(x, scales, levels));
    for (int group = 0; group < 16; group++) decoded[group] = from_half(half) * to_float(scales[group] - 32);
    scaled_levels(x, decoded, levels, 4, levels);
    for (int i = 0; i < 8; i++) packed[i] = (scales[i] & 0x0F) | (scales[i + 8] & 0x0F) << 4;
    for (int i = 0; i < 4; i++)
        packed[i + 8] = scales[i] >> 4 | scales[i + 4] >> 4 << 2 | scales[i + 8] >> 4 << 4 | scales[i + 12] >> 4 << 6;
    store_planes(batch, 0, levels, BLOCK, 1, 1, 2);
    store_planes(batch, 32, levels, BLOCK, 2, 2, 0);
    for (int i = 0; i < 12; i += 4) store_bytes(batch, 96 + i, packed + i);
    store_half(batch, 108, half);
}

/* Q6_K: 128 bytes of nibbles; 64 of upper bits; 16 int8 scales; f16 d. Weights are squares, or the importance alone. */
INLINE void q6_k(const Batch *batch, int weighted) {
    vf x[BLOCK], weight[16], scale[16], decoded[16];
    vi levels[BLOCK], scales[16];
    mask zero;
    load_lanes(batch->x, BLOCK, x);
    for (int group = 0; group < 16; group++) {
        const vf *part = x + 16 * group;
        if (weighted) load_importance(batch, 16 * group, 16, weight);
        else squares(part, 16, weight);
        const ScaleFit fit = fit_scale(part, weight, 16, 32, 1);
        for (int i = 0; i < 16; i++) levels[16 * group + i] = level_of(&fit, part[i], 32);
        scale[group] = fit.scale;
    }
    const vi half = to_half(quantize_by_signed_largest(scale, 128, splat(TINY), scales, &zero));
    for (int group = 0; group < 16; group++) {
        scales[group] = lesser_int(scales[group], splat_int(127)) << 24 >> 24; /* int8 */
        decoded[group] = from_half(half) * to_float(scales[group]);
    }
    scaled_levels(x, decoded, levels, 32, levels);
    if (any(zero)) /* a block as good as zero is zero bytes */
        for (int i = 0; i < BLOCK; i++) levels[i] = choose_int(zero, splat_int(0), levels[i]);
    store_planes(batch, 0, levels, BLOCK, 2, 4, 0);
    store_planes(batch, 128, levels, BLOCK, 2, 2, 4);
    for (int i = 0; i < 16; i += 4) store_bytes(batch, 192 + i, scales + i);
    store_half(batch, 208, half);
}

BATCH_ENCODER(q2_k, BLOCK, 84)
BATCH_ENCODER(q3_k, BLOCK, 110)
BATCH_ENCODER(q4_k, BLOCK, 144)
BATCH_ENCODER(q5_k, BLOCK, 176)
BATCH_ENCODER(q6_k, BLOCK, 210)
