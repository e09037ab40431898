// One token of every row of logits, in two or three passes over the row: what may be drawn is a threshold on its logits
// (top-k, top-p, min-p), what is drawn one number. Rows know nothing of each other, so a batch changes no bit.
#include <stdlib.h>
#include "vector.h"

#define PART 1024 // logits whose probabilities are added up at once
#define GROUP 64  // logits that one maximum stands for, in the search for the k-th largest
#define BINS 512
#define NEAR 16.0f // nats below the largest logit in which the bins are looked for first; then 88, where e^-x is 0

typedef struct {
    const char *logits;                          // [rows, vocab], `stride` elements from row to row
    const float *temperature, *top_p, *min_p;    // [rows]
    const int64_t *top_k;                        // [rows]
    const double *uniform;                       // [rows], in (0, 1]
    int64_t *tokens;                             // [rows]: what is drawn; vocab where logits are not numbers
    float *cuts;                                 // [rows]: the logit below which none may be drawn
    int64_t rows, vocab, stride, threads;
} Call;

INLINE vf part_of(const void *x, int64_t i, int64_t n, const int half) {
    return i + W <= n ? load(x, i, half) : load_n(x, i, n - i, -INFINITY, half);
}

INLINE int any(vi mask) {
    int found = 0;
    for (int j = 0; j < W; j++) found |= mask[j];
    return found;
}

// Floats as integers in their order, and back.
INLINE int32_t rank_of(float x) {
    int32_t i;
    memcpy(&i, &x, 4);
    return i ^ (i >> 31 & INT32_MAX);
}
INLINE float ranked(int32_t i) {
    float x;
    i ^= i >> 31 & INT32_MAX;
    memcpy(&x, &i, 4);
    return x;
}

// The largest but k of n numbers, by halving the range of floats in which it lies until only so many lie above.
INLINE float nth(const void *x, int64_t n, int64_t k, const int half) {
    vf least = splat(INFINITY), most = splat(-INFINITY);
    for (int64_t i = 0; i < n; i += W) {
        const vf v = part_of(x, i, n, half);
        least = vmin(v, least), most = vmax(v, most);
    }
    int64_t low = rank_of(-largest(-least)), high = rank_of(largest(most));
    while (low < high) {
        const int64_t middle = low + (high - low + 1) / 2;
        const vf bound = splat(ranked((int32_t)middle));
        vi count = (vi){0};
        vf above = splat(INFINITY);
        for (int64_t i = 0; i < n; i += W) {
            const vf v = part_of(x, i, n, half);
            const vi more = v >= bound;
            count -= more;
            above = vmin(select_(more, v, splat(INFINITY)), above);
        }
        int64_t found = 0;
        for (int j = 0; j < W; j++) found += count[j];
        if (found == k + 1) return -largest(-above);
        if (found > k)
            low = middle;
        else
            high = middle - 1;
    }
    return ranked((int32_t)low);
}

// All logits of at least `least`; their number.
INLINE int64_t collect(const void *x, int64_t n, float least, float *found, const int half) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += W) {
        const vf v = part_of(x, i, n, half);
        if (!any(v >= least)) continue;
        for (int j = 0; j < MIN(W, n - i); j++)
            if (v[j] >= least) found[count++] = v[j];
    }
    return count;
}

// The k-th largest logit; `found` holds those that are as large, and perhaps some more: `count`.
INLINE float largest_k(const void *x, int64_t n, int64_t k, float *found, int64_t *count, const int half) {
    const int64_t groups = (n + GROUP - 1) / GROUP;
    if (groups < k) {
        const float least = nth(x, n, k - 1, half);
        *count = collect(x, n, least, found, half);
        return least;
    }
    for (int64_t g = 0; g < groups; g++) {
        vf most = splat(-INFINITY);
        for (int64_t i = g * GROUP; i < MIN(n, (g + 1) * GROUP); i += W) most = vmax(most, part_of(x, i, n, half));
        found[g] = largest(most);
    }
    *count = collect(x, n, nth(found, groups, k - 1, 0), found, half); // k groups hold a logit as large
    return nth(found, *count, k - 1, 0);
}

