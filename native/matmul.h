/* Products with matrices in tiles: one token at a time, straight from the packed tile; several, in groups of 8, from a
   panel, which is a tile unpacked once. Sums run over the blocks in the same order in both, so that a token's result does
   not depend on how many there are.

   Quantized matrices multiply activations a in int8 with a float32 scale d for each 32 of them: with w unsigned,
   sum scale (w - zero) d a = scale d (sum w a - zero sum a), and sum (scale w + min) d a = scale d sum w a + min d sum a. */
#ifndef LLAMAKIT_MATMUL_H
#define LLAMAKIT_MATMUL_H

#include <math.h>

#include "engine.h"
#include "tiles.h"

enum { GROUP = 8 }; /* tokens of a panel product */

/* Activations of m tokens, m = 1 or GROUP, as the products read them: four (two, one) columns of each token side by side.
   q [n_in / 4][m][4]; d, sums (d times the sum of 32) [n_in / 32][m]; zeros32 and zeros16 (-128 times the sum of 32, 16);
   halves [n_in / 2][m][2] bfloat16; x [n_in][m]. */
typedef struct {
    int8_t *q;
    float *d, *sums, *x;
    int32_t *zeros32, *zeros16;
    uint16_t *halves;
} activations;

INLINE int64_t padded(int64_t n) { return (n + 63) & ~(int64_t)63; }

/* Bytes of the activations of m tokens. */
static inline int64_t activation_bytes(int64_t n_in, int m) {
    const int64_t n = padded(n_in);
    return padded(n * m) + 4 * padded(n / 32 * m) * 3 + 4 * padded(n / 16 * m) + 4 * n * m + 2 * n * m;
}

INLINE activations activations_at(uint8_t *at, int64_t n_in, int m) {
    const int64_t n = padded(n_in);
    activations a;
    a.x = (float *)at;
    at += 4 * n * m;
    a.halves = (uint16_t *)at;
    at += 2 * n * m;
    a.q = (int8_t *)at;
    at += padded(n * m);
    a.d = (float *)at;
    at += 4 * padded(n / 32 * m);
    a.sums = (float *)at;
    at += 4 * padded(n / 32 * m);
    a.zeros32 = (int32_t *)at;
    at += 4 * padded(n / 32 * m);
    a.zeros16 = (int32_t *)at;
    return a;
}

/* What of the activations a matrix reads, by its type. */
enum { NEED_INT8 = 1, NEED_BF16 = 2, NEED_F32 = 4 };

INLINE int need_of(int type) {
    if (!is_float_type(type)) return NEED_INT8;
#if defined(__AVX512BF16__)
    return type == TYPE_BF16 ? NEED_BF16 : NEED_F32;
#else
    return NEED_F32;
#endif
}

/* 32 numbers to int8 with one scale: block `index` of token number `token` of m. */
INLINE void quantize_32(const float *x, const activations *to, int64_t index, int token, int m) {
    const vf low = load(x), high = load(x + 16);
    const int32_t largest = most_of(greater((vi)low & 0x7FFFFFFF, (vi)high & 0x7FFFFFFF)); /* bits in the order of sizes */
    const float top = bits_float((uint32_t)largest), scale = top / 127.0f, inverse = top > 0 ? 127.0f / top : 0;
    /* Adding 1.5 * 2^23 rounds to the nearest integer, half to even. */
    const vi a = (vi)(low * inverse + 12582912.0f) - 0x4B400000, b = (vi)(high * inverse + 12582912.0f) - 0x4B400000;
    const int32_t first = sum_int(a), second = sum_int(b);
    typedef int8_t bytes __attribute__((vector_size(16)));
    const bytes parts[2] = {__builtin_convertvector(a, bytes), __builtin_convertvector(b, bytes)};
    int8_t *q = to->q + (index * 8 * m + token) * 4;
    for (int j = 0; j < 8; j++) memcpy(q + j * 4 * m, (const int8_t *)parts + 4 * j, 4);
    to->d[index * m + token] = scale;
    to->sums[index * m + token] = scale * (float)(first + second);
    to->zeros32[index * m + token] = -128 * (first + second);
    to->zeros16[2 * index * m + token] = -128 * first;
    to->zeros16[(2 * index + 1) * m + token] = -128 * second;
}

