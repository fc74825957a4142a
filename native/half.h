/* float16, which is IEEE 754 binary16 as 16 bits, and the scales of MXFP4, which are exponents. */
#ifndef LLAMAKIT_HALF_H
#define LLAMAKIT_HALF_H

#include <stdint.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

static inline uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* Rounded half to even; what is beyond the range becomes infinite. */
static inline uint16_t to_half(float x) {
#ifdef __F16C__
    return (uint16_t)_cvtss_sh(x, 0);
#else
    const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return (uint16_t)(sign | 0x7E00 | (magnitude >> 13 & 0x3FF));
    if (magnitude >= 0x477FF000) return (uint16_t)(sign | 0x7C00);
    if (magnitude < 0x38800000) /* subnormal: 0.5 has float16's smallest step as the value of its last bit */
        return (uint16_t)(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000));
    return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13));
#endif
}

/* Exact; a NaN is made quiet. */
static inline float from_half(uint16_t half) {
#ifdef __F16C__
    return _cvtsh_ss(half);
#else
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7FFF;
    if (magnitude >= 0x7C00) {
        const uint32_t quiet = magnitude > 0x7C00 ? 0x00400000 : 0;
        return bits_float(sign | 0x7F800000 | quiet | (magnitude & 0x3FF) << 13);
    }
    /* As an exponent field the half's stands for 2^112 less; the product is exact, for subnormal ones too. */
    return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
#endif
}

/* MXFP4: 2^(e - 128). As an exponent field e stands for 2^(e - 127), so e - 1, and the two smallest are subnormal. */
static inline float mxfp4_scale(uint8_t exponent) {
    return bits_float(exponent < 2 ? 0x00200000u << exponent : (uint32_t)(exponent - 1) << 23);
}

static inline void put_half(uint8_t *at, float x) {
    const uint16_t half = to_half(x);
    memcpy(at, &half, 2);
}

static inline float get_half(const uint8_t *at) {
    uint16_t half;
    memcpy(&half, at, 2);
    return from_half(half);
}

#endif
