/* Vectors of as many float32 as a register of the instruction set holds, and what the searches do with them.

   Lane k of every vector belongs to block k of a batch: each lane runs the scalar algorithm of ggml, all of them at
   once, so that sums keep their order and nothing moves between lanes. What C says with an if is a choice by a mask. */
#ifndef LLAMAKIT_LANES_H
#define LLAMAKIT_LANES_H

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#else
#include <math.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline, unused))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

#if defined(__AVX512F__)
typedef __mmask16 mask;
INLINE mask less(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ); }
INLINE mask equal(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ); }
INLINE mask both(mask a, mask b) { return a & b; }
INLINE mask either(mask a, mask b) { return a | b; }
INLINE int any(mask m) { return m != 0; }
INLINE int all(mask m) { return m == 0xFFFF; }
INLINE vf choose(mask m, vf yes, vf no) { return (vf)_mm512_mask_blend_ps(m, (__m512)no, (__m512)yes); }
INLINE vi choose_int(mask m, vi yes, vi no) { return (vi)_mm512_mask_blend_epi32(m, (__m512i)no, (__m512i)yes); }
/* a < b ? a : b, and so b where one is NaN or both are zeros; greater likewise. */
INLINE vf lesser(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vf greater(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vi lesser_int(vi a, vi b) { return (vi)_mm512_min_epi32((__m512i)a, (__m512i)b); }
INLINE vi greater_int(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
INLINE vf root(vf x) { return (vf)_mm512_sqrt_ps((__m512)x); }
INLINE vf to_float(vi x) { return (vf)_mm512_cvtepi32_ps((__m512i)x); }
#else
typedef vi mask;
INLINE mask less(vf a, vf b) { return a < b; }
INLINE mask equal(vf a, vf b) { return a == b; }
INLINE mask both(mask a, mask b) { return a & b; }
INLINE mask either(mask a, mask b) { return a | b; }
INLINE vi choose_int(mask m, vi yes, vi no) { return (m & yes) | (~m & no); }
INLINE vi lesser_int(vi a, vi b) { return choose_int(a < b, a, b); }
INLINE vi greater_int(vi a, vi b) { return choose_int(a > b, a, b); }
#if defined(__AVX2__)
INLINE int any(mask m) { return _mm256_movemask_ps((__m256)m) != 0; }
INLINE int all(mask m) { return _mm256_movemask_ps((__m256)m) == 0xFF; }
INLINE vf choose(mask m, vf yes, vf no) { return (vf)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)m); }
INLINE vf lesser(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vf greater(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf root(vf x) { return (vf)_mm256_sqrt_ps((__m256)x); }
INLINE vf to_float(vi x) { return (vf)_mm256_cvtepi32_ps((__m256i)x); }
#else
INLINE vf choose(mask m, vf yes, vf no) { return (vf)choose_int(m, (vi)yes, (vi)no); }
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
#if defined(__SSE2__)
INLINE int any(mask m) { return _mm_movemask_ps((__m128)m) != 0; }
INLINE int all(mask m) { return _mm_movemask_ps((__m128)m) == 0x0F; }
INLINE vf lesser(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
INLINE vf greater(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
INLINE vf root(vf x) { return (vf)_mm_sqrt_ps((__m128)x); }
#else
INLINE int any(mask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
INLINE int all(mask m) { return (m[0] & m[1] & m[2] & m[3]) != 0; }
INLINE vf lesser(vf a, vf b) { return choose(a < b, a, b); }
INLINE vf greater(vf a, vf b) { return choose(a > b, a, b); }
INLINE vf root(vf x) { return (vf){sqrtf(x[0]), sqrtf(x[1]), sqrtf(x[2]), sqrtf(x[3])}; }
#endif
#endif
#endif

INLINE vf splat(float x) { return x - (vf){0}; } /* not x + 0, which is 0 for -0 */
INLINE vi splat_int(int32_t x) { return x + (vi){0}; }
INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7FFFFFFF); }

/* 1.5 * 2^23: added to a float32 below 2^22 in magnitude, it leaves the nearest integer, half to even, in the mantissa. */
#define ROUNDER 12582912.0f

/* To the nearest integer, half to even; beyond +-2^22 and for NaN what the arithmetic of ggml's nearest_int gives. */
INLINE vi nearest(vf x) { return ((vi)(x + ROUNDER) & 0x7FFFFF) - 0x400000; }

INLINE vi clamp_int(vi x, int32_t low, int32_t high) {
    return lesser_int(greater_int(x, splat_int(low)), splat_int(high));
}

/* The nearest integer within low..high, as a float; x is below 2^22 in magnitude, or NaN, which gives low. */
INLINE vf nearest_within(vf x, float low, float high) {
    return lesser(greater((x + ROUNDER) - ROUNDER, splat(low)), splat(high));
}

/* Float16 bits of x, rounded half to even. */
INLINE vi to_half(vf x) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
    const vi bits = (vi)x, sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
    /* Below 2^-14 the last place of a float16 is 2^-24, that of a float32 from 0.5 on. */
    const vi small = (vi)(magnitude(x) + 0.5f) - 0x3F000000;
    const vi normal = (size + 0xFFF + (size >> 13 & 1) - 0x38000000) >> 13;
    vi half = choose_int(size < 0x38800000, small, normal);
    half = choose_int(size >= 0x477FF000, splat_int(0x7C00), half);
    half = choose_int(size > 0x7F800000, 0x7E00 | (size >> 13 & 0x3FF), half);
    return half | sign;
#endif
}

INLINE vf from_half(vi half) {
    const vi size = half & 0x7FFF;
    /* As the bits of a float32 it is 2^-112 of its value, subnormals too. */
    const vi finite = (vi)((vf)(size << 13) * 0x1p112f);
    const vi bits = finite | ((size >= 0x7C00) & 0x7F800000);
    return (vf)(bits | (half & 0x8000) << 16);
}

#if LANES == 16
#define INTERLEAVE_LOW {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}
#define INTERLEAVE_HIGH {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}
#elif LANES == 8
#define INTERLEAVE_LOW {0, 8, 1, 9, 2, 10, 3, 11}
#define INTERLEAVE_HIGH {4, 12, 5, 13, 6, 14, 7, 15}
#else
#define INTERLEAVE_LOW {0, 4, 1, 5}
#define INTERLEAVE_HIGH {2, 6, 3, 7}
#endif

INLINE vf interleave(vf a, vf b, vi order) {
#if defined(__clang__)
    vf out;
    for (int i = 0; i < LANES; i++) out[i] = order[i] < LANES ? a[order[i]] : b[order[i] - LANES];
    return out;
#else
    return __builtin_shuffle(a, b, order);
#endif
}

/* size elements (a multiple of LANES) from each of LANES addresses, element by element. */
INLINE void load_lanes(const float *const *from, int size, vf *out) {
    for (int start = 0; start < size; start += LANES) {
        vf rows[LANES], next[LANES];
        for (int lane = 0; lane < LANES; lane++) memcpy(&rows[lane], from[lane] + start, sizeof(vf));
        /* A square is transposed by interleaving its upper with its lower half, log2(LANES) times. */
        for (int stage = 1; stage < LANES; stage *= 2) {
            for (int i = 0; i < LANES / 2; i++) {
                next[2 * i] = interleave(rows[i], rows[i + LANES / 2], (vi)INTERLEAVE_LOW);
                next[2 * i + 1] = interleave(rows[i], rows[i + LANES / 2], (vi)INTERLEAVE_HIGH);
            }
            memcpy(rows, next, sizeof rows);
        }
        memcpy(out + start, rows, sizeof rows);
    }
}

#endif
