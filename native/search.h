/* The searches for the scale of a group of weights, one group in every lane.

   Formulas: ggml-quants.c of llama.cpp (make_qx_quants, make_q3_quants, make_qkx2_quants, make_qkx3_quants,
   make_qp_quants). The bytes must equal those of ggml: one rounding for each operation, sums from the first element to
   the last, products from left to right. llamakit/quant/encode_search.py is the same in torch.

   x and weight are arrays of `size` vectors. What a search does to groups that are as good as zero, or constant, is
   masked at the end: their scales are divided by infinity, so that no lane meets an infinity. */
#ifndef LLAMAKIT_SEARCH_H
#define LLAMAKIT_SEARCH_H

#include "lanes.h"

/* Groups whose largest magnitude is below this are taken as zero (GROUP_MAX_EPS of ggml-quants.c). */
#define TINY 1e-15f
#define INFINITE __builtin_inff()

/* At most so many weights have one scale, or scales one scale of theirs. */
#define MAX_GROUP 32
#define N_PASSES 5

INLINE vf sum(const vf *x, int size) {
    vf total = x[0];
    for (int i = 1; i < size; i++) total += x[i];
    return total;
}

INLINE vf sum_of_squares(const vf *x, int size) {
    vf total = {0};
    for (int i = 0; i < size; i++) total += x[i] * x[i];
    return total;
}

INLINE void squares(const vf *x, int size, vf *out) {
    for (int i = 0; i < size; i++) out[i] = x[i] * x[i];
}

/* importance * sqrt(variance + x^2); in place where weight is importance. */
INLINE void weigh(const vf *x, const vf *importance, vf variance, int size, vf *weight) {
    for (int i = 0; i < size; i++) weight[i] = importance[i] * root(variance + x[i] * x[i]);
}

/* The element of the largest magnitude, the first of several; 0 is positive, NaN is passed over. */
INLINE vf largest(const vf *x, int size) {
    vf peak = {0}, high = {0};
    for (int i = 0; i < size; i++) {
        const vf size_of = magnitude(x[i]);
        const mask more = less(high, size_of);
        peak = choose(more, x[i], peak);
        high = choose(more, size_of, high);
    }
    return peak;
}

/* The largest element above 0, or 0. */
INLINE vf largest_positive(const vf *x, int size) {
    vf peak = {0};
    for (int i = 0; i < size; i++) peak = greater(x[i], peak);
    return peak;
}

/* x ~ scale (level - n_max), level in 0..2 n_max - 1; `inverse` is what the levels are found with. */
typedef struct {
    vf scale, inverse;
    mask zero;
} ScaleFit;

typedef struct {
    vf xl, ll;
} Sums;

/* For finite elements: |x / peak| <= 1, and so the level is in range. */
INLINE vf signed_level(vf x, vf inverse, int n_max) {
    return nearest_within(inverse * x, (float)-n_max, (float)(n_max - 1));
}

/* For scales, too, which overflow where squares of weights do. */
INLINE vf any_signed_level(vf x, vf inverse, int n_max) {
    return to_float(clamp_int(nearest(inverse * x), -n_max, n_max - 1));
}

INLINE Sums scale_sums(const vf *x, const vf *weight, int size, int n_max, vf inverse, int finite) {
    Sums sums = {{0}, {0}};
    for (int i = 0; i < size; i++) {
        const vf level = finite ? signed_level(x[i], inverse, n_max) : any_signed_level(x[i], inverse, n_max);
        sums.xl += weight[i] * x[i] * level;
        sums.ll += weight[i] * level * level;
    }
    return sums;
}

