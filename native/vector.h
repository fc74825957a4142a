/* Vectors as wide as a register: WIDTH lanes of 32 bits, 16, 8 or 4. A wider one the compiler would keep in memory, and
   read and write it for each operation. Compiled with contraction allowed: a * b + c is one instruction where there is one. */
#ifndef LLAMAKIT_VECTOR_H
#define LLAMAKIT_VECTOR_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "half.h"

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

#define INLINE static inline __attribute__((always_inline, unused))

typedef float vf __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * WIDTH)));
typedef uint8_t vb __attribute__((vector_size(4 * WIDTH)));

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vi splat_int(int32_t x) { return x + (vi){0}; }
INLINE vf load(const void *at) { vf x; memcpy(&x, at, sizeof x); return x; }
INLINE vb load_bytes(const void *at) { vb x; memcpy(&x, at, sizeof x); return x; }
INLINE void store(void *at, vf x) { memcpy(at, &x, sizeof x); }
INLINE void store_bytes(void *at, vb x) { memcpy(at, &x, sizeof x); }
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

/* 0, 1, 2 ... */
INLINE vi lane_numbers(void) {
    vi x = {0};
    for (int lane = 0; lane < WIDTH; lane++) x[lane] = lane;
    return x;
}

#if defined(__AVX512F__)
INLINE float sum(vf x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE int32_t sum_int(vi x) { return _mm512_reduce_add_epi32((__m512i)x); }
INLINE int32_t most_of(vi x) { return _mm512_reduce_max_epi32((__m512i)x); }
INLINE float most_of_floats(vf x) { return _mm512_reduce_max_ps((__m512)x); }
INLINE vi greater(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
#elif WIDTH == 8
/* One half of the lanes with the other, three times. */
INLINE float sum(vf x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
INLINE int32_t sum_int(vi x) {
    __m128i y = _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xB1)));
}
INLINE int32_t most_of(vi x) {
    __m128i y = _mm_max_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xB1)));
}
INLINE float most_of_floats(vf x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
INLINE vi greater(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
#else
INLINE float sum(vf x) {
    float total = 0;
    for (int lane = 0; lane < WIDTH; lane++) total += x[lane];
    return total;
}
INLINE int32_t sum_int(vi x) {
    int32_t total = 0;
    for (int lane = 0; lane < WIDTH; lane++) total += x[lane];
    return total;
}
INLINE int32_t most_of(vi x) {
    int32_t most = x[0];
    for (int lane = 1; lane < WIDTH; lane++) most = x[lane] > most ? x[lane] : most;
    return most;
}
INLINE float most_of_floats(vf x) {
    float most = x[0];
    for (int lane = 1; lane < WIDTH; lane++) most = x[lane] > most ? x[lane] : most;
    return most;
}
INLINE vi greater(vi a, vi b) {
    const vi above = a > b;
    return (above & a) | (~above & b);
}
#endif

/* WIDTH float16 at any address. */
INLINE vf load_half(const void *at) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(at));
#elif WIDTH == 8 && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(at));
#else
    vf x;
    for (int lane = 0; lane < WIDTH; lane++) x[lane] = get_half((const uint8_t *)at + 2 * lane);
    return x;
#endif
}

/* WIDTH bfloat16 at any address. */
INLINE vf load_bf16(const void *at) {
    typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
    halves x;
    memcpy(&x, at, sizeof x);
    return (vf)(__builtin_convertvector(x, vi) << 16);
}

/* WIDTH bytes as numbers. */
INLINE vi load_u8(const void *at) {
    typedef uint8_t bytes __attribute__((vector_size(WIDTH)));
    bytes x;
    memcpy(&x, at, sizeof x);
    return __builtin_convertvector(x, vi);
}
INLINE vi load_i8(const void *at) {
    typedef int8_t bytes __attribute__((vector_size(WIDTH)));
    bytes x;
    memcpy(&x, at, sizeof x);
    return __builtin_convertvector(x, vi);
}

/* 32 whole numbers from -127 to 127 as bytes. */
INLINE void store_i8(int8_t *at, const vi *x) {
#if WIDTH == 8
    const __m256i a = _mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]), b = _mm256_packs_epi32((__m256i)x[2], (__m256i)x[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i *)at, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order));
#else
    typedef int8_t bytes __attribute__((vector_size(WIDTH)));
    for (int i = 0; i < 32 / WIDTH; i++) {
        const bytes part = __builtin_convertvector(x[i], bytes);
        memcpy(at + WIDTH * i, &part, sizeof part);
    }
#endif
}

INLINE int32_t word_at(const void *at) {
    int32_t word;
    memcpy(&word, at, 4);
    return word;
}

#if WIDTH == 8
/* As `add_products`, for weights up to 63: pairs of products are added up in 16 bits for as long as they fit. */
INLINE void add_small_products(int most, int n, int m, const vb *w, const int8_t *q, vi *sums) {
    const int fit = most > 31 ? 2 : most > 15 ? 4 : 8; /* 2 * 127 * 15 * 8 < 2^15, and so on */
#pragma GCC unroll 8
    for (int j = 0; j < n; j += fit) {
        __m256i pairs[8];
#pragma GCC unroll 8
        for (int t = 0; t < m; t++) pairs[t] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int i = 0; i < fit; i++) {
            const int k = j + i;
#pragma GCC unroll 8
            for (int t = 0; k < n && t < m; t++) {
                const __m256i a = _mm256_set1_epi32(word_at(q + 4 * (k * m + t)));
                pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16((__m256i)w[k], a));
                __asm__("" : "+x"(pairs[t])); /* now: the compiler would put all products aside, and add them later */
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < m; t++) sums[t] += (vi)_mm256_madd_epi16(pairs[t], _mm256_set1_epi16(1));
    }
}
#endif

