/* What runs a Llama forward: its matrices, its caches, a batch of tokens. All memory belongs to the caller. */
#ifndef LLAMAKIT_ENGINE_H
#define LLAMAKIT_ENGINE_H

#include <stdint.h>

#include "team.h"

/* A matrix (n_out, n_in) in tiles (tiles.h), with what is added to its product x W^T: bias (n_out, padded to 16) or NULL,
   and a LoRA of rank > 0: lora_b in tiles [n_out / 16][rank][16], scales multiplied in, float32 where the matrix has
   floats, else bfloat16. Its A stands with those of the matrices that have the same input in one of their own. */
typedef struct {
    const uint8_t *tiles;
    const float *bias;
    const void *lora_b;
    int64_t tile_bytes;
    int32_t type, n_out, n_in, rank;
} matrix;

/* low_NAME: A of what has the same input, one below the other; n_out = 0 without LoRAs. */
typedef struct {
    const float *attn_norm, *ffn_norm;
    matrix q, k, v, attn_output, gate, up, down, low_qkv, low_output, low_hidden, low_down;
} layer;

/* embedding: packed rows as in the file, decode: of its type to float32 (codec.h); its LoRA as above, with B by rows.
   rotations: cosine and sine of every position and pair, [n_ctx][head_dim / 2][2]. */
typedef struct {
    int32_t n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, n_vocab, embedding_rank;
    float rms_eps, attention_scale;
    const uint8_t *embedding;
    int64_t embedding_row_bytes, embedding_row_blocks;
    void (*embedding_decode)(const uint8_t *packed, void *out, int64_t n_blocks);
    const float *embedding_lora_a, *embedding_lora_b, *output_norm, *rotations;
    const layer *layers;
    matrix output, low;
} llama;

/* Keys and values of one sequence, float32 where `wide`, else float16; n_ctx a multiple of 16. Keys in tiles of 16 positions,
   [n_layer][n_head_kv][n_ctx / 16][head_dim][16]; values [n_layer][n_head_kv][n_ctx][head_dim]. */
typedef struct {
    uint8_t *keys, *values;
    int64_t n_ctx;
    int32_t wide;
} kv_cache;

/* tokens, their positions and caches (n_tokens each); tokens of one cache follow one another, positions rising by 1.
   logits: n_outputs rows of n_vocab (padded to 16), after the tokens whose indices are in outputs. */
typedef struct {
    int32_t n_tokens, n_outputs;
    const int32_t *tokens, *positions, *outputs;
    const kv_cache *const *caches;
    float *logits;
} batch;

/* Of forward.c, by instruction set. */
typedef struct {
    int64_t (*scratch_bytes)(const llama *model, const batch *tokens, int n_threads);
    void (*forward)(const llama *model, const batch *tokens, uint8_t *scratch, parallel_fn parallel,
                    int (*thread_count)(void), int n_threads);
} engine;

/* Up to 16 rows of a file -> a tile (pack_tiles.c). */
void llamakit_pack_tile(int type, const uint8_t *rows, int64_t row_bytes, int n_rows, int64_t n_in, uint8_t *tile);
int64_t llamakit_bytes_of_tile(int type, int64_t n_in);

#endif