static int descending(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

INLINE int bin_of(float below, float width) { return (int)MIN(below / width, (float)(BINS - 1)); }

// The smallest logit of the smallest set with a share p of the probability of all logits of at least `cut`. Bins of
// logits hold their probability; the one in which it is reached is sorted. -inf if that is not within `range`.
INLINE float nucleus(const void *x, int64_t n, float most, float inverse, float cut, float p, float range, float *found,
                     const int half) {
    double mass[BINS] = {0}, all = 0, above = 0;
    const float width = range / (BINS - 1); // the last bin is for what is further away
    vf far = splat(0);
    for (int64_t i = 0; i < n; i += W) {
        const vf v = part_of(x, i, n, half), below = (most - v) * inverse;
        const vf e = select_(v >= cut, vexp(-below), splat(0));
        if (!any(below < range)) {
            far += e;
            continue;
        }
        for (int j = 0; j < W; j++) mass[bin_of(below[j], width)] += e[j];
    }
    mass[BINS - 1] += sum(far);
    for (int b = 0; b < BINS; b++) all += mass[b];
    int b = 0;
    while (b < BINS - 1 && above + mass[b] < p * all) above += mass[b++];
    if (b == BINS - 1) return -INFINITY;
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += W) {
        const vf v = part_of(x, i, n, half), below = (most - v) * inverse;
        if (!any((below < (b + 2) * width) & (v >= cut))) continue;
        for (int j = 0; j < MIN(W, n - i); j++)
            if (v[j] >= cut && bin_of(below[j], width) == b) found[count++] = v[j];
    }
    qsort(found, count, sizeof *found, descending);
    float last = cut;
    for (int64_t i = 0; i < count && above < p * all; i++) {
        last = found[i];
        above += expf((last - most) * inverse);
    }
    return last;
}

INLINE void draw_row(const Call *c, int64_t r, float *found, double *parts, const int half) {
    const int64_t n = c->vocab;
    const char *x = c->logits + r * c->stride * (half ? 2 : 4);
    const float heat = c->temperature[r];
    vf top = splat(-INFINITY);
    vi wrong = (vi){0};
    for (int64_t i = 0; i < n; i += W) {
        const vf v = part_of(x, i, n, half);
        top = vmax(v, top), wrong |= v != v;
    }
    const float most = largest(top);
    c->tokens[r] = n, c->cuts[r] = -INFINITY;
    if (any(wrong) || !isfinite(most)) return;
    if (heat == 0) {
        c->cuts[r] = most;
        for (int64_t i = 0; i < n; i += W) {
            const vf v = part_of(x, i, n, half);
            if (!any(v == most)) continue;
            for (c->tokens[r] = i; v[c->tokens[r] - i] != most;) c->tokens[r]++;
            return;
        }
    }
    const float inverse = 1 / heat;
    float cut = -INFINITY;
    int64_t count = 0;
    if (c->top_k[r] > 0 && c->top_k[r] < n) cut = largest_k(x, n, c->top_k[r], found, &count, half);
    if (c->top_p[r] < 1) {
        float *rest = found + count;
        for (float range = NEAR, last = -INFINITY; range < 100 && last == -INFINITY; range += 72) {
            last = count ? nucleus(found, count, most, inverse, cut, c->top_p[r], range, rest, 0)
                         : nucleus(x, n, most, inverse, cut, c->top_p[r], range, rest, half);
            cut = MAX(cut, last);
        }
    }
    if (c->min_p[r] > 0) cut = MAX(cut, most + heat * logf(c->min_p[r]));
    c->cuts[r] = cut;
    double all = 0, before = 0;
    for (int64_t i = 0; i < n; i += PART) {
        vf total = splat(0);
        for (int64_t j = i; j < MIN(n, i + PART); j += W) {
            const vf v = part_of(x, j, n, half);
            total += select_(v >= cut, vexp((v - most) * inverse), splat(0));
        }
        all += parts[i / PART] = sum(total);
    }
    const double wanted = c->uniform[r] * all;
    int64_t at = 0;
    while (before + parts[at] < wanted && (at + 1) * PART < n) before += parts[at++];
    while (parts[at] == 0) at--; // rounding, at the end of a row
    for (int64_t i = at * PART; i < MIN(n, (at + 1) * PART); i += W) {
        const vf v = part_of(x, i, n, half), e = select_(v >= cut, vexp((v - most) * inverse), splat(0));
        if (!any(e > 0)) continue;
        for (int j = 0; j < W; j++) {
            if (!(e[j] > 0)) continue;
            c->tokens[r] = i + j, before += e[j];
            if (before >= wanted) return;
        }
    }
}

INLINE void draw(const Call *c, const int half) {
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    {
        float *found = malloc(2 * (c->vocab + GROUP) * sizeof *found);
        double *parts = malloc((c->vocab / PART + 1) * sizeof *parts);
#pragma omp for schedule(dynamic)
        for (int64_t r = 0; r < c->rows; r++) draw_row(c, r, found, parts, half);
        free(found), free(parts);
    }
}

void draw_f32(const Call *c) { draw(c, 0); }
void draw_bf16(const Call *c) { draw(c, 1); }