/* make_qx_quants: weighted least squares for 19 scales around that of the largest element. */
INLINE ScaleFit fit_scale(const vf *x, const vf *weight, int size, int n_max, int finite) {
    vf peak = largest(x, size);
    const mask zero = less(magnitude(peak), splat(TINY));
    peak = choose(zero, splat(INFINITE), peak);
    vf chosen = splat((float)-n_max) / peak;
    Sums sums = scale_sums(x, weight, size, n_max, chosen, finite);
    vf scale = choose(equal(sums.ll, splat(0)), splat(0), sums.xl / sums.ll), best = scale * sums.xl;
    for (int step = -9; step <= 9; step++) {
        if (step == 0) continue;
        const vf inverse = splat(-((float)n_max + 0.1f * (float)step)) / peak;
        sums = scale_sums(x, weight, size, n_max, inverse, finite);
        const mask better = both(less(splat(0), sums.ll), less(best * sums.ll, sums.xl * sums.xl));
        scale = choose(better, sums.xl / sums.ll, scale);
        best = choose(better, scale * sums.xl, best);
        chosen = choose(better, inverse, chosen);
    }
    return (ScaleFit){choose(zero, splat(0), scale), chosen, zero};
}

/* Every level of a group that is as good as zero is 0. */
INLINE vi level_of(const ScaleFit *fit, vf x, int n_max) {
    const vi level = clamp_int(nearest(fit->inverse * x), -n_max, n_max - 1) + n_max;
    return choose_int(fit->zero, splat_int(0), level);
}

/* One pass of make_q3_quants: every level in its turn becomes what is best for the others. */
INLINE mask descend(const vf *x, int size, int n_max, vf *level, Sums *sums) {
    mask changed = less(splat(0), splat(0));
    for (int i = 0; i < size; i++) {
        const vf w = x[i] * x[i], old = level[i];
        const vf rest_xl = sums->xl - w * x[i] * old, rest_ll = sums->ll - w * old * old;
        const vf new = to_float(clamp_int(nearest(x[i] * rest_ll / rest_xl), -n_max, n_max - 1));
        const vf xl = rest_xl + w * x[i] * new, ll = rest_ll + w * new * new;
        mask better = both(less(splat(0), rest_xl), less(splat(0), ll));
        better = both(better, less(sums->xl * sums->xl * ll, xl * xl * sums->ll));
        better = both(better, either(less(new, old), less(old, new)));
        level[i] = choose(better, new, old);
        sums->xl = choose(better, xl, sums->xl);
        sums->ll = choose(better, ll, sums->ll);
        changed = either(changed, better);
    }
    return changed;
}

/* make_q3_quants: as fit_scale with weights x^2, by up to five passes. level: `size` vectors, the result as floats. */
INLINE vf fit_scale_by_descent(const vf *x, int size, int n_max, vf *level) {
    vf peak = largest(x, size);
    const mask zero = less(magnitude(peak), splat(TINY));
    const vf inverse = splat((float)-n_max) / choose(zero, splat(INFINITE), peak);
    Sums sums = {{0}, {0}};
    for (int i = 0; i < size; i++) {
        const vf w = x[i] * x[i];
        level[i] = signed_level(x[i], inverse, n_max);
        sums.xl += w * x[i] * level[i];
        sums.ll += w * level[i] * level[i];
    }
    for (int pass = 0; pass < N_PASSES; pass++)
        if (!any(descend(x, size, n_max, level, &sums))) break;
    for (int i = 0; i < size; i++) level[i] = choose(zero, splat(0), level[i] + (float)n_max);
    const vf scale = choose(less(splat(0), sums.ll), sums.xl / sums.ll, splat(0));
    return choose(zero, splat(0), scale);
}

/* x ~ scale level + low, level in 0..n_max, low <= 0; the levels are found with inverse and origin. */
typedef struct {
    vf scale, low, inverse, origin;
    mask flat;
} LineFit;

/* Which lines are tried: count + 1 of them, and whether the error is that of magnitudes rather than of squares. */
typedef struct {
    float start, step;
    int count, absolute;
} LineSearch;

/* With an importance every type tries the same lines. */
static const LineSearch WEIGHTED_LINES = {-0.9f, 0.05f, 36, 0};

