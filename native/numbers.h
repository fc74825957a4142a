/* The kernels of train.c for one type of number: NUMBER, LOAD, STORE and their likes for fewer than WIDTH of them. */

static void NAME(rms_norm)(const train_job *job, int64_t start, int64_t stop) {
    const int64_t n = job->n, whole = WHOLE(n), rest = n - whole;
    const float *weight = job->in[1];
    for (int64_t row = start; row < stop; row++) {
        const NUMBER *x = (const NUMBER *)job->in[0] + row * n;
        NUMBER *y = (NUMBER *)job->out[0] + row * n;
        vf squares = {0};
        for (int64_t i = 0; i < whole; i += WIDTH) {
            const vf v = LOAD(x + i);
            squares += v * v;
        }
        if (rest) {
            const vf v = LOAD_PART(x + whole, rest);
            squares += v * v;
        }
        const float inverse = 1.0f / sqrtf(sum(squares) / (float)n + job->scale);
        for (int64_t i = 0; i < whole; i += WIDTH) STORE(y + i, LOAD(x + i) * inverse * load(weight + i));
        if (rest) {
            vf w = {0};
            memcpy(&w, weight + whole, 4 * (size_t)rest);
            STORE_PART(y + whole, LOAD_PART(x + whole, rest) * inverse * w, rest);
        }
    }
}

/* With u = x / rms: dx = (dy w - u mean(dy w u)) / rms, dw = sum over rows of dy u. */
static void NAME(rms_norm_back)(const train_job *job, int64_t start, int64_t stop) {
    const int64_t n = job->n, whole = WHOLE(n), rest = n - whole;
    const float *weight = job->in[1];
    float *d_weight = job->out[1] ? (float *)job->out[1] + start / job->step * n : NULL;
    vf last_weight = {0};
    if (rest) memcpy(&last_weight, weight + whole, 4 * (size_t)rest);
    if (d_weight) memset(d_weight, 0, 4 * (size_t)n);
    for (int64_t row = start; row < stop; row++) {
        const NUMBER *x = (const NUMBER *)job->in[0] + row * n, *dy = (const NUMBER *)job->in[2] + row * n;
        NUMBER *dx = (NUMBER *)job->out[0] + row * n;
        vf squares = {0}, products = {0};
        for (int64_t i = 0; i < whole; i += WIDTH) {
            const vf v = LOAD(x + i);
            squares += v * v;
            products += v * LOAD(dy + i) * load(weight + i);
        }
        if (rest) {
            const vf v = LOAD_PART(x + whole, rest);
            squares += v * v;
            products += v * LOAD_PART(dy + whole, rest) * last_weight;
        }
        const float inverse = 1.0f / sqrtf(sum(squares) / (float)n + job->scale);
        const float mean = sum(products) * inverse / (float)n;
        for (int64_t i = 0; i < whole; i += WIDTH) {
            const vf u = LOAD(x + i) * inverse, g = LOAD(dy + i);
            STORE(dx + i, (g * load(weight + i) - u * mean) * inverse);
            if (d_weight) store(d_weight + i, load(d_weight + i) + g * u);
        }
        if (rest) {
            const vf u = LOAD_PART(x + whole, rest) * inverse, g = LOAD_PART(dy + whole, rest), product = g * u;
            STORE_PART(dx + whole, (g * last_weight - u * mean) * inverse, rest);
            if (d_weight)
                for (int64_t i = 0; i < rest; i++) d_weight[whole + i] += product[i];
        }
    }
}

INLINE vf NAME(sigmoid)(vf x) { return 1.0f / (1.0f + exponential(-x)); }

static void NAME(gate)(const train_job *job, int64_t start, int64_t stop) {
    const int64_t first = start * job->n, last = stop * job->n;
    const NUMBER *gates = job->in[0], *ups = job->in[1];
    NUMBER *out = job->out[0];
    int64_t i = first;
    for (; i + WIDTH <= last; i += WIDTH) {
        const vf g = LOAD(gates + i);
        STORE(out + i, g * NAME(sigmoid)(g) * LOAD(ups + i));
    }
    if (i < last) {
        const vf g = LOAD_PART(gates + i, last - i);
        STORE_PART(out + i, g * NAME(sigmoid)(g) * LOAD_PART(ups + i, last - i), last - i);
    }
}

