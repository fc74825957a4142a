/* Vectors of 16 lanes, whatever the registers of the instruction set hold: lane r of every vector belongs to row r of a
   tile of 16 rows. Who has no tiles defines LANES as what a register holds: compilers keep wider ones in memory.
   Compiled with contraction allowed: a * b + c is one instruction where there is one. */
#ifndef LLAMAKIT_VECTOR_H
#define LLAMAKIT_VECTOR_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "half.h"

#define INLINE static inline __attribute__((always_inline, unused))

#ifndef LANES
#define LANES 16
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint8_t vb __attribute__((vector_size(4 * LANES)));

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vi splat_int(int32_t x) { return x + (vi){0}; }
INLINE vf load(const void *at) { vf x; memcpy(&x, at, sizeof x); return x; }
INLINE vb load_bytes(const void *at) { vb x; memcpy(&x, at, sizeof x); return x; }
INLINE void store(void *at, vf x) { memcpy(at, &x, sizeof x); }
INLINE void store_bytes(void *at, vb x) { memcpy(at, &x, sizeof x); }
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

#if defined(__AVX512F__)
INLINE float sum(vf x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE int32_t sum_int(vi x) { return _mm512_reduce_add_epi32((__m512i)x); }
INLINE int32_t most_of(vi x) { return _mm512_reduce_max_epi32((__m512i)x); }
INLINE float most_of_floats(vf x) { return _mm512_reduce_max_ps((__m512)x); }
INLINE vi greater(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
#else
INLINE float sum(vf x) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += x[lane];
    return total;
}
INLINE int32_t sum_int(vi x) {
    int32_t total = 0;
    for (int lane = 0; lane < LANES; lane++) total += x[lane];
    return total;
}
INLINE int32_t most_of(vi x) {
    int32_t most = x[0];
    for (int lane = 1; lane < LANES; lane++) most = x[lane] > most ? x[lane] : most;
    return most;
}
INLINE float most_of_floats(vf x) {
    float most = x[0];
    for (int lane = 1; lane < LANES; lane++) most = x[lane] > most ? x[lane] : most;
    return most;
}
INLINE vi greater(vi a, vi b) {
    const vi above = a > b;
    return (above & a) | (~above & b);
}
#endif

#if LANES == 16
/* 16 float16 at any address. */
INLINE vf load_half(const void *at) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(at));
#elif defined(__F16C__)
    union { __m256 half[2]; vf whole; } x;
    x.half[0] = _mm256_cvtph_ps(_mm_loadu_si128(at));
    x.half[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at + 1));
    return x.whole;
#else
    vf x;
    for (int lane = 0; lane < 16; lane++) x[lane] = get_half((const uint8_t *)at + 2 * lane);
    return x;
#endif
}

INLINE void store_half(void *at, vf x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(at, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int lane = 0; lane < 16; lane++) put_half((uint8_t *)at + 2 * lane, x[lane]);
#endif
}

/* 16 bytes as numbers. */
INLINE vi load_u8(const void *at) {
    typedef uint8_t bytes __attribute__((vector_size(16)));
    bytes x;
    memcpy(&x, at, 16);
    return __builtin_convertvector(x, vi);
}
INLINE vi load_i8(const void *at) {
    typedef int8_t bytes __attribute__((vector_size(16)));
    bytes x;
    memcpy(&x, at, 16);
    return __builtin_convertvector(x, vi);
}

/* acc[r] + sum over i < 4 of w[4 r + i] a[i]: unsigned weights, the four signed bytes a of an activation. */
INLINE vi dot(vi acc, vb w, int32_t a) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(a));
#elif defined(__AVX2__)
    /* By 16-bit halves, since two products of full bytes do not fit the 16 bits of vpmaddubsw. */
    const int32_t even = ((int32_t)(int8_t)a & 0xFFFF) | (int32_t)((uint32_t)(int8_t)(a >> 16) << 16);
    const int32_t odd = ((int32_t)(int8_t)(a >> 8) & 0xFFFF) | (int32_t)((uint32_t)(int8_t)(a >> 24) << 16);
    const __m256i evens = _mm256_set1_epi32(even), odds = _mm256_set1_epi32(odd), low = _mm256_set1_epi16(0xFF);
    union { vb all; __m256i half[2]; } x = {w};
    union { vi all; __m256i half[2]; } y = {acc};
    for (int i = 0; i < 2; i++) {
        const __m256i e = _mm256_madd_epi16(_mm256_and_si256(x.half[i], low), evens);
        const __m256i o = _mm256_madd_epi16(_mm256_srli_epi16(x.half[i], 8), odds);
        y.half[i] = _mm256_add_epi32(y.half[i], _mm256_add_epi32(e, o));
    }
    return y.all;
#else
    const vi x = (vi)w;
    acc += (x & 0xFF) * (int32_t)(int8_t)a;
    acc += (x >> 8 & 0xFF) * (int32_t)(int8_t)(a >> 8);
    acc += (x >> 16 & 0xFF) * (int32_t)(int8_t)(a >> 16);
    return acc + (x >> 24 & 0xFF) * (int32_t)(int8_t)(a >> 24);
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

/* Where bit i of bits is set, byte i becomes byte | value. */
INLINE vb or_where(vb w, uint64_t bits, uint8_t value) {
#if defined(__AVX512BW__)
    const __m512i other = _mm512_or_si512((__m512i)w, _mm512_set1_epi8((char)value));
    return (vb)_mm512_mask_mov_epi8((__m512i)w, bits, other);
#else
    for (int i = 0; i < 8; i++) {
        uint64_t eight, spread = (bits >> 8 * i & 0xFF) * 0x0101010101010101u & 0x8040201008040201u;
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
#elif defined(__AVX2__)
    union { vb all; __m256i half[2]; } x = {w};
    const __m256i rows = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    for (int i = 0; i < 2; i++) x.half[i] = _mm256_shuffle_epi8(rows, x.half[i]);
    return x.all;
#else
    for (int i = 0; i < 64; i++) w[i] = table[w[i]];
    return w;
#endif
}

#endif

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