typedef struct {
    vf sum_w, sum_x, least, most;
} GroupFacts;

INLINE GroupFacts group_facts(const vf *x, const vf *weight, int size) {
    GroupFacts facts = {weight[0], weight[0] * x[0], x[0], x[0]};
    for (int i = 1; i < size; i++) {
        facts.least = lesser(x[i], facts.least);
        facts.most = greater(x[i], facts.most);
        facts.sum_w += weight[i];
        facts.sum_x += weight[i] * x[i];
    }
    facts.least = choose(less(splat(0), facts.least), splat(0), facts.least);
    return facts;
}

typedef struct {
    vf l, ll, xl;
} LineSums;

/* in_range: no level is beyond 2^22, so that rounding needs no integers. */
INLINE LineSums line_sums(const vf *x, const vf *weight, int size, int n_max, const LineFit *line, int in_range,
                          vf *levels) {
    LineSums sums = {{0}, {0}, {0}};
    for (int i = 0; i < size; i++) {
        const vf raw = line->inverse * (x[i] - line->origin);
        const vf level =
            in_range ? nearest_within(raw, 0, (float)n_max) : to_float(clamp_int(nearest(raw), 0, n_max));
        const vf wl = weight[i] * level;
        levels[i] = level;
        sums.l += wl;
        sums.ll += wl * level;
        sums.xl += wl * x[i];
    }
    return sums;
}

INLINE vf line_error(const vf *x, const vf *weight, const vf *levels, int size, vf scale, vf low, int absolute) {
    vf total = {0};
    for (int i = 0; i < size; i++) {
        const vf difference = scale * levels[i] + low - x[i];
        total += weight[i] * (absolute ? magnitude(difference) : difference * difference);
    }
    return total;
}

/* The weighted least squares for the levels; which lanes have such a line. */
INLINE mask regress(const LineSums *sums, const GroupFacts *facts, vf *scale, vf *low) {
    const vf determinant = facts->sum_w * sums->ll - sums->l * sums->l;
    *scale = (facts->sum_w * sums->xl - facts->sum_x * sums->l) / determinant;
    *low = (sums->ll * facts->sum_x - sums->l * sums->xl) / determinant;
    const mask positive = less(splat(0), *low);
    *low = choose(positive, splat(0), *low);
    if (any(positive)) *scale = choose(positive, sums->xl / sums->ll, *scale);
    return less(splat(0), determinant);
}

/* make_qkx2_quants and make_qkx3_quants: weighted regression for some inverse scales. A line that is taken moves the
   origin for those after it, too, so that a level may be anything. */
INLINE LineFit fit_line(const vf *x, const vf *weight, int size, int n_max, LineSearch search) {
    vf levels[MAX_GROUP];
    GroupFacts facts = group_facts(x, weight, size);
    const mask flat = equal(facts.most, facts.least);
    facts.most = choose(flat, splat(INFINITE), facts.most);
    const vf inverse = splat((float)n_max) / (facts.most - facts.least);
    LineFit best = {1.0f / inverse, facts.least, inverse, facts.least, flat};
    line_sums(x, weight, size, n_max, &best, 1, levels);
    vf error = line_error(x, weight, levels, size, best.scale, best.low, search.absolute);
    for (int i = 0; i <= search.count; i++) {
        const float numerator = search.start + search.step * (float)i + (float)n_max;
        LineFit now = {.inverse = splat(numerator) / (facts.most - best.low), .origin = best.low};
        const vf smallest = magnitude((facts.least - now.origin) * now.inverse);
        const int in_range = all(less(smallest, splat(0x1p21f)));
        const LineSums sums = in_range ? line_sums(x, weight, size, n_max, &now, 1, levels)
                                       : line_sums(x, weight, size, n_max, &now, 0, levels);
        const mask valid = regress(&sums, &facts, &now.scale, &now.low);
        const vf its_error = line_error(x, weight, levels, size, now.scale, now.low, search.absolute);
        const mask better = both(valid, less(its_error, error));
        error = choose(better, its_error, error);
        best.scale = choose(better, now.scale, best.scale);
        best.low = choose(better, now.low, best.low);
        best.inverse = choose(better, now.inverse, best.inverse);
        best.origin = choose(better, now.origin, best.origin);
    }
    best.scale = choose(flat, splat(0), best.scale);
    return best;
}

