/* Products with matrices in tiles: of one token or a group of 8 straight from the packed tile, of several groups from a
   panel, which is a tile unpacked once. Sums run over the blocks in the same order in all, so that a token's result does
   not depend on how many there are.

   Quantized matrices multiply activations a in int8 with a float32 scale d for each 32 of them: with w unsigned,
   sum scale (w - zero) d a = scale d (sum w a - zero sum a), and sum (scale w + min) d a = scale d sum w a + min d sum a. */
#ifndef LLAMAKIT_MATMUL_H
#define LLAMAKIT_MATMUL_H

#include <math.h>

#include "engine.h"
#include "tiles.h"

enum { GROUP = 8 }; /* tokens of a panel product */

/* Tokens of a group where there are n in all: those that are missing up to 2, 4 or 8 are computed for nothing. */
static inline int group_width(int64_t n) { return n <= 2 ? 2 : n <= 4 ? 4 : GROUP; }

/* Activations of m tokens, m = 1 or a group's, as the products read them: four (two, one) columns of each token side by
   side. q [n_in / 4][m][4]; d, sums (d times the sum of 32) [n_in / 32][m]; zeros32 and zeros16 (-128 times the sum of 32, 16);
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
    enum { N = 32 / WIDTH };
    vi largest = {0}, whole[N], first = {0}, second = {0};
    for (int i = 0; i < N; i++) largest = greater(largest, (vi)load(x + WIDTH * i) & 0x7FFFFFFF); /* in the order of sizes */
    const float top = bits_float((uint32_t)most_of(largest)), scale = top / 127.0f, inverse = top > 0 ? 127.0f / top : 0;
    for (int i = 0; i < N; i++) /* adding 1.5 * 2^23 rounds to the nearest integer, half to even */
        whole[i] = (vi)(load(x + WIDTH * i) * inverse + 12582912.0f) - 0x4B400000;
    for (int i = 0; i < N / 2; i++) {
        first += whole[i];
        second += whole[N / 2 + i];
    }
    int8_t bytes[32], *q = to->q + (index * 8 * m + token) * 4;
    store_i8(bytes, whole);
    for (int j = 0; j < 8; j++) memcpy(q + j * 4 * m, bytes + 4 * j, 4);
    const int32_t sums[2] = {sum_int(first), sum_int(second)};
    to->d[index * m + token] = scale;
    to->sums[index * m + token] = scale * (float)(sums[0] + sums[1]);
    to->zeros32[index * m + token] = -128 * (sums[0] + sums[1]);
    to->zeros16[2 * index * m + token] = -128 * sums[0];
    to->zeros16[(2 * index + 1) * m + token] = -128 * sums[1];
}

/* A share of the columns of token number `token` of m, from `first` (a multiple of 64) to `last`: x (n_in, readable and
   zero up to a multiple of 64). */
INLINE void put_activations(const float *x, int64_t first, int64_t last, int need, const activations *to, int token, int m) {
    if (need & NEED_INT8)
        for (int64_t b = first / 32; b < last / 32; b++) quantize_32(x + 32 * b, to, b, token, m);
    if (need & NEED_BF16)
        for (int64_t i = first; i < last; i++) to->halves[(i / 2 * m + token) * 2 + i % 2] = to_bf16(x[i]);
    if (need & NEED_BF16 && last % 2) to->halves[(last / 2 * m + token) * 2 + 1] = 0;
    if (need & NEED_F32)
        for (int64_t i = first; i < last; i++) to->x[i * m + token] = x[i];
}

/* Every tile is read once: while one is multiplied, the lines of the next (`ahead`) are on their way to the L2 cache,
   one for each that is multiplied. All of them at once would wait for each other: a core has a dozen on their way at most. */
INLINE void fetch(const uint8_t *at) { __builtin_prefetch(at, 0, 2); }

/* A tile unpacked: w [n_in / 4][16][4] with scales and mins [groups][16]; or floats [n_in][16], or pairs of bfloat16 as
   they are where there are instructions for them. type: of the matrix, or float32 where that is what it was unpacked to. */
