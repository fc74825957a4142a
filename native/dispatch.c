/* What Python calls: the choice of the instruction set, and the division of rows among threads.

   Every function is plain C with integers and pointers; nothing here keeps a state. Arguments are checked in Python. */
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
/* Raised whenever a signature below changes; native.py has the same number. */
#define ABI 1

#define ISA baseline
#include "codec.h"
#undef ISA
#if defined(__x86_64__)
#define X86 1
#endif

typedef struct {
    const char *name;
    const encode_fn *encoders;
    const decode_fn (*decoders)[N_TYPES]; /* by what they write: float32, bfloat16 */
} isa_codecs;

const void *llamakit_grids[N_GRIDS];

#define DECLARE(isa)                                         \
    extern const encode_fn llamakit_encoders_##isa[N_TYPES]; \
    extern const decode_fn llamakit_decoders_##isa[N_OUTPUTS][N_TYPES]
#define CODECS(isa) {#isa, llamakit_encoders_##isa, llamakit_decoders_##isa}
DECLARE(baseline);
#ifdef X86
DECLARE(avx2);
DECLARE(avx512);
#endif

/* From the plainest to the best. */
static const isa_codecs codecs[] = {
    CODECS(baseline),
#ifdef X86
    CODECS(avx2),
    CODECS(avx512),
#endif
};
enum { N_ISAS = sizeof codecs / sizeof codecs[0] };

/* The rows of a grid of the IQ types, which must stay where they are. */
EXPORT void llamakit_set_grid(int which, const void *rows) {
    llamakit_grids[which] = rows;
}

EXPORT int llamakit_abi(void) { return ABI; }

EXPORT const char *llamakit_sources(void) { return SOURCES_DIGEST; }

/* NULL beyond the last. */
EXPORT const char *llamakit_isa_name(int isa) { return isa >= 0 && isa < N_ISAS ? codecs[isa].name : NULL; }

/* Whether this processor, and the operating system, can run it. */
EXPORT int llamakit_isa_supported(int isa) {
    if (isa == 0) return 1;
#ifdef X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    if (!__builtin_cpu_supports("bmi") || !__builtin_cpu_supports("bmi2")) return 0;
    if (isa == 1) return 1;
    return isa == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512cd");
#else
    return 0;
#endif
}

EXPORT int llamakit_has_encoder(int isa, int type) {
    return type >= 0 && type < N_TYPES && codecs[isa].encoders[type] != NULL;
}

EXPORT int llamakit_has_decoder(int isa, int type, int bf16) {
    return type >= 0 && type < N_TYPES && codecs[isa].decoders[bf16][type] != NULL;
}

/* OpenMP's way to run a function on a team of threads (GOMP_parallel of libgomp, which libomp has too). */
typedef void (*parallel_fn)(void (*work)(void *), void *data, unsigned n_threads, unsigned flags);

/* Pieces of work, taken by whichever thread is free. */
typedef struct {
    void (*piece)(const void *job, int64_t start, int64_t stop);
    const void *job;
    int64_t n, step, next;
} pieces;

static void take_pieces(void *data) {
    pieces *all = data;
    for (;;) {
        const int64_t start = __atomic_fetch_add(&all->next, all->step, __ATOMIC_RELAXED);
        if (start >= all->n) return;
        all->piece(all->job, start, all->n - start < all->step ? all->n : start + all->step);
    }
}

static void run(pieces *all, parallel_fn parallel, int n_threads) {
    if (parallel && n_threads > 1 && all->n > all->step)
        parallel(take_pieces, all, (unsigned)n_threads, 0);
    else
        take_pieces(all);
}

typedef struct {
    encode_fn encode;
    const float *x, *importance;
    uint8_t *out;
    int64_t n_in, row_bytes;
} encode_job;

static void encode_rows(const void *data, int64_t start, int64_t stop) {
    const encode_job *job = data;
    job->encode(job->x + start * job->n_in, job->importance, job->out + start * job->row_bytes, stop - start, job->n_in);
}

/* Rows x (n_rows, n_in) -> out (n_rows, row_bytes). */
EXPORT void llamakit_encode(
    int isa, int type, const float *x, const float *importance, uint8_t *out, int64_t n_rows, int64_t n_in,
    int64_t row_bytes, parallel_fn parallel, int n_threads
) {
    const encode_job job = {codecs[isa].encoders[type], x, importance, out, n_in, row_bytes};
    const int64_t rows = 16384 / n_in;
    pieces all = {encode_rows, &job, n_rows, rows > 1 ? rows : 1, 0};
    run(&all, parallel, n_threads);
}

typedef struct {
    decode_fn decode;
    const uint8_t *packed;
    uint8_t *out;
    int64_t block_bytes, out_bytes;
} decode_job;

static void decode_blocks(const void *data, int64_t start, int64_t stop) {
    const decode_job *job = data;
    job->decode(job->packed + start * job->block_bytes, job->out + start * job->out_bytes, stop - start);
}

/* n_blocks of block_bytes each -> as many times out_bytes, in float32 or bfloat16. */
EXPORT void llamakit_decode(
    int isa, int type, int bf16, const uint8_t *packed, void *out, int64_t n_blocks, int64_t block_bytes,
    int64_t out_bytes, parallel_fn parallel, int n_threads
) {
    const decode_job job = {codecs[isa].decoders[bf16][type], packed, out, block_bytes, out_bytes};
    pieces all = {decode_blocks, &job, n_blocks, (65536 + out_bytes - 1) / out_bytes, 0};
    run(&all, parallel, n_threads);
}

/* The index of the first NaN or infinity of n floats, or n. */
EXPORT int64_t llamakit_first_non_finite(const float *x, int64_t n) {
    const uint32_t *bits = (const uint32_t *)(const void *)x;
    enum { STEP = 4096 };
    for (int64_t start = 0; start < n; start += STEP) {
        const int64_t stop = n - start < STEP ? n : start + STEP;
        uint32_t bad = 0;
        for (int64_t i = start; i < stop; i++) bad |= (bits[i] & 0x7F800000) == 0x7F800000;
        if (bad)
            for (int64_t i = start;; i++)
                if ((bits[i] & 0x7F800000) == 0x7F800000) return i;
    }
    return n;
}