/* Token number `token` of m: x (n_in, readable and zero up to a multiple of 64). */
INLINE void put_activations(const float *x, int64_t n_in, int need, const activations *to, int token, int m) {
    if (need & NEED_INT8)
        for (int64_t b = 0; b < n_in / 32; b++) quantize_32(x + 32 * b, to, b, token, m);
    if (need & NEED_BF16)
        for (int64_t i = 0; i < n_in; i++) to->halves[(i / 2 * m + token) * 2 + i % 2] = to_bf16(x[i]);
    if (need & NEED_BF16 && n_in % 2) to->halves[(n_in / 2 * m + token) * 2 + 1] = 0;
    if (need & NEED_F32)
        for (int64_t i = 0; i < n_in; i++) to->x[i * m + token] = x[i];
}

INLINE int32_t word_at(const void *at) {
    int32_t word;
    memcpy(&word, at, 4);
    return word;
}

/* Every tile is read once: while one is multiplied, the lines of the next (`ahead`) are on their way to the L2 cache. */
INLINE void fetch(const uint8_t *at) { __builtin_prefetch(at, 0, 2); }

/* One token times a tile of a quantized type. */
INLINE vf multiply_one(int type, const uint8_t *tile, int64_t n_in, const activations *a, const uint8_t *ahead) {
    const int n_blocks = (int)(n_in / 32), n_groups = 32 / group_of(type), per = 8 / n_groups, zero = zero_of(type);
    const int32_t *zeros = n_groups == 1 ? a->zeros32 : a->zeros16;
    const int64_t step = tile_bytes(type, 256) / 8;
    vf total = {0};
    for (int i = 0; i < n_blocks; i++) {
        for (int64_t line = 0; line < step; line += 64) fetch(ahead + i * step + line);
        const block b = read_block(type, tile, i);
        for (int g = 0; g < n_groups; g++) {
            vi even = splat_int(zero ? zeros[i * n_groups + g] / (128 / (zero ? zero : 1)) : 0), odd = {0};
            for (int j = g * per; j < (g + 1) * per; j += 2) {
                even = dot(even, b.w[j], word_at(a->q + 4 * (8 * i + j)));
                odd = dot(odd, b.w[j + 1], word_at(a->q + 4 * (8 * i + j + 1)));
            }
            total += to_float(even + odd) * (b.scale[g] * a->d[i]);
            if (!zero) total += b.min * a->sums[i];
        }
    }
    return total;
}

/* One vector of a tile of floats: a column, or two of bfloat16. */
INLINE vf add_column(int type, vf total, const uint8_t *at, const activations *a, int64_t i) {
    if (type == TYPE_F32) return total + load(at) * a->x[i];
    if (type == TYPE_F16) return total + load_half(at) * a->x[i];
    return dot_bf16(total, (vi)load(at), word_at(a->halves + 2 * i));
}

/* Without instructions for bfloat16 a column at a time, so that a panel's order is kept. */
INLINE vf multiply_one_bf16(const uint8_t *tile, int64_t n_in, const activations *a) {
    vf even = {0}, odd = {0};
    for (int64_t i = 0; i < n_in; i += 2) {
        const vi both = (vi)load(tile + 32 * i);
        even += (vf)(both << 16) * a->x[i];
        if (i + 1 < n_in) odd += (vf)(both & (int32_t)0xFFFF0000) * a->x[i + 1];
    }
    return even + odd;
}

