/* Matrices in tiles of 16 rows, so that one broadcast activation feeds 16 outputs. A tile holds its rows' blocks of 32
   columns one after the other (for the K-quants 256), each block's bytes for all rows side by side:

     four columns of 16 rows make one vector of 64 bytes, row r at byte 4 r; with 4 bits, a vector holds eight columns.

   What a block means, w unsigned: weight = scale * (w - zero), or scale * w + min. Float matrices are stored column by
   column, 16 rows each; bfloat16 by pairs of columns. */
#ifndef LLAMAKIT_TILES_H
#define LLAMAKIT_TILES_H

#include "codec.h"
#include "vector.h"

/* A tile is multiplied in parts: as many rows as a vector has lanes. */
enum { TILE = 16, BLOCK = 32, PARTS = TILE / WIDTH };

/* Bytes of one tile with n_in columns, or 0 for a type that has no tiles. */
static inline int64_t tile_bytes(int type, int64_t n_in) {
    switch (type) {
        case TYPE_F32: return n_in * 64;
        case TYPE_F16: return n_in * 32;
        case TYPE_BF16: return (n_in + 1) / 2 * 64;
        case TYPE_Q8_0: return n_in / 32 * (512 + 32);
        case TYPE_Q4_0: case TYPE_IQ4_NL: return n_in / 32 * (256 + 32);
        case TYPE_Q4_1: return n_in / 32 * (256 + 64);
        case TYPE_Q5_0: return n_in / 32 * (256 + 64 + 32);
        case TYPE_Q5_1: return n_in / 32 * (256 + 64 + 64);
        case TYPE_IQ4_XS: return n_in / 256 * (8 * (256 + 16) + 32);
        case TYPE_Q4_K: return n_in / 256 * (8 * (256 + 32) + 64);
        case TYPE_Q5_K: return n_in / 256 * (8 * (256 + 64 + 32) + 64);
        case TYPE_Q6_K: return n_in / 256 * (2048 + 1024 + 256 + 32);
        default: return 0;
    }
}

static inline int is_float_type(int type) { return type == TYPE_F32 || type == TYPE_F16 || type == TYPE_BF16; }

/* What an unsigned weight w stands for: scale * (w - zero); 0 for the types with a minimum of their own. */
static inline int zero_of(int type) {
    switch (type) {
        case TYPE_Q8_0: case TYPE_IQ4_NL: case TYPE_IQ4_XS: return 128;
        case TYPE_Q4_0: return 8;
        case TYPE_Q5_0: return 16;
        case TYPE_Q6_K: return 32;
        default: return 0;
    }
}

/* Columns that share a scale. */
static inline int group_of(int type) { return type == TYPE_Q6_K ? 16 : 32; }

/* The levels of IQ4_NL and IQ4_XS, plus 128. */
static const uint8_t iq4_levels[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                       129, 141, 153, 166, 181, 197, 217, 241};

/* The largest unsigned weight there may be. */
static inline int most_of_type(int type) {
    switch (type) {
        case TYPE_Q4_0: case TYPE_Q4_1: case TYPE_Q4_K: return 15;
        case TYPE_Q5_0: case TYPE_Q5_1: case TYPE_Q5_K: return 31;
        case TYPE_Q6_K: return 63;
        default: return 255;
    }
}

/* What 32 columns of a part of a tile are: w[j] holds the columns 4 j to 4 j + 3; the scales of one or (Q6_K) two groups;
   the minimum where the type has no zero. */
typedef struct {
    vb w[8];
    vf scale[2], min;
} block;

/* Where a part's share of a vector of 16 rows is, each of which has `bytes` there. */
INLINE const uint8_t *part_at(const uint8_t *at, int part, int bytes) { return at + WIDTH * bytes * part; }

/* Four vectors of nibbles: the low ones are the columns 0 to 15, the high ones 16 to 31. */
INLINE void read_nibbles(const uint8_t *at, int part, vb w[8]) {
    for (int j = 0; j < 4; j++) {
        const vb both = load_bytes(part_at(at + 64 * j, part, 4));
        w[j] = both & 15;
        w[j + 4] = (vb)((vu)both >> 4) & 15;
    }
}

/* Eight vectors of nibbles of 64 columns: the low ones the first 32, the high ones the others. */
INLINE void read_half_nibbles(const uint8_t *at, int part, int high, vb w[8]) {
    for (int j = 0; j < 8; j++) w[j] = (vb)((vu)load_bytes(part_at(at + 64 * j, part, 4)) >> (high ? 4 : 0)) & 15;
}

