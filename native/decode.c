/* Which decoders each tensor type has. The float types are torch's affair. */
#include "codec.h"

#define TYPES(X)                                                                                                  \
    X(Q4_0, q4_0) X(Q4_1, q4_1) X(Q5_0, q5_0) X(Q5_1, q5_1) X(Q8_0, q8_0) X(TQ1_0, tq1_0) X(TQ2_0, tq2_0)          \
    X(MXFP4, mxfp4) X(NVFP4, nvfp4) X(Q2_K, q2_k) X(Q3_K, q3_k) X(Q4_K, q4_k) X(Q5_K, q5_k) X(Q6_K, q6_k)          \
    X(IQ2_XXS, iq2_xxs) X(IQ2_XS, iq2_xs) X(IQ2_S, iq2_s) X(IQ3_XXS, iq3_xxs) X(IQ3_S, iq3_s) X(IQ1_S, iq1_s)      \
    X(IQ1_M, iq1_m) X(IQ4_NL, iq4_nl) X(IQ4_XS, iq4_xs)

#define DECLARE(type, name)                                                                  \
    void ISA_NAME(decode_f32_##name)(const uint8_t *packed, void *out, int64_t n_blocks);    \
    void ISA_NAME(decode_bf16_##name)(const uint8_t *packed, void *out, int64_t n_blocks);
#define TO_F32(type, name) [TYPE_##type] = ISA_NAME(decode_f32_##name),
#define TO_BF16(type, name) [TYPE_##type] = ISA_NAME(decode_bf16_##name),

TYPES(DECLARE)

const decode_fn ISA_NAME(decoders)[N_OUTPUTS][N_TYPES] = {
    [OUTPUT_F32] = {TYPES(TO_F32)},
    [OUTPUT_BF16] = {TYPES(TO_BF16)},
};
