// Causal depthwise convolution of every channel with K taps, sequence by sequence, optionally through SiLU; and backward.
#include <stdlib.h>
#include "vector.h"

#define AT(p, i) ((char *)(p) + (i) * (half ? 2 : 4))
#define TAPS 16   // at most
#define TILE 64   // tokens of a block of channels, which the first-level cache holds

INLINE vf take(const void *p, int64_t n, const int half) { return n >= W ? load(p, 0, half) : load_n(p, 0, n, 0, half); }
INLINE void give(void *p, int64_t n, vf x, const int half) {
    if (n >= W)
        store(p, 0, x, half);
    else
        store_n(p, 0, n, x, half);
}

// weight [C, K] and bias as [K + 1][C] float32.
static float *transposed(const void *weight, const void *bias, int64_t C, int64_t K, int half) {
    float *w = malloc((K + 1) * C * sizeof(float));
    if (!w) abort();
    for (int64_t c = 0; c < C; c++) {
        for (int64_t k = 0; k < K; k++) w[k * C + c] = get(weight, c * K + k, half);
        w[K * C + c] = bias ? get(bias, c, half) : 0;
    }
    return w;
}

// One sequence's channels from c on: row t of x, or what came before the sequence.
typedef struct {
    const char *x, *initial;
    int64_t ld, C, c, n;
} Seq;

INLINE vf row(const Seq *s, int64_t t, int64_t lanes, const int K, const int half) {
    if (t >= 0) return take(AT(s->x, t * s->ld + s->c), lanes, half);
    return s->initial ? take(AT(s->initial, (K - 1 + t) * s->C + s->c), lanes, half) : splat(0);
}

INLINE void tile(const Seq *s, const float *w, char *y, int64_t t0, int64_t t1, const int silu, const int K, const int half) {
    const int64_t lanes = MIN(W, s->C - s->c);
    vf tap[TAPS + 1], win[TAPS];
    for (int k = 0; k <= K; k++) tap[k] = take(w + k * s->C + s->c, lanes, 0);
    for (int k = 0; k < K - 1; k++) win[k] = row(s, t0 - (K - 1) + k, lanes, K, half);
    for (int64_t t = t0; t < t1; t++) {
        win[K - 1] = take(AT(s->x, t * s->ld + s->c), lanes, half);
        vf sum_ = tap[K];
        for (int k = 0; k < K; k++) sum_ += tap[k] * win[k];
        give(AT(y, t * s->C + s->c), lanes, silu ? sum_ * vsigmoid(sum_) : sum_, half);
        for (int k = 0; k < K - 1; k++) win[k] = win[k + 1];
    }
}

// With g the gradient of the sum at each token: dx[s] = sum over k of w[k] g[s + K - 1 - k], dw[k] = sum of g[t] x[t - (K - 1) + k].
INLINE void tile_backward(const Seq *s, const float *w, const char *dy, const char *dlast, char *dx, char *dfirst, float *dw,
                          int64_t t0, int64_t t1, const int silu, const int K, const int half) {
    const int64_t lanes = MIN(W, s->C - s->c), from = t0 ? t0 : 1 - K;
    vf tap[TAPS + 1], win[TAPS], g[TAPS], acc[TAPS + 1];
    for (int k = 0; k <= K; k++) tap[k] = take(w + k * s->C + s->c, lanes, 0), acc[k] = splat(0);
    for (int k = 0; k < K - 1; k++) win[k] = row(s, t0 - (K - 1) + k, lanes, K, half), g[k] = splat(0);
    for (int64_t t = t0; t < t1 + K - 1; t++) {
        g[K - 1] = splat(0);
        if (t < s->n) {
            win[K - 1] = take(AT(s->x, t * s->ld + s->c), lanes, half);
            vf slope = take(AT(dy, t * s->C + s->c), lanes, half);
            if (silu) {
                vf sum_ = tap[K];
                for (int k = 0; k < K; k++) sum_ += tap[k] * win[k];
                const vf sig = vsigmoid(sum_);
                slope *= sig * (1 + sum_ * (1 - sig));
            }
            g[K - 1] = slope;
            if (t < t1) {
                for (int k = 0; k < K; k++) acc[k] += slope * win[k];
                acc[K] += slope;
            }
            for (int k = 0; k < K - 1; k++) win[k] = win[k + 1];
        }
        const int64_t at = t - (K - 1);
        if (at >= from) {
            vf sum_ = splat(0);
            for (int k = 0; k < K; k++) sum_ += tap[k] * g[K - 1 - k];
            const int64_t end = at - (s->n - (K - 1));  // its row in what the sequence ends with
            if (dlast && end >= 0) sum_ += take(AT(dlast, end * s->C + s->c), lanes, half);
            if (at >= 0)
                give(AT(dx, at * s->C + s->c), lanes, sum_, half);
            else if (dfirst)
                give(AT(dfirst, (K - 1 + at) * s->C + s->c), lanes, sum_, half);
        }
        for (int k = 0; k < K - 1; k++) g[k] = g[k + 1];
    }
    for (int k = 0; k <= K; k++) {
        float *to = dw + k * s->C + s->c;
        give(to, lanes, take(to, lanes, 0) + acc[k], 0);
    }
}

