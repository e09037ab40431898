// RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016) of one row.
#pragma once
#include "rows.h"

// 1 / sqrt(mean(x^2) + eps).
INLINE float rms_of(const void *x, int64_t n, float eps, const int half) {
    vf a = splat(0), b = a;
    for (int64_t i = 0; i < n; i += 2 * W) {
        const vf u = take(x, i, n, half);
        a += u * u;
        if (i + W < n) {
            const vf v = take(x, i + W, n, half);
            b += v * v;
        }
    }
    return 1 / sqrtf(sum(a + b) / (float)n + eps);
}

// y = x / rms (offset + weight), or without weight x / rms.
INLINE float rms_norm_row(const void *x, const void *weight, int weight_half, void *y, int64_t n, float eps, float offset,
                          const int half) {
    const float k = rms_of(x, n, eps, half);
    for (int64_t i = 0; i < n; i += W) {
        const vf u = take(x, i, n, half) * k;
        give(y, i, n, weight ? u * (offset + take(weight, i, n, weight_half)) : u, half);
    }
    return k;
}

// y = (x - mean) / sqrt(var + eps) weight + bias, all of one type; bias may be null.
INLINE void layer_norm_row(const void *x, const void *weight, const void *bias, void *y, int64_t n, float eps, const int half) {
    vf a = splat(0), b = a;
    for (int64_t i = 0; i < n; i += W) a += take(x, i, n, half);
    const float mean = sum(a) / (float)n;
    for (int64_t i = 0; i < n; i += W) {
        vf u = take(x, i, n, half) - mean;
        for (int j = (int)(n - i); j < W; j++) u[j] = 0;
        b += u * u;
    }
    const float k = 1 / sqrtf(sum(b) / (float)n + eps);
    for (int64_t i = 0; i < n; i += W) {
        const vf u = (take(x, i, n, half) - mean) * k * take(weight, i, n, half);
        give(y, i, n, bias ? u + take(bias, i, n, half) : u, half);
    }
}
