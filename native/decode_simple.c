/* Decoders of the types with one scale per 32 weights, of the ternary ones, and of microscaling FP4. Formulas stand in
   llamakit/quant/simple.py. */
#include "decode.h"

/* E2M1 doubled (OCP MX v1.0). */
static const int8_t e2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

INLINE void nibbles_16(const uint8_t *packed, uint8_t minus, int8_t *level) {
    const bytes16 x = load_16(packed);
    store_16(level, (x & 15) - minus);
    store_16(level + 16, (x >> 4) - minus);
}

/* Adds 16 where the fifth bit is set. */
INLINE void fifth_bits(const uint8_t *bits, int8_t *level) {
    for (int half = 0; half < 2; half++) {
        const bytes16 fifth = words_16(spread_bits(bits[2 * half]), spread_bits(bits[2 * half + 1])) >> 3;
        store_16(level + 16 * half, load_16(level + 16 * half) + fifth);
    }
}

INLINE void unpack_q4_0(const uint8_t *packed, block *b) {
    b->scale[0] = get_half(packed);
    nibbles_16(packed + 2, 8, b->level);
}
DECODER(q4_0, 32, 18, 32, 0)

INLINE void unpack_q4_1(const uint8_t *packed, block *b) {
    b->scale[0] = get_half(packed);
    b->offset[0] = get_half(packed + 2);
    nibbles_16(packed + 4, 0, b->level);
}
DECODER(q4_1, 32, 20, 32, 1)

INLINE void unpack_q5_0(const uint8_t *packed, block *b) {
    b->scale[0] = get_half(packed);
    nibbles_16(packed + 6, 16, b->level);
    fifth_bits(packed + 2, b->level);
}
DECODER(q5_0, 32, 22, 32, 0)

INLINE void unpack_q5_1(const uint8_t *packed, block *b) {
    b->scale[0] = get_half(packed);
    b->offset[0] = get_half(packed + 2);
    nibbles_16(packed + 8, 0, b->level);
    fifth_bits(packed + 4, b->level);
}
DECODER(q5_1, 32, 24, 32, 1)

INLINE void unpack_q8_0(const uint8_t *packed, block *b) {
    b->scale[0] = get_half(packed);
    memcpy(b->level, packed + 2, 32);
}
DECODER(q8_0, 32, 34, 32, 0)

/* The trits of a byte are the leading base-3 digits of byte / 256; times 3^k, modulo 256, digit k is the first: 0 below
   86, 2 from 171. A comparison that holds is -1. */
INLINE bytes16 first_digit(bytes16 fraction) { return (bytes16)(-(fraction >= 86) - (fraction >= 171)) - 1; }

INLINE void trits_16(const uint8_t *packed, int width, int8_t *level) {
    bytes16 fraction = load_16(packed);
    for (int k = 0; k < 5; k++, fraction *= 3) store_16(level + k * width, first_digit(fraction));
}

INLINE void unpack_tq1_0(const uint8_t *packed, block *b) {
    trits_16(packed, 32, b->level);
    trits_16(packed + 16, 32, b->level + 16);
    trits_16(packed + 32, 16, b->level + 160);
    uint8_t last[16];
    for (int i = 0; i < 4; i++) {
        const unsigned x = packed[48 + i];
        last[i] = (uint8_t)x, last[i + 4] = (uint8_t)(3 * x), last[i + 8] = (uint8_t)(9 * x), last[i + 12] = (uint8_t)(27 * x);
    }
    store_16(b->level + 240, first_digit(load_16(last)));
    b->scale[0] = get_half(packed + 52);
}
DECODER(tq1_0, 256, 54, 256, 0)

INLINE void unpack_tq2_0(const uint8_t *packed, block *b) {
    for (int i = 0; i < 64; i += 16) {
        const bytes16 x = load_16(packed + i);
        int8_t *level = b->level + (i & 32) * 4 + (i & 16);
        for (int plane = 0; plane < 4; plane++) store_16(level + 32 * plane, (x >> (uint8_t)(2 * plane) & 3) - 1);
    }
    b->scale[0] = get_half(packed + 64);
}
DECODER(tq2_0, 256, 66, 256, 0)

INLINE void unpack_mxfp4(const uint8_t *packed, block *b) {
    b->scale[0] = mxfp4_scale(packed[0]);
    look_up_nibbles(e2m1, packed + 1, b->level);
}
DECODER(mxfp4, 32, 17, 32, 0)

/* Unsigned E4M3, halved; bit 7 is ignored, and 0x7F is 0. */
static inline float half_of_ue4m3(uint8_t byte) {
    const uint32_t exponent = byte >> 3 & 15, mantissa = byte & 7;
    if (byte == 0x7F) return 0;
    return exponent ? bits_float((exponent + 119) << 23 | mantissa << 20) : (float)mantissa * 0x1p-10f;
}

INLINE void unpack_nvfp4(const uint8_t *packed, block *b) {
    for (int g = 0; g < 4; g++) {
        uint64_t eight;
        memcpy(&eight, packed + 4 + 8 * g, 8);
        b->scale[g] = half_of_ue4m3(packed[g]);
        store_16(b->level + 16 * g, look_up_16(e2m1, words_16(eight, eight >> 4) & 15));
    }
}
DECODER(nvfp4, 64, 36, 16, 0)
