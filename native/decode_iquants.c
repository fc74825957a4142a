/* Decoders of the IQ types: levels from a grid or a code book. Formulas stand in llamakit/quant/iquants.py. */
#include "decode.h"

static const int8_t iq4_nl[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

INLINE uint64_t row_of_8(int grid, uint32_t index) {
    uint64_t levels;
    memcpy(&levels, (const uint8_t *)llamakit_grids[grid] + 8 * index, 8);
    return levels;
}

INLINE uint64_t rows_of_4(int grid, uint32_t first, uint32_t second) {
    uint32_t low, high;
    memcpy(&low, (const uint8_t *)llamakit_grids[grid] + 4 * first, 4);
    memcpy(&high, (const uint8_t *)llamakit_grids[grid] + 4 * second, 4);
    return low | (uint64_t)high << 32;
}

/* 16 levels, turned over where a bit of `signs` is set. They come in registers: a load of what two stores have just
   written would wait for both. */
INLINE void store_signed(uint64_t low, uint64_t high, uint32_t signs, int8_t *level) {
    const bytes16 x = words_16(low, high);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m128i turned = _mm_mask_sub_epi8((__m128i)x, (__mmask16)signs, _mm_setzero_si128(), (__m128i)x);
    _mm_storeu_si128((__m128i *)(void *)level, turned);
#else
    const bytes16 set = words_16(spread_bits((uint8_t)signs), spread_bits((uint8_t)(signs >> 8)));
    const bytes16 negative = (bytes16)(set != 0);
    store_16(level, (x ^ negative) - negative);
#endif
}

/* Seven sign bits in the lower part of each byte; the eighth makes their number even. */
INLINE uint32_t even_signs(uint32_t sevens) {
    uint32_t parity = sevens ^ sevens >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return sevens | (parity & 0x01010101) << 7;
}

/* Four sevens side by side in 28 bits: the signs of 32 weights. */
INLINE uint32_t signs_of_28(uint32_t word) {
    const uint32_t pairs = (word & 0x3FFF) | (word << 2 & 0x3FFF0000); /* two sevens in each half */
    return even_signs((pairs & 0x007F007F) | (pairs << 1 & 0x7F007F00));
}

INLINE int nibble(const uint8_t *packed, int i) { return packed[i / 2] >> 4 * (i % 2) & 15; }

/* The upper four bits of a word of signs: a scale. */
INLINE float scale_above(uint32_t word) { return 0.5f + (float)(word >> 28); }

INLINE void unpack_iq2_xxs(const uint8_t *packed, block *b) {
    const float d = get_half(packed);
    for (int g = 0; g < 8; g++) {
        const uint8_t *index = packed + 2 + 8 * g;
        const uint32_t word = get_u32(index + 4), signs = signs_of_28(word);
        for (int k = 0; k < 4; k += 2) {
            const uint64_t low = row_of_8(GRID_IQ2_XXS, index[k]), high = row_of_8(GRID_IQ2_XXS, index[k + 1]);
            store_signed(low, high, signs >> 8 * k, b->level + 32 * g + 8 * k);
        }
        b->scale[g] = d * scale_above(word) * 0.25f;
    }
}
DECODER(iq2_xxs, 256, 66, 32, 0)

INLINE void quarter_scales(float d, const uint8_t *packed, block *b) {
    for (int g = 0; g < 16; g++) b->scale[g] = d * (0.5f + (float)nibble(packed, g)) * 0.25f;
}

INLINE void unpack_iq2_xs(const uint8_t *packed, block *b) {
    for (int k = 0; k < 32; k += 2) {
        const uint32_t words = get_u32(packed + 2 + 2 * k), signs = even_signs(words >> 9 & 0x007F007F);
        const uint64_t low = row_of_8(GRID_IQ2_XS, words & 511), high = row_of_8(GRID_IQ2_XS, words >> 16 & 511);
        store_signed(low, high, (signs & 255) | signs >> 8, b->level + 8 * k);
    }
    quarter_scales(get_half(packed), packed + 66, b);
}
DECODER(iq2_xs, 256, 74, 16, 0)

INLINE void unpack_iq2_s(const uint8_t *packed, block *b) {
    const uint8_t *index = packed + 2, *signs = packed + 34;
    for (int k = 0; k < 32; k += 2) {
        const uint32_t high = (uint32_t)packed[66 + k / 4] >> 2 * (k % 4);
        const uint64_t first = row_of_8(GRID_IQ2_S, index[k] | (high & 3) << 8);
        const uint64_t second = row_of_8(GRID_IQ2_S, index[k + 1] | (high & 12) << 6);
        store_signed(first, second, get_u16(signs + k), b->level + 8 * k);
    }
    quarter_scales(get_half(packed), packed + 74, b);
}
DECODER(iq2_s, 256, 82, 16, 0)

INLINE void unpack_iq3_xxs(const uint8_t *packed, block *b) {
    const float d = get_half(packed);
    for (int g = 0; g < 8; g++) {
        const uint8_t *index = packed + 2 + 8 * g;
        const uint32_t word = get_u32(packed + 66 + 4 * g), signs = signs_of_28(word);
        for (int k = 0; k < 8; k += 4) {
            const uint64_t low = rows_of_4(GRID_IQ3_XXS, index[k], index[k + 1]);
            const uint64_t high = rows_of_4(GRID_IQ3_XXS, index[k + 2], index[k + 3]);
            store_signed(low, high, signs >> 4 * k, b->level + 32 * g + 4 * k);
        }
        b->scale[g] = d * scale_above(word) * 0.5f;
    }
}
DECODER(iq3_xxs, 256, 98, 32, 0)

INLINE void unpack_iq3_s(const uint8_t *packed, block *b) {
    const float d = get_half(packed);
    for (int g = 0; g < 8; g++) {
        const uint8_t *index = packed + 2 + 8 * g;
        const uint32_t high = (uint32_t)packed[66 + g] << 8, signs = get_u32(packed + 74 + 4 * g);
        for (int k = 0; k < 8; k += 4) {
            uint32_t row[4];
            for (int i = 0; i < 4; i++) row[i] = index[k + i] | (high >> (k + i) & 256);
            store_signed(rows_of_4(GRID_IQ3_S, row[0], row[1]), rows_of_4(GRID_IQ3_S, row[2], row[3]), signs >> 4 * k,
                         b->level + 32 * g + 4 * k);
        }
        b->scale[g] = d * (float)(1 + 2 * nibble(packed + 106, g));
    }
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