#define WITH_TAPS(CALL)               \
    switch (K) {                      \
        case 2: CALL(2); break;       \
        case 3: CALL(3); break;       \
        case 4: CALL(4); break;       \
        default: CALL((int)K); break; \
    }

// x [tokens, C] with a row stride, weight [C, K], initial [sequences, K - 1, C] or null -> y [tokens, C], last as initial.
INLINE void conv(const char *x, const void *weight, const void *bias, const char *initial, const int64_t *spans, char *y, char *last,
                 int64_t sequences, int64_t C, int64_t K, int64_t ld, int silu, int threads, const int half) {
    float *w = transposed(weight, bias, C, K, half);
    const int64_t blocks = (C + W - 1) / W, kept = (K - 1) * C, size = half ? 2 : 4;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int p = 0; p < threads; p++)
        for (int64_t i = 0; i < sequences; i++) {
            const int64_t start = spans[2 * i], n = spans[2 * i + 1];
            Seq s = {AT(x, start * ld), initial ? AT(initial, i * kept) : 0, ld, C, 0, n};
            for (int64_t t = 0; t < n; t += TILE)
                for (int64_t b = blocks * p / threads; b < blocks * (p + 1) / threads; b++) {
                    s.c = b * W;
#define CALL(K_) silu ? tile(&s, w, AT(y, start * C), t, MIN(n, t + TILE), 1, K_, half) : tile(&s, w, AT(y, start * C), t, MIN(n, t + TILE), 0, K_, half)
                    WITH_TAPS(CALL)
#undef CALL
                }
            if (p == 0)
                for (int64_t k = 0; k < K - 1; k++) {
                    const int64_t t = n - (K - 1) + k;
                    char *to = AT(last, i * kept + k * C);
                    if (t >= 0)
                        memcpy(to, AT(x, (start + t) * ld), C * size);
                    else if (initial)
                        memcpy(to, AT(initial, i * kept + (K - 1 + t) * C), C * size);
                    else
                        memset(to, 0, C * size);
                }
        }
    free(w);
}

// dw [K + 1, C] float32, zeros: the gradients of all taps and of the bias.
INLINE void conv_backward(const char *x, const void *weight, const void *bias, const char *initial, const int64_t *spans,
                          const char *dy, const char *dlast, char *dx, char *dfirst, float *dw, int64_t sequences, int64_t C,
                          int64_t K, int64_t ld, int silu, int threads, const int half) {
    float *w = transposed(weight, bias, C, K, half);
    const int64_t blocks = (C + W - 1) / W, kept = (K - 1) * C;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int p = 0; p < threads; p++)
        for (int64_t i = 0; i < sequences; i++) {
            const int64_t start = spans[2 * i], n = spans[2 * i + 1];
            Seq s = {AT(x, start * ld), initial ? AT(initial, i * kept) : 0, ld, C, 0, n};
            char *last = dlast ? AT(dlast, i * kept) : 0, *first = dfirst ? AT(dfirst, i * kept) : 0;
            for (int64_t t = 0; t == 0 || t < n; t += TILE)
                for (int64_t b = blocks * p / threads; b < blocks * (p + 1) / threads; b++) {
                    s.c = b * W;
#define CALL(K_)                                                                                                           \
    silu ? tile_backward(&s, w, AT(dy, start * C), last, AT(dx, start * C), first, dw, t, MIN(n, t + TILE), 1, K_, half)   \
         : tile_backward(&s, w, AT(dy, start * C), last, AT(dx, start * C), first, dw, t, MIN(n, t + TILE), 0, K_, half)
                    WITH_TAPS(CALL)
#undef CALL
                }
        }
    free(w);
}

#define EXPORT(NAME, HALF)                                                                                                      \
    void conv_##NAME(const char *x, const void *weight, const void *bias, const char *initial, const int64_t *spans, char *y,   \
                     char *last, int64_t sequences, int64_t C, int64_t K, int64_t ld, int silu, int threads) {                  \
        conv(x, weight, bias, initial, spans, y, last, sequences, C, K, ld, silu, threads, HALF);                               \
    }                                                                                                                           \
    void conv_backward_##NAME(const char *x, const void *weight, const void *bias, const char *initial, const int64_t *spans,   \
                              const char *dy, const char *dlast, char *dx, char *dfirst, float *dw, int64_t sequences,          \
                              int64_t C, int64_t K, int64_t ld, int silu, int threads) {                                        \
        conv_backward(x, weight, bias, initial, spans, dy, dlast, dx, dfirst, dw, sequences, C, K, ld, silu, threads, HALF);    \
    }

EXPORT(f32, 0)
EXPORT(bf16, 1)
