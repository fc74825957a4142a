/* As many blocks as there are lanes, and how their bytes are written. */
#ifndef LLAMAKIT_BATCH_H
#define LLAMAKIT_BATCH_H

#include "codec.h"
#include "lanes.h"

/* importance: of each lane's block, NULL where there is none. Lanes beyond the last block repeat it and write to
   `spare`. */
typedef struct {
    const float *x[LANES];
    const float *importance[LANES];
    uint8_t *out[LANES];
    uint8_t spare[256];
} Batch;

typedef struct {
    const float *x, *importance;
    uint8_t *out;
    int64_t n_blocks, per_row;
    int block_size, block_bytes;
} Blocks;

INLINE Blocks blocks_of(const float *x, const float *importance, uint8_t *out, int64_t n_rows, int64_t n_in,
                        int block_size, int block_bytes) {
    const int64_t per_row = n_in / block_size;
    return (Blocks){x, importance, out, n_rows * per_row, per_row, block_size, block_bytes};
}

/* Blocks from number `first` on. */
INLINE void fill_batch(Batch *batch, const Blocks *blocks, int64_t first) {
    for (int lane = 0; lane < LANES; lane++) {
        const int64_t last = blocks->n_blocks - 1, wanted = first + lane, number = wanted < last ? wanted : last;
        batch->x[lane] = blocks->x + number * blocks->block_size;
        batch->out[lane] = wanted <= last ? blocks->out + number * blocks->block_bytes : batch->spare;
        batch->importance[lane] =
            blocks->importance ? blocks->importance + number % blocks->per_row * blocks->block_size : NULL;
    }
}

/* encode(batch) for all blocks. */
INLINE void each_batch(const Blocks *blocks, void (*encode)(const Batch *)) {
    Batch batch;
    for (int64_t first = 0; first < blocks->n_blocks; first += LANES) {
        fill_batch(&batch, blocks, first);
        encode(&batch);
    }
}

/* The importance of `size` elements of each block, from element `at` on. */
INLINE void load_importance(const Batch *batch, int at, int size, vf *out) {
    const float *from[LANES];
    for (int lane = 0; lane < LANES; lane++) from[lane] = batch->importance[lane] + at;
    load_lanes(from, size, out);
}

INLINE void store_half(const Batch *batch, int at, vi half) {
    for (int lane = 0; lane < LANES; lane++) {
        const uint16_t bits = (uint16_t)half[lane];
        memcpy(batch->out[lane] + at, &bits, 2);
    }
}

/* Four bytes, the first the lowest. */
INLINE void store_word(const Batch *batch, int at, vi word) {
    int32_t words[LANES];
    memcpy(words, &word, sizeof words);
    for (int lane = 0; lane < LANES; lane++) memcpy(batch->out[lane] + at, &words[lane], 4);
}

/* Four bytes, each the low byte of a value. */
INLINE void store_bytes(const Batch *batch, int at, const vi *values) {
    vi word = {0};
    for (int byte = 0; byte < 4; byte++) word |= (values[byte] & 0xFF) << 8 * byte;
    store_word(batch, at, word);
}

/* `count` levels as bit fields: `bits` bits of each, beginning with bit `right`. They come in `pieces`, each cut into
   8 / bits planes; a byte has one field of every plane, the first the lowest. */
INLINE void store_planes(const Batch *batch, int at, const vi *levels, int count, int pieces, int bits, int right) {
    const int n_planes = 8 / bits, width = count / pieces / n_planes, field = (1 << bits) - 1;
    for (int piece = 0; piece < pieces; piece++) {
        const vi *planes = levels + piece * n_planes * width;
        for (int byte = 0; byte < width; byte += 4) {
            vi word = {0};
            for (int k = 0; k < n_planes; k++)
                for (int i = 0; i < 4; i++) {
                    const vi level = planes[k * width + byte + i] >> right & field;
                    word |= level << (bits * k + 8 * i);
                }
            store_word(batch, at + piece * width + byte, word);
        }
    }
}

/* encode_NAME of codec.h from NAME(batch, weighted), which is compiled for both. */
#define BATCH_ENCODER(name, block_size, block_bytes)                                                                  \
    static void name##_plain(const Batch *batch) { name(batch, 0); }                                                  \
    static void name##_weighted(const Batch *batch) { name(batch, 1); }                                               \
    DECLARE_ENCODER(encode_##name) {                                                                                  \
        const Blocks blocks = blocks_of(x, importance, out, n_rows, n_in, block_size, block_bytes);                   \
        each_batch(&blocks, importance ? name##_weighted : name##_plain);                                             \
    }

#endif