typedef struct {
    const uint8_t *w;
    const float *scale, *min;
    int type;
} panel;

static inline int64_t panel_bytes(int64_t n_in) {
    const int64_t n = padded(n_in);
    return n * 64 + 64 * 2 * (n / 16);
}

INLINE block read_panel(int type, const panel *p, int64_t index, int part) {
    const int n_groups = 32 / group_of(type);
    block b;
    for (int j = 0; j < 8; j++) b.w[j] = load_bytes(part_at(p->w + 512 * index + 64 * j, part, 4));
    for (int g = 0; g < n_groups; g++) b.scale[g] = load(p->scale + 16 * (index * n_groups + g) + WIDTH * part);
    if (!zero_of(type)) b.min = load(p->min + 16 * index + WIDTH * part);
    return b;
}

INLINE void unpack_quants(int type, const uint8_t *tile, int64_t n_in, uint8_t *w, float *scale, float *min) {
    const int n_groups = 32 / group_of(type);
    for (int i = 0; i < n_in / 32; i++)
        for (int part = 0; part < PARTS; part++) {
            const block b = read_block(type, tile, i, part);
            for (int j = 0; j < 8; j++) store_bytes(w + 512 * (int64_t)i + 64 * j + 4 * WIDTH * part, b.w[j]);
            for (int g = 0; g < n_groups; g++) store(scale + 16 * (i * n_groups + g) + WIDTH * part, b.scale[g]);
            if (!zero_of(type)) store(min + 16 * i + WIDTH * part, b.min);
        }
}

/* m tokens times a tile of a quantized type, or its panel where there is one; out [PARTS][m]. */
INLINE void multiply_quants(int type, int m, const uint8_t *tile, const panel *p, int64_t n_in, const activations *a,
                            const uint8_t *ahead, vf *out) {
    const int n_blocks = (int)(n_in / 32), n_groups = 32 / group_of(type), per = 8 / n_groups, zero = zero_of(type);
    const int shift = zero == 8 ? 4 : zero == 16 ? 3 : zero == 32 ? 2 : 0; /* zero = 128 >> shift */
    const int32_t *zeros = n_groups == 1 ? a->zeros32 : a->zeros16;
    const int64_t step = tile_bytes(type, 256) / 8;
    vf totals[PARTS * GROUP]; /* and not `out`, which the compiler would read and write each time */
#pragma GCC unroll 16
    for (int i = 0; i < PARTS * m; i++) totals[i] = (vf){0};
    for (int i = 0; i < n_blocks; i++) {
        for (int64_t line = 0; !p && line < step; line += 64) fetch(ahead + i * step + line);
        for (int part = 0; part < PARTS; part++) {
            const block b = p ? read_panel(type, p, i, part) : read_block(type, tile, i, part);
            for (int g = 0; g < n_groups; g++) {
                vi sums[GROUP];
                for (int t = 0; t < m; t++)
                    sums[t] = zero ? splat_int(zeros[(i * n_groups + g) * m + t]) >> shift : (vi){0};
                add_products(most_of_type(type), per, m, b.w + g * per, a->q + 4 * m * (8 * i + g * per), sums);
                for (int t = 0; t < m; t++) {
                    vf total = totals[part * m + t] + to_float(sums[t]) * (b.scale[g] * a->d[i * m + t]);
                    if (!zero) total += b.min * a->sums[i * m + t];
                    totals[part * m + t] = total;
                }
            }
        }
    }
    for (int i = 0; i < PARTS * m; i++) out[i] = totals[i];
}

/* A part of a vector of a tile of floats times n tokens: a column, or two of bfloat16. */
INLINE void add_column(int type, int n, int m, const uint8_t *at, int part, const activations *a, int64_t i, int first,
                       vf *totals) {
    const vf column = type == TYPE_F16 ? load_half(part_at(at, part, 2)) : load(part_at(at, part, 4));
    for (int t = 0; t < n; t++)
        totals[t] = type == TYPE_BF16 ? dot_bf16(totals[t], (vi)column, word_at(a->halves + 2 * (i * m + first + t)))
                                      : totals[t] + column * a->x[i * m + first + t];
}

