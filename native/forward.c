/* A batch of tokens through a whole Llama in one call: embedding, layers, the logits that are asked for.

   One token takes the short way: every thread normalizes and quantizes it for itself, and the threads meet four times a
   layer. More tokens are shared out in groups of 8, a few in one of 2 or 4; a single group is multiplied with the tiles as
   they are packed, more of them with tiles that are unpacked once. Shapes: see engine.h; M tokens, rows padded to 64
   numbers that are zero. */
#include <stddef.h>

#include "attention.h"
#include "job.h"
#include "matmul.h"

/* Root mean square norm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight; out is zero up to a multiple of 64. */
static void normalize(const float *x, const float *weight, int n, float eps, float *out) {
    vf squares[2] = {{0}, {0}};
    int i = 0;
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        const vf a = load(x + i), b = load(x + i + WIDTH);
        squares[0] += a * a;
        squares[1] += b * b;
    }
    float total = sum(squares[0] + squares[1]);
    for (; i < n; i++) total += x[i] * x[i];
    const float scale = 1.0f / sqrtf(total / (float)n + eps);
    for (i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
    for (; i < padded(n); i++) out[i] = 0;
}

static void embed(const job *j, int token, float *x) {
    const llama *m = j->model;
    m->embedding_decode(m->embedding + token * m->embedding_row_bytes, x, m->embedding_row_blocks);
    for (int r = 0; r < m->embedding_rank; r++) {
        const float b = m->embedding_lora_b[(int64_t)token * m->embedding_rank + r];
        for (int i = 0; i < m->n_embd; i++) x[i] += b * m->embedding_lora_a[r * padded(m->n_embd) + i];
    }
    for (int i = m->n_embd; i < j->ld_embd; i++) x[i] = 0;
}

/* Products that share their input: out = x W^T, or what it adds to where `accumulate` is set. With `gated`, the first is
   silu(first) * second (Shazeer 2020, arXiv 2002.05202). low: of their LoRAs. */
typedef struct {
    const matrix *w[3], *low;
    float *out[3];
    int64_t ld[3];
    int n, accumulate, gated;
} products;

static int need_of_all(const products *p) {
    int need = p->low->n_out ? need_of(p->low->type) : 0;
    for (int i = 0; i < p->n; i++) need |= need_of(p->w[i]->type);
    return need;
}

INLINE vf gate(vf g, vf up) { return g / (1.0f + exponential(-g)) * up; }

INLINE int64_t tiles_of(const matrix *w) { return (w->n_out + TILE - 1) / TILE; }

/* Which product and tile a number among all of them means, and where its LoRA's low products begin. */
INLINE int find_tile(const products *p, int64_t *tile, int *low) {
    int i = 0;
    *low = 0;
    while (*tile >= tiles_of(p->w[i])) {
        *tile -= tiles_of(p->w[i]);
        *low += p->w[i++]->rank;
    }
    return i;
}

static int64_t all_tiles(const products *p) {
    int64_t n = 0;
    for (int i = 0; i < (p->gated ? 1 : p->n); i++) n += tiles_of(p->w[i]);
    return n;
}

/* The tiles of one token's products are divided once and for all: every thread reads a stretch of memory. */
INLINE int64_t share(const job *j, const products *p, int thread) { return all_tiles(p) * thread / j->team.n_threads; }

static const uint8_t *tile_at(const products *p, int64_t number) {
    int low;
    const int i = find_tile(p, &number, &low);
    return p->w[i]->tiles + number * p->w[i]->tile_bytes;
}

/* Where a thread begins in a set of products. */
static const uint8_t *first_of(const job *j, const products *p, int thread) {
    const int64_t start = share(j, p, thread);
    return start < all_tiles(p) ? tile_at(p, start) : NULL;
}

/* The low products of one token: every thread makes all of them for itself, which is less than to wait for the others. */
static void lower_token(const matrix *low, const activations *a, float *out) {
    for (int64_t tile = 0; tile < tiles_of(low); tile++) {
        vf y[PARTS];
        multiply_tile(low, tile, a, low->tiles + (tile + 1) * low->tile_bytes, y);
        for (int part = 0; part < PARTS; part++) store(out + TILE * tile + WIDTH * part, y[part]);
    }
}

