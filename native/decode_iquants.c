/* Decoders of the IQ types: levels from a grid or a code book. Formulas stand in llamakit/quant/iquants.py. */
#include "decode.h"

static const int8_t iq4_nl[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

INLINE void row_of_8(int grid, uint32_t index, int8_t *level) {
    memcpy(level, (const uint8_t *)llamakit_grids[grid] + 8 * index, 8);
}

INLINE void row_of_4(int grid, uint32_t index, int8_t *level) {
    memcpy(level, (const uint8_t *)llamakit_grids[grid] + 4 * index, 4);
}

/* Turns levels over where a bit of `signs` is set. */
INLINE void apply_signs(const uint8_t *signs, int8_t *level) {
    for (int i = 0; i < 32; i += 2, level += 16) {
        const bytes16 negative = (bytes16)(words_16(spread_bits(signs[i]), spread_bits(signs[i + 1])) != 0);
        store_16(level, (load_16(level) ^ negative) - negative);
    }
}

/* Seven sign bits; the eighth makes their number even. */
INLINE uint8_t even_signs(uint32_t seven) { return (uint8_t)(seven | (uint32_t)__builtin_parity(seven) << 7); }

INLINE int nibble(const uint8_t *packed, int i) { return packed[i / 2] >> 4 * (i % 2) & 15; }

/* 32 bits of four sevens and a scale, for 32 weights. */
INLINE float sevens_and_scale(uint32_t word, uint8_t *signs) {
    for (int k = 0; k < 4; k++) signs[k] = even_signs(word >> 7 * k & 127);
    return 0.5f + (float)(word >> 28);
}

INLINE void unpack_iq2_xxs(const uint8_t *packed, block *b) {
    const float d = get_half(packed);
    uint8_t signs[32];
    for (int g = 0; g < 8; g++) {
        const uint8_t *index = packed + 2 + 8 * g;
        for (int k = 0; k < 4; k++) row_of_8(GRID_IQ2_XXS, index[k], b->level + 32 * g + 8 * k);
        b->scale[g] = d * sevens_and_scale(get_u32(index + 4), signs + 4 * g) * 0.25f;
    }
    apply_signs(signs, b->level);
}
DECODER(iq2_xxs, 256, 66, 32, 0)

INLINE void quarter_scales(float d, const uint8_t *packed, block *b) {
    for (int g = 0; g < 16; g++) b->scale[g] = d * (0.5f + (float)nibble(packed, g)) * 0.25f;
}

INLINE void unpack_iq2_xs(const uint8_t *packed, block *b) {
    uint8_t signs[32];
    for (int k = 0; k < 32; k++) {
        const uint32_t word = get_u16(packed + 2 + 2 * k);
        row_of_8(GRID_IQ2_XS, word & 511, b->level + 8 * k);
        signs[k] = even_signs(word >> 9);
    }
    apply_signs(signs, b->level);
    quarter_scales(get_half(packed), packed + 66, b);
}
DECODER(iq2_xs, 256, 74, 16, 0)

INLINE void unpack_iq2_s(const uint8_t *packed, block *b) {
    for (int k = 0; k < 32; k++) {
        const uint32_t high = packed[66 + k / 4] >> 2 * (k % 4) & 3;
        row_of_8(GRID_IQ2_S, packed[2 + k] | high << 8, b->level + 8 * k);
    }
    apply_signs(packed + 34, b->level);
    quarter_scales(get_half(packed), packed + 74, b);
}
DECODER(iq2_s, 256, 82, 16, 0)

INLINE void unpack_iq3_xxs(const uint8_t *packed, block *b) {
    const float d = get_half(packed);
    uint8_t signs[32];
    for (int k = 0; k < 64; k++) row_of_4(GRID_IQ3_XXS, packed[2 + k], b->level + 4 * k);
    for (int g = 0; g < 8; g++) b->scale[g] = d * sevens_and_scale(get_u32(packed + 66 + 4 * g), signs + 4 * g) * 0.5f;
    apply_signs(signs, b->level);
}
DECODER(iq3_xxs, 256, 98, 32, 0)

INLINE void unpack_iq3_s(const uint8_t *packed, block *b) {
    const float d = get_half(packed);
    for (int k = 0; k < 64; k++) {
        const uint32_t high = packed[66 + k / 8] >> k % 8 & 1;
        row_of_4(GRID_IQ3_S, packed[2 + k] | high << 8, b->level + 4 * k);
    }
    apply_signs(packed + 74, b->level);
    for (int g = 0; g < 8; g++) b->scale[g] = d * (float)(1 + 2 * nibble(packed + 106, g));
}
DECODER(iq3_s, 256, 110, 32, 0)

/* Eight levels of IQ1, with the shift of an eighth up or down. */
INLINE void shifted_row(uint32_t index, uint32_t down, int8_t *level) {
    typedef int8_t chars8 __attribute__((vector_size(8)));
    chars8 row;
    memcpy(&row, (const uint8_t *)llamakit_grids[GRID_IQ1] + 8 * index, 8);
    row += (int8_t)(1 - 2 * (int)down);
    memcpy(level, &row, 8);
}

INLINE void unpack_iq1_s(const uint8_t *packed, block *b) {
    const float d = get_half(packed) / 8;
    for (int g = 0; g < 8; g++) {
        const uint32_t word = get_u16(packed + 34 + 2 * g);
        for (int k = 0; k < 4; k++) {
            shifted_row(packed[2 + 4 * g + k] | (word >> 3 * k & 7) << 8, word >> 15, b->level + 32 * g + 8 * k);
        }
        b->scale[g] = d * (float)(1 + 2 * (word >> 12 & 7));
    }
}
DECODER(iq1_s, 256, 50, 32, 0)

INLINE void unpack_iq1_m(const uint8_t *packed, block *b) {
    uint32_t half = 0;
    for (int k = 0; k < 4; k++) half |= get_u16(packed + 48 + 2 * k) >> 12 << 4 * k;
    const float d = from_half((uint16_t)half) / 8;
    for (int g = 0; g < 16; g++)
        b->scale[g] = d * (float)(1 + 2 * (get_u16(packed + 48 + 2 * (g / 4)) >> 3 * (g % 4) & 7));
    for (int k = 0; k < 32; k++) {
        const uint32_t high = (uint32_t)nibble(packed + 32, k);
        shifted_row(packed[k] | (high & 7) << 8, high >> 3, b->level + 8 * k);
    }
}
DECODER(iq1_m, 256, 56, 16, 0)

INLINE void unpack_iq4_nl(const uint8_t *packed, block *b) {
    b->scale[0] = get_half(packed);
    look_up_nibbles(iq4_nl, packed + 2, b->level);
}
DECODER(iq4_nl, 32, 18, 32, 0)

INLINE void unpack_iq4_xs(const uint8_t *packed, block *b) {
    const float d = get_half(packed);
    const uint32_t high = get_u16(packed + 2);
    for (int g = 0; g < 8; g++) {
        b->scale[g] = d * (float)((nibble(packed + 4, g) | (int)(high >> 2 * g & 3) << 4) - 32);
        look_up_nibbles(iq4_nl, packed + 8 + 16 * g, b->level + 32 * g);
    }
}
DECODER(iq4_xs, 256, 136, 32, 0)
