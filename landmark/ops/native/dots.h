// A few rows of x times rows of a matrix, each read once, in order, at memory speed.
#pragma once
#include "vector.h"

#ifdef __AVX512BF16__
#define PAIRED 1  // bfloat16 products by vdpbf16ps, 32 at a time
#else
#define PAIRED 0
#endif
#define FEW 8           // rows of x at once
#define AHEAD 8192      // bytes to prefetch ahead where weights are read in order

INLINE vf raw(const char *p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}

// One step of w and x: W floats, or bfloat16 as wide as a vector where they come in pairs, else W of them.
INLINE vf step_of(const char *p, const int half) { return half && !PAIRED ? load(p, 0, 1) : raw(p); }

INLINE vf times(vf a, vf b, vf c, const int half) {
#ifdef __AVX512BF16__
    if (half) return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
    return c + a * b;
}

// acc[R][M] = rows w[R] (two at most) times rows x[M], of n elements each; U steps at once.
INLINE void dots_by(const char *const *w, const char *const *x, int64_t n, vf *acc, const int R, const int M, const int U,
                    const int half) {
    const int64_t lanes = half && PAIRED ? 2 * W : W, size = half ? 2 : 4, bytes = n * size, step = lanes * size;
    vf part[16];  // [U][R][M]
    for (int i = 0; i < U * R * M; i++) part[i] = splat(0);
    int64_t at = 0;
#pragma GCC unroll 1
    for (; at + U * step <= bytes; at += U * step)
        for (int u = 0; u < U; u++) {
            vf v[2];
            for (int r = 0; r < R; r++) {
                v[r] = step_of(w[r] + at + u * step, half);
                __builtin_prefetch(w[r] + at + u * step + AHEAD);
            }
            for (int m = 0; m < M; m++) {
                const vf y = step_of(x[m] + at + u * step, half);
                for (int r = 0; r < R; r++) part[(u * R + r) * M + m] = times(v[r], y, part[(u * R + r) * M + m], half);
            }
        }
    for (int u = 1; u < U; u++)
        for (int i = 0; i < R * M; i++) part[i] += part[u * R * M + i];
#pragma GCC unroll 1
    for (; at + step <= bytes; at += step)
        for (int r = 0; r < R; r++) {
            const vf v = step_of(w[r] + at, half);
            for (int m = 0; m < M; m++) part[r * M + m] = times(v, step_of(x[m] + at, half), part[r * M + m], half);
        }
    if (at < bytes)
        for (int m = 0; m < M; m++) {
            char b[64] = {0};
            memcpy(b, x[m] + at, bytes - at);
            for (int r = 0; r < R; r++) {
                char a[64] = {0};
                memcpy(a, w[r] + at, bytes - at);
                part[r * M + m] = times(step_of(a, half), step_of(b, half), part[r * M + m], half);
            }
        }
    for (int i = 0; i < R * M; i++) acc[i] = part[i];
}

INLINE void dots(const char *const *w, const char *const *x, int64_t n, vf *acc, const int R, const int M, const int half) {
    dots_by(w, x, n, acc, R, M, M == 1 ? 4 : M == 2 ? 4 : M <= 4 ? 2 : 1, half);
}

// t[m][r] = the first n <= W rows of a matrix, each of `width` elements, times the M vectors of x.
INLINE void rows(const char *w, int64_t width, int64_t n, const char *const *x, float (*t)[W], const int M, const int half) {
    const int64_t row = width * (half ? 2 : 4);
    int64_t r = 0;
    vf acc[2 * FEW];
    if (M > 2)  // two at once, so that x is read half as often
        for (; r + 2 <= n; r += 2) {
            dots((const char *[]){w + r * row, w + (r + 1) * row}, x, width, acc, 2, M, half);
            for (int m = 0; m < M; m++) t[m][r] = sum(acc[m]), t[m][r + 1] = sum(acc[M + m]);
        }
    for (; r < n; r++) {
        dots((const char *[]){w + r * row}, x, width, acc, 1, M, half);
        for (int m = 0; m < M; m++) t[m][r] = sum(acc[m]);
    }
}

// F(..., M, half) with M as a constant.
#define EACH(M, F, ...)                                                                                                \
    switch (M) {                                                                                                       \
        case 1: F(__VA_ARGS__, 1, half); break;                                                                        \
        case 2: F(__VA_ARGS__, 2, half); break;                                                                        \
        case 3: F(__VA_ARGS__, 3, half); break;                                                                        \
        case 4: F(__VA_ARGS__, 4, half); break;                                                                        \
        case 5: F(__VA_ARGS__, 5, half); break;                                                                        \
        case 6: F(__VA_ARGS__, 6, half); break;                                                                        \
        case 7: F(__VA_ARGS__, 7, half); break;                                                                        \
        default: F(__VA_ARGS__, 8, half);                                                                              \
    }