/* Without instructions for bfloat16 it is a column at a time, too. */
INLINE void add_two_columns(int n, int m, int64_t n_in, const uint8_t *at, int part, const activations *a, int64_t i,
                            int first, vf *even, vf *odd) {
    const vi both = (vi)load(part_at(at, part, 4));
    for (int t = 0; t < n; t++) even[t] += (vf)(both << 16) * a->x[i * m + first + t];
    for (int t = 0; i + 1 < n_in && t < n; t++) odd[t] += (vf)(both & (int32_t)0xFFFF0000) * a->x[(i + 1) * m + first + t];
}

/* The lines of the next tile that belong to two columns, or two pairs of bfloat16. */
INLINE void fetch_two(const uint8_t *ahead, int64_t i, int64_t step) {
    for (int64_t line = 0; line < 2 * step; line += 64) fetch(ahead + i * step + line);
}

/* m tokens times a tile of floats; out [PARTS][m]. */
INLINE void multiply_floats(int type, int m, const uint8_t *tile, int64_t n_in, const activations *a, const uint8_t *ahead,
                            vf *out) {
    enum { MOST = WIDTH == 16 ? 8 : 4 }; /* tokens whose sums the registers hold */
    const int in_two = type == TYPE_BF16 && need_of(type) == NEED_F32;
    const int64_t n = type == TYPE_BF16 ? (n_in + 1) / 2 : n_in, step = type == TYPE_F16 ? 32 : 64;
    for (int part = 0; part < PARTS; part++)
        for (int first = 0; first < m; first += MOST) {
            const int tokens = m < MOST ? m : MOST;
            vf even[MOST] = {{0}}, odd[MOST] = {{0}};
            const int is_first = part == 0 && first == 0;
            for (int64_t i = 0; in_two && i < n; i++) {
                if (is_first && ahead && i % 2 == 0) fetch_two(ahead, i, step);
                add_two_columns(tokens, m, n_in, tile + 64 * i, part, a, 2 * i, first, even, odd);
            }
            int64_t i = 0;
            for (; !in_two && i + 2 <= n; i += 2) {
                if (is_first && ahead) fetch_two(ahead, i, step);
                add_column(type, tokens, m, tile + i * step, part, a, i, first, even);
                add_column(type, tokens, m, tile + (i + 1) * step, part, a, i + 1, first, odd);
            }
            if (!in_two && i < n) add_column(type, tokens, m, tile + i * step, part, a, i, first, even);
            for (int t = 0; t < tokens; t++) out[part * m + first + t] = even[t] + odd[t];
        }
}

#define EACH_TILE_TYPE(DO)                                                                                              \
    DO(TYPE_Q8_0) DO(TYPE_Q4_0) DO(TYPE_Q4_1) DO(TYPE_Q5_0) DO(TYPE_Q5_1) DO(TYPE_IQ4_NL) DO(TYPE_IQ4_XS)               \
    DO(TYPE_Q4_K) DO(TYPE_Q5_K) DO(TYPE_Q6_K)

INLINE void multiply_m(int m, const matrix *w, int64_t tile, const activations *a, const uint8_t *ahead, vf *out) {
    const uint8_t *at = w->tiles + tile * w->tile_bytes;
    switch (w->type) {
#define CASE(type) case type: multiply_quants(type, m, at, NULL, w->n_in, a, ahead, out); return;
        EACH_TILE_TYPE(CASE)
#undef CASE
        case TYPE_F32: multiply_floats(TYPE_F32, m, at, w->n_in, a, ahead, out); return;
        case TYPE_F16: multiply_floats(TYPE_F16, m, at, w->n_in, a, ahead, out); return;
        default: multiply_floats(TYPE_BF16, m, at, w->n_in, a, ahead, out);
    }
}