/* sums[t][r] + sum over j < n and i < 4 of w[j][4 r + i] q[j][t][i], for m tokens t: at most 8 vectors of unsigned weights,
   none above `most`, and signed bytes q [n][m][4], none of them -128. Whole numbers: their order does not matter. */
INLINE void add_products(int most, int n, int m, const vb *w, const int8_t *q, vi *sums) {
    (void)most;
#if WIDTH == 8
    if (most <= 63) {
        add_small_products(most, n, m, w, q, sums);
        return;
    }
    /* Two products of full bytes do not fit 16 bits, those of nibbles do. */
    vb low[8], high[8];
    vi sixteenths[8];
    for (int j = 0; j < n; j++) {
        low[j] = w[j] & 15;
        high[j] = (vb)((vu)w[j] >> 4) & 15;
    }
    for (int t = 0; t < m; t++) sixteenths[t] = (vi){0};
    add_small_products(15, n, m, low, q, sums);
    __asm__ volatile("" ::: "memory"); /* or the compiler would keep all of q for the second time */
    add_small_products(15, n, m, high, q, sixteenths);
    for (int t = 0; t < m; t++) sums[t] += sixteenths[t] << 4;
#else
    for (int j = 0; j < n; j++)
        for (int t = 0; t < m; t++) {
            const vi a = splat_int(word_at(q + 4 * (j * m + t)));
#if WIDTH == 16 && defined(__AVX512VNNI__)
            sums[t] = (vi)_mm512_dpbusd_epi32((__m512i)sums[t], (__m512i)w[j], (__m512i)a);
#elif WIDTH == 4 && defined(__SSE2__)
            const __m128i even = _mm_srai_epi16(_mm_slli_epi16((__m128i)a, 8), 8), odd = _mm_srai_epi16((__m128i)a, 8);
            const __m128i low = _mm_and_si128((__m128i)w[j], _mm_set1_epi16(0xFF)), high = _mm_srli_epi16((__m128i)w[j], 8);
            sums[t] += (vi)_mm_madd_epi16(low, even) + (vi)_mm_madd_epi16(high, odd);
#else
            const vi x = (vi)w[j];
            sums[t] += (x & 0xFF) * (a << 24 >> 24) + (x >> 8 & 0xFF) * (a << 16 >> 24);
            sums[t] += (x >> 16 & 0xFF) * (a << 8 >> 24) + (x >> 24 & 0xFF) * (a >> 24);
#endif
        }
#endif
}

/* acc[r] + w[2 r] a[0] + w[2 r + 1] a[1]: pairs of bfloat16. */
INLINE vf dot_bf16(vf acc, vi w, int32_t a) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(a));
#else
    acc += (vf)(w << 16) * bits_float((uint32_t)a << 16);
    return acc + (vf)(w & (int32_t)0xFFFF0000) * bits_float((uint32_t)a & 0xFFFF0000u);
#endif
}

/* Where bit i of the 4 * WIDTH at `bits` is set, byte i becomes byte | value. */
INLINE vb or_where(vb w, const uint8_t *bits, uint8_t value) {
#if defined(__AVX512BW__)
    uint64_t mask;
    memcpy(&mask, bits, 8);
    const __m512i other = _mm512_or_si512((__m512i)w, _mm512_set1_epi8((char)value));
    return (vb)_mm512_mask_mov_epi8((__m512i)w, mask, other);
#elif WIDTH == 8
    const __m256i byte_of = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3,
                                             3, 3, 3, 3, 3);
    const __m256i bit_of = _mm256_set1_epi64x((long long)0x8040201008040201);
    const __m256i all = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word_at(bits)), byte_of), bit_of);
    const __m256i is_set = _mm256_cmpeq_epi8(all, bit_of);
    return w | ((vb)is_set & value);
#else
    for (int i = 0; i < WIDTH / 2; i++) {
        uint64_t eight, spread = bits[i] * 0x0101010101010101u & 0x8040201008040201u;
        spread = (spread + 0x7F7F7F7F7F7F7F7Fu) >> 7 & 0x0101010101010101u; /* 1 in every byte that is not 0 */
        memcpy(&eight, (const char *)&w + 8 * i, 8);
        eight |= spread * value;
        memcpy((char *)&w + 8 * i, &eight, 8);
    }
    return w;
#endif
}

/* table[w] for nibbles w. */
INLINE vb look_up(vb w, const uint8_t *table) {
#if defined(__AVX512BW__)
    const __m512i rows = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    return (vb)_mm512_shuffle_epi8(rows, (__m512i)w);
#elif WIDTH == 8
    const __m256i rows = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (vb)_mm256_shuffle_epi8(rows, (__m256i)w);
#else
    for (int i = 0; i < 4 * WIDTH; i++) w[i] = table[w[i]];
    return w;
#endif
}

/* e^x to about 2 units in the last place (range reduction by log 2, polynomial of degree 6); 0 below -87.3. */
INLINE vf exponential(vf x) {
    const vi small = x < -87.3f;
    const vf limited = choose(small, splat(-87.3f), choose(x > 88.0f, splat(88.0f), x));
    const vf shifted = limited * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the integer is in the low bits */
    const vf whole = shifted - 12582912.0f;
    const vf r = (limited - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const vi scale = (((vi)shifted & 0x7FFFFF) - 0x400000 + 127) << 23;
    return choose(small, splat(0), p * (vf)scale);
}

/* Round half to even to bfloat16; NaN does not occur. */
INLINE uint16_t to_bf16(float x) {
    const uint32_t bits = float_bits(x);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

#endif
