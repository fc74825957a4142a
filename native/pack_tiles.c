/* Rows as they are in a file -> tiles (tiles.h). Four bytes at a time: a block's quants are laid out so that four columns
   of a row are four neighbouring bytes. */
#include <stddef.h>

#include "codec.h"
#include "engine.h"
#include "half.h"
#include "tiles.h"

typedef struct {
    const uint8_t *rows;
    int64_t row_bytes;
    int n_rows; /* 1 to 16; the others of the tile are zeros */
} source;

static const uint8_t *block_at(const source *from, int row, int64_t offset) {
    return from->rows + row * from->row_bytes + offset;
}

/* `count` vectors: number j holds, for every row, the four bytes at `offset` + 4 j of its row. */
static void copy_words(const source *from, int64_t offset, int count, uint8_t *to) {
    for (int row = 0; row < from->n_rows; row++) {
        const uint8_t *at = block_at(from, row, offset);
        for (int j = 0; j < count; j++) memcpy(to + 64 * j + 4 * row, at + 4 * j, 4);
    }
}

/* The n bytes at `offset` of every row, side by side in units of `unit` bytes. */
static void copy_units(const source *from, int64_t offset, int unit, uint8_t *to) {
    for (int row = 0; row < from->n_rows; row++) memcpy(to + unit * row, block_at(from, row, offset), (size_t)unit);
}

/* Fifth bits of 32 columns as eight masks of 64 bits; get(row, column) is 0 or 1. */
static void put_fifth_bit(uint8_t *to, int row, int column, unsigned bit) {
    const int at = column / 4 * 64 + row * 4 + column % 4;
    to[at / 8] |= (uint8_t)(bit << at % 8);
}

static void pack_q5(const source *from, int64_t offset, uint8_t *to, int n_halves) {
    copy_words(from, offset + 2 * n_halves + 4, 4, to);
    for (int row = 0; row < from->n_rows; row++) {
        uint32_t bits;
        memcpy(&bits, block_at(from, row, offset + 2 * n_halves), 4);
        for (int column = 0; column < 32; column++) put_fifth_bit(to + 256, row, column, bits >> column & 1);
    }
    for (int i = 0; i < n_halves; i++) copy_units(from, offset + 2 * i, 2, to + 320 + 32 * i);
}

static void pack_k_quant(const source *from, int64_t offset, uint8_t *to, int fifth) {
    const int64_t quants = offset + 16 + (fifth ? 32 : 0);
    for (int quarter = 0; quarter < 4; quarter++) copy_words(from, quants + 32 * quarter, 8, to + 512 * quarter);
    uint8_t *bits = to + 2048, *scales = to + 2048 + (fifth ? 512 : 0);
    for (int row = 0; row < from->n_rows; row++) {
        const uint8_t *at = block_at(from, row, offset), *s = at + 4;
        for (int sub = 0; sub < 8; sub++) {
            const int low = sub < 4;
            scales[32 * sub + row] = low ? s[sub] & 63 : (uint8_t)((s[sub + 4] & 15) | s[sub - 4] >> 6 << 4);
            scales[32 * sub + 16 + row] = low ? s[sub + 4] & 63 : (uint8_t)(s[sub + 4] >> 4 | s[sub] >> 6 << 4);
            for (int column = 0; fifth && column < 32; column++)
                put_fifth_bit(bits + 64 * sub, row, column, at[16 + column] >> sub & 1);
        }
    }
    copy_units(from, offset, 2, scales + 256);
    copy_units(from, offset + 2, 2, scales + 288);
}

static void pack_q6_k(const source *from, int64_t offset, uint8_t *to) {
    copy_words(from, offset, 32, to);
    copy_words(from, offset + 128, 16, to + 2048);
    for (int group = 0; group < 16; group++) copy_units(from, offset + 192 + group, 1, to + 3072 + 16 * group);
    copy_units(from, offset + 208, 2, to + 3328);
}

static void pack_iq4_xs(const source *from, int64_t offset, uint8_t *to) {
    for (int sub = 0; sub < 8; sub++) copy_words(from, offset + 8 + 16 * sub, 4, to + 256 * sub);
    for (int row = 0; row < from->n_rows; row++) {
        const uint8_t *at = block_at(from, row, offset);
        const int high = at[2] | at[3] << 8;
        for (int sub = 0; sub < 8; sub++) {
            const int low = at[4 + sub / 2] >> 4 * (sub & 1) & 15;
            to[2048 + 16 * sub + row] = (uint8_t)((low | (high >> 2 * sub & 3) << 4) - 32);
        }
    }
    copy_units(from, offset, 2, to + 2176);
}

static void pack_floats(int type, const source *from, int64_t n_in, uint8_t *to) {
    const int unit = type == TYPE_F16 ? 2 : 4; /* two columns of bfloat16 are one unit */
    const int64_t n_units = type == TYPE_BF16 ? (n_in + 1) / 2 : n_in;
    for (int row = 0; row < from->n_rows; row++)
        for (int64_t i = 0; i < n_units; i++) {
            const int last = type == TYPE_BF16 && 2 * i + 1 == n_in;
            memcpy(to + (16 * i + row) * unit, block_at(from, row, i * unit), last ? 2 : (size_t)unit);
        }
}

/* One block of 32 columns, or 256 for the K-quants, of all rows. */
static void pack_block(int type, const source *from, int64_t offset, uint8_t *to) {
    switch (type) {
        case TYPE_Q8_0:
            copy_words(from, offset + 2, 8, to);
            for (int i = 0; i < 512; i++) to[i] ^= 128; /* unsigned; rows that are not there have the scale 0 */
            copy_units(from, offset, 2, to + 512);
            break;
        case TYPE_Q4_0: case TYPE_IQ4_NL:
            copy_words(from, offset + 2, 4, to);
            copy_units(from, offset, 2, to + 256);
            break;
        case TYPE_Q4_1:
            copy_words(from, offset + 4, 4, to);
            copy_units(from, offset, 2, to + 256);
            copy_units(from, offset + 2, 2, to + 288);
            break;
        case TYPE_Q5_0: pack_q5(from, offset, to, 1); break;
        case TYPE_Q5_1: pack_q5(from, offset, to, 2); break;
        case TYPE_IQ4_XS: pack_iq4_xs(from, offset, to); break;
        case TYPE_Q4_K: pack_k_quant(from, offset, to, 0); break;
        case TYPE_Q5_K: pack_k_quant(from, offset, to, 1); break;
        default: pack_q6_k(from, offset, to);
    }
}

int64_t llamakit_bytes_of_tile(int type, int64_t n_in) { return tile_bytes(type, n_in); }

void llamakit_pack_tile(int type, const uint8_t *rows, int64_t row_bytes, int n_rows, int64_t n_in, uint8_t *tile) {
    const source from = {rows, row_bytes, n_rows};
    memset(tile, 0, (size_t)tile_bytes(type, n_in));
    if (is_float_type(type)) {
        pack_floats(type, &from, n_in, tile);
        return;
    }
    const int columns = tile_bytes(type, 32) ? 32 : 256;
    const int64_t n_blocks = n_in / columns, block_bytes = row_bytes / n_blocks;
    for (int64_t b = 0; b < n_blocks; b++)
        pack_block(type, &from, b * block_bytes, tile + b * tile_bytes(type, columns));
}
