// Attention of one or a few queries a sequence over its cached keys and values, in one pass over both (online softmax, Milakov and
// Gimelshein 2018). Query heads that share a key head share what is read of it; long caches are cut into parts of fixed
// length, attended apart and merged in order (Flash-Decoding, Dao et al. 2023), so that threads change no bit. The cache
// may lie in pages, wherever they are (PagedAttention, Kwon et al. 2023). The last key and value that a query sees may be
// new: then query and key are turned by their position first, and key and value put where they belong.
#include <stdlib.h>
#include "decode.h"
#include "lanes.h"
#include "norm.h"
#include "turn.h"

#define BLOCK 128 // keys whose scores are held at once
#define UNROLL 4  // vectors of the output in registers
#ifdef __AVX512BF16__
#define PAIRS 1 // products of bfloat16 take two terms at once, where heads are a multiple of 32
#else
#define PAIRS 0
#endif

// acc + a b, or with 2 W bfloat16 in each of a and b: plus the products of neighbours, added together.
INLINE vf madd(vf acc, vf a, vf b, const int pair) {
#if PAIRS
    if (pair) return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#endif
    return acc + a * b;
}

INLINE vf whole(const char *p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}

// s[g][t] = q[g] . k[t] for G queries and n keys of d values, W / G keys at a time.
INLINE void scores(const char *q, const char *k, int64_t step, int64_t n, int64_t d, float scale, float *s, const int G,
                   const int half, const int pair) {
    const int T = W / G;
    const int64_t size = half ? 2 : 4, stride = pair ? 2 * W : W;
    for (int64_t t = 0; t < n; t += T) {
        const int64_t last = n - 1 - t;
        vf acc[W];
        for (int i = 0; i < W; i++) acc[i] = splat(0);
        for (int64_t j = 0; j < d; j += stride) {
            vf keys[W];
            for (int i = 0; i < T; i++) {
                const char *at = k + (t + MIN(i, last)) * step;
                keys[i] = pair ? whole(at + j * size) : load(at, j, half);
            }
            for (int g = 0; g < G; g++) {
                const vf query = pair ? whole(q + (g * d + j) * size) : load(q, g * d + j, half);
                for (int i = 0; i < T; i++) acc[g * T + i] = madd(acc[g * T + i], query, keys[i], pair);
            }
        }
        const vf y = scale * sums(acc);
        float out[W];
        store(out, 0, y, 0);
        for (int g = 0; g < G; g++) memcpy(s + g * (BLOCK + W) + t, out + g * T, T * sizeof *out);
    }
}

// out[g] = keep[g] out[g] + sum_t p[g][t] v[t], for N vectors of each of n values.
INLINE void mix(const float *p, const char *v, int64_t step, int64_t n, const float *keep, float *out, int64_t dv, const int G,
                const int N, const int half) {
    vf acc[4 * UNROLL];
    for (int g = 0; g < G; g++)
        for (int j = 0; j < N; j++) acc[g * N + j] = keep[g] * load(out, g * dv + j * W, 0);
    for (int64_t t = 0; t < n; t++, v += step) {
        vf value[UNROLL];
        for (int j = 0; j < N; j++) value[j] = load(v, j * W, half);
        for (int g = 0; g < G; g++)
            for (int j = 0; j < N; j++) acc[g * N + j] += p[g * (BLOCK + W) + t] * value[j];
    }
    for (int g = 0; g < G; g++)
        for (int j = 0; j < N; j++) store(out, g * dv + j * W, acc[g * N + j], 0);
}