/* next: where this thread goes on after these products. */
static void multiply_token(const job *j, const products *p, const float *x, const desk *d, const uint8_t *next) {
    const int64_t start = share(j, p, d->thread), stop = share(j, p, d->thread + 1);
    put_activations(x, 0, p->w[0]->n_in, need_of_all(p), &d->one, 0, 1);
    lower_token(p->low, &d->one, d->low);
    for (int64_t t = start; t < stop; t++) {
        int64_t tile = t;
        int low;
        const int i = find_tile(p, &tile, &low);
        const matrix *up = p->w[1];
        const uint8_t *ahead = t + 1 < stop ? tile_at(p, t + 1) : next;
        vf y[PARTS], other[PARTS];
        multiply_tile(p->w[i], tile, &d->one, ahead, y);
        if (p->gated) multiply_tile(up, tile, &d->one, up->tiles + (tile + 1) * up->tile_bytes, other);
        for (int part = 0; part < PARTS; part++) {
            float *out = p->out[i] + TILE * tile + WIDTH * part;
            y[part] += added(p->w[i], tile, part, d->low + low);
            if (p->gated) y[part] = gate(y[part], other[part] + added(up, tile, part, d->low + p->w[0]->rank));
            store(out, p->accumulate ? load(out) + y[part] : y[part]);
        }
    }
}

/* The product y [PARTS][width] of a tile of matrix number i with a group, to where it goes. */
static void finish_group(const job *j, const products *p, int i, int64_t tile, int low, int group, const vf *y) {
    const int first = group * GROUP, side = p->gated && i, left = j->tokens->n_tokens - first;
    const int n = left < j->width ? left : j->width;
    for (int part = 0; part < PARTS; part++) {
        vf more[GROUP];
        added_to_group(p->w[i], tile, part, j->low + first * j->ld_low + low, j->ld_low, n, more);
        for (int t = 0; t < n; t++) {
            float *out = p->out[i] + (first + t) * p->ld[i] + TILE * tile + WIDTH * part;
            vf x = y[part * j->width + t] + more[t];
            if (side) x = gate(load(out), x);
            store(out, p->accumulate ? load(out) + x : x);
        }
    }
}

/* A tile of some products, and where the low products of its LoRA begin. */
typedef struct {
    int which;
    int64_t number;
    int low;
} tile_of;

INLINE tile_of tile_number(const products *p, int64_t number, int side) {
    tile_of t;
    t.which = find_tile(p, &number, &t.low) + side;
    t.number = number;
    if (side) t.low += p->w[0]->rank;
    return t;
}

/* One group with a tile as it is packed; next: how many tiles on this thread's next one is. */
static void multiply_tile_of(const job *j, const products *p, int64_t number, int64_t next) {
    const activations a = activations_at(j->shared, longest_input(j->model), j->width);
    for (int side = 0; side <= p->gated; side++) {
        const tile_of t = tile_number(p, number, side);
        const matrix *w = p->w[t.which];
        vf y[PARTS * GROUP];
        multiply_tile_by_group(j->width, w, t.number, &a, w->tiles + (t.number + next) * w->tile_bytes, y);
        finish_group(j, p, t.which, t.number, t.low, 0, y);
    }
}

/* One tile, or two that are read together, unpacked and multiplied with all groups. */
static void multiply_unpacked(const job *j, const products *p, const desk *d, const tile_of *tiles, int n) {
    const int64_t longest = longest_input(j->model);
    panel panels[2];
    for (int i = 0; i < n; i++) panels[i] = unpack(p->w[tiles[i].which], tiles[i].number, d->panels[i]);
    const int together = n == 2 && panels[0].type == TYPE_F32 && panels[1].type == TYPE_F32 ? 2 : 1;
    for (int i = 0; i < n; i += together)
        for (int group = 0; group < j->n_groups; group++) {
            const activations a = activations_at(j->shared + group * j->group_bytes, longest, GROUP);
            vf y[2 * PARTS * GROUP];
            if (together == 2)
                multiply_two_panels(panels, p->w[tiles[0].which]->n_in, &a, y);
            else
                multiply_panel(p->w[tiles[i].which], panels + i, &a, y);
            for (int k = 0; k < together; k++) {
                const tile_of *t = tiles + i + k;
                finish_group(j, p, t->which, t->number, t->low, group, y + k * PARTS * GROUP);
            }
        }
}