/* Eight masks, one for each vector: the fifth bits. */
INLINE void read_fifth_bits(const uint8_t *at, int part, vb w[8]) {
    for (int j = 0; j < 8; j++) w[j] = or_where(w[j], at + 8 * j + WIDTH / 2 * part, 16);
}

INLINE block read_k_quant(const uint8_t *tile, int index, int part, int fifth) {
    const uint8_t *at = tile + (int64_t)(index / 8) * (8 * (256 + (fifth ? 64 : 0) + 32) + 64);
    const int sub = index % 8;
    block b;
    read_half_nibbles(at + sub / 2 * 512, part, sub & 1, b.w);
    at += 2048;
    if (fifth) {
        read_fifth_bits(at + sub * 64, part, b.w);
        at += 512;
    }
    b.scale[0] = load_half(part_at(at + 256, part, 2)) * to_float(load_u8(part_at(at + sub * 32, part, 1)));
    b.min = -load_half(part_at(at + 288, part, 2)) * to_float(load_u8(part_at(at + sub * 32 + 16, part, 1)));
    return b;
}

INLINE block read_q6_k(const uint8_t *tile, int index, int part) {
    const uint8_t *at = tile + (int64_t)(index / 8) * (2048 + 1024 + 256 + 32);
    const int half = index / 4 % 2, strip = index % 4;
    const uint8_t *low = at + half * 1024 + (strip & 1) * 512, *high = at + 2048 + half * 512;
    block b;
    for (int j = 0; j < 8; j++) {
        const vu four = (vu)load_bytes(part_at(low + 64 * j, part, 4)) >> (strip & 2 ? 4 : 0);
        const vu two = (vu)load_bytes(part_at(high + 64 * j, part, 4)) >> 2 * strip << 4;
        b.w[j] = ((vb)four & 15) | ((vb)two & 48);
    }
    const vf d = load_half(part_at(at + 2048 + 1024 + 256, part, 2));
    for (int g = 0; g < 2; g++)
        b.scale[g] = d * to_float(load_i8(part_at(at + 2048 + 1024 + 16 * (8 * half + 2 * strip + g), part, 1)));
    return b;
}

INLINE block read_iq4(const uint8_t *at, int part, vf scale) {
    block b;
    read_nibbles(at, part, b.w);
    for (int j = 0; j < 8; j++) b.w[j] = look_up(b.w[j], iq4_levels);
    b.scale[0] = scale;
    return b;
}

/* 32 columns of a part of a tile of a quantized type; `type` is a constant where this is inlined. */
INLINE block read_block(int type, const uint8_t *tile, int index, int part) {
    const uint8_t *at = tile + (int64_t)index * tile_bytes(type, 32);
    block b;
    switch (type) {
        case TYPE_Q8_0:
            for (int j = 0; j < 8; j++) b.w[j] = load_bytes(part_at(at + 64 * j, part, 4));
            b.scale[0] = load_half(part_at(at + 512, part, 2));
            return b;
        case TYPE_Q4_0:
            read_nibbles(at, part, b.w);
            b.scale[0] = load_half(part_at(at + 256, part, 2));
            return b;
        case TYPE_Q4_1:
            read_nibbles(at, part, b.w);
            b.scale[0] = load_half(part_at(at + 256, part, 2));
            b.min = load_half(part_at(at + 288, part, 2));
            return b;
        case TYPE_Q5_0: case TYPE_Q5_1:
            read_nibbles(at, part, b.w);
            read_fifth_bits(at + 256, part, b.w);
            b.scale[0] = load_half(part_at(at + 320, part, 2));
            if (type == TYPE_Q5_1) b.min = load_half(part_at(at + 352, part, 2));
            return b;
        case TYPE_IQ4_NL: return read_iq4(at, part, load_half(part_at(at + 256, part, 2)));
        case TYPE_IQ4_XS: {
            at = tile + (int64_t)(index / 8) * (8 * (256 + 16) + 32);
            const vf steps = to_float(load_i8(part_at(at + 2048 + index % 8 * 16, part, 1)));
            return read_iq4(at + index % 8 * 256, part, load_half(part_at(at + 2176, part, 2)) * steps);
        }
        case TYPE_Q4_K: return read_k_quant(tile, index, part, 0);
        case TYPE_Q5_K: return read_k_quant(tile, index, part, 1);
        default: return read_q6_k(tile, index, part);
    }
}

#endif