INLINE vi line_level(const LineFit *fit, vf x, int n_max) {
    const vi level = clamp_int(nearest(fit->inverse * (x - fit->origin)), 0, n_max);
    return choose_int(fit->flat, splat_int(0), level);
}

/* The first half of make_qp_quants: of nine inverse scales that with the smallest weighted square error. */
INLINE vf best_inverse(const vf *x, const vf *weight, int size, int n_max, vf peak) {
    vf chosen = splat((float)n_max) / peak, best = {0};
    for (int i = 0; i < size; i++) {
        /* Bytes, not limited: as ggml has it. */
        const vf difference = x[i] - 1.0f / chosen * to_float(nearest(chosen * x[i]) & 0xFF);
        best += weight[i] * difference * difference;
    }
    for (int step = -4; step <= 4; step++) {
        if (step == 0) continue;
        const vf inverse = splat(0.1f * (float)step + (float)n_max) / peak, scale = 1.0f / inverse;
        vf error = {0};
        for (int i = 0; i < size; i++) {
            const vf level = to_float(lesser_int(nearest(inverse * x[i]), splat_int(n_max)));
            const vf difference = x[i] - scale * level;
            error += weight[i] * difference * difference;
        }
        const mask better = less(error, best);
        best = choose(better, error, best);
        chosen = choose(better, inverse, chosen);
    }
    return chosen;
}

/* make_qp_quants: x ~ scale * level, level in 0..n_max, for scales that should be positive. Levels are bytes as in
   ggml: a negative one wraps around there, and is used so. */
INLINE vf fit_positive(const vf *x, const vf *weight, int size, int n_max, vi *levels) {
    const vf highest = largest_positive(x, size);
    const mask zero = less(highest, splat(TINY));
    const vf peak = choose(zero, splat(INFINITE), highest);
    const vf inverse = best_inverse(x, weight, size, n_max, peak);
    Sums sums = {{0}, {0}};
    for (int i = 0; i < size; i++) {
        const vi level = lesser_int(nearest(inverse * x[i]), splat_int(n_max));
        sums.xl += weight[i] * x[i] * to_float(level);
        sums.ll += weight[i] * to_float(level) * to_float(level);
        levels[i] = level & 0xFF;
    }
    for (int pass = 0; pass < N_PASSES; pass++) {
        mask changed = less(splat(0), splat(0));
        for (int i = 0; i < size; i++) {
            const vf w = weight[i], wx = w * x[i], old = to_float(levels[i]);
            const vf rest_xl = sums.xl - wx * old, rest_ll = sums.ll - w * old * old;
            const vi level = lesser_int(nearest(x[i] * rest_ll / rest_xl), splat_int(n_max));
            const vf new = to_float(level), xl = rest_xl + wx * new, ll = rest_ll + w * new * new;
            mask better = both(less(splat(0), rest_xl), less(splat(0), rest_ll));
            better = both(better, less(sums.xl * sums.xl * ll, xl * xl * sums.ll));
            better = both(better, either(less(new, old), less(old, new)));
            levels[i] = choose_int(better, level & 0xFF, levels[i]);
            sums.xl = choose(better, xl, sums.xl);
            sums.ll = choose(better, ll, sums.ll);
            changed = either(changed, better);
        }
        if (!any(changed)) break;
    }
    for (int i = 0; i < size; i++) levels[i] = choose_int(zero, splat_int(0), levels[i]);
    const vf scale = choose(less(splat(0), sums.ll), sums.xl / sums.ll, splat(0));
    return choose(zero, splat(0), scale);
}

#endif