/* One group: a piece is a few tiles, so that a thread can fetch its own next one. */
static void multiply_group(const job *j, const products *p, int64_t *counter) {
    enum { PIECES = 8, MOST = 8 }; /* of each thread; tiles */
    const int64_t n = all_tiles(p), n_threads = j->team.n_threads, few = n / (PIECES * n_threads);
    const int64_t step = few < 1 ? 1 : few < MOST ? few : MOST;
    for (int64_t start, stop; take(counter, n, step, &start, &stop);)
        for (int64_t t = start; t < stop; t++)
            multiply_tile_of(j, p, t, t + 1 < stop ? 1 : 1 + (n_threads - 1) * step);
}

/* Several groups: a piece is two tiles, those of a gate and what it opens or else two neighbours. */
static void multiply_groups(const job *j, const products *p, const desk *d, int64_t *counter) {
    const int64_t n = all_tiles(p), n_pairs = p->gated ? n : (n + 1) / 2;
    for (int64_t pair, stop; take(counter, n_pairs, 1, &pair, &stop);) {
        const int64_t number = p->gated ? pair : 2 * pair;
        const int is_alone = !p->gated && number + 1 == n;
        tile_of tiles[2] = {tile_number(p, number, 0)};
        if (!is_alone) tiles[1] = p->gated ? tile_number(p, number, 1) : tile_number(p, number + 1, 0);
        multiply_unpacked(j, p, d, tiles, is_alone ? 1 : 2);
    }
}

/* The input of some products, for all tokens: x (rows of ld) as it is, or normalized. A piece is a group or, where there
   are fewer groups than threads, a share of its columns. */
static void prepare_groups(const job *j, const products *p, const float *x, int64_t ld, const float *norm,
                           const desk *d, int64_t *counter) {
    const int need = need_of_all(p), n_in = p->w[0]->n_in, n_threads = j->team.n_threads;
    const int n_shares = j->n_groups < n_threads ? n_threads : 1, n_64 = n_in / 64;
    for (int64_t start, stop; take(counter, (int64_t)j->n_groups * n_shares, 1, &start, &stop);) {
        const int64_t group = start / n_shares;
        const int share = (int)(start % n_shares);
        const int first = 64 * (n_64 * share / n_shares), end = 64 * (n_64 * (share + 1) / n_shares);
        const int last = share + 1 < n_shares ? end : n_in;
        const activations a = activations_at(j->shared + group * j->group_bytes, longest_input(j->model), j->width);
        for (int t = 0; t < j->width; t++) { /* where there are fewer, the last one stands for those that are missing */
            const int64_t token = group * GROUP + t, end = j->tokens->n_tokens - 1;
            const float *from = x + (token < end ? token : end) * ld;
            if (norm) {
                normalize(from, norm, n_in, j->model->rms_eps, d->normed);
                from = d->normed;
            }
            put_activations(from, first, last, need, &a, t, j->width);
        }
    }
}

/* The low products of all groups. */
static void lower_groups(const job *j, const matrix *low, int64_t *counter) {
    const int64_t n = tiles_of(low);
    for (int64_t start, stop; take(counter, n * j->n_groups, 1, &start, &stop);) {
        const int64_t group = start / n, tile = start % n;
        const activations a = activations_at(j->shared + group * j->group_bytes, longest_input(j->model), j->width);
        vf y[PARTS * GROUP];
        multiply_tile_by_group(j->width, low, tile, &a, low->tiles + tile * low->tile_bytes, y);
        for (int t = 0; t < j->width && group * GROUP + t < j->tokens->n_tokens; t++)
            for (int part = 0; part < PARTS; part++)
                store(j->low + (group * GROUP + t) * j->ld_low + TILE * tile + WIDTH * part, y[part * j->width + t]);
    }
}

