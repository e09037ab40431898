// Token shift: y_n[t] = x[t] + (x[t - 1] - x[t]) mix_n for n mixes at once; and backward.
#include "vector.h"

#define AT(p, i) ((char *)(p) + (i) * (half ? 2 : 4))

INLINE vf take(const void *p, int64_t n, const int half) { return n >= W ? load(p, 0, half) : load_n(p, 0, n, 0, half); }
INLINE void give(void *p, int64_t n, vf x, const int half) {
    if (n >= W)
        store(p, 0, x, half);
    else
        store_n(p, 0, n, x, half);
}

// Channels [from, end) of part p of P, in whole vectors.
INLINE void part(int64_t C, int64_t p, int64_t P, int64_t *from, int64_t *end) {
    const int64_t blocks = (C + W - 1) / W;
    *from = blocks * p / P * W, *end = MIN(C, blocks * (p + 1) / P * W);
}

// x [tokens, C] with row stride ld; mix [n, C] float32; initial (or null) and last [sequences, C]; ys: n arrays [tokens, C].
INLINE void mix(const char *x, int64_t ld, const float *mix, const char *initial, const int64_t *spans, int64_t sequences,
                int64_t n, int64_t C, char **ys, char *last, int threads, const int half) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < threads; p++) {
        int64_t from, end;
        part(C, p, threads, &from, &end);
        for (int64_t i = 0; i < sequences; i++) {
            const int64_t start = spans[2 * i], length = spans[2 * i + 1];
            for (int64_t t = start; t <= start + length; t++) {
                const char *before = t > start ? AT(x, (t - 1) * ld) : initial ? AT(initial, i * C) : 0;
                if (t == start + length) {
                    for (int64_t c = from; c < end; c += W)
                        give(AT(last, i * C + c), C - c, before ? take(AT(before, c), C - c, half) : splat(0), half);
                    break;
                }
                for (int64_t c = from; c < end; c += W) {
                    const vf now = take(AT(x, t * ld + c), C - c, half);
                    const vf step = (before ? take(AT(before, c), C - c, half) : splat(0)) - now;
                    for (int64_t k = 0; k < n; k++)
                        give(AT(ys[k], t * C + c), C - c, now + step * take(mix + k * C + c, C - c, 0), half);
                }
            }
        }
    }
}

// dys: n arrays [tokens, C], null where there is no gradient; dmix [n, C] float32, added to; dinitial may be null.
INLINE void mix_backward(const char *x, int64_t ld, const float *mix, const char *initial, const int64_t *spans,
                         int64_t sequences, int64_t n, int64_t C, char **dys, const char *dlast, char *dx, char *dinitial,
                         float *dmix, int threads, const int half) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < threads; p++) {
        int64_t from, end;
        part(C, p, threads, &from, &end);
        for (int64_t i = 0; i < sequences; i++) {
            const int64_t start = spans[2 * i], length = spans[2 * i + 1];
            for (int64_t t = start + length; t >= start; t--) {  // the gradient of token t - 1, and that of the mixes at t
                const char *before = t > start ? AT(x, (t - 1) * ld) : initial ? AT(initial, i * C) : 0;
                char *to = t > start ? AT(dx, (t - 1) * C) : dinitial ? AT(dinitial, i * C) : 0;
                for (int64_t c = from; c < end; c += W) {
                    vf g = splat(0);
                    if (t == start + length) {
                        if (dlast) g = take(AT(dlast, i * C + c), C - c, half);
                    } else {
                        const vf now = take(AT(x, t * ld + c), C - c, half);
                        const vf step = (before ? take(AT(before, c), C - c, half) : splat(0)) - now;
                        for (int64_t k = 0; k < n; k++) {
                            if (!dys[k]) continue;
                            const vf dy = take(AT(dys[k], t * C + c), C - c, half);
                            float *sum_ = dmix + k * C + c;
                            give(sum_, C - c, take(sum_, C - c, 0) + dy * step, 0);
                            g += dy * take(mix + k * C + c, C - c, 0);
                        }
                    }
                    if (t > start)
                        for (int64_t k = 0; k < n; k++)
                            if (dys[k])
                                g += take(AT(dys[k], (t - 1) * C + c), C - c, half) * (1.0f - take(mix + k * C + c, C - c, 0));
                    if (to) give(AT(to, c), C - c, g, half);
                }
            }
        }
    }
}

#define EXPORT(NAME, HALF)                                                                                                     \
    void mix_##NAME(const char *x, int64_t ld, const float *m, const char *initial, const int64_t *spans, int64_t sequences,   \
                    int64_t n, int64_t C, char **ys, char *last, int threads) {                                                \
        mix(x, ld, m, initial, spans, sequences, n, C, ys, last, threads, HALF);                                               \
    }                                                                                                                          \
    void mix_backward_##NAME(const char *x, int64_t ld, const float *m, const char *initial, const int64_t *spans,             \
                             int64_t sequences, int64_t n, int64_t C, char **dys, const char *dlast, char *dx, char *dinitial, \
                             float *dmix, int threads) {                                                                       \
        mix_backward(x, ld, m, initial, spans, sequences, n, C, dys, dlast, dx, dinitial, dmix, threads, HALF);                \
    }

EXPORT(f32, 0)
EXPORT(bf16, 1)