#if PAIRS
// The same for N vectors of 2 W values, two keys at a time; columns come out in the order of `unzip`.
INLINE void mix_pairs(const float *p, const char *v, int64_t step, int64_t n, const float *keep, float *out, int64_t dv,
                      const int G, const int N) {
    vf acc[4 * UNROLL];
    bf16 weights[4][BLOCK + W];
    for (int g = 0; g < G; g++) {
        for (int j = 0; j < 2 * N; j++) acc[g * 2 * N + j] = keep[g] * load(out, g * dv + j * W, 0);
        for (int64_t t = 0; t < n; t += W) store(weights[g], t, load(p, g * (BLOCK + W) + t, 0), 1);
    }
    for (int64_t t = 0; t < n; t += 2, v += 2 * step) {
        vf value[UNROLL];
        for (int j = 0; j < N; j++) {
            const __m512i a = _mm512_loadu_si512(v + 64 * j);
            const __m512i b = t + 1 < n ? _mm512_loadu_si512(v + step + 64 * j) : _mm512_setzero_si512();
            value[2 * j] = (vf)_mm512_unpacklo_epi16(a, b), value[2 * j + 1] = (vf)_mm512_unpackhi_epi16(a, b);
        }
        for (int g = 0; g < G; g++) {
            int32_t two;
            memcpy(&two, weights[g] + t, sizeof two);
            for (int j = 0; j < 2 * N; j++)
                acc[g * 2 * N + j] = madd(acc[g * 2 * N + j], (vf)_mm512_set1_epi32(two), value[j], 1);
        }
    }
    for (int g = 0; g < G; g++)
        for (int j = 0; j < 2 * N; j++) store(out, g * dv + j * W, acc[g * 2 * N + j], 0);
}

INLINE void unzip(float *x, int64_t n) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int64_t j = 0; j < n; j += 2 * W) {
        const __m512 a = _mm512_loadu_ps(x + j), b = _mm512_loadu_ps(x + j + W);
        _mm512_storeu_ps(x + j, _mm512_permutex2var_ps(a, low, b));
        _mm512_storeu_ps(x + j + W, _mm512_permutex2var_ps(a, high, b));
    }
}
#endif

// Keys and values of n tokens that lie in order.
typedef struct {
    const char *k, *v;
    int64_t n;
} Run;

// Key t of a slot and head, its value, and how many more of that slot lie behind it.
INLINE Run run_from(const Decode *c, int64_t slot, int64_t head, int64_t t, const int64_t size) {
    int64_t at = c->first[slot] + t, row = c->rows[slot], n = INT64_MAX;
    if (c->tables) {
        row = c->tables[row * c->pages + at / c->page], at %= c->page;
        n = c->page - at;
    }
    return (Run){c->k + (row * c->k_row + at * c->k_token + head * c->k_head) * size,
                 c->v + (row * c->v_row + at * c->v_token + head * c->v_head) * size, n};
}

// The next up to BLOCK tokens of a part: where they lie; the number of runs.
INLINE int64_t runs_of(const Decode *c, int64_t slot, int64_t head, int64_t from, int64_t end, const int64_t size, Run *runs) {
    int64_t count = 0;
    for (int64_t t = from; t < MIN(end, from + BLOCK); t += runs[count++].n) {
        runs[count] = run_from(c, slot, head, t, size);
        runs[count].n = MIN(runs[count].n, MIN(end, from + BLOCK) - t);
    }
    return count;
}

// Ask for the vectors of n tokens: a processor does not foresee where the next page is.
INLINE void fetch(const char *x, int64_t n, int64_t step, int64_t bytes) {
    for (int64_t t = 0; t < n; t++)
        for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(x + t * step + j, 0, 2);
}

