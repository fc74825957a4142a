/* Which encoder each tensor type has. */
#include "codec.h"

const encode_fn ISA_NAME(encoders)[N_TYPES] = {
    [TYPE_Q4_0] = ISA_NAME(encode_q4_0),     [TYPE_Q4_1] = ISA_NAME(encode_q4_1),
    [TYPE_Q5_0] = ISA_NAME(encode_q5_0),     [TYPE_Q5_1] = ISA_NAME(encode_q5_1),
    [TYPE_Q8_0] = ISA_NAME(encode_q8_0),     [TYPE_TQ1_0] = ISA_NAME(encode_tq1_0),
    [TYPE_TQ2_0] = ISA_NAME(encode_tq2_0),   [TYPE_MXFP4] = ISA_NAME(encode_mxfp4),
    [TYPE_Q2_K] = ISA_NAME(encode_q2_k),     [TYPE_Q3_K] = ISA_NAME(encode_q3_k),
    [TYPE_Q4_K] = ISA_NAME(encode_q4_k),     [TYPE_Q5_K] = ISA_NAME(encode_q5_k),
    [TYPE_Q6_K] = ISA_NAME(encode_q6_k),
    [TYPE_IQ4_NL] = ISA_NAME(encode_iq4_nl), [TYPE_IQ4_XS] = ISA_NAME(encode_iq4_xs),
};