/* All products of groups whose input has been prepared, once all threads are done with that. */
static void multiply_prepared(const job *j, team *all, const products *p, const desk *d, int64_t *counters) {
    wait_for_all(all, NULL);
    if (p->low->n_out) {
        lower_groups(j, p->low, counters + 1);
        wait_for_all(all, NULL);
    }
    if (j->n_groups > 1)
        multiply_groups(j, p, d, counters);
    else
        multiply_group(j, p, counters);
}

static head head_of(const job *j, const kv_cache *cache, int layer, int kv) {
    const llama *m = j->model;
    const int64_t which = (int64_t)layer * m->n_head_kv + kv;
    const int64_t start = which * cache->n_ctx * (cache->wide ? 4 : 2);
    return (head){cache->keys + start * m->head_dim, cache->values + start * j->value_stride, m->head_dim,
                  j->value_stride, cache->wide, m->attention_scale};
}

/* Keys turned, and values, of a token into its cache. */
static void remember(const job *j, int layer, int token, int kv) {
    const llama *m = j->model;
    const int position = j->tokens->positions[token], d = m->head_dim;
    float *key = j->k + token * j->ld_kv + kv * d;
    const float *value = j->v + token * j->ld_kv + kv * d;
    const head h = head_of(j, j->tokens->caches[token], layer, kv);
    rotate(key, m->rotations + (int64_t)position * d, d);
    const int64_t keys = (int64_t)(position / 16) * d * 16 + position % 16, values = (int64_t)position * j->value_stride;
    for (int i = 0; i < d; i++) store_number(h.wide, h.keys, keys + 16 * i, key[i]);
    for (int i = 0; i < d; i++) store_number(h.wide, h.values, values + i, value[i]);
}

static void attend_chunk(const job *j, int n, const head *h, const float *const *q, const int *visible, int64_t chunk,
                         const desk *d, float *const *out) {
    float most[MAX_QUERIES], total[MAX_QUERIES];
    const int first = (int)chunk * (CHUNK / 16), last = first + CHUNK / 16, end = (visible[n - 1] + 15) / 16;
    attend(n, h, q, visible, first, last < end ? last : end, d->scores, out, most, total);
    for (int i = 0; i < n; i++) {
        out[i][j->value_stride] = most[i];
        out[i][j->value_stride + 1] = total[i];
    }
}

/* A single token: pieces are a key/value head and a chunk of positions; the last chunk's first stores the new key. */
static void attend_token(const job *j, int layer, const desk *d, int64_t *counter) {
    const llama *m = j->model;
    const int position = j->tokens->positions[0], queries = m->n_head / m->n_head_kv;
    for (int64_t start, stop; take(counter, m->n_head_kv * j->n_chunks, 1, &start, &stop);) {
        const int kv = (int)(start / j->n_chunks);
        const int64_t chunk = start % j->n_chunks;
        const head h = head_of(j, j->tokens->caches[0], layer, kv);
        if (chunk == j->n_chunks - 1) remember(j, layer, 0, kv);
        for (int first = 0; first < queries; first += MAX_QUERIES) {
            const int n = queries - first < MAX_QUERIES ? queries - first : MAX_QUERIES;
            float turned[MAX_QUERIES][MAX_HEAD_DIM], *out[MAX_QUERIES];
            const float *q[MAX_QUERIES];
            int visible[MAX_QUERIES];
            for (int i = 0; i < n; i++) {
                const int which = kv * queries + first + i;
                memcpy(turned[i], j->q + which * m->head_dim, sizeof(float) * (size_t)m->head_dim);
                rotate(turned[i], m->rotations + (int64_t)position * m->head_dim, m->head_dim);
                q[i] = turned[i];
                visible[i] = position + 1;
                out[i] = j->partial + (which * j->n_chunks + chunk) * part_numbers(j);
            }
            attend_chunk(j, n, &h, q, visible, chunk, d, out);
        }
    }
}

