/* Products with the narrow matrices of a LoRA pair, for one type of number as numbers.h: m and what goes with it is
   float32, (r, n) with few rows. A matrix library pads them to its tiles, and starts once for each. Every sum goes over
   its terms in one order, whatever the number of threads.

   Tiles have constant sizes, so that their sums stay in registers: vectors are WIDTH numbers. */
#define EACH(i, n) _Pragma("GCC unroll 4") for (int i = 0; i < (n); i++)

INLINE vf NAME(first_of)(const float *at, int64_t n) { vf x = {0}; memcpy(&x, at, 4 * (size_t)n); return x; }

/* `rows` rows of x times `count` rows of m; out's rows are `stride` apart. */
INLINE void NAME(narrow_tile)(
    const NUMBER *x, const float *m, int64_t n, int rows, int count, float *out, int64_t stride
) {
    const int64_t whole = WHOLE(n), rest = n - whole;
    vf sums[2][4];
    EACH(i, rows) EACH(k, count) sums[i][k] = splat(0);
    for (int64_t at = 0; at < whole; at += WIDTH) {
        vf v[2];
        EACH(i, rows) v[i] = LOAD(x + i * n + at);
        EACH(k, count) {
            const vf w = load(m + k * n + at);
            EACH(i, rows) sums[i][k] += v[i] * w;
        }
    }
    if (rest)
        EACH(k, count) {
            const vf w = NAME(first_of)(m + k * n + whole, rest);
            EACH(i, rows) sums[i][k] += LOAD_PART(x + i * n + whole, rest) * w;
        }
    EACH(i, rows) EACH(k, count) out[i * stride + k] = sum(sums[i][k]);
}

/* out (rows, r) = x (rows, n) m^T; r is job->tile, and the rows of out are job->first apart. */
static void NAME(narrow)(const train_job *job, int64_t start, int64_t stop) {
    const int64_t n = job->n, r = job->tile, stride = job->first;
    const float *all = job->in[1];
    for (int64_t k = 0; k < r; k += r - k < 4 ? 1 : 4) { /* some rows of m stay near while all rows of x pass */
        const float *m = all + k * n;
        int64_t row = start;
        for (; row + 2 <= stop; row += 2) {
            const NUMBER *x = (const NUMBER *)job->in[0] + row * n;
            float *out = (float *)job->out[0] + row * stride + k;
            if (r - k < 4) NAME(narrow_tile)(x, m, n, 2, 1, out, stride);
            else NAME(narrow_tile)(x, m, n, 2, 4, out, stride);
        }
        if (row < stop) {
            const NUMBER *x = (const NUMBER *)job->in[0] + row * n;
            float *out = (float *)job->out[0] + row * stride + k;
            if (r - k < 4) NAME(narrow_tile)(x, m, n, 1, 1, out, stride);
            else NAME(narrow_tile)(x, m, n, 1, 4, out, stride);
        }
    }
}

/* `rows` rows of y, `vectors` wide from a column on: y += low m. */
INLINE void NAME(widen_tile)(
    NUMBER *y, const float *low, const float *m, int64_t n, int64_t stride, int64_t r, int rows, int vectors
) {
    vf sums[2][4];
    EACH(i, rows) EACH(j, vectors) sums[i][j] = LOAD(y + i * n + WIDTH * j);
    for (int64_t k = 0; k < r; k++)
        EACH(j, vectors) {
            const vf w = load(m + k * n + WIDTH * j);
            EACH(i, rows) sums[i][j] += low[i * stride + k] * w;
        }
    EACH(i, rows) EACH(j, vectors) STORE(y + i * n + WIDTH * j, sums[i][j]);
}

