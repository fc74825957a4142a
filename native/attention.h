/* Attention of a few queries over the keys and values of one head of a cache (engine.h): n queries of head_dim numbers,
   of which number i sees the first visible[i] keys. */
#ifndef LLAMAKIT_ATTENTION_H
#define LLAMAKIT_ATTENTION_H

#include <math.h>

#include "vector.h"

enum { MAX_QUERIES = 8, AHEAD = 2 };

/* head_dim, and that rounded up to whole vectors, which is the stride of values; wide: float32, not float16. */
typedef struct {
    uint8_t *keys, *values;
    int head_dim, value_stride, wide;
    float scale;
} head;

INLINE vf load_number(int wide, const uint8_t *from, int64_t index) {
    return wide ? load(from + 4 * index) : load_half(from + 2 * index);
}

INLINE void store_number(int wide, uint8_t *to, int64_t index, float x) {
    if (wide)
        memcpy(to + 4 * index, &x, 4);
    else
        put_half(to + 2 * index, x);
}

/* scores [n][stride]: q k^T * scale for the keys of the tiles first_tile to last_tile - 1, -inf where not visible. */
INLINE void score(int n, int wide, const head *h, const float *const *q, const int *visible, int first_tile, int last_tile,
                  float *scores, int64_t stride) {
    for (int first = 16 * first_tile; first < 16 * last_tile; first += WIDTH) {
        const int64_t keys = (int64_t)(first / 16) * h->head_dim * 16 + first % 16;
        const int64_t bytes = wide ? 4 : 2, ahead = (keys + AHEAD * 16 * h->head_dim) * bytes;
        const int64_t values = (int64_t)first * h->value_stride * bytes;
        vf sums[MAX_QUERIES] = {{0}};
        for (int d = 0; d < h->head_dim; d++) {
            if (d % 2 == 0) { /* caches do not foresee where the next page begins, nor the values */
                __builtin_prefetch(h->keys + ahead + 16 * bytes * d);
                __builtin_prefetch(h->values + values + 16 * bytes * d);
            }
            const vf key = load_number(wide, h->keys, keys + 16 * d);
            for (int i = 0; i < n; i++) sums[i] += key * q[i][d];
        }
        for (int i = 0; i < n; i++)
            store(scores + i * stride + first - 16 * first_tile,
                  choose(lane_numbers() + first < visible[i], sums[i] * h->scale, splat(-INFINITY)));
    }
}

/* Scores -> exp(score - max) in place; the maximum and the sum. With nothing visible the sum is 0. */
INLINE void exponentiate(float *scores, int n_keys, float *most, float *total) {
    vf top = splat(-INFINITY), sums = {0};
    for (int i = 0; i < n_keys; i += WIDTH) {
        const vf x = load(scores + i);
        top = choose(x > top, x, top);
    }
    float largest = most_of_floats(top);
    *most = largest;
    if (largest == -INFINITY) largest = 0;
    for (int i = 0; i < n_keys; i += WIDTH) {
        const vf x = exponential(load(scores + i) - largest);
        store(scores + i, x);
        sums += x;
    }
    *total = sum(sums);
}

/* out[i] (value_stride each) = weights [n][stride] times the values of n_keys positions from `first` on. */
INLINE void mix(int n, int wide, const head *h, const float *weights, int64_t stride, int first, int n_keys,
                float *const *out) {
    for (int d = 0; d < h->value_stride; d += WIDTH) {
        const int64_t values = (int64_t)first * h->value_stride + d;
        vf even[MAX_QUERIES] = {{0}}, odd[MAX_QUERIES] = {{0}};
        for (int k = 0; k < n_keys; k += 2) { /* n_keys is even: whole tiles */
            const vf a = load_number(wide, h->values, values + (int64_t)k * h->value_stride);
            const vf b = load_number(wide, h->values, values + (int64_t)(k + 1) * h->value_stride);
            for (int i = 0; i < n; i++) {
                even[i] += a * weights[i * stride + k];
                odd[i] += b * weights[i * stride + k + 1];
            }
        }
        for (int i = 0; i < n; i++) store(out[i] + d, even[i] + odd[i]);
    }
}

INLINE void attend_n(int n, int wide, const head *h, const float *const *q, const int *visible, int first_tile, int last_tile,
                     float *scores, float *const *out, float *most, float *total) {
    const int n_keys = 16 * (last_tile - first_tile);
    score(n, wide, h, q, visible, first_tile, last_tile, scores, n_keys);
    for (int i = 0; i < n; i++) exponentiate(scores + (int64_t)i * n_keys, n_keys, most + i, total + i);
    mix(n, wide, h, scores, n_keys, 16 * first_tile, n_keys, out);
}

/* n queries (1 to 8) over the keys of some tiles: out not yet divided by the total of each. Cached positions beyond those
   that are visible, up to a whole tile, must hold finite numbers. */
static void attend(int n, const head *h, const float *const *q, const int *visible, int first_tile, int last_tile,
                   float *scores, float *const *out, float *most, float *total) {
    switch (2 * n + h->wide) {
#define CASE(n)                                                                                                \
    case 2 * n: attend_n(n, 0, h, q, visible, first_tile, last_tile, scores, out, most, total); break;         \
    case 2 * n + 1: attend_n(n, 1, h, q, visible, first_tile, last_tile, scores, out, most, total); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
}

/* The pairs (2 i, 2 i + 1) of x turned by rotations [head_dim / 2][cosine, sine]. */
INLINE void rotate(float *x, const float *rotations, int head_dim) {
    for (int i = 0; i < head_dim; i += 2) {
        const float a = x[i], b = x[i + 1], c = rotations[i], s = rotations[i + 1];
        x[i] = a * c - b * s;
        x[i + 1] = a * s + b * c;
    }
}

#endif