/* The chunks of one query put together, out (head_dim): parts [n_chunks] of `stride` numbers, each the values mixed, the
   largest score and the sum (Milakov and Gimelshein 2018, arXiv 1805.02867). */
static void join_chunks(const job *j, const float *parts, int64_t n_chunks, int64_t stride, float *out) {
    const int head_dim = j->model->head_dim;
    float most = -INFINITY, total = 0;
    for (int64_t c = 0; c < n_chunks; c++)
        most = parts[c * stride + j->value_stride] > most ? parts[c * stride + j->value_stride] : most;
    memset(out, 0, sizeof(float) * (size_t)head_dim);
    for (int64_t c = 0; c < n_chunks; c++) {
        const float weight = expf(parts[c * stride + j->value_stride] - most);
        total += weight * parts[c * stride + j->value_stride + 1];
        for (int d = 0; d < head_dim; d++) out[d] += weight * parts[c * stride + d];
    }
    for (int d = 0; d < head_dim; d++) out[d] /= total;
}

/* The heads of the single token, in `mixed`. */
static void join_heads(const job *j, float *mixed) {
    const llama *m = j->model;
    const int64_t stride = part_numbers(j);
    for (int i = 0; i < m->n_head; i++)
        join_chunks(j, j->partial + i * j->n_chunks * stride, j->n_chunks, stride, mixed + i * m->head_dim);
    for (int64_t i = (int64_t)m->n_head * m->head_dim; i < j->ld_q; i++) mixed[i] = 0;
}

static void turn_tokens(const job *j, int layer, int64_t *counter) {
    const llama *m = j->model;
    for (int64_t start, stop; take(counter, j->tokens->n_tokens, 4, &start, &stop);)
        for (int64_t t = start; t < stop; t++) {
            const float *rotations = m->rotations + (int64_t)j->tokens->positions[t] * m->head_dim;
            for (int kv = 0; kv < m->n_head_kv; kv++) remember(j, layer, (int)t, kv);
            for (int i = 0; i < m->n_head; i++) rotate(j->q + t * j->ld_q + i * m->head_dim, rotations, m->head_dim);
        }
}

/* Pieces are a run of tokens and a head, long contexts first. A run shorter than a group's eight tokens takes several
   heads that share their keys: the first of them does it for all. */
static void attend_groups(const job *j, int layer, const desk *d, int64_t *counter) {
    const llama *m = j->model;
    const batch *b = j->tokens;
    const int queries = m->n_head / m->n_head_kv;
    const int64_t stride = part_numbers(j);
    for (int64_t start, stop; take(counter, (int64_t)j->n_runs * m->n_head, 1, &start, &stop);) {
        const int run = j->n_runs - 1 - (int)(start / m->n_head), which = (int)(start % m->n_head), own = which % queries;
        const int token = j->runs[run], n_tokens = j->runs[run + 1] - token, together = MAX_QUERIES / n_tokens;
        if (own % together) continue;
        const int n_heads = queries - own < together ? queries - own : together, n = n_tokens * n_heads;
        const head h = head_of(j, b->caches[token], layer, which / queries);
        const float *q[MAX_QUERIES];
        float *out[MAX_QUERIES], *mixed[MAX_QUERIES];
        int visible[MAX_QUERIES];
        for (int i = 0; i < n; i++) {
            const int64_t at = (token + i / n_heads) * j->ld_q + (which + i % n_heads) * m->head_dim;
            q[i] = j->q + at;
            mixed[i] = j->mixed + at;
            visible[i] = b->positions[token + i / n_heads] + 1;
        }
        const int64_t n_chunks = (visible[n - 1] + CHUNK - 1) / CHUNK;
        for (int64_t chunk = 0; chunk < n_chunks; chunk++) {
            for (int i = 0; i < n; i++) out[i] = d->parts + (i * n_chunks + chunk) * stride;
            attend_chunk(j, n, &h, q, visible, chunk, d, out);
        }
        for (int i = 0; i < n; i++) join_chunks(j, d->parts + i * n_chunks * stride, n_chunks, stride, mixed[i]);
    }
}

