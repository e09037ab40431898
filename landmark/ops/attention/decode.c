// Attention of one query a sequence over its cached keys and values, in one pass over both (online softmax, Milakov and
// Gimelshein 2018). Query heads that share a key head share what is read of it.
#include <stdlib.h>
#include "vector.h"

#define BLOCK 128  // keys whose scores are held at once
#define UNROLL 4   // vectors of the output in registers

// The sums of W vectors, as one vector.
INLINE vf sums(vf *x) {
#ifdef __AVX512F__
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; i++)
        a[i] = _mm512_unpacklo_ps((__m512)x[2 * i], (__m512)x[2 * i + 1]) +
               _mm512_unpackhi_ps((__m512)x[2 * i], (__m512)x[2 * i + 1]);
    for (int i = 0; i < 4; i++)
        b[i] = _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44) + _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee);
    for (int i = 0; i < 2; i++)
        c[i] = _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd);
    return (vf)(_mm512_shuffle_f32x4(c[0], c[1], 0x88) + _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
#else
    vf y;
    for (int i = 0; i < W; i++) y[i] = sum(x[i]);
    return y;
#endif
}

// s[g][t] = q[g] . k[t] for G queries and n keys of d values, W / G keys at a time.
INLINE void scores(const float *q, const char *k, int64_t step, int64_t n, int64_t d, float *s, const int G, const int half) {
    const int T = W / G;
    for (int64_t t = 0; t < n; t += T) {
        const int64_t last = n - 1 - t;
        vf acc[W];
        for (int i = 0; i < W; i++) acc[i] = splat(0);
        for (int64_t j = 0; j < d; j += W) {
            vf keys[W];
            for (int i = 0; i < T; i++) keys[i] = load(k + (t + MIN(i, last)) * step, j, half);
            for (int g = 0; g < G; g++) {
                const vf query = load(q, g * d + j, 0);
                for (int i = 0; i < T; i++) acc[g * T + i] += query * keys[i];
            }
        }
        const vf y = sums(acc);
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

// G queries [G, d], scaled, over n keys and values; acc [G, dv] is the answer times total[g].
INLINE void attend(const float *q, const char *k, const char *v, int64_t kstep, int64_t vstep, int64_t n, int64_t d, int64_t dv,
                   float cap, float *acc, float *total, const int G, const int half) {
    float s[4 * (BLOCK + W)], top[4], keep[4];
    for (int g = 0; g < G; g++) top[g] = -INFINITY, total[g] = 0;
    memset(acc, 0, G * dv * sizeof *acc);
    for (int64_t first = 0; first < n; first += BLOCK, k += BLOCK * kstep, v += BLOCK * vstep) {
        const int64_t count = MIN(BLOCK, n - first);
        scores(q, k, kstep, count, d, s, G, half);
        for (int g = 0; g < G; g++) {
            float *mine = s + g * (BLOCK + W);
            vf most = splat(top[g]), all = splat(0);
            for (int64_t t = count; t % W; t++) mine[t] = -INFINITY;
            for (int64_t t = 0; t < count; t += W) {
                vf x = load(mine, t, 0);
                if (cap > 0) {
                    x = select_(x == -INFINITY, x, cap * vtanh(x * (1 / cap)));
                    store(mine, t, x, 0);
                }
                most = vmax(most, x);
            }
            const float peak = largest(most);
            for (int64_t t = 0; t < count; t += W) {
                const vf x = vexp(load(mine, t, 0) - peak);
                all += x;
                store(mine, t, x, 0);
            }
            keep[g] = expf(top[g] - peak);
            total[g] = total[g] * keep[g] + sum(all), top[g] = peak;
        }
        int64_t j = 0;
        for (; j + UNROLL * W <= dv; j += UNROLL * W)
            mix(s, v + j * (half ? 2 : 4), vstep, count, keep, acc + j, dv, G, UNROLL, half);
        for (; j < dv; j += W) mix(s, v + j * (half ? 2 : 4), vstep, count, keep, acc + j, dv, G, 1, half);
    }
}

// q [slots, heads, d] and out [slots, heads, dv] contiguous; k and v by strides in elements, their last axis contiguous;
// slot i sees keys first[i] .. first[i] + counts[i].
#define EXPORT(NAME, HALF)                                                                                             \
    void NAME(const void *q, const char *k, const char *v, void *out, const int64_t *first, const int64_t *counts,     \
              int64_t slots, int64_t heads, int64_t kv_heads, int64_t d, int64_t dv, int64_t k_slot, int64_t k_token,  \
              int64_t k_head, int64_t v_slot, int64_t v_token, int64_t v_head, float scale, float cap, int threads) {  \
        const int64_t group = heads / kv_heads, tasks = slots * kv_heads, size = HALF ? 2 : 4;                         \
        _Pragma("omp parallel num_threads(threads) if (threads > 1)") {                                                \
            float *query = malloc(group * (d + dv) * sizeof *query + 4 * sizeof *query);                               \
            float *acc = query + group * d, *total = acc + group * dv;                                                 \
            _Pragma("omp for schedule(static)")                                                                        \
            for (int64_t task = 0; task < tasks; task++) {                                                             \
                const int64_t slot = task / kv_heads, shared = task % kv_heads, at = slot * heads + shared * group;    \
                const char *keys = k + (slot * k_slot + first[slot] * k_token + shared * k_head) * size;               \
                const char *values = v + (slot * v_slot + first[slot] * v_token + shared * v_head) * size;             \
                for (int64_t i = 0; i < group * d; i++) query[i] = scale * get(q, at * d + i, HALF);                   \
                for (int64_t g = 0, n; g < group; g += n) {                                                            \
                    n = group - g >= 4 ? 4 : 1;                                                                        \
                    if (n == 4)                                                                                        \
                        attend(query + g * d, keys, values, k_token * size, v_token * size, counts[slot], d, dv, cap,  \
                               acc, total, 4, HALF);                                                                   \
                    else                                                                                               \
                        attend(query + g * d, keys, values, k_token * size, v_token * size, counts[slot], d, dv, cap,  \
                               acc, total, 1, HALF);                                                                   \
                    for (int64_t i = 0; i < n * dv; i++) put(out, (at + g) * dv + i, acc[i] / total[i / dv], HALF);    \
                }                                                                                                      \
            }                                                                                                          \
            free(query);                                                                                               \
        }                                                                                                              \
    }

EXPORT(decode_f32, 0)
EXPORT(decode_bf16, 1)