// G queries take n more keys and values: acc [G, dv] is the answer times total[g], of scores below top[g].
INLINE void attend(const Decode *c, const char *q, const Run *runs, int64_t count, int64_t n, float *acc, float *top, float *total,
                   const int G, const int half, const int pair) {
    const int64_t size = half ? 2 : 4, k_step = c->k_token * size, v_step = c->v_token * size, dv = c->dv;
    float s[4 * (BLOCK + W)], keep[4];
    if (count > 1) fetch(runs[0].v, runs[0].n, v_step, dv * size);
    for (int64_t i = 0, t = 0; i < count; t += runs[i++].n) {
        if (i + 1 < count) {
            fetch(runs[i + 1].k, runs[i + 1].n, k_step, c->d * size);
            fetch(runs[i + 1].v, runs[i + 1].n, v_step, dv * size);
        }
        scores(q, runs[i].k, k_step, runs[i].n, c->d, c->scale, s + t, G, half, pair);
    }
    for (int g = 0; g < G; g++) {
        float *mine = s + g * (BLOCK + W);
        vf most = splat(top[g]), all = splat(0);
        for (int64_t t = n; t % W; t++) mine[t] = -INFINITY;
        for (int64_t t = 0; t < n; t += W) {
            vf x = load(mine, t, 0);
            if (c->cap > 0) {
                x = select_(x == -INFINITY, x, c->cap * vtanh(x * (1 / c->cap)));
                store(mine, t, x, 0);
            }
            most = vmax(most, x);
        }
        const float peak = largest(most);
        for (int64_t t = 0; t < n; t += W) {
            const vf x = vexp(load(mine, t, 0) - peak);
            all += x;
            store(mine, t, x, 0);
        }
        keep[g] = expf(top[g] - peak);
        total[g] = total[g] * keep[g] + sum(all), top[g] = peak;
    }
    const float *p = s;
    for (int64_t i = 0; i < count; p += runs[i++].n) {
        const char *v = runs[i].v;
        int64_t j = 0;
#if PAIRS
        if (pair) {
            for (; j + UNROLL * W <= dv; j += UNROLL * W)
                mix_pairs(p, v + j * 2, v_step, runs[i].n, keep, acc + j, dv, G, UNROLL / 2);
            for (; j < dv; j += 2 * W) mix_pairs(p, v + j * 2, v_step, runs[i].n, keep, acc + j, dv, G, 1);
        }
#endif
        for (; j + UNROLL * W <= dv; j += UNROLL * W) mix(p, v + j * size, v_step, runs[i].n, keep, acc + j, dv, G, UNROLL, half);
        for (; j < dv; j += W) mix(p, v + j * size, v_step, runs[i].n, keep, acc + j, dv, G, 1, half);
        for (int g = 0; g < G; g++) keep[g] = 1;
    }
}

// All queries of a key head over one part of its keys: acc [group, dv], top [group], total [group].
INLINE void part(const Decode *c, const char *queries, int64_t slot, int64_t head, int64_t from, int64_t end, float *acc, const int half, const int pair) {
    const int64_t group = c->heads / c->kv_heads, size = half ? 2 : 4, d = c->d, dv = c->dv;
    float *top = acc + group * dv, *total = top + group;
    memset(acc, 0, group * dv * sizeof *acc);
    for (int64_t g = 0; g < group; g++) top[g] = -INFINITY, total[g] = 0;
    const char *q = queries + (slot * c->heads + head * group) * d * size;
    for (int64_t t = from; t < end; t += BLOCK) {
        Run runs[BLOCK];
        const int64_t n = MIN(BLOCK, end - t), count = runs_of(c, slot, head, t, end, size, runs);
        int64_t g = 0;
        for (; g + 4 <= group; g += 4)
            attend(c, q + g * d * size, runs, count, n, acc + g * dv, top + g, total + g, 4, half, pair);
        for (; g + 2 <= group; g += 2)
            attend(c, q + g * d * size, runs, count, n, acc + g * dv, top + g, total + g, 2, half, pair);
        if (g < group) attend(c, q + g * d * size, runs, count, n, acc + g * dv, top + g, total + g, 1, half, pair);
    }
}

// Parts [count, group, dv + 2] of one key head -> the answers.
INLINE void merge(const Decode *c, int64_t slot, int64_t head, float *parts, int64_t count, const int half, const int pair) {
    const int64_t group = c->heads / c->kv_heads, dv = c->dv, size = group * (dv + 2);
    for (int64_t g = 0; g < group; g++) {
        float *acc = parts + g * dv, *top = parts + group * dv + g, *total = top + group, peak = -INFINITY, all = 0;
        if (!count) memset(acc, 0, dv * sizeof *acc);
        for (int64_t i = 0; i < count; i++) peak = MAX(peak, top[i * size]);
        for (int64_t i = 0; i < count; i++) {
            const float keep = expf(top[i * size] - peak);
            all += keep * total[i * size];
            for (int64_t j = 0; j < dv; j += W)
                store(acc, j, keep * load(acc, i * size + j, 0) + (i ? load(acc, j, 0) : splat(0)), 0);
        }
#if PAIRS
        if (pair) unzip(acc, dv);
#endif
        const float inverse = count ? 1 / all : 0;
        const int64_t to = (slot * c->heads + head * group + g) * dv;
        for (int64_t j = 0; j < dv; j += W) store(c->out, to + j, inverse * load(acc, j, 0), half);
    }
}

