/* Kernels of train.c: their numbers, which native.py has too, and what they are given. */
#ifndef LLAMAKIT_TRAIN_H
#define LLAMAKIT_TRAIN_H

#include <stdint.h>

enum {
    RMS_NORM,       /* x (rows, n), weight (n) f32 -> y (rows, n); scale: epsilon */
    RMS_NORM_BACK,  /* x, weight, dy -> dx, and where out[1] is there dweight of each piece of `step` rows, (pieces, n) f32 */
    GATE,           /* gate, up -> silu(gate) up */
    GATE_BACK,      /* gate, up, dy -> dgate, dup */
    ROTATE,         /* x (B, T, H, n), rotations (B or 1, T, n) f32 cosine and sine of each pair -> y; scale: 1, or -1 back */
    CAUSAL_SOFTMAX, /* scores (rows, n) -> weights, in place; a row sees the keys up to first + row % tile, and where in[1] is
                       there, (B, n_tokens) int64, from the one that stands there for it; rows are (B, n_heads, tile) */
    SOFTMAX_BACK,   /* weights, dweights -> dscores, in place of dweights; in[1] likewise */
    CROSS_ENTROPY,  /* logits (rows, n), targets int64 -> loss (rows) f32; with out[1] scale times the gradient, in place */
    ACCUMULATE,     /* x (rows, n) -> added to y (rows, n) f32 */
    NARROW,         /* x (rows, n), m (tile, n) f32 -> x m^T (rows, tile) f32, its rows `first` apart */
    WIDEN,          /* low (rows, tile) f32, its rows `first` apart, m (tile, n) f32 -> added to y (rows, n) in place */
    OUTER,          /* x (n_tokens, n), low (n_tokens, tile) f32, its rows `first` apart -> low^T x (tile, n) f32; the rows
                       of the job are pieces of 32 columns */
    N_TRAIN_KERNELS
};

/* strides: of ROTATE, in numbers: of B, T and H in x and in y, and of B and T in the rotations. */
typedef struct {
    const void *in[3];
    void *out[2];
    int64_t n, step, n_tokens, n_heads, first, tile, strides[8];
    float scale;
} train_job;

typedef void (*train_fn)(const train_job *job, int64_t start, int64_t stop);

#endif
