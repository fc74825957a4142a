/* What Python calls: the choice of the instruction set, and the division of rows among threads.

   Every function is plain C with integers and pointers; nothing here keeps a state. Arguments are checked in Python. */
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
/* Raised whenever a signature below changes; native.py has the same number. */
#define ABI 6

#define ISA baseline
#include "codec.h"
#undef ISA
#include "engine.h"
#include "half.h"
#include "train.h"
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

#define DECLARE_ENGINE(isa)                                                                                     \
    int64_t llamakit_scratch_bytes_##isa(const llama *model, const batch *tokens, int n_threads);               \
    void llamakit_forward_##isa(const llama *model, const batch *tokens, uint8_t *scratch, parallel_fn parallel, \
                                int (*thread_count)(void), int n_threads);
#define ENGINE(isa) {llamakit_scratch_bytes_##isa, llamakit_forward_##isa}
DECLARE_ENGINE(baseline)
static const engine plain_engine = ENGINE(baseline);
#ifdef X86
DECLARE_ENGINE(avx2)
DECLARE_ENGINE(avx512vnni)
DECLARE_ENGINE(avx512bf16)
static const engine avx2_engine = ENGINE(avx2), vnni_engine = ENGINE(avx512vnni), bf16_engine = ENGINE(avx512bf16);
#endif

/* The best for an instruction set of the codecs: AVX-512 serves with VNNI. The BF16 instructions are twice as fast as
   float32 on AMD's processors, and half as fast on Intel's, where AMX is meant for that. */
static const engine *engine_of(int isa) {
#ifdef X86
    __builtin_cpu_init();
    if (isa == 2 && __builtin_cpu_supports("avx512vnni"))
        return __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel") ? &bf16_engine : &vnni_engine;
    if (isa > 0) return &avx2_engine;
#endif
    (void)isa;
    return &plain_engine;
}

#define DECLARE_TRAIN(isa) extern const train_fn llamakit_train_kernels_##isa[2][N_TRAIN_KERNELS];
DECLARE_TRAIN(baseline)
#ifdef X86
DECLARE_TRAIN(avx2)
DECLARE_TRAIN(avx512vnni)
DECLARE_TRAIN(avx512bf16)
#endif

static const train_fn (*train_kernels_of(int isa))[N_TRAIN_KERNELS] {
#ifdef X86
    __builtin_cpu_init();
    if (isa == 2 && __builtin_cpu_supports("avx512vnni"))
        return __builtin_cpu_supports("avx512bf16") ? llamakit_train_kernels_avx512bf16 : llamakit_train_kernels_avx512vnni;
    if (isa > 0) return llamakit_train_kernels_avx2;
#endif
    (void)isa;
    return llamakit_train_kernels_baseline;
}

typedef struct {
    train_fn kernel;
    const train_job *job;
} train_rows_job;

static void train_rows(const void *data, int64_t start, int64_t stop) {
    const train_rows_job *job = data;
    job->kernel(job->job, start, stop);
}

/* A kernel of train.h over n_rows, job->step of them at a time; bf16: what the numbers are, else float32. */
EXPORT void llamakit_train(
    int isa, int kernel, int bf16, const train_job *job, int64_t n_rows, parallel_fn parallel, int n_threads
) {
    const train_rows_job rows = {train_kernels_of(isa)[bf16][kernel], job};
    pieces all = {train_rows, &rows, n_rows, job->step, 0};
    run(&all, parallel, n_threads);
}

/* Bytes of 16 rows of n_in weights in the engine's layout, 0 for a type that it does not have. */
EXPORT int64_t llamakit_tile_bytes(int type, int64_t n_in) { return llamakit_bytes_of_tile(type, n_in); }

typedef struct {
    const uint8_t *rows;
    uint8_t *tiles;
    int64_t row_bytes, tile_bytes, n_rows, n_in;
    int type;
} pack_job;

static void pack_tiles(const void *data, int64_t start, int64_t stop) {
    const pack_job *job = data;
    for (int64_t tile = start; tile < stop; tile++) {
        const int64_t left = job->n_rows - 16 * tile;
        llamakit_pack_tile(job->type, job->rows + 16 * tile * job->row_bytes, job->row_bytes, left < 16 ? (int)left : 16,
                           job->n_in, job->tiles + tile * job->tile_bytes);
    }
}

/* Packed rows -> tiles, as many bytes as llamakit_tile_bytes says for each 16 rows. */
EXPORT void llamakit_pack(
    int type, const uint8_t *rows, int64_t row_bytes, int64_t n_rows, int64_t n_in, uint8_t *tiles, parallel_fn parallel,
    int n_threads
) {
    const pack_job job = {rows, tiles, row_bytes, llamakit_bytes_of_tile(type, n_in), n_rows, n_in, type};
    pieces all = {pack_tiles, &job, (n_rows + 15) / 16, 4, 0};
    run(&all, parallel, n_threads);
}

static void copy_f32(const uint8_t *packed, void *out, int64_t n) { memcpy(out, packed, 4 * (size_t)n); }

static void widen_f16(const uint8_t *packed, void *out, int64_t n) {
    for (int64_t i = 0; i < n; i++) ((float *)out)[i] = get_half(packed + 2 * i);
}

static void widen_bf16(const uint8_t *packed, void *out, int64_t n) {
    for (int64_t i = 0; i < n; i++) ((float *)out)[i] = bits_float((uint32_t)(packed[2 * i] | packed[2 * i + 1] << 8) << 16);
}

/* A decoder of rows to float32, for the embedding; NULL where there is none. */
EXPORT decode_fn llamakit_decoder(int isa, int type) {
    if (type == TYPE_F32) return copy_f32;
    if (type == TYPE_F16) return widen_f16;
    if (type == TYPE_BF16) return widen_bf16;
    return type >= 0 && type < N_TYPES ? codecs[isa].decoders[OUTPUT_F32][type] : NULL;
}

EXPORT int64_t llamakit_scratch_bytes(int isa, const llama *model, const batch *tokens, int n_threads) {
    return engine_of(isa)->scratch_bytes(model, tokens, n_threads);
}

/* A batch through a model; scratch: as many bytes as llamakit_scratch_bytes says, at a multiple of 64. */
EXPORT void llamakit_forward(
    int isa, const llama *model, const batch *tokens, uint8_t *scratch, parallel_fn parallel, int (*thread_count)(void),
    int n_threads
) {
    engine_of(isa)->forward(model, tokens, scratch, parallel, thread_count, n_threads);
}
