/* Encoders of the types with one scale per 32 weights, of the ternary ones and of MXFP4, without an importance matrix;
   the searches that use one stand in encode_weighted.c. The same steps as in llamakit/quant/encode_simple.py, whose
   source is ggml-quants.c. */
#include <math.h>

#include "bytes.h"
#include "codec.h"
#include "half.h"

/* The largest float32 below 0.5: adding it and cutting off the fraction rounds half away from zero, as roundf does. */
#define BELOW_HALF 0.49999997f

/* Magnitudes compare as the integers that their bits are, and maxima of integers are vector code. */
static inline float largest_magnitude(const float *x, int n) {
    int32_t most = 0;
    for (int i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7FFFFFFF;
        most = bits > most ? bits : most;
    }
    return bits_float((uint32_t)most);
}

/* The element of the largest magnitude, the first of several; 0 is positive. */
static inline float largest_of_32(const float *x) {
    const float most = largest_magnitude(x, 32);
    int positive = 0, negative = 0;
    for (int i = 0; i < 32; i++) {
        positive |= x[i] == most;
        negative |= x[i] == -most;
    }
    if (positive && negative && most != 0)
        for (int i = 0;; i++)
            if (fabsf(x[i]) == most) return x[i];
    return negative && !positive ? -most : most;
}

/* The smallest and the largest of 32; of zeros with both signs the first is the smallest. As integers negative floats
   run backwards; turned over, all are in order. */
static inline void range_of_32(const float *x, float *smallest, float *largest) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int i = 0; i < 32; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits ^= (bits >> 31) & 0x7FFFFFFF;
        low = bits < low ? bits : low;
        high = bits > high ? bits : high;
    }
    low ^= (low >> 31) & 0x7FFFFFFF;
    high ^= (high >> 31) & 0x7FFFFFFF;
    *smallest = bits_float((uint32_t)low);
    *largest = bits_float((uint32_t)high);
    if (*smallest == 0)
        for (int i = 0; i < 32; i++)
            if (x[i] == 0) {
                *smallest = x[i];
                return;
            }
}

static inline float inverse_of(float scale) { return scale != 0 ? 1 / scale : 0; }

/* The smallest scales have infinite inverses, and what these give is no number: it is taken as 0, the low byte of what
   x86 converts it to. Then every weight is looked at; else none needs to be. */
static inline float known(float x) { return isfinite(x) ? x : 0; }

/* x * inverse + offset, cut off, at most n_max. */
static inline void cut_32(const float *x, float origin, float inverse, float offset, int n_max, uint8_t *levels) {
    if (isfinite(inverse)) {
        for (int i = 0; i < 32; i++) {
            const int level = (int)((x[i] - origin) * inverse + offset);
            levels[i] = (uint8_t)(level < n_max ? level : n_max);
        }
    } else {
        for (int i = 0; i < 32; i++) {
            const int level = (int)known((x[i] - origin) * inverse + offset);
            levels[i] = (uint8_t)(level < n_max ? level : n_max);
        }
    }
}

/* x * inverse, half away from zero. */
static inline void round_32(const float *x, float inverse, int8_t *levels) {
    if (isfinite(inverse)) {
        for (int i = 0; i < 32; i++) {
            const float scaled = x[i] * inverse;
            levels[i] = (int8_t)(int)(scaled + copysignf(BELOW_HALF, scaled));
        }
    } else {
        for (int i = 0; i < 32; i++) {
            const float scaled = x[i] * inverse;
            levels[i] = (int8_t)(int)known(scaled + copysignf(BELOW_HALF, scaled));
        }
    }
}

static inline void pack_nibbles(const uint8_t *levels, uint8_t *out) {
    store_16(out, (load_16(levels) & 15) | load_16(levels + 16) << 4);
}

static inline void pack_fifth_bits(const uint8_t *levels, uint8_t *out) {
    for (int byte = 0; byte < 4; byte++) {
        uint64_t eight;
        memcpy(&eight, levels + 8 * byte, 8);
        out[byte] = (uint8_t)((eight >> 4 & 0x0101010101010101u) * 0x0102040810204080u >> 56);
    }
}

/* d and levels in 0..2 n_max - 1 of x ~ d (level - n_max): d is at `out`. */
static inline void symmetric(const float *x, int n_max, uint8_t *out, uint8_t *levels) {
    const float scale = largest_of_32(x) / (float)-n_max;
    put_half(out, scale);
    cut_32(x, 0, inverse_of(scale), (float)n_max + 0.5f, 2 * n_max - 1, levels);
}

/* d, m and levels in 0..n_max of x ~ d level + m. */
static inline void with_minimum(const float *x, int n_max, uint8_t *out, uint8_t *levels) {
    float smallest, largest;
    range_of_32(x, &smallest, &largest);
    const float scale = ((largest - smallest) + 0.0f) / (float)n_max; /* never -0 */
    put_half(out, scale);
    put_half(out + 2, smallest);
    cut_32(x, smallest, inverse_of(scale), 0.5f, n_max, levels);
}

typedef void (*fit_fn)(const float *x, int n_max, uint8_t *out, uint8_t *levels);

