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

// One bit a lane.
INLINE uint32_t bits(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)mask);
#else
    uint32_t found = 0;
    for (int j = 0; j < W; j++) found |= (mask[j] & 1u) << j;
    return found;
#endif
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

#define BY_VALUE 16 // times that a range is halved by its values; then by the floats in it, which ends

INLINE int64_t between(int64_t low, int64_t high, int tries) {
    const float least = ranked((int32_t)low), most = ranked((int32_t)high);
    if (tries >= BY_VALUE || !isfinite(least)) return low + (high - low + 1) / 2;
    return MIN(MAX(rank_of(least * 0.5f + most * 0.5f), low + 1), high);
}

INLINE int64_t count_of(const void *x, int64_t n, float least, const int half) {
    vi count = (vi){0};
    int64_t found = 0;
    for (int64_t i = 0; i < n; i += W) count -= part_of(x, i, n, half) >= splat(least);
    for (int j = 0; j < W; j++) found += count[j];
    return found;
}

// The largest but k of n numbers, by halving the range of floats in which it lies until only so many lie above.
INLINE float nth(const void *x, int64_t n, int64_t k, const int half) {
    vf least = splat(INFINITY), most = splat(-INFINITY);
    for (int64_t i = 0; i < n; i += W) {
        const vf v = part_of(x, i, n, half);
        least = vmin(i + W <= n ? v : load_n(x, i, n - i, INFINITY, half), least), most = vmax(v, most);
    }
    int64_t low = rank_of(-largest(-least)), high = rank_of(largest(most));
    for (int tries = 0; low < high; tries++) {
        const int64_t middle = between(low, high, tries), found = count_of(x, n, ranked((int32_t)middle), half);
        if (found == k + 1) {
            vf above = splat(INFINITY);
            for (int64_t i = 0; i < n; i += W) {
                const vf v = part_of(x, i, n, half);
                above = vmin(select_(v >= splat(ranked((int32_t)middle)), v, splat(INFINITY)), above);
            }
            return -largest(-above);
        }
        if (found > k)
            low = middle;
        else
            high = middle - 1;
    }
    return ranked((int32_t)low);
}

// Those lanes of the first n that a mask picks; their number.
INLINE int64_t picked(vf v, vi mask, int64_t n, float *found) {
    uint32_t left = bits(mask);
    float own[W];
    int64_t count = 0;
    if (!left) return 0;
    if (n < W) left &= (1u << n) - 1;
    for (store(own, 0, v, 0); left; left &= left - 1) found[count++] = own[__builtin_ctz(left)];
    return count;
}

// All logits of at least `least`; their number.
INLINE int64_t collect(const void *x, int64_t n, float least, float *found, const int half) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += W) {
        const vf v = part_of(x, i, n, half);
        count += picked(v, v >= least, n - i, found + count);
    }
    return count;
}

// A bound that at least k of n numbers reach, and if it is soon found not many more.
INLINE float bound_of(const void *x, int64_t n, int64_t k, float most, const int half) {
    vf finite = splat(most);
    for (int64_t i = 0; i < n; i += W) {
        const vf v = part_of(x, i, n, half);
        finite = vmin(select_(v == -INFINITY, splat(most), v), finite);
    }
    float low = -INFINITY, high = most, least = -largest(-finite);
    for (int tries = 0; tries < 12 && least < high; tries++) {
        const float middle = least * 0.5f + high * 0.5f;
        const int64_t found = count_of(x, n, middle, half);
        if (found < k) {
            high = middle;
            continue;
        }
        low = least = middle;
        if (found <= 2 * k) break;
    }
    return low;
}

