/* What every encoder and decoder of blocks is declared with. Layouts of the blocks: ggml-common.h of llama.cpp.

   The files that include this are compiled once for each instruction set, with -DISA=baseline, avx2 or avx512. Whatever
   they define with external linkage is named ISA_NAME(...), so that the copies stand side by side in one library.

   Arithmetic is float32, one rounding for each operation, in the order that the torch code in llamakit/quant has:
   compiled with -ffp-contract=off, never with -ffast-math. The bytes must not depend on the instruction set. */
#ifndef LLAMAKIT_CODEC_H
#define LLAMAKIT_CODEC_H

#include <stddef.h>
#include <stdint.h>

#ifndef ISA
#error "compile with -DISA=baseline, -DISA=avx2 or -DISA=avx512"
#endif
#define LLAMAKIT_JOIN2(name, isa) llamakit_##name##_##isa
#define LLAMAKIT_JOIN(name, isa) LLAMAKIT_JOIN2(name, isa)
#define ISA_NAME(name) LLAMAKIT_JOIN(name, ISA)

/* Tensor types by their number in ggml.h. */
enum {
    TYPE_F32 = 0, TYPE_F16 = 1, TYPE_Q4_0 = 2, TYPE_Q4_1 = 3, TYPE_Q5_0 = 6, TYPE_Q5_1 = 7, TYPE_Q8_0 = 8,
    TYPE_Q2_K = 10, TYPE_Q3_K = 11, TYPE_Q4_K = 12, TYPE_Q5_K = 13, TYPE_Q6_K = 14, TYPE_IQ2_XXS = 16,
    TYPE_IQ2_XS = 17, TYPE_IQ3_XXS = 18, TYPE_IQ1_S = 19, TYPE_IQ4_NL = 20, TYPE_IQ3_S = 21, TYPE_IQ2_S = 22,
    TYPE_IQ4_XS = 23, TYPE_IQ1_M = 29, TYPE_BF16 = 30, TYPE_TQ1_0 = 34, TYPE_TQ2_0 = 35, TYPE_MXFP4 = 39,
    TYPE_NVFP4 = 40, N_TYPES = 43
};

/* Whole rows on one thread: x (n_rows, n_in), finite or not; n_in a multiple of the type's block.
   importance: n_in floats, how much an error in each column matters, or NULL; types without a use for it ignore it.
   out: n_rows times the bytes of a row, at any address. Allocates nothing, keeps nothing. */
typedef void (*encode_fn)(const float *x, const float *importance, uint8_t *out, int64_t n_rows, int64_t n_in);

/* By type number; NULL where there is none. Each entry's function stands in the file that is named after its family. */
extern const encode_fn ISA_NAME(encoders)[N_TYPES];

/* Whole blocks on one thread: packed, at any address, -> n_blocks times a block's weights. Allocates nothing. */
typedef void (*decode_fn)(const uint8_t *packed, void *out, int64_t n_blocks);

/* What a decoder writes: float32, or that value rounded half to even to bfloat16 (NaN stays NaN). */
enum { OUTPUT_F32, OUTPUT_BF16, N_OUTPUTS };

/* By output and type number; NULL where there is none. */
extern const decode_fn ISA_NAME(decoders)[N_OUTPUTS][N_TYPES];

/* The grids of the IQ types: int8 rows of 8 or 4 levels, IQ1's times 8. Set before a decoder that looks one up runs. */
enum { GRID_IQ2_XXS, GRID_IQ2_XS, GRID_IQ2_S, GRID_IQ3_XXS, GRID_IQ3_S, GRID_IQ1, N_GRIDS };
extern const void *llamakit_grids[N_GRIDS];

#define DECLARE_ENCODER(name) \
    void ISA_NAME(name)(const float *x, const float *importance, uint8_t *out, int64_t n_rows, int64_t n_in)
DECLARE_ENCODER(encode_q4_0);
DECLARE_ENCODER(encode_q4_1);
DECLARE_ENCODER(encode_q5_0);
DECLARE_ENCODER(encode_q5_1);
DECLARE_ENCODER(encode_q8_0);
DECLARE_ENCODER(encode_tq1_0);
DECLARE_ENCODER(encode_tq2_0);
DECLARE_ENCODER(encode_mxfp4);
DECLARE_ENCODER(encode_q2_k);
DECLARE_ENCODER(encode_q3_k);
DECLARE_ENCODER(encode_q4_k);
DECLARE_ENCODER(encode_q5_k);
DECLARE_ENCODER(encode_q6_k);
DECLARE_ENCODER(encode_iq4_nl);
DECLARE_ENCODER(encode_iq4_xs);

/* Q4_0 to Q5_1 with an importance, which is not NULL. */
DECLARE_ENCODER(encode_q4_0_weighted);
DECLARE_ENCODER(encode_q4_1_weighted);
DECLARE_ENCODER(encode_q5_0_weighted);
DECLARE_ENCODER(encode_q5_1_weighted);

#endif