INLINE vf multiply_one_float(int type, const uint8_t *tile, int64_t n_in, const activations *a, const uint8_t *ahead) {
    if (type == TYPE_BF16 && need_of(type) == NEED_F32) return multiply_one_bf16(tile, n_in, a);
    const int64_t n = type == TYPE_BF16 ? (n_in + 1) / 2 : n_in, step = type == TYPE_F16 ? 32 : 64;
    vf even = {0}, odd = {0};
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
        const uint8_t *at = tile + i * step;
        fetch(ahead + i * step);
        if (step == 64) fetch(ahead + i * step + 64);
        even = add_column(type, even, at, a, i);
        odd = add_column(type, odd, at + step, a, i + 1);
    }
    if (i < n) even = add_column(type, even, tile + i * step, a, i);
    return even + odd;
}

#define EACH_TILE_TYPE(DO)                                                                                              \
    DO(TYPE_Q8_0) DO(TYPE_Q4_0) DO(TYPE_Q4_1) DO(TYPE_Q5_0) DO(TYPE_Q5_1) DO(TYPE_IQ4_NL) DO(TYPE_IQ4_XS)               \
    DO(TYPE_Q4_K) DO(TYPE_Q5_K) DO(TYPE_Q6_K)

static vf multiply_tile(const matrix *w, int64_t tile, const activations *a, const uint8_t *ahead) {
    const uint8_t *at = w->tiles + tile * w->tile_bytes;
    switch (w->type) {
#define CASE(type) case type: return multiply_one(type, at, w->n_in, a, ahead);
        EACH_TILE_TYPE(CASE)
#undef CASE
        case TYPE_F32: return multiply_one_float(TYPE_F32, at, w->n_in, a, ahead);
        case TYPE_F16: return multiply_one_float(TYPE_F16, at, w->n_in, a, ahead);
        default: return multiply_one_float(TYPE_BF16, at, w->n_in, a, ahead);
    }
}

/* A tile unpacked: w [n_in / 4][16][4] with scales and mins [groups][16]; or floats [n_in][16]. */
typedef struct {
    const uint8_t *w;
    const float *scale, *min;
} panel;

static inline int64_t panel_bytes(int64_t n_in) {
    const int64_t n = padded(n_in);
    return n * 64 + 64 * 2 * (n / 16);
}

/* Weights with a zero get that of 128. */
INLINE void unpack_quants(int type, const uint8_t *tile, int64_t n_in, uint8_t *w, float *scale, float *min) {
    const int n_groups = 32 / group_of(type), zero = zero_of(type);
    for (int i = 0; i < n_in / 32; i++) {
        const block b = read_block(type, tile, i);
        for (int j = 0; j < 8; j++)
            store_bytes(w + 512 * (int64_t)i + 64 * j, zero ? b.w[j] + (uint8_t)(128 - zero) : b.w[j]);
        for (int g = 0; g < n_groups; g++) store(scale + 16 * (i * n_groups + g), b.scale[g]);
        if (!zero) store(min + 16 * i, b.min);
    }
}

/* Uses `room` (panel_bytes) where the tile cannot be read as it is. */
static panel unpack(const matrix *w, int64_t tile, uint8_t *room) {
    const uint8_t *at = w->tiles + tile * w->tile_bytes;
    const int64_t n_in = w->n_in;
    float *scale = (float *)(room + 16 * padded(n_in)), *min = scale + padded(n_in);
    panel p = {room, scale, min};
    switch (w->type) {
#define CASE(type) case type: unpack_quants(type, at, n_in, room, scale, min); return p;
        EACH_TILE_TYPE(CASE)
#undef CASE
        case TYPE_F32: p.w = at; return p;
        case TYPE_F16:
            for (int64_t i = 0; i < n_in; i++) store(room + 64 * i, load_half(at + 32 * i));
            return p;
        default:
#if defined(__AVX512BF16__)
            p.w = at;
#else
            for (int64_t i = 0; i < (n_in + 1) / 2; i++) {
                store(room + 128 * i, (vf)((vi)load(at + 64 * i) << 16));
                store(room + 128 * i + 64, (vf)((vi)load(at + 64 * i) & (int32_t)0xFFFF0000));
            }
#endif
            return p;
    }
}

