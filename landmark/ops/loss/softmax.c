// Cross-entropy of rows of logits, and its gradient in place of the logits.
#include "vector.h"

// y = scale x, soft-capped to cap tanh(y / cap) where cap > 0.
INLINE vf squash(vf x, float scale, float cap) {
    x = x * scale;
    return cap > 0 ? cap * vtanh(x * (1 / cap)) : x;
}

// One row: nll = log-sum-exp(y) - y[target], lse, and mean(y); then, where `grad`, x becomes the gradient of
// (1 - smoothing) nll + smoothing (lse - mean) + z lse^2 with respect to x.
INLINE void row(void *x, int64_t n, int64_t target, float scale, float cap, float smoothing, float z, int grad,
                float *nll, float *lse, float *mean, const int half, const int capped) {
    if (!capped) cap = 0;
    const int64_t whole = n - n % W, rest = n % W;
    const float sign = scale < 0 ? -1 : 1;
    vf m0 = splat(-INFINITY), m1 = m0;
    int64_t i = 0;
    for (; i + 2 * W <= whole; i += 2 * W) {
        m0 = vmax(sign * load(x, i, half), m0);
        m1 = vmax(sign * load(x, i + W, half), m1);
    }
    for (; i < whole; i += W) m0 = vmax(sign * load(x, i, half), m0);
    if (rest) m0 = vmax(sign * load_n(x, i, rest, -sign * INFINITY, half), m0);
    const float top = squash(splat(sign * largest(vmax(m0, m1))), scale, cap)[0];
    const float chosen = squash(splat(get(x, target, half)), scale, cap)[0];

    vf s0 = splat(0), s1 = s0, t0 = s0, t1 = s0;
    for (i = 0; i + 2 * W <= whole; i += 2 * W) {
        vf a = squash(load(x, i, half), scale, cap), b = squash(load(x, i + W, half), scale, cap);
        s0 += vexp(a - top), s1 += vexp(b - top);
        t0 += a, t1 += b;
    }
    for (; i < whole; i += W) {
        vf a = squash(load(x, i, half), scale, cap);
        s0 += vexp(a - top);
        t0 += a;
    }
    float s = sum(s0 + s1), t = sum(t0 + t1);
    for (; i < n; i++) {
        float a = squash(splat(get(x, i, half)), scale, cap)[0];
        s += expf(a - top);
        t += a;
    }
    const float l = top + logf(s);
    *nll = (top - chosen) + logf(s), *lse = l, *mean = t / (float)n;
    if (!grad) return;

    const float p = (1 + 2 * z * l) / s, even = smoothing / (float)n, hit = 1 - smoothing;
    for (i = 0; i < n; i += W) {
        vf raw = i < whole ? load(x, i, half) : load_n(x, i, rest, 0, half);
        vf y = squash(raw, scale, cap), g = (vexp(y - top) * p - even) * scale;
        if (capped) g *= 1 - (y / cap) * (y / cap);
        if (target >= i && target < i + W) g[target - i] -= hit * scale * (capped ? 1 - (y[target - i] / cap) * (y[target - i] / cap) : 1);
        if (i < whole)
            store(x, i, g, half);
        else
            store_n(x, i, rest, g, half);
    }
}

#define EXPORT(NAME, HALF)                                                                                             \
    void NAME(void *x, int64_t rows, int64_t n, int64_t stride, const int64_t *targets, float scale, float cap,        \
              float smoothing, float z, int grad, float *nll, float *lse, float *mean, int threads) {                  \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")                             \
        for (int64_t r = 0; r < rows; r++) {                                                                           \
            char *at = (char *)x + r * stride * (HALF ? 2 : 4);                                                        \
            if (cap > 0)                                                                                               \
                row(at, n, targets[r], scale, cap, smoothing, z, grad, nll + r, lse + r, mean + r, HALF, 1);           \
            else                                                                                                       \
                row(at, n, targets[r], scale, cap, smoothing, z, grad, nll + r, lse + r, mean + r, HALF, 0);           \
        }                                                                                                              \
    }

EXPORT(softmax_f32, 0)
EXPORT(softmax_bf16, 1)
