/* What every decoder is made of. A type's `unpack` gives a block's levels in the order of the weights, and a scale and
   perhaps an offset for each group of them; weight = level * scale + offset. The product is exact in float32 for every
   type, so that only the sum rounds. The temporaries stay in the first cache, and the loops over them are vector code. */
#ifndef LLAMAKIT_DECODE_H
#define LLAMAKIT_DECODE_H

#ifdef __SSSE3__
#include <immintrin.h>
#endif

#include "bytes.h"
#include "codec.h"
#include "half.h"

/* As much as the largest block has. */
typedef struct {
    int8_t level[256];
    float scale[16], offset[16]; /* offset: where the type has one */
} block;

static inline uint32_t get_u16(const uint8_t *at) { return (uint32_t)at[0] | (uint32_t)at[1] << 8; }

static inline uint32_t get_u32(const uint8_t *at) { return get_u16(at) | get_u16(at + 2) << 16; }

/* Eight bits, the lowest first, as bytes of 0x80 or 0: each byte keeps its own bit, and a carry into its highest. */
static inline uint64_t spread_bits(uint8_t bits) {
    const uint64_t own = bits * 0x0101010101010101u & 0x8040201008040201u;
    return (own + 0x7F7F7F7F7F7F7F7Fu) & 0x8080808080808080u;
}

/* Two words side by side; through memory they would have to wait for each other. */
static inline bytes16 words_16(uint64_t low, uint64_t high) {
    typedef uint64_t words __attribute__((vector_size(16)));
    return (bytes16)(words){low, high};
}

/* Bytes of 0 to 15 through a code book. */
static inline bytes16 look_up_16(const int8_t *book, bytes16 index) {
#ifdef __SSSE3__
    return (bytes16)_mm_shuffle_epi8((__m128i)load_16(book), (__m128i)index);
#else
    bytes16 out;
    for (int i = 0; i < 16; i++) out[i] = (uint8_t)book[index[i]];
    return out;
#endif
}

/* 16 bytes of nibbles, the low ones first, through a code book: 32 levels. */
static inline void look_up_nibbles(const int8_t *book, const uint8_t *packed, int8_t *out) {
    const bytes16 x = load_16(packed);
    store_16(out, look_up_16(book, x & 15));
    store_16(out + 16, look_up_16(book, x >> 4));
}

#define INLINE static inline __attribute__((always_inline))

/* 16 weights from 16 levels: float32, or bfloat16 with the rounding done on the bits. */
#if defined(__AVX512F__)
INLINE __m512 weights_16(const int8_t *level, float scale, float offset, int has_offset) {
    const __m512i wide = _mm512_cvtepi8_epi32((__m128i)load_16(level));
    const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(wide), _mm512_set1_ps(scale));
    return has_offset ? _mm512_add_ps(product, _mm512_set1_ps(offset)) : product;
}

INLINE void f32_16(const int8_t *level, float scale, float offset, int has_offset, float *out) {
    _mm512_storeu_ps(out, weights_16(level, scale, offset, has_offset));
}

INLINE void bf16_16(const int8_t *level, float scale, float offset, int has_offset, uint16_t *out) {
    const __m512 x = weights_16(level, scale, offset, has_offset);
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i known = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i *)(void *)out, _mm512_cvtepi32_epi16(_mm512_srli_epi32(known, 16)));
}
#elif defined(__AVX2__)
INLINE __m256 weights_8(const int8_t *level, float scale, float offset, int has_offset) {
    const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)level));
    const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(scale));
    return has_offset ? _mm256_add_ps(product, _mm256_set1_ps(offset)) : product;
}

INLINE void f32_16(const int8_t *level, float scale, float offset, int has_offset, float *out) {
    _mm256_storeu_ps(out, weights_8(level, scale, offset, has_offset));
    _mm256_storeu_ps(out + 8, weights_8(level + 8, scale, offset, has_offset));
}

INLINE __m256i rounded_8(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256 known = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
    return _mm256_srli_epi32(_mm256_castps_si256(known), 16);
}

INLINE void bf16_16(const int8_t *level, float scale, float offset, int has_offset, uint16_t *out) {
    const __m256i low = rounded_8(weights_8(level, scale, offset, has_offset));
    const __m256i high = rounded_8(weights_8(level + 8, scale, offset, has_offset));
    const __m256i lanes = _mm256_packus_epi32(low, high); /* of each 128 bits by themselves: put in order */
    _mm256_storeu_si256((__m256i *)(void *)out, _mm256_permute4x64_epi64(lanes, 0xD8));
}
#else
INLINE void f32_16(const int8_t *level, float scale, float offset, int has_offset, float *out) {
    for (int i = 0; i < 16; i++) {
        const float product = (float)level[i] * scale;
        out[i] = has_offset ? product + offset : product;
    }
}

INLINE void bf16_16(const int8_t *level, float scale, float offset, int has_offset, uint16_t *out) {
    float x[16];
    f32_16(level, scale, offset, has_offset, x);
    for (int i = 0; i < 16; i++) {
        const uint32_t bits = float_bits(x[i]), rounded = bits + 0x7FFF + (bits >> 16 & 1);
        out[i] = (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? bits >> 16 | 0x40 : rounded >> 16);
    }
}
#endif

INLINE void write_f32(const block *b, int n, int group, int has_offset, float *out) {
    for (int i = 0; i < n; i += 16)
        f32_16(b->level + i, b->scale[i / group], has_offset ? b->offset[i / group] : 0, has_offset, out + i);
}

INLINE void write_bf16(const block *b, int n, int group, int has_offset, uint16_t *out) {
    for (int i = 0; i < n; i += 16)
        bf16_16(b->level + i, b->scale[i / group], has_offset ? b->offset[i / group] : 0, has_offset, out + i);
}

/* Both decoders of a type: n weights and n_bytes bytes a block, so many weights to a scale. */
#define DECODER(name, n, n_bytes, group, has_offset)                                               \
    void ISA_NAME(decode_f32_##name)(const uint8_t *packed, void *out, int64_t n_blocks) {         \
        block b;                                                                                   \
        float *to = out;                                                                           \
        for (int64_t i = 0; i < n_blocks; i++, packed += (n_bytes), to += (n)) {                   \
            unpack_##name(packed, &b);                                                             \
            write_f32(&b, n, group, has_offset, to);                                               \
        }                                                                                          \
    }                                                                                              \
    void ISA_NAME(decode_bf16_##name)(const uint8_t *packed, void *out, int64_t n_blocks) {        \
        block b;                                                                                   \
        uint16_t *to = out;                                                                        \
        for (int64_t i = 0; i < n_blocks; i++, packed += (n_bytes), to += (n)) {                   \
            unpack_##name(packed, &b);                                                             \
            write_bf16(&b, n, group, has_offset, to);                                              \
        }                                                                                          \
    }

#endif