/* One token times a tile, out [PARTS]; ahead: the tile that comes next. */
static void multiply_tile(const matrix *w, int64_t tile, const activations *a, const uint8_t *ahead, vf *out) {
    multiply_m(1, w, tile, a, ahead, out);
}

static void multiply_tile_by_two(const matrix *w, int64_t tile, const activations *a, const uint8_t *ahead, vf *out) {
    multiply_m(2, w, tile, a, ahead, out);
}

static void multiply_tile_by_four(const matrix *w, int64_t tile, const activations *a, const uint8_t *ahead, vf *out) {
    multiply_m(4, w, tile, a, ahead, out);
}

static void multiply_tile_by_eight(const matrix *w, int64_t tile, const activations *a, const uint8_t *ahead, vf *out) {
    multiply_m(GROUP, w, tile, a, ahead, out);
}

/* A group of `width` tokens times a tile, out [PARTS][width]. */
static void multiply_tile_by_group(int width, const matrix *w, int64_t tile, const activations *a, const uint8_t *ahead,
                                   vf *out) {
    (width == 2 ? multiply_tile_by_two : width == 4 ? multiply_tile_by_four : multiply_tile_by_eight)(w, tile, a, ahead, out);
}

/* Uses `room` (panel_bytes) where the tile cannot be read as it is. */
static panel unpack(const matrix *w, int64_t tile, uint8_t *room) {
    const uint8_t *at = w->tiles + tile * w->tile_bytes;
    const int64_t n_in = w->n_in;
    float *scale = (float *)(room + 16 * padded(n_in)), *min = scale + padded(n_in);
    panel p = {room, scale, min, w->type};
    switch (w->type) {
#define CASE(type) case type: unpack_quants(type, at, n_in, room, scale, min); return p;
        EACH_TILE_TYPE(CASE)
#undef CASE
        case TYPE_F16:
            p.type = TYPE_F32;
            for (int64_t i = 0; i < 16 * n_in; i += WIDTH) store(room + 4 * i, load_half(at + 2 * i));
            return p;
        case TYPE_BF16:
            if (need_of(TYPE_BF16) == NEED_BF16) break;
            p.type = TYPE_F32;
            for (int64_t i = 0; i < 8 * (n_in + 1); i += WIDTH) {
                const vi both = (vi)load(at + 4 * i);
                uint8_t *even = room + 128 * (i / 16) + 4 * (i % 16);
                store(even, (vf)(both << 16));
                store(even + 64, (vf)(both & (int32_t)0xFFFF0000));
            }
            return p;
        default: break;
    }
    p.w = at;
    return p;
}

/* Two vectors of rows times `tokens` tokens, every second column of a stretch: a broadcast activation feeds both. */
INLINE void add_every_second(int tokens, const float *w, const float *v, const float *x, int64_t from, int64_t to,
                             vf *of_w, vf *of_v) {
    vf a[GROUP], b[GROUP];
    for (int t = 0; t < tokens; t++) {
        a[t] = of_w[t];
        b[t] = of_v[t];
    }
    for (int64_t i = from; i < to; i += 2) {
        const vf c = load(w + 16 * i), d = load(v + 16 * i);
        for (int t = 0; t < tokens; t++) {
            const vf y = splat(x[i * GROUP + t]);
            a[t] += c * y;
            b[t] += d * y;
        }
    }
    for (int t = 0; t < tokens; t++) {
        of_w[t] = a[t];
        of_v[t] = b[t];
    }
}

/* Two vectors of rows of float32 panels times a group, out [GROUP] each: the sums of multiply_floats, the even and then
   the odd columns, in stretches that stay in the L1 cache for both. Its sums and its two columns fill the registers, which
   wait less for memory than those of one vector with all columns. */