/* silu(g) = g s with s = sigmoid(g); its derivative is s (1 + g (1 - s)). */
static void NAME(gate_back)(const train_job *job, int64_t start, int64_t stop) {
    const int64_t first = start * job->n, last = stop * job->n;
    const NUMBER *gates = job->in[0], *ups = job->in[1], *dys = job->in[2];
    NUMBER *d_gates = job->out[0], *d_ups = job->out[1];
    int64_t i = first;
    for (; i + WIDTH <= last; i += WIDTH) {
        const vf g = LOAD(gates + i), dy = LOAD(dys + i), s = NAME(sigmoid)(g);
        STORE(d_gates + i, dy * LOAD(ups + i) * s * (1.0f + g * (1.0f - s)));
        STORE(d_ups + i, dy * g * s);
    }
    if (i < last) {
        const int64_t rest = last - i;
        const vf g = LOAD_PART(gates + i, rest), dy = LOAD_PART(dys + i, rest), s = NAME(sigmoid)(g);
        STORE_PART(d_gates + i, dy * LOAD_PART(ups + i, rest) * s * (1.0f + g * (1.0f - s)), rest);
        STORE_PART(d_ups + i, dy * g * s, rest);
    }
}

/* Rows are (batch, token, head); pairs (2i, 2i+1) turn by the angle whose cosine and sine stand at the same places. */
static void NAME(rotate)(const train_job *job, int64_t start, int64_t stop) {
    const int64_t n = job->n, n_heads = job->n_heads, n_tokens = job->n_tokens, *strides = job->strides;
    enum { PIECE = 256 };
    float in[PIECE], out[PIECE];
    for (int64_t row = start; row < stop; row++) {
        const int64_t h = row % n_heads, t = row / n_heads % n_tokens, b = row / (n_heads * n_tokens);
        const NUMBER *x = (const NUMBER *)job->in[0] + b * strides[0] + t * strides[1] + h * strides[2];
        NUMBER *y = (NUMBER *)job->out[0] + b * strides[3] + t * strides[4] + h * strides[5];
        const float *turn = (const float *)job->in[1] + b * strides[6] + t * strides[7];
        for (int64_t at = 0; at < n; at += PIECE) {
            const int64_t m = n - at < PIECE ? n - at : PIECE, whole = WHOLE(m);
            for (int64_t i = 0; i < whole; i += WIDTH) store(in + i, LOAD(x + at + i));
            if (whole < m) {
                const vf last = LOAD_PART(x + at + whole, m - whole);
                memcpy(in + whole, &last, 4 * (size_t)(m - whole));
            }
            for (int64_t i = 0; i < m; i += 2) {
                const float c = turn[at + i], s = turn[at + i + 1] * job->scale;
                out[i] = in[i] * c - in[i + 1] * s;
                out[i + 1] = in[i] * s + in[i + 1] * c;
            }
            for (int64_t i = 0; i < whole; i += WIDTH) STORE(y + at + i, load(out + i));
            if (whole < m) {
                vf last = {0};
                memcpy(&last, out + whole, 4 * (size_t)(m - whole));
                STORE_PART(y + at + whole, last, m - whole);
            }
        }
    }
}

/* The largest of n numbers. */
INLINE float NAME(largest)(const NUMBER *x, int64_t n) {
    const int64_t whole = WHOLE(n), rest = n - whole;
    vf most = splat(-INFINITY);
    for (int64_t i = 0; i < whole; i += WIDTH) {
        const vf v = LOAD(x + i);
        most = choose(v > most, v, most);
    }
    if (rest) {
        const vf v = choose(first_lanes(rest), LOAD_PART(x + whole, rest), splat(-INFINITY));
        most = choose(v > most, v, most);
    }
    return most_of_floats(most);
}

/* The sum of e^(scale (x - most)). NaN among the numbers makes it NaN: it does not pass `exponential`, it is added. */
INLINE float NAME(sum_of_exponentials)(const NUMBER *x, int64_t n, float most, float scale) {
    const int64_t whole = WHOLE(n), rest = n - whole;
    vf total = {0};
    for (int64_t i = 0; i < whole; i += WIDTH) {
        const vf v = (LOAD(x + i) - most) * scale;
        total += choose(v == v, exponential(v), v);
    }
    if (rest) {
        const vf v = (LOAD_PART(x + whole, rest) - most) * scale;
        total += choose(first_lanes(rest), choose(v == v, exponential(v), v), splat(0));
    }
    return sum(total);
}