INLINE void multiply_quants(int has_min, int n_groups, const panel *p, int64_t n_in, const activations *a,
                            vf out[GROUP]) {
    const int per = 8 / n_groups;
    const int32_t *zeros = n_groups == 1 ? a->zeros32 : a->zeros16;
    for (int t = 0; t < GROUP; t++) out[t] = (vf){0};
    for (int64_t i = 0; i < n_in / 32 * n_groups; i++) {
        vi sums[GROUP];
        for (int t = 0; t < GROUP; t++) sums[t] = splat_int(has_min ? 0 : zeros[i * GROUP + t]);
        for (int j = 0; j < per; j++) {
            const vb w = load_bytes(p->w + 64 * (i * per + j));
            for (int t = 0; t < GROUP; t++)
                sums[t] = dot(sums[t], w, word_at(a->q + 4 * ((i * per + j) * GROUP + t)));
        }
        const vf scale = load(p->scale + 16 * i);
        for (int t = 0; t < GROUP; t++)
            out[t] += to_float(sums[t]) * (scale * a->d[i / n_groups * GROUP + t]);
        if (has_min) {
            const vf min = load(p->min + 16 * i);
            for (int t = 0; t < GROUP; t++) out[t] += min * a->sums[i * GROUP + t];
        }
    }
}

INLINE void add_columns(int is_bf16, const uint8_t *w, const activations *a, int64_t i, vf totals[GROUP]) {
    const vf column = load(w + 64 * i);
    for (int t = 0; t < GROUP; t++)
        totals[t] = is_bf16 ? dot_bf16(totals[t], (vi)column, word_at(a->halves + 2 * (i * GROUP + t)))
                            : totals[t] + column * a->x[i * GROUP + t];
}

INLINE void multiply_floats(int is_bf16, const panel *p, int64_t n_in, const activations *a, vf out[GROUP]) {
    vf even[GROUP] = {{0}}, odd[GROUP] = {{0}};
    const int64_t n = is_bf16 ? (n_in + 1) / 2 : n_in;
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
        add_columns(is_bf16, p->w, a, i, even);
        add_columns(is_bf16, p->w, a, i + 1, odd);
    }
    if (i < n) add_columns(is_bf16, p->w, a, i, even);
    for (int t = 0; t < GROUP; t++) out[t] = even[t] + odd[t];
}

/* GROUP tokens times a tile that has been unpacked. */
static void multiply_panel(const matrix *w, const panel *p, const activations *a, vf out[GROUP]) {
    if (is_float_type(w->type))
        multiply_floats(need_of(w->type) == NEED_BF16, p, w->n_in, a, out);
    else if (group_of(w->type) == 16)
        multiply_quants(0, 2, p, w->n_in, a, out);
    else if (zero_of(w->type))
        multiply_quants(0, 1, p, w->n_in, a, out);
    else
        multiply_quants(1, 1, p, w->n_in, a, out);
}

/* What a matrix adds to its product with one token: low (rank) is x A^T. */
INLINE vf added(const matrix *w, int64_t tile, const float *low) {
    vf total = w->bias ? load(w->bias + 16 * tile) : (vf){0};
    for (int r = 0; r < w->rank; r++) total += load(w->lora_b + (tile * w->rank + r) * 16) * low[r];
    return total;
}

/* low = x A^T, x (n_in, zero up to a multiple of 16). */
static void lower(const matrix *w, const float *x, float *low) {
    for (int r = 0; r < w->rank; r++) {
        const float *a = w->lora_a + r * padded(w->n_in);
        vf total = {0};
        for (int64_t i = 0; i < w->n_in; i += 16) total += load(a + i) * load(x + i);
        low[r] = sum(total);
    }
}

#endif