// The k-th largest logit; `found` holds those that are as large, and perhaps some more: `count`.
INLINE float largest_k(const void *x, int64_t n, int64_t k, float top, float *found, int64_t *count, const int half) {
    const int64_t groups = (n + GROUP - 1) / GROUP;
    if (groups < k) {
        *count = collect(x, n, bound_of(x, n, k, top, half), found, half);
        return nth(found, *count, k - 1, 0);
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

#define FEW 128 // logits that are sorted sooner than they are put in bins

INLINE vi bin_of(vf below, float each, int bins) { return __builtin_convertvector(vmin(below * each, splat(bins - 1)), vi); }

// As `nucleus`, of few logits: by halving the range in which it lies.
INLINE float nucleus_of_few(const float *x, int64_t n, float most, float inverse, float cut, float p) {
    vf e[FEW / W], all = splat(0), least = splat(most);
    const int64_t vectors = (n + W - 1) / W;
    for (int64_t i = 0; i < vectors; i++) {
        const vf v = part_of(x, i * W, n, 0);
        const vi in = v >= cut;
        all += e[i] = select_(in, vexp((v - most) * inverse), splat(0));
        least = vmin(select_(in, v, splat(most)), least);
    }
    const float wanted = p * sum(all);
    int64_t low = rank_of(-largest(-least)), high = rank_of(most);  // what lies above the lowest is enough
    for (int tries = 0; low < high; tries++) {
        const int64_t middle = between(low, high, tries);
        const vf bound = splat(ranked((int32_t)middle));
        vf mass = splat(0), next = splat(most);
        for (int64_t i = 0; i < vectors; i++) {
            const vf v = part_of(x, i * W, n, 0);
            const vi in = v >= bound;
            mass += select_(in, e[i], splat(0));
            next = vmin(select_(in, v, splat(most)), next);
        }
        if (sum(mass) >= wanted)
            low = rank_of(-largest(-next));
        else
            high = middle - 1;
    }
    return ranked((int32_t)low);
}

// The smallest logit of the smallest set with a share p of the probability of all logits of at least `cut`. Bins of
// logits hold their probability; the one in which it is reached is sorted. -inf if that is not within `range`.
INLINE float nucleus(const void *x, int64_t n, float most, float inverse, float cut, float p, float range, float *found,
                     const int half) {
    const int bins = n < 16384 ? BINS / 8 : BINS;
    double mass[BINS], all = 0, above = 0;
    memset(mass, 0, bins * sizeof *mass);
    const float each = (bins - 1) / range; // the last bin is for what is further away
    vf far = splat(0);
    for (int64_t i = 0; i < n; i += W) {
        const vf v = part_of(x, i, n, half), below = (most - v) * inverse;
        const vf e = select_(v >= cut, vexp(-below), splat(0));
        if (!bits(below < range)) {
            far += e;
            continue;
        }
        float own[W];
        int32_t at[W];
        const vi bin = bin_of(below, each, bins);
        memcpy(at, &bin, sizeof at), memcpy(own, &e, sizeof own);
        for (int j = 0; j < W; j++) mass[at[j]] += own[j];
    }
    mass[bins - 1] += sum(far);
    for (int b = 0; b < bins; b++) all += mass[b];
    int b = 0;
    while (b < bins - 1 && above + mass[b] < p * all) above += mass[b++];
    if (b == bins - 1) return -INFINITY;
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += W) {
        const vf v = part_of(x, i, n, half);
        count += picked(v, (bin_of((most - v) * inverse, each, bins) == b) & (v >= cut), n - i, found + count);
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
    if (bits(wrong) || !isfinite(most)) return;
    if (heat == 0) {
        c->cuts[r] = most;
        for (int64_t i = 0; i < n; i += W) {
            const vf v = part_of(x, i, n, half);
            if (!bits(v == most)) continue;
            for (c->tokens[r] = i; v[c->tokens[r] - i] != most;) c->tokens[r]++;
            return;
        }
    }
    const float inverse = 1 / heat;
    float cut = -INFINITY;
    int64_t count = 0;
    if (c->top_k[r] > 0 && c->top_k[r] < n) cut = largest_k(x, n, c->top_k[r], most, found, &count, half);
    if (c->top_p[r] < 1 && count && count <= FEW) {
        cut = MAX(cut, nucleus_of_few(found, count, most, inverse, cut, c->top_p[r]));
    } else if (c->top_p[r] < 1) {
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
        if (!bits(e > 0)) continue;
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