/* Rows of a type of 32 weights: `head` bytes of scales, 4 of fifth bits where there are such, nibbles. */
static inline __attribute__((always_inline)) void rows_of_nibbles(
    const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, int n_max, int head, int fifths, fit_fn fit
) {
    uint8_t levels[32];
    for (int64_t block = 0; block < n_rows * (n_in / 32); block++, x += 32) {
        fit(x, n_max, out, levels);
        if (fifths) pack_fifth_bits(levels, out + head);
        pack_nibbles(levels, out + head + (fifths ? 4 : 0));
        out += head + (fifths ? 4 : 0) + 16;
    }
}

DECLARE_ENCODER(encode_q4_0) {
    if (importance) ISA_NAME(encode_q4_0_weighted)(x, importance, out, n_rows, n_in);
    else rows_of_nibbles(x, out, n_rows, n_in, 8, 2, 0, symmetric);
}

DECLARE_ENCODER(encode_q4_1) {
    if (importance) ISA_NAME(encode_q4_1_weighted)(x, importance, out, n_rows, n_in);
    else rows_of_nibbles(x, out, n_rows, n_in, 15, 4, 0, with_minimum);
}

DECLARE_ENCODER(encode_q5_0) {
    if (importance) ISA_NAME(encode_q5_0_weighted)(x, importance, out, n_rows, n_in);
    else rows_of_nibbles(x, out, n_rows, n_in, 16, 2, 1, symmetric);
}

DECLARE_ENCODER(encode_q5_1) {
    if (importance) ISA_NAME(encode_q5_1_weighted)(x, importance, out, n_rows, n_in);
    else rows_of_nibbles(x, out, n_rows, n_in, 31, 4, 1, with_minimum);
}

/* The largest magnitude becomes 127. */
DECLARE_ENCODER(encode_q8_0) {
    (void)importance;
    for (int64_t i = 0; i < n_rows * n_in; i += 32, x += 32, out += 34) {
        const float scale = largest_magnitude(x, 32) / 127;
        int8_t levels[32];
        round_32(x, inverse_of(scale), levels);
        put_half(out, scale);
        memcpy(out + 2, levels, 32);
    }
}

/* Levels 0, 1, 2 of 256 weights; the largest magnitude is the scale, which is given back. */
static inline float ternary(const float *x, uint8_t *trits) {
    const float scale = largest_magnitude(x, 256), inverse = inverse_of(scale);
    for (int i = 0; i < 256; i += 32) {
        int8_t levels[32];
        round_32(x + i, inverse, levels);
        for (int j = 0; j < 32; j++) trits[i + j] = (uint8_t)(levels[j] + 1);
    }
    return scale;
}

/* Digits base 3, the first the most significant, as a fraction of 256; fewer than five are followed by zeros. */
static inline void pack_trits(const uint8_t *trits, int n_trits, int width, uint8_t *out) {
    for (int i = 0; i < width; i++) {
        unsigned number = 0;
        for (int k = 0; k < 5; k++) number = 3 * number + (k < n_trits ? trits[k * width + i] : 0);
        out[i] = (uint8_t)((number * 256 + 242) / 243);
    }
}

DECLARE_ENCODER(encode_tq1_0) {
    (void)importance;
    for (int64_t i = 0; i < n_rows * n_in; i += 256, x += 256, out += 54) {
        uint8_t trits[256];
        const float scale = ternary(x, trits);
        pack_trits(trits, 5, 32, out);
        pack_trits(trits + 160, 5, 16, out + 32);
        pack_trits(trits + 240, 4, 4, out + 48);
        put_half(out + 52, scale);
    }
}

DECLARE_ENCODER(encode_tq2_0) {
    (void)importance;
    for (int64_t i = 0; i < n_rows * n_in; i += 256, x += 256, out += 66) {
        uint8_t trits[256];
        const float scale = ternary(x, trits);
        for (int piece = 0; piece < 2; piece++) {
            const uint8_t *t = trits + 128 * piece;
            for (int j = 0; j < 32; j++)
                out[32 * piece + j] = (uint8_t)(t[j] | t[j + 32] << 2 | t[j + 64] << 4 | t[j + 96] << 6);
        }
        put_half(out + 64, scale);
    }
}

/* The exponent of the largest magnitude, less 2; the nearest value of the code book, the smaller one of two. The
   logarithm is rounded to float32, since a value just below a power of two counts as that power. */
DECLARE_ENCODER(encode_mxfp4) {
    static const float midpoints[7] = {0.5f, 1.5f, 2.5f, 3.5f, 5.0f, 7.0f, 10.0f};
    (void)importance;
    for (int64_t i = 0; i < n_rows * n_in; i += 32, x += 32, out += 17) {
        const float largest = largest_magnitude(x, 32);
        const int usable = largest > 0 && isfinite(largest);
        const uint8_t exponent = usable ? (uint8_t)((int)floorf((float)log2((double)largest)) + 125) : 0;
        const float scale = mxfp4_scale(exponent);
        uint8_t levels[32];
        for (int j = 0; j < 32; j++) {
            int level = 0;
            for (int k = 0; k < 7; k++) level += fabsf(x[j]) > scale * midpoints[k];
            levels[j] = (uint8_t)(level + (x[j] < 0 && level > 0 ? 8 : 0));
        }
        out[0] = exponent;
        pack_nibbles(levels, out + 1);
    }
}