// Heads [n, d] are normed, if there is a norm, and turned -> to.
INLINE void ready(const Decode *c, const char *heads, const char *norm, int64_t slot, int64_t n, char *to, const int half) {
    for (int64_t g = 0; norm && g < n; g++) rms_norm_row(AT(heads, g * c->d), norm, half, AT(to, g * c->d), c->d, c->eps, c->offset, half);
    const int64_t angles = c->turns ? slot % c->turns * c->pairs : 0;
    turn(norm ? to : heads, to, c->cos + angles, c->sin + angles, n, c->d, c->d, c->pairs, 1, c->interleaved, half);
}

// The new key and value of a head take their place; its queries -> turned.
INLINE void take_in(const Decode *c, int64_t slot, int64_t head, char *turned, const int half) {
    const int64_t group = c->heads / c->kv_heads, first = slot * c->heads + head * group, mine = slot * c->kv_heads + head;
    const Run last = run_from(c, slot, head, c->counts[slot] - 1, half ? 2 : 4);
    ready(c, AT(c->new_k, mine * c->d), c->k_norm, slot, 1, (char *)last.k, half);
    memcpy((char *)last.v, AT(c->new_v, mine * c->dv), c->dv * (half ? 2 : 4));
    ready(c, AT(c->q, first * c->d), c->q_norm, slot, group, AT(turned, first * c->d), half);
}

// What each of a team of threads does; all are through at its end. `parts` and `turned`: see parts_size, turned_size.
INLINE void answer(const Decode *c, float *parts, char *turned, const int half, const int pair) {
    const int64_t cuts = parts_of(c, c->longest), size = c->heads / c->kv_heads * (c->dv + 2), tasks = c->slots * c->kv_heads;
    if (c->new_k) {
#pragma omp for schedule(static, 1)
        for (int64_t i = 0; i < tasks; i++) take_in(c, i / c->kv_heads, i % c->kv_heads, turned, half);
    }
#pragma omp for schedule(static, 1)
    for (int64_t i = 0; i < tasks * cuts; i++) {
        const int64_t slot = i / cuts / c->kv_heads, from = i % cuts * PART, end = MIN(from + PART, c->counts[slot]);
        if (from < end) part(c, c->new_k ? turned : c->q, slot, i / cuts % c->kv_heads, from, end, parts + i * size, half, pair);
    }
#pragma omp for schedule(static, 1)
    for (int64_t i = 0; i < tasks; i++) {
        const int64_t slot = i / c->kv_heads;
        merge(c, slot, i % c->kv_heads, parts + i * cuts * size, (c->counts[slot] + PART - 1) / PART, half, pair);
    }
}

void answer_f32(const Decode *c, float *parts, char *turned) { answer(c, parts, turned, 0, 0); }

void answer_bf16(const Decode *c, float *parts, char *turned) {
    if (PAIRS && c->d % 32 == 0 && c->dv % 32 == 0)
        answer(c, parts, turned, 1, PAIRS);
    else
        answer(c, parts, turned, 1, 0);
}

#define EXPORT(TYPE)                                                                                                   \
    void decode_##TYPE(const Decode *c) {                                                                              \
        float *parts = malloc((parts_size(c) + turned_size(c)) * sizeof *parts);                                       \
        if (!parts) abort();                                                                                           \
        _Pragma("omp parallel num_threads(c->threads) if (c->threads > 1)")                                            \
        answer_##TYPE(c, parts, (char *)(parts + parts_size(c)));                                                      \
        free(parts);                                                                                                   \
    }

EXPORT(f32)
EXPORT(bf16)