static products of_qkv(const job *j, const layer *l) {
    return (products){{&l->q, &l->k, &l->v}, &l->low_qkv, {j->q, j->k, j->v}, {j->ld_q, j->ld_kv, j->ld_kv}, 3, 0, 0};
}

static products of_hidden(const job *j, const layer *l) {
    return (products){{&l->gate, &l->up}, &l->low_hidden, {j->hidden, j->hidden}, {j->ld_ff, j->ld_ff}, 2, 0, 1};
}

static products onto_x(const job *j, const matrix *w, const matrix *low) {
    return (products){{w}, low, {j->x}, {j->ld_embd}, 1, 1, 0};
}

static products of_logits(const job *j) {
    const matrix *w = &j->model->output;
    return (products){{w}, &j->model->low, {j->tokens->logits}, {0}, 1, 0, 0};
}

static void token_layer(job *j, int index, const desk *d, int64_t *counters) {
    const llama *m = j->model;
    const layer *l = m->layers + index;
    const products qkv = of_qkv(j, l), attention = onto_x(j, &l->attn_output, &l->low_output);
    const products hidden = of_hidden(j, l), down = onto_x(j, &l->down, &l->low_down);
    const products after = index + 1 < m->n_layer ? of_qkv(j, l + 1) : of_logits(j);
    const uint8_t *next[] = {first_of(j, &attention, d->thread), first_of(j, &hidden, d->thread),
                             first_of(j, &down, d->thread), first_of(j, &after, d->thread)};
    normalize(j->x, l->attn_norm, m->n_embd, m->rms_eps, d->normed);
    multiply_token(j, &qkv, d->normed, d, next[0]);
    wait_for_all(&j->team, NULL);
    attend_token(j, index, d, counters);
    wait_for_all(&j->team, next[0]);
    join_heads(j, d->normed);
    multiply_token(j, &attention, d->normed, d, next[1]);
    wait_for_all(&j->team, next[1]);
    normalize(j->x, l->ffn_norm, m->n_embd, m->rms_eps, d->normed);
    multiply_token(j, &hidden, d->normed, d, next[2]);
    wait_for_all(&j->team, next[2]);
    multiply_token(j, &down, j->hidden, d, next[3]);
    wait_for_all(&j->team, next[3]);
}

static void group_products(const job *j, team *all, const products *p, const float *x, int64_t ld, const float *norm,
                           const desk *d, int64_t *counters) {
    prepare_groups(j, p, x, ld, norm, d, counters);
    multiply_prepared(j, all, p, d, counters + 1);
    wait_for_all(all, NULL);
}

/* A job with the tokens alone that have logits, whose rows are at the front. */
static job outputs_of(const job *j, batch *tokens) {
    job own = *j;
    *tokens = *j->tokens;
    tokens->n_tokens = tokens->n_outputs;
    own.tokens = tokens;
    own.n_groups = (tokens->n_outputs + GROUP - 1) / GROUP;
    own.width = group_width(tokens->n_outputs);
    return own;
}

static void move_outputs_to_front(job *j, const desk *d) {
    const batch *b = j->tokens;
    for (int o = 0; d->thread == 0 && o < b->n_outputs; o++) { /* they rise: none is overwritten before it is moved */
        memmove(j->x + o * j->ld_embd, j->x + b->outputs[o] * j->ld_embd, sizeof(float) * (size_t)j->ld_embd);
        memmove(j->mixed + o * j->ld_q, j->mixed + b->outputs[o] * j->ld_q, sizeof(float) * (size_t)j->ld_q);
    }
    wait_for_all(&j->team, NULL);
}

