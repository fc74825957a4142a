/* One call of the engine: the batch, the team that works on it, and how the scratch memory is divided. */
#ifndef LLAMAKIT_JOB_H
#define LLAMAKIT_JOB_H

#include <stddef.h>

#include "attention.h"
#include "engine.h"
#include "matmul.h"

/* Keys of one chunk of attention, a whole number of tiles. The chunks of a query are always the same, whatever the threads
   and whatever is computed beside it, so that its result is, too. */
enum { CHUNK = 128, PHASES = 14, MAX_HEAD_DIM = 512 };

typedef struct {
    const llama *model;
    const batch *tokens;
    int (*thread_count)(void);
    team team;
    int64_t *counters; /* one for each phase */
    float *x, *q, *k, *v, *mixed, *hidden, *low;
    float *partial; /* [n_head][chunks][part_numbers]: of a single token's attention */
    uint8_t *shared, *own; /* activations of all groups; what each thread has for itself */
    int32_t *runs; /* where runs of tokens of one cache begin, [n_runs + 1] */
    int64_t own_bytes, ld_embd, ld_q, ld_kv, ld_ff, ld_low, group_bytes, n_chunks;
    int32_t n_groups, width, n_runs, value_stride; /* width: tokens of a group */
} job;

/* What a thread has for itself. */
typedef struct {
    activations one;
    float *normed, *low, *scores, *parts;
    uint8_t *panels[2];
    int thread;
} desk;

/* What one chunk of attention leaves for each query: the values mixed, the largest score, the sum. */
static int64_t part_numbers(const job *j) { return j->value_stride + 16; }

static int64_t longest_input(const llama *m) {
    const int64_t heads = (int64_t)m->n_head * m->head_dim, a = m->n_embd > m->n_ff ? m->n_embd : m->n_ff;
    return padded(a > heads ? a : heads);
}

static int64_t most_rank(const llama *m) {
    int64_t most = m->low.n_out;
    for (int i = 0; i < m->n_layer; i++) {
        const layer *l = m->layers + i;
        const int64_t inputs[] = {l->low_qkv.n_out, l->low_output.n_out, l->low_hidden.n_out, l->low_down.n_out};
        for (int j = 0; j < 4; j++) most = inputs[j] > most ? inputs[j] : most;
    }
    return padded(most);
}

static uint8_t *place(uint8_t **at, int64_t bytes) {
    uint8_t *here = *at;
    *at += padded(bytes);
    return here;
}

/* Divides the scratch memory; with base NULL only its size is found. */
static int64_t lay_out(job *j, uint8_t *base, int n_threads) {
    const llama *m = j->model;
    const int64_t n = j->tokens->n_tokens, n_in = longest_input(m);
    j->ld_embd = padded(m->n_embd);
    j->ld_q = padded((int64_t)m->n_head * m->head_dim);
    j->ld_kv = padded((int64_t)m->n_head_kv * m->head_dim);
    j->ld_ff = padded(m->n_ff);
    j->ld_low = most_rank(m);
    j->n_groups = (int32_t)((n + GROUP - 1) / GROUP);
    j->width = group_width(n);
    j->value_stride = (m->head_dim + 15) / 16 * 16;
    int longest = 0;
    for (int i = 0; i < n; i++)
        if (j->tokens->positions[i] >= longest) longest = j->tokens->positions[i] + 1;
    j->n_chunks = (longest + CHUNK - 1) / CHUNK;
    j->group_bytes = activation_bytes(n_in, GROUP);
    uint8_t *at = base;
    j->counters = (int64_t *)place(&at, 8 * ((int64_t)PHASES * m->n_layer + 8));
    j->runs = (int32_t *)place(&at, 4 * (n + 1));
    j->x = (float *)place(&at, 4 * n * j->ld_embd);
    j->q = (float *)place(&at, 4 * n * j->ld_q);
    j->k = (float *)place(&at, 4 * n * j->ld_kv);
    j->v = (float *)place(&at, 4 * n * j->ld_kv);
    j->mixed = (float *)place(&at, 4 * n * j->ld_q);
    j->hidden = (float *)place(&at, 4 * n * j->ld_ff);
    j->low = (float *)place(&at, 4 * n * j->ld_low);
    j->partial = (float *)place(&at, 4 * m->n_head * j->n_chunks * part_numbers(j));
    j->shared = place(&at, n > 1 ? j->n_groups * j->group_bytes : 0);
    j->own_bytes = padded(activation_bytes(n_in, 1)) + padded(4 * n_in) + padded(4 * j->ld_low) +
                   padded(4 * MAX_QUERIES * CHUNK) +
                   (n > 1 ? padded(4 * MAX_QUERIES * j->n_chunks * part_numbers(j)) + 2 * padded(panel_bytes(n_in)) : 0);
    j->own = place(&at, n_threads * j->own_bytes);
    return at - base;
}

static desk desk_of(const job *j, int thread) {
    const int64_t n_in = longest_input(j->model);
    uint8_t *at = j->own + thread * j->own_bytes;
    desk d;
    d.one = activations_at(place(&at, activation_bytes(n_in, 1)), n_in, 1);
    d.normed = (float *)place(&at, 4 * n_in);
    d.low = (float *)place(&at, 4 * j->ld_low);
    d.scores = (float *)place(&at, 4 * MAX_QUERIES * CHUNK);
    d.parts = NULL;
    d.panels[0] = d.panels[1] = NULL;
    if (j->tokens->n_tokens > 1) {
        d.parts = (float *)place(&at, 4 * MAX_QUERIES * j->n_chunks * part_numbers(j));
        d.panels[0] = place(&at, panel_bytes(n_in));
        d.panels[1] = at;
    }
    d.thread = thread;
    return d;
}

#endif
