/* Products with matrices in tiles: one token at a time, straight from the packed tile; several, in groups of 8, from a
   panel, which is a tile unpacked once. Sums run over the blocks in the same order in both, so that a token's result does
   not depend on how many there are.

   Quantized matrices multiply activations in int8 with a float32 scale for each 32 of them: with w unsigned,
   sum (scale w + min) (d a) = scale d (sum w a) + min (d sum a). */
#ifndef LLAMAKIT_MATMUL_H
#define LLAMAKIT_MATMUL_H

#include <math.h>

#include "engine.h"
#include "tiles.h"

enum { GROUP = 8 }; /* tokens of a panel product */

/* Activations of m tokens, m = 1 or GROUP, as the products read them: four (two, one) columns of each token side by side.
   q [n_in / 4][m][4]; d, s32 [n_in / 32][m]; s16 [n_in / 16][m]; halves [n_in / 2][m][2] bfloat16; x [n_in][m]. */
typedef struct {
    int8_t *q;
    float *d, *s32, *s16, *x;
    uint16_t *halves;
} activations;

/* Bytes of the activations of m tokens; what a matrix of `type` reads of them. */
INLINE int64_t padded(int64_t n) { return (n + 63) & ~(int64_t)63; }

static inline int64_t activation_bytes(int64_t n_in, int m) {
    const int64_t n = padded(n_in);
    return padded(n * m) + 4 * padded(n / 32 * m) * 2 + 4 * padded(n / 16 * m) + 4 * n * m + 2 * n * m;
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
    a.s32 = (float *)at;
    at += 4 * padded(n / 32 * m);
    a.s16 = (float *)at;
    return a;
}

/* What the matrices that share an input need of it. */
enum { NEED_INT8 = 1, NEED_BF16 = 2, NEED_F32 = 4 };

INLINE int need_of(int type) {
    if (!is_float_type(type)) return NEED_INT8;
#if defined(__AVX512BF16__)
    return type == TYPE_BF16 ? NEED_BF16 : NEED_F32;
#else
    return NEED_F32;
#endif
}

/* 32 numbers to int8 with one scale; the two sums of 16, and of all, times the scale. */
INLINE void quantize_32(const float *x, int8_t *q, int q_step, float *d, float *s32, float *s16, int m) {
    vf low = load(x), high = load(x + 16);
    vi most = (vi)low & 0x7FFFFFFF, other = (vi)high & 0x7FFFFFFF;
    const vi above = other > most;
    most = (above & other) | (~above & most);
    int32_t largest = 0;
    for (int i = 0; i < 16; i++) largest = most[i] > largest ? most[i] : largest;
    const float top = bits_float((uint32_t)largest), scale = top / 127.0f, inverse = top > 0 ? 127.0f / top : 0;
    /* Adding 1.5 * 2^23 rounds to the nearest integer, half to even. */
    const vi a = (vi)(low * inverse + 12582912.0f) - 0x4B400000, b = (vi)(high * inverse + 12582912.0f) - 0x4B400000;
    int32_t first = 0, second = 0;
    for (int i = 0; i < 16; i++) first += a[i];
    for (int i = 0; i < 16; i++) second += b[i];
    typedef int8_t bytes __attribute__((vector_size(16)));
    const bytes parts[2] = {__builtin_convertvector(a, bytes), __builtin_convertvector(b, bytes)};
    for (int j = 0; j < 8; j++) memcpy(q + j * q_step, (const int8_t *)parts + 4 * j, 4);
    *d = scale;
    s16[0] = scale * (float)first;
    s16[m] = scale * (float)second;
    *s32 = scale * (float)(first + second);
}

/* Token number `token` of m: x (n_in, readable and zero up to a multiple of 64). */
INLINE void put_activations(const float *x, int64_t n_in, int need, const activations *to, int token, int m) {
    if (need & NEED_INT8)
        for (int64_t b = 0; b < n_in / 32; b++)
            quantize_32(x + 32 * b, to->q + (b * 8 * m + token) * 4, 4 * m, to->d + b * m + token,
                        to->s32 + b * m + token, to->s16 + 2 * b * m + token, m);
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

/* One token times a tile of a quantized type. */
INLINE vf multiply_one(int type, const uint8_t *tile, int64_t n_in, const activations *a) {
    const int n_blocks = (int)(n_in / 32), n_groups = 32 / group_of(type);
    const int64_t ahead = 4096, step = tile_bytes(type, 256) / 8;
    vf total = {0};
    for (int i = 0; i < n_blocks; i++) {
        for (int64_t line = 0; line < step; line += 64) prefetch(tile + i * step + ahead + line);
        const block b = read_block(type, tile, i);
        for (int g = 0; g < n_groups; g++) {
            vi sums[2] = {{0}, {0}};
            for (int j = 8 / n_groups * g; j < 8 / n_groups * (g + 1); j++)
                sums[j & 1] = dot(sums[j & 1], b.w[j], word_at(a->q + 4 * (8 * i + j)));
            total += to_float(sums[0] + sums[1]) * (b.scale[g] * a->d[i]);
            total += b.min[g] * (n_groups == 1 ? a->s32[i] : a->s16[2 * i + g]);
        }
    }
    return total;
}

INLINE vf multiply_one_float(int type, const uint8_t *tile, int64_t n_in, const activations *a) {
    const int64_t n = type == TYPE_BF16 ? (n_in + 1) / 2 : n_in, step = type == TYPE_F16 ? 32 : 64;
    vf totals[2] = {{0}, {0}};
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *at = tile + i * step;
        if (i % 2 == 0 || step == 64) prefetch(at + 4096);
        if (type == TYPE_F32) totals[i & 1] += load(at) * a->x[i];
        if (type == TYPE_F16) totals[i & 1] += load_half(at) * a->x[i];
#if defined(__AVX512BF16__)
        if (type == TYPE_BF16) totals[i & 1] = dot_bf16(totals[i & 1], (vi)load(at), word_at(a->halves + 2 * i));
#else
        if (type == TYPE_BF16) {
            totals[0] += (vf)((vi)load(at) << 16) * a->x[2 * i];
            if (2 * i + 1 < n_in) totals[1] += (vf)((vi)load(at) & (int32_t)0xFFFF0000) * a->x[2 * i + 1];
        }
#endif
    }
    return totals[0] + totals[1];
}