/* In the last layer only keys and values are wanted of a token without logits. */
static void group_layer(job *j, int index, const desk *d, int64_t *counters) {
    const layer *l = j->model->layers + index;
    const products qkv = of_qkv(j, l), attention = onto_x(j, &l->attn_output, &l->low_output);
    const products hidden = of_hidden(j, l), down = onto_x(j, &l->down, &l->low_down);
    const int is_last = index + 1 == j->model->n_layer;
    team *all = &j->team;
    batch outputs;
    group_products(j, all, &qkv, j->x, j->ld_embd, l->attn_norm, d, counters);
    turn_tokens(j, index, counters + 3);
    wait_for_all(all, NULL);
    if (is_last && j->tokens->n_outputs == 0) return;
    attend_groups(j, index, d, counters + 4);
    wait_for_all(all, NULL);
    if (is_last) move_outputs_to_front(j, d);
    const job own = is_last ? outputs_of(j, &outputs) : *j;
    group_products(&own, all, &attention, j->mixed, j->ld_q, NULL, d, counters + 5);
    group_products(&own, all, &hidden, j->x, j->ld_embd, l->ffn_norm, d, counters + 8);
    group_products(&own, all, &down, j->hidden, j->ld_ff, NULL, d, counters + 11);
}

/* Logits of the tokens that have some, whose rows are at the front; of a lone one by the short way. */
static void finish(job *j, const desk *d) {
    const llama *m = j->model;
    const int n = j->tokens->n_outputs;
    products logits = of_logits(j);
    if (n == 1) {
        const products first = of_qkv(j, m->layers);
        normalize(j->x, m->output_norm, m->n_embd, m->rms_eps, d->normed);
        multiply_token(j, &logits, d->normed, d, first_of(j, &first, d->thread));
    } else if (n > 1) {
        batch outputs;
        const job own = outputs_of(j, &outputs);
        int64_t *counters = j->counters + (int64_t)PHASES * m->n_layer;
        logits.ld[0] = tiles_of(logits.w[0]) * TILE;
        prepare_groups(&own, &logits, j->x, j->ld_embd, m->output_norm, d, counters);
        multiply_prepared(&own, &j->team, &logits, d, counters + 1);
    }
}

static void work(void *data) {
    job *j = data;
    const int thread = __atomic_fetch_add(&j->team.joined, 1, __ATOMIC_ACQ_REL), n = j->tokens->n_tokens;
    if (j->thread_count) j->team.n_threads = j->thread_count(); /* all write the same number */
    const desk d = desk_of(j, thread);
    for (int64_t t = thread; t < n; t += j->team.n_threads) {
        embed(j, j->tokens->tokens[t], j->x + t * j->ld_embd);
        memset(j->mixed + t * j->ld_q, 0, sizeof(float) * (size_t)j->ld_q);
        const int64_t n_ff = j->model->n_ff; /* what lies behind a row is read, too, times zero: it must be a number */
        memset(j->hidden + t * j->ld_ff + n_ff, 0, sizeof(float) * (size_t)(j->ld_ff - n_ff));
    }
    wait_for_all(&j->team, NULL);
    for (int i = 0; i < j->model->n_layer; i++)
        (n == 1 ? token_layer : group_layer)(j, i, &d, j->counters + (int64_t)PHASES * i);
    finish(j, &d);
}

/* Tokens of one cache that follow one another, at most a group of them at once. */
static void find_runs(job *j) {
    const batch *b = j->tokens;
    j->n_runs = 0;
    for (int i = 0; i < b->n_tokens; i++)
        if (i == 0 || b->caches[i] != b->caches[i - 1] || i - j->runs[j->n_runs - 1] == GROUP) j->runs[j->n_runs++] = i;
    j->runs[j->n_runs] = b->n_tokens;
}

/* The bytes of scratch memory that `forward` needs for a batch, at an address that is a multiple of 64. */
int64_t ISA_NAME(scratch_bytes)(const llama *model, const batch *tokens, int n_threads) {
    job j = {.model = model, .tokens = tokens};
    return lay_out(&j, NULL, n_threads);
}

void ISA_NAME(forward)(const llama *model, const batch *tokens, uint8_t *scratch, parallel_fn parallel,
                       int (*thread_count)(void), int n_threads) {
    job j = {.model = model, .tokens = tokens, .thread_count = parallel ? thread_count : NULL};
    j.team.n_threads = 1;
    lay_out(&j, scratch, n_threads);
    find_runs(&j);
    memset(j.counters, 0, 8 * ((size_t)PHASES * (size_t)model->n_layer + 8));
    if (parallel && n_threads > 1)
        parallel(work, &j, (unsigned)n_threads, 0);
    else
        work(&j);
}
