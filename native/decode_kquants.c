/* Decoders of the K-quants: 256 weights with two levels of scales. Formulas stand in llamakit/quant/kquants.py. */
#include "decode.h"

/* Two pieces of 32 bytes of four 2-bit levels: 256 levels. */
INLINE void twos(const uint8_t *packed, int8_t *level) {
    for (int i = 0; i < 64; i += 16) {
        const bytes16 x = load_16(packed + i);
        int8_t *to = level + (i & 32) * 4 + (i & 16);
        for (int plane = 0; plane < 4; plane++) store_16(to + 32 * plane, x >> (uint8_t)(2 * plane) & 3);
    }
}

/* Pieces of `width` bytes of nibbles, the low ones first: 256 levels. */
INLINE void nibbles_of_256(const uint8_t *packed, int width, int8_t *level) {
    for (int piece = 0; piece < 128 / width; piece++, packed += width, level += 2 * width)
        for (int i = 0; i < width; i += 16) {
            const bytes16 x = load_16(packed + i);
            store_16(level + i, x & 15);
            store_16(level + i + width, x >> 4);
        }
}

/* Adds `bit` where bit k of byte i of 32 is set, to level 32 k + i; and `always` everywhere. */
INLINE void bit_planes(const uint8_t *packed, uint8_t bit, uint8_t always, int8_t *level) {
    for (int i = 0; i < 32; i += 16) {
        const bytes16 x = load_16(packed + i);
        for (int plane = 0; plane < 8; plane++) {
            int8_t *at = level + 32 * plane + i;
            store_16(at, load_16(at) + ((bytes16)((x & (uint8_t)(1 << plane)) != 0) & bit) + always);
        }
    }
}

INLINE void unpack_q2_k(const uint8_t *packed, block *b) {
    const float d = get_half(packed + 80), minus = -get_half(packed + 82);
    for (int g = 0; g < 16; g++) {
        b->scale[g] = d * (float)(packed[g] & 15);
        b->offset[g] = minus * (float)(packed[g] >> 4);
    }
    twos(packed + 16, b->level);
}
DECODER(q2_k, 256, 84, 16, 1)

INLINE void unpack_q3_k(const uint8_t *packed, block *b) {
    const uint8_t *scales = packed + 96;
    const float d = get_half(packed + 108);
    for (int g = 0; g < 16; g++) {
        const int low = g < 8 ? scales[g] & 15 : scales[g - 8] >> 4, high = scales[8 + g % 4] >> 2 * (g / 4) & 3;
        b->scale[g] = d * (float)((low | high << 4) - 32);
    }
    twos(packed + 32, b->level);
    bit_planes(packed, 4, (uint8_t)-4, b->level); /* a third bit that is not set takes 4 away */
}
DECODER(q3_k, 256, 110, 16, 0)

/* Six bits each, of scales and mins: the upper two bits of the last four stand above the first four. */
INLINE void scales_and_mins(const uint8_t *packed, block *b) {
    const float d = get_half(packed), minus = -get_half(packed + 2);
    const uint8_t *six = packed + 4;
    for (int g = 0; g < 4; g++) {
        b->scale[g] = d * (float)(six[g] & 63);
        b->offset[g] = minus * (float)(six[g + 4] & 63);
        b->scale[g + 4] = d * (float)((six[g + 8] & 15) | (six[g] >> 6 << 4));
        b->offset[g + 4] = minus * (float)((six[g + 8] >> 4) | (six[g + 4] >> 6 << 4));
    }
}

INLINE void unpack_q4_k(const uint8_t *packed, block *b) {
    scales_and_mins(packed, b);
    nibbles_of_256(packed + 16, 32, b->level);
}
DECODER(q4_k, 256, 144, 32, 1)

INLINE void unpack_q5_k(const uint8_t *packed, block *b) {
    scales_and_mins(packed, b);
    nibbles_of_256(packed + 48, 32, b->level);
    bit_planes(packed + 16, 16, 0, b->level);
}
DECODER(q5_k, 256, 176, 32, 1)

INLINE void unpack_q6_k(const uint8_t *packed, block *b) {
    const float d = get_half(packed + 208);
    int8_t high[256];
    for (int g = 0; g < 16; g++) b->scale[g] = d * (float)(int8_t)packed[192 + g];
    nibbles_of_256(packed, 64, b->level);
    twos(packed + 128, high);
    for (int i = 0; i < 256; i += 16) store_16(b->level + i, (load_16(b->level + i) | load_16(high + i) << 4) - 32);
}
DECODER(q6_k, 256, 210, 16, 0)