/* y (rows, n) += low (rows, r) m, in place: y is out[0]; r is job->tile, and the rows of low are job->first apart. */
static void NAME(widen)(const train_job *job, int64_t start, int64_t stop) {
    const int64_t n = job->n, r = job->tile, stride = job->first, whole = WHOLE(n), rest = n - whole;
    const float *lows = job->in[0], *m = job->in[1];
    int64_t row = start;
    for (int rows; row < stop; row += rows) {
        rows = stop - row < 2 ? 1 : 2;
        NUMBER *y = (NUMBER *)job->out[0] + row * n;
        const float *low = lows + row * stride;
        int64_t at = 0;
        for (; at + 4 * WIDTH <= whole; at += 4 * WIDTH)
            if (rows == 2) NAME(widen_tile)(y + at, low, m + at, n, stride, r, 2, 4);
            else NAME(widen_tile)(y + at, low, m + at, n, stride, r, 1, 4);
        for (; at < whole; at += WIDTH)
            if (rows == 2) NAME(widen_tile)(y + at, low, m + at, n, stride, r, 2, 1);
            else NAME(widen_tile)(y + at, low, m + at, n, stride, r, 1, 1);
        for (int i = 0; rest && i < rows; i++) {
            vf total = LOAD_PART(y + i * n + whole, rest);
            for (int64_t k = 0; k < r; k++) total += low[i * stride + k] * NAME(first_of)(m + k * n + whole, rest);
            STORE_PART(y + i * n + whole, total, rest);
        }
    }
}

enum { NAME(OUTER_COLUMNS) = 32, NAME(OUTER_ROWS) = 64 };

/* `count` rows of the result, `vectors` wide, and more of it by some rows of x. */
INLINE void NAME(outer_tile)(
    const NUMBER *x, const float *low, int64_t rows, int64_t n, int64_t stride, int count, int vectors, float *out
) {
    vf sums[4][2];
    EACH(k, count) EACH(j, vectors) sums[k][j] = load(out + k * n + WIDTH * j);
    for (int64_t row = 0; row < rows; row++) {
        vf v[2];
        EACH(j, vectors) v[j] = LOAD(x + row * n + WIDTH * j);
        EACH(k, count) EACH(j, vectors) sums[k][j] += low[row * stride + k] * v[j];
    }
    EACH(k, count) EACH(j, vectors) store(out + k * n + WIDTH * j, sums[k][j]);
}

/* The same for one row and fewer columns than a vector has. */
INLINE void NAME(outer_rest)(
    const NUMBER *x, const float *low, int64_t rows, int64_t n, int64_t stride, int64_t width, float *out
) {
    vf total = NAME(first_of)(out, width);
    for (int64_t row = 0; row < rows; row++) total += low[row * stride] * LOAD_PART(x + row * n, width);
    memcpy(out, &total, 4 * (size_t)width);
}

/* out (r, n) = low^T x over all job->n_tokens rows of both; the job's own rows are pieces of OUTER_COLUMNS columns. r is
   job->tile, and the rows of low are job->first apart. */
static void NAME(outer)(const train_job *job, int64_t start, int64_t stop) {
    const int64_t n = job->n, r = job->tile, stride = job->first, n_rows = job->n_tokens;
    const int64_t from = start * NAME(OUTER_COLUMNS), end = stop * NAME(OUTER_COLUMNS), to = end < n ? end : n;
    float *all = job->out[0];
    for (int64_t k = 0; k < r; k++) memset(all + k * n + from, 0, 4 * (size_t)(to - from));
    for (int64_t row = 0; row < n_rows; row += NAME(OUTER_ROWS)) { /* these stay near while all rows of out pass */
        const int64_t rows = n_rows - row < NAME(OUTER_ROWS) ? n_rows - row : NAME(OUTER_ROWS);
        for (int64_t k = 0; k < r; k += r - k < 4 ? 1 : 4) {
            const int one = r - k < 4;
            const float *low = (const float *)job->in[1] + row * stride + k;
            const NUMBER *x = (const NUMBER *)job->in[0] + row * n;
            float *out = all + k * n;
            int64_t at = from;
            for (; at + 2 * WIDTH <= to; at += 2 * WIDTH)
                if (one) NAME(outer_tile)(x + at, low, rows, n, stride, 1, 2, out + at);
                else NAME(outer_tile)(x + at, low, rows, n, stride, 4, 2, out + at);
            for (; at + WIDTH <= to; at += WIDTH)
                if (one) NAME(outer_tile)(x + at, low, rows, n, stride, 1, 1, out + at);
                else NAME(outer_tile)(x + at, low, rows, n, stride, 4, 1, out + at);
            for (int64_t i = 0; at < to && i < (one ? 1 : 4); i++)
                NAME(outer_rest)(x + at, low + i, rows, n, stride, to - at, out + i * n + at);
        }
    }
}
#undef EACH
