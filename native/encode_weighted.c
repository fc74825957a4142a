/* Encoders of Q4_0, Q4_1, Q5_0 and Q5_1 that make use of an importance: searches as for the K-quants. Formulas:
   ggml-quants.c of llama.cpp (quantize_row_q4_0_impl and so on); layouts: ggml-common.h. */
#include "batch.h"
#include "search.h"

#define BLOCK 32

/* What a type is made of: f16 d; f16 m where there is a line rather than a scale; 4 bytes of fifth bits where n_max is
   beyond four bits; 16 of nibbles. */
typedef struct {
    int n_max, line, fifths, bytes;
} WeightedType;

INLINE void fit_block(const Batch *batch, vf variance, WeightedType type) {
    vf x[BLOCK], weight[BLOCK];
    vi levels[BLOCK];
    load_lanes(batch->x, BLOCK, x);
    load_importance(batch, 0, BLOCK, weight);
    weigh(x, weight, variance, BLOCK, weight);
    if (type.line) {
        const LineFit fit = fit_line(x, weight, BLOCK, type.n_max, WEIGHTED_LINES);
        for (int i = 0; i < BLOCK; i++) levels[i] = line_level(&fit, x[i], type.n_max);
        store_half(batch, 0, to_half(fit.scale));
        store_half(batch, 2, to_half(fit.low));
    } else {
        const ScaleFit fit = fit_scale(x, weight, BLOCK, type.n_max, 1);
        for (int i = 0; i < BLOCK; i++) levels[i] = level_of(&fit, x[i], type.n_max);
        store_half(batch, 0, to_half(fit.scale));
    }
    if (type.fifths) {
        vi word = {0};
        for (int i = 0; i < BLOCK; i++) word |= (levels[i] >> 4 & 1) << i;
        store_word(batch, type.line ? 4 : 2, word);
    }
    store_planes(batch, type.bytes - 16, levels, BLOCK, 1, 4, 0);
}

/* The mean squares of up to LANES rows, each summed from its first element to its last. */
static vf mean_squares(const float *x, int64_t n_rows, int64_t n_in) {
    const float *from[LANES];
    vf part[LANES], total = {0};
    for (int64_t column = 0; column < n_in; column += LANES) {
        for (int lane = 0; lane < LANES; lane++)
            from[lane] = x + (lane < n_rows ? lane : n_rows - 1) * n_in + column;
        load_lanes(from, LANES, part);
        for (int i = 0; i < LANES; i++) total += part[i] * part[i];
    }
    return total / (float)n_in;
}

/* Up to LANES rows: their blocks, each with the mean square of its row. */
INLINE void encode_rows(const Blocks *blocks, int64_t n_rows, WeightedType type) {
    const vf powers = mean_squares(blocks->x, n_rows, blocks->per_row * BLOCK);
    Batch batch;
    vf variance = powers;
    for (int64_t first = 0; first < blocks->n_blocks; first += LANES) {
        fill_batch(&batch, blocks, first);
        for (int lane = 0; lane < LANES; lane++) {
            const int64_t row = (first + lane) / blocks->per_row;
            variance[lane] = powers[row < n_rows ? row : n_rows - 1];
        }
        fit_block(&batch, variance, type);
    }
}

INLINE void encode_weighted(const float *x, const float *importance, uint8_t *out, int64_t n_rows, int64_t n_in,
                            WeightedType type) {
    for (int64_t row = 0; row < n_rows; row += LANES) {
        const int64_t count = n_rows - row < LANES ? n_rows - row : LANES;
        const Blocks blocks = blocks_of(x + row * n_in, importance, out + row * (n_in / BLOCK) * type.bytes, count,
                                        n_in, BLOCK, type.bytes);
        encode_rows(&blocks, count, type);
    }
}

#define WEIGHTED_ENCODER(name, n_max, line, fifths, bytes)                                                            \
    DECLARE_ENCODER(encode_##name##_weighted) {                                                                       \
        encode_weighted(x, importance, out, n_rows, n_in, (WeightedType){n_max, line, fifths, bytes});                \
    }

WEIGHTED_ENCODER(q4_0, 8, 0, 0, 18)
WEIGHTED_ENCODER(q4_1, 15, 1, 0, 20)
WEIGHTED_ENCODER(q5_0, 16, 0, 1, 22)
WEIGHTED_ENCODER(q5_1, 31, 1, 1, 24)
