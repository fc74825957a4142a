/* What training does to rows of numbers between its matrix products: norm, gate, rotation, softmax, cross entropy,
   their gradients, and the small products of LoRA. Each is one pass over memory where torch makes several. Compiled for
   each instruction set, and in it for bfloat16 and float32 (numbers.h, narrow.h); every sum is made in float32, in an
   order that no number of threads changes.

   A kernel does the rows [start, stop) of a job; rows are independent of one another. */
#include <math.h>

#include "train.h"
#include "vector.h"

/* What of n numbers fills vectors. */
#define WHOLE(n) ((n) & ~(int64_t)(WIDTH - 1))
#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)

typedef uint16_t vn __attribute__((vector_size(2 * WIDTH)));

INLINE vf widen(vn x) { return (vf)(__builtin_convertvector(x, vu) << 16); }
INLINE vn narrow(vf x) {
#if defined(__AVX512BF16__)
    return (vn)_mm512_cvtneps_pbh((__m512)x);
#else
    const vu bits = (vu)x, rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const vi is_nan = x != x;
    return __builtin_convertvector((vu)(((vi)rounded & ~is_nan) | (is_nan & 0x7FC0)), vn);
#endif
}

/* The first n of the lanes; the others are 0. */
INLINE vi first_lanes(int64_t n) { return lane_numbers() < (int32_t)n; }

#define NUMBER uint16_t
#define NAME(kernel) JOIN(JOIN(kernel, bf16), ISA)
INLINE void store_bf16(uint16_t *at, vf x) { const vn y = narrow(x); memcpy(at, &y, sizeof y); }
INLINE vf load_part_bf16(const uint16_t *at, int64_t n) { vn x = {0}; memcpy(&x, at, 2 * (size_t)n); return widen(x); }
INLINE void store_part_bf16(uint16_t *at, vf x, int64_t n) { const vn y = narrow(x); memcpy(at, &y, 2 * (size_t)n); }
#define LOAD load_bf16
#define STORE store_bf16
#define LOAD_PART load_part_bf16
#define STORE_PART store_part_bf16
#include "numbers.h"
#include "narrow.h"
#undef NUMBER
#undef NAME
#undef LOAD
#undef STORE
#undef LOAD_PART
#undef STORE_PART

#define NUMBER float
#define NAME(kernel) JOIN(JOIN(kernel, f32), ISA)
INLINE vf load_part_f32(const float *at, int64_t n) { vf x = {0}; memcpy(&x, at, 4 * (size_t)n); return x; }
INLINE void store_part_f32(float *at, vf x, int64_t n) { memcpy(at, &x, 4 * (size_t)n); }
#define LOAD load
#define STORE store
#define LOAD_PART load_part_f32
#define STORE_PART store_part_f32
#include "numbers.h"
#include "narrow.h"

#define KERNELS(type)                                                                                                 \
    {JOIN(JOIN(rms_norm, type), ISA), JOIN(JOIN(rms_norm_back, type), ISA), JOIN(JOIN(gate, type), ISA),              \
     JOIN(JOIN(gate_back, type), ISA), JOIN(JOIN(rotate, type), ISA), JOIN(JOIN(causal_softmax, type), ISA),          \
     JOIN(JOIN(softmax_back, type), ISA), JOIN(JOIN(cross_entropy, type), ISA),                \
     JOIN(JOIN(accumulate, type), ISA), JOIN(JOIN(narrow, type), ISA), JOIN(JOIN(widen, type), ISA),                  \
     JOIN(JOIN(outer, type), ISA)}

const train_fn JOIN(llamakit_train_kernels, ISA)[2][N_TRAIN_KERNELS] = {KERNELS(f32), KERNELS(bf16)};