#define EACH_TILE_TYPE(DO)                                                                                              \
    DO(TYPE_Q8_0) DO(TYPE_Q4_0) DO(TYPE_Q4_1) DO(TYPE_Q5_0) DO(TYPE_Q5_1) DO(TYPE_IQ4_NL) DO(TYPE_IQ4_XS)               \
    DO(TYPE_Q4_K) DO(TYPE_Q5_K) DO(TYPE_Q6_K)

static vf multiply_tile(const matrix *w, int64_t tile, const activations *a) {
    const uint8_t *at = w->tiles + tile * w->tile_bytes;
    switch (w->type) {
#define CASE(type) case type: return multiply_one(type, at, w->n_in, a);
        EACH_TILE_TYPE(CASE)
#undef CASE
        case TYPE_F32: return multiply_one_float(TYPE_F32, at, w->n_in, a);
        case TYPE_F16: return multiply_one_float(TYPE_F16, at, w->n_in, a);
        default: return multiply_one_float(TYPE_BF16, at, w->n_in, a);
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

INLINE void unpack_quants(int type, const uint8_t *tile, int64_t n_in, uint8_t *w, float *scale, float *min) {
    const int n_groups = 32 / group_of(type);
    for (int i = 0; i < n_in / 32; i++) {
        const block b = read_block(type, tile, i);
        for (int j = 0; j < 8; j++) store_bytes(w + 512 * (int64_t)i + 64 * j, b.w[j]);
        for (int g = 0; g < n_groups; g++) {
            store(scale + 16 * (i * n_groups + g), b.scale[g]);
            store(min + 16 * (i * n_groups + g), b.min[g]);
        }
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

INLINE void multiply_quants(const panel *p, int64_t n_in, int n_groups, const activations *a, vf out[GROUP]) {
    const int per = 8 / n_groups;
    const float *sums_of = n_groups == 1 ? a->s32 : a->s16;
    for (int t = 0; t < GROUP; t++) out[t] = (vf){0};
    for (int64_t i = 0; i < n_in / 32 * n_groups; i++) {
        vi sums[GROUP] = {{0}};
        for (int j = 0; j < per; j++) {
            const vb w = load_bytes(p->w + 64 * (i * per + j));
            for (int t = 0; t < GROUP; t++)
                sums[t] = dot(sums[t], w, word_at(a->q + 4 * ((i * per + j) * GROUP + t)));
        }
        const vf scale = load(p->scale + 16 * i), min = load(p->min + 16 * i);
        for (int t = 0; t < GROUP; t++) {
            out[t] += to_float(sums[t]) * (scale * a->d[i / n_groups * GROUP + t]);
            out[t] += min * sums_of[i * GROUP + t];
        }
    }
}

INLINE void multiply_floats(int is_bf16, const panel *p, int64_t n_in, const activations *a, vf out[GROUP]) {
    vf totals[2][GROUP] = {{{0}}};
    const int64_t n = is_bf16 ? (n_in + 1) / 2 : n_in;
    for (int64_t i = 0; i < n; i++) {
        const vf w = load(p->w + 64 * i);
        vf *sums = totals[i & 1];
        for (int t = 0; t < GROUP; t++)
            sums[t] = is_bf16 ? dot_bf16(sums[t], (vi)w, word_at(a->halves + 2 * (i * GROUP + t)))
                              : sums[t] + w * a->x[i * GROUP + t];
    }
    for (int t = 0; t < GROUP; t++) out[t] = totals[0][t] + totals[1][t];
}

/* GROUP tokens times a tile that has been unpacked. */
static void multiply_panel(const matrix *w, const panel *p, const activations *a, vf out[GROUP]) {
    if (w->type == TYPE_Q6_K)
        multiply_quants(p, w->n_in, 2, a, out);
    else if (!is_float_type(w->type))
        multiply_quants(p, w->n_in, 1, a, out);
    else
        multiply_floats(need_of(w->type) == NEED_BF16, p, w->n_in, a, out);
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
