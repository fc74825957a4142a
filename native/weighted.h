/* The searches of Q4_0 to Q5_1 with an importance matrix: fit_scale and fit_scale_and_min of
   llamakit/quant/encode_search.py, for one group of 32 weights. Formulas: ggml-quants.c (make_qx_quants,
   make_qkx3_quants). */
#ifndef LLAMAKIT_WEIGHTED_H
#define LLAMAKIT_WEIGHTED_H

#include <math.h>

#include "half.h"

/* Groups whose largest magnitude is below this are taken as zero (GROUP_MAX_EPS). */
#define TINY 1e-15f

/* Half to even: adding 1.5 * 2^23 leaves the integer in the mantissa. Beyond +-2^22 it is what that gives. */
static inline int nearest(float x) { return (int)(float_bits(x + 12582912.0f) & 0x7FFFFF) - 0x400000; }

static inline int clamp(int level, int low, int high) { return level < low ? low : level > high ? high : level; }

/* The mean square of a row, summed from its first element to its last. */
static inline float mean_square(const float *x, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    return sum / (float)n;
}

static inline void weights_of_32(const float *x, const float *importance, float power, float *weight) {
    for (int i = 0; i < 32; i++) weight[i] = importance[i] * sqrtf(power + x[i] * x[i]);
}

static inline void sums_of_levels(
    const float *x, const float *weight, float inverse, int n_max, float *xl, float *ll
) {
    float products[32], squares[32];
    for (int i = 0; i < 32; i++) {
        const float level = (float)clamp(nearest(x[i] * inverse), -n_max, n_max - 1);
        products[i] = weight[i] * x[i] * level;
        squares[i] = weight[i] * level * level;
    }
    *xl = *ll = 0;
    for (int i = 0; i < 32; i++) {
        *xl += products[i];
        *ll += squares[i];
    }
}

/* x ~ d (level - n_max): 19 scales around that of the largest element. */
static inline void weighted_symmetric(const float *x, const float *weight, int n_max, uint8_t *out, uint8_t *levels) {
    float peak = 0, xl, ll;
    for (int i = 0; i < 32; i++)
        if (fabsf(x[i]) > fabsf(peak)) peak = x[i];
    if (fabsf(peak) < TINY) {
        put_half(out, 0);
        memset(levels, 0, 32);
        return;
    }
    float chosen = (float)-n_max / peak;
    sums_of_levels(x, weight, chosen, n_max, &xl, &ll);
    float scale = ll != 0 ? xl / ll : 0, best = scale * xl;
    for (int step = -9; step <= 9; step++) {
        if (step == 0) continue;
        const float inverse = -((float)n_max + 0.1f * (float)step) / peak;
        sums_of_levels(x, weight, inverse, n_max, &xl, &ll);
        if (ll > 0 && xl * xl > best * ll) {
            scale = xl / ll;
            best = scale * xl;
            chosen = inverse;
        }
    }
    put_half(out, scale);
    for (int i = 0; i < 32; i++) levels[i] = (uint8_t)(clamp(nearest(x[i] * chosen), -n_max, n_max - 1) + n_max);
}

static inline void levels_from(const float *x, float origin, float inverse, int n_max, float *levels) {
    for (int i = 0; i < 32; i++) levels[i] = (float)clamp(nearest((x[i] - origin) * inverse), 0, n_max);
}

static inline float line_error(const float *x, const float *weight, const float *levels, float scale, float low) {
    float parts[32], error = 0;
    for (int i = 0; i < 32; i++) {
        const float difference = scale * levels[i] + low - x[i];
        parts[i] = weight[i] * (difference * difference);
    }
    for (int i = 0; i < 32; i++) error += parts[i];
    return error;
}

/* x ~ d level + m, m <= 0: weighted regression for 37 inverse scales. A step that is accepted moves `low` for those
   after it, too. */
static inline void weighted_with_minimum(
    const float *x, const float *weight, int n_max, uint8_t *out, uint8_t *levels
) {
    float least = x[0], most = x[0], sum_w = 0, sum_x = 0, level[32];
    for (int i = 0; i < 32; i++) {
        if (x[i] < least) least = x[i];
        if (x[i] > most) most = x[i];
        sum_w += weight[i];
        sum_x += weight[i] * x[i];
    }
    if (least > 0) least = 0;
    put_half(out + 2, least);
    if (most == least) {
        put_half(out, 0);
        memset(levels, 0, 32);
        return;
    }
    float inverse = (float)n_max / (most - least), origin = least, scale = 1 / inverse, low = least;
    levels_from(x, origin, inverse, n_max, level);
    float best = line_error(x, weight, level, scale, low);
    for (int step = 0; step <= 36; step++) {
        const float trial = (-0.9f + 0.05f * (float)step + (float)n_max) / (most - low);
        float l = 0, ll = 0, xl = 0;
        levels_from(x, low, trial, n_max, level);
        for (int i = 0; i < 32; i++) {
            l += weight[i] * level[i];
            ll += weight[i] * level[i] * level[i];
            xl += weight[i] * level[i] * x[i];
        }
        const float determinant = sum_w * ll - l * l;
        if (!(determinant > 0)) continue;
        float new_scale = (sum_w * xl - sum_x * l) / determinant, new_low = (ll * sum_x - l * xl) / determinant;
        if (new_low > 0) {
            new_low = 0;
            new_scale = xl / ll;
        }
        const float error = line_error(x, weight, level, new_scale, new_low);
        if (error < best) {
            best = error, inverse = trial, origin = low, scale = new_scale, low = new_low;
        }
    }
    levels_from(x, origin, inverse, n_max, level);
    put_half(out, scale);
    put_half(out + 2, low);
    for (int i = 0; i < 32; i++) levels[i] = (uint8_t)level[i];
}

#endif