INLINE void multiply_two(const float *w, const float *v, int64_t n_in, const float *x, vf *of_w, vf *of_v) {
    enum { STRETCH = 128, TOKENS = WIDTH == 16 ? 8 : 4 };
    for (int first = 0; first < GROUP; first += TOKENS) {
        vf sums[2][2][TOKENS] = {{{{0}}}};
        for (int64_t from = 0; from < n_in; from += STRETCH) {
            const int64_t to = from + STRETCH < n_in ? from + STRETCH : n_in;
            add_every_second(TOKENS, w, v, x + first, from, to, sums[0][0], sums[0][1]);
            add_every_second(TOKENS, w, v, x + first, from + 1, to, sums[1][0], sums[1][1]);
        }
        for (int t = 0; t < TOKENS; t++) {
            of_w[first + t] = sums[0][0][t] + sums[1][0][t];
            of_v[first + t] = sums[0][1][t] + sums[1][1][t];
        }
    }
}

/* GROUP tokens times two tiles of float32, out [2][PARTS][GROUP]. */
static void multiply_two_panels(const panel *p, int64_t n_in, const activations *a, vf *out) {
    const float *rows[2 * PARTS];
    for (int i = 0; i < 2 * PARTS; i++) rows[i] = (const float *)p[i / PARTS].w + WIDTH * (i % PARTS);
    for (int i = 0; i < 2 * PARTS; i += 2)
        multiply_two(rows[i], rows[i + 1], n_in, a->x, out + i * GROUP, out + (i + 1) * GROUP);
}

/* GROUP tokens times a tile that has been unpacked, out [PARTS][GROUP]. */
static void multiply_panel(const matrix *w, const panel *p, const activations *a, vf *out) {
    switch (p->type) {
#define CASE(type) case type: multiply_quants(type, GROUP, NULL, p, w->n_in, a, NULL, out); return;
        EACH_TILE_TYPE(CASE)
#undef CASE
        case TYPE_F32: multiply_floats(TYPE_F32, GROUP, p->w, w->n_in, a, NULL, out); return;
        default: multiply_floats(TYPE_BF16, GROUP, p->w, w->n_in, a, NULL, out);
    }
}

INLINE vf load_lora(int is_float, const void *of, int64_t at) {
    return is_float ? load((const float *)of + at) : load_bf16((const uint16_t *)of + at);
}

/* What a matrix adds to a part of its products with n tokens, out [n]: low (n rows of ld, `rank` numbers of each) is
   x A^T. Each number is two sums: one alone would wait for itself. */
INLINE void add_up(int is_float, int n, const matrix *w, int64_t tile, int part, const float *low, int64_t ld, vf *out) {
    const int64_t at = WIDTH * part;
    const vf bias = w->bias ? load(w->bias + 16 * tile + at) : (vf){0};
    vf odd[GROUP] = {{0}};
    for (int t = 0; t < n; t++) out[t] = bias;
    for (int r = 0; r < w->rank; r += 2) {
        const vf b = load_lora(is_float, w->lora_b, (tile * w->rank + r) * 16 + at);
        for (int t = 0; t < n; t++) out[t] += b * low[t * ld + r];
        if (r + 1 == w->rank) break;
        const vf c = load_lora(is_float, w->lora_b, (tile * w->rank + r + 1) * 16 + at);
        for (int t = 0; t < n; t++) odd[t] += c * low[t * ld + r + 1];
    }
    for (int t = 0; t < n; t++) out[t] += odd[t];
}

INLINE vf added(const matrix *w, int64_t tile, int part, const float *low) {
    vf out;
    add_up(is_float_type(w->type), 1, w, tile, part, low, 0, &out);
    return out;
}

/* As `added` for a group; only the first n tokens have a row of `low`. */
static void added_to_group(const matrix *w, int64_t tile, int part, const float *low, int64_t ld, int n, vf *out) {
    if (n < GROUP)
        for (int t = 0; t < n; t++) out[t] = added(w, tile, part, low + t * ld);
    else if (is_float_type(w->type))
        add_up(1, GROUP, w, tile, part, low, ld, out);
    else
        add_up(0, GROUP, w, tile, part, low, ld, out);
}

#endif