/* The first key that a row of queries sees: that of its segment, where rows have segments. */
INLINE int64_t NAME(first_key)(const train_job *job, int64_t row) {
    const int64_t *starts = job->in[1];
    if (!starts) return 0;
    return starts[row / (job->n_heads * job->tile) * job->n_tokens + job->first + row % job->tile];
}

static void NAME(causal_softmax)(const train_job *job, int64_t start, int64_t stop) {
    for (int64_t row = start; row < stop; row++) {
        const int64_t low = NAME(first_key)(job, row);
        NUMBER *x = (NUMBER *)job->out[0] + row * job->n + low;
        const int64_t n = job->first + row % job->tile + 1 - low, whole = WHOLE(n), rest = n - whole;
        const float most = NAME(largest)(x, n);
        const float inverse = 1.0f / NAME(sum_of_exponentials)(x, n, most, job->scale);
        for (int64_t i = 0; i < whole; i += WIDTH)
            STORE(x + i, exponential((LOAD(x + i) - most) * job->scale) * inverse);
        if (rest)
            STORE_PART(x + whole, exponential((LOAD_PART(x + whole, rest) - most) * job->scale) * inverse, rest);
        memset(x - low, 0, sizeof *x * (size_t)low);
        memset(x + n, 0, sizeof *x * (size_t)(job->n - low - n));
    }
}

/* dscore = scale w (dw - sum of dw w). What a mask hides has the weight 0, and so no gradient. */
static void NAME(softmax_back)(const train_job *job, int64_t start, int64_t stop) {
    for (int64_t row = start; row < stop; row++) {
        const int64_t low = NAME(first_key)(job, row);
        const NUMBER *w = (const NUMBER *)job->in[0] + row * job->n + low;
        NUMBER *d = (NUMBER *)job->out[0] + row * job->n + low;
        const int64_t n = job->first + row % job->tile + 1 - low, whole = WHOLE(n), rest = n - whole;
        vf products = {0};
        for (int64_t i = 0; i < whole; i += WIDTH) products += LOAD(w + i) * LOAD(d + i);
        if (rest) products += LOAD_PART(w + whole, rest) * LOAD_PART(d + whole, rest);
        const float mean = sum(products);
        for (int64_t i = 0; i < whole; i += WIDTH) STORE(d + i, LOAD(w + i) * (LOAD(d + i) - mean) * job->scale);
        if (rest)
            STORE_PART(d + whole, LOAD_PART(w + whole, rest) * (LOAD_PART(d + whole, rest) - mean) * job->scale, rest);
        memset(d - low, 0, sizeof *d * (size_t)low);
        memset(d + n, 0, sizeof *d * (size_t)(job->n - low - n));
    }
}

static void NAME(cross_entropy)(const train_job *job, int64_t start, int64_t stop) {
    const int64_t n = job->n, whole = WHOLE(n), rest = n - whole;
    const int64_t *targets = job->in[1];
    for (int64_t row = start; row < stop; row++) {
        NUMBER *x = (NUMBER *)job->out[0] + row * n;
        const float most = NAME(largest)(x, n), total = NAME(sum_of_exponentials)(x, n, most, 1.0f);
        const vf chosen = LOAD_PART(x + targets[row], 1);
        ((float *)job->out[1])[row] = logf(total) - (chosen[0] - most);
        if (job->scale == 0.0f) continue;
        const float inverse = job->scale / total;
        for (int64_t i = 0; i < whole; i += WIDTH) STORE(x + i, exponential(LOAD(x + i) - most) * inverse);
        if (rest) STORE_PART(x + whole, exponential(LOAD_PART(x + whole, rest) - most) * inverse, rest);
        const vf share = exponential(chosen - most) * inverse - job->scale;
        STORE_PART(x + targets[row], share, 1);
    }
}

static void NAME(accumulate)(const train_job *job, int64_t start, int64_t stop) {
    const int64_t first = start * job->n, last = stop * job->n;
    const NUMBER *x = job->in[0];
    float *y = job->out[0];
    int64_t i = first;
    for (; i + WIDTH <= last; i += WIDTH) store(y + i, load(y + i) + LOAD(x + i));
    if (i < last) {
        const vf rest = LOAD_PART(x + i, last - i);
        for (int64_t lane = 0; i + lane < last; lane++) y[i + lane] += rest[lane];
    }
}
