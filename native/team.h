/* Threads that work on one job from its beginning to its end: they share out each phase, and wait for one another spinning,
   since phases last microseconds. */
#ifndef LLAMAKIT_TEAM_H
#define LLAMAKIT_TEAM_H

#include <sched.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* OpenMP's way to run a function on a team of threads (GOMP_parallel of libgomp, which libomp has too). */
typedef void (*parallel_fn)(void (*work)(void *), void *data, unsigned n_threads, unsigned flags);

typedef struct {
    _Alignas(64) int32_t arrived;
    _Alignas(64) int32_t generation;
    _Alignas(64) int32_t joined;
    int32_t n_threads;
} team;

/* A phase's work, n pieces, is taken `step` at a time through its own counter. */
static inline int take(int64_t *counter, int64_t n, int64_t step, int64_t *start, int64_t *stop) {
    *start = __atomic_fetch_add(counter, step, __ATOMIC_RELAXED);
    *stop = *start + step < n ? *start + step : n;
    return *start < n;
}

/* Waits until all have come here; meanwhile the lines from `ahead` on, where the next phase begins, are fetched. */
static inline void wait_for_all(team *t, const uint8_t *ahead) {
    enum { MOST_LINES = 512 };
    if (t->n_threads == 1) return;
    const int32_t generation = __atomic_load_n(&t->generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&t->arrived, 1, __ATOMIC_ACQ_REL) == t->n_threads) {
        __atomic_store_n(&t->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&t->generation, generation + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&t->generation, __ATOMIC_ACQUIRE) == generation; spins++) {
        if (ahead && spins < MOST_LINES)
            __builtin_prefetch(ahead + 64 * spins, 0, 2);
#if defined(__x86_64__)
        else
            _mm_pause();
#endif
        if (spins > 1000) sched_yield(); /* somebody else has the other one's core */
    }
}

#endif
