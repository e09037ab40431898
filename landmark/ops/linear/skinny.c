// y = x W^T + b for few rows of x: reads W once, in order, at memory speed.
#include <stdlib.h>
#include "vector.h"

#ifdef __AVX512BF16__
#define PAIRS 1  // bfloat16 products by vdpbf16ps, 32 at a time
#else
#define PAIRS 0
#endif
#define LANES(half) ((half) && PAIRS ? 32 : W)    // of a group: what one step of the inner loop takes
#define XSIZE(half) ((half) && PAIRS ? 2 : 4)     // bytes of an element of packed x
#define ROWS 8                                    // rows of W that share a block of columns
#define CACHE 32768                               // bytes of x that stay in the first-level cache
#define AHEAD 4096                                // bytes to prefetch ahead where W is read in order

INLINE vf dot(const char *w, const char *x, vf acc, const int half) {
#ifdef __AVX512BF16__
    if (half) return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_loadu_si512(x));
#endif
    return acc + load(w, 0, half) * load(x, 0, 0);
}

// Adds n columns of one row of W times M packed rows of x to part[M], in U interleaved float32 sums.
INLINE void strip(const char *w, const char *x, int64_t m, int64_t n, const char *ahead, vf *part, const int M, const int U,
                  const int half) {
    const int size = half ? 2 : 4, lanes = LANES(half), step = lanes * size, xstep = lanes * XSIZE(half);
    const int64_t groups = n / lanes;
    vf acc[8];
    for (int i = 0; i < M * U; i++) acc[i] = splat(0);
    int64_t g = 0;
#pragma GCC unroll 1
    for (; g + U <= groups; g += U)
        for (int u = 0; u < U; u++, w += step, ahead += step, x += m * xstep) {
            __builtin_prefetch(ahead);
            for (int i = 0; i < M; i++) acc[u * M + i] = dot(w, x + i * xstep, acc[u * M + i], half);
        }
    for (; g < groups; g++, w += step, x += m * xstep)
        for (int i = 0; i < M; i++) acc[i] = dot(w, x + i * xstep, acc[i], half);
    if (g * lanes < n) {
        char last[64] = {0};
        memcpy(last, w, (n - g * lanes) * size);
        for (int i = 0; i < M; i++) acc[i] = dot(last, x + i * xstep, acc[i], half);
    }
    for (int i = 0; i < M; i++) {
        for (int u = 1; u < U; u++) acc[i] += acc[u * M + i];
        part[i] += acc[i];
    }
}

INLINE void strips(int64_t rows, const char *w, const char *x, int64_t m, int64_t n, const char *ahead, vf *part, const int half) {
    switch (rows) {
        case 1: strip(w, x, m, n, ahead, part, 1, 4, half); break;
        case 2: strip(w, x, m, n, ahead, part, 2, 4, half); break;
        case 3: strip(w, x, m, n, ahead, part, 3, 2, half); break;
        case 4: strip(w, x, m, n, ahead, part, 4, 2, half); break;
        case 5: strip(w, x, m, n, ahead, part, 5, 1, half); break;
        case 6: strip(w, x, m, n, ahead, part, 6, 1, half); break;
        case 7: strip(w, x, m, n, ahead, part, 7, 1, half); break;
        default: strip(w, x, m, n, ahead, part, 8, 1, half);
    }
}

// x as [n / lanes][m][lanes], zero-padded: one stream, whatever m. bfloat16 where vdpbf16ps takes it, else float32.
INLINE void pack(const void *x, char *packed, int64_t m, int64_t n, int64_t xld, const int half) {
    const int64_t lanes = LANES(half), size = XSIZE(half), bytes = lanes * size;
    for (int64_t from = 0; from < n; from += lanes)
        for (int64_t i = 0; i < m; i++, packed += bytes) {
            const int64_t at = i * xld + from, count = MIN(lanes, n - from);
            if (half && !PAIRS)
                for (int64_t j = 0; j < count; j++) ((float *)packed)[j] = get(x, at + j, half);
            else
                memcpy(packed, (const char *)x + at * size, count * size);
            memset(packed + count * size, 0, bytes - count * size);
        }
}

// Rows [from, to) of W, `width` columns at a time so that their part of x stays in cache.
INLINE void share(const char *packed, const char *w, const char *bias, char *y, int64_t m, int64_t from, int64_t to, int64_t out,
                  int64_t n, int64_t wld, int64_t width, const int half) {
    const int size = half ? 2 : 4, xstep = LANES(half) * XSIZE(half);
    vf part[ROWS][16];
    for (int64_t o = from; o < to; o += ROWS) {
        const int64_t rows = MIN(ROWS, to - o);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < m; i++) part[r][i] = splat(0);
        for (int64_t k = 0; k < n; k += width)
            for (int64_t r = 0; r < rows; r++) {
                const char *at = w + ((o + r) * wld + k) * size, *ahead;
                if (width >= n)
                    ahead = at + AHEAD;
                else if (r + 1 < rows)
                    ahead = at + wld * size;
                else
                    ahead = k + width < n ? w + (o * wld + k + width) * size : w + (o + rows) * wld * size;
                const char *x = packed + k / LANES(half) * m * xstep;
                for (int64_t i = 0; i < m; i += 8)
                    strips(m - i, at, x + i * xstep, m, MIN(width, n - k), ahead, part[r] + i, half);
            }
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < m; i++)
                put(y, i * out + o + r, sum(part[r][i]) + (bias ? get(bias, o + r, half) : 0), half);
    }
}

// x [m, n] (row stride xld), w [out, n] (row stride wld), bias [out] or null -> y [m, out]; m <= 16.
INLINE void linear(const void *x, const char *w, const char *bias, char *y, int64_t m, int64_t out, int64_t n, int64_t xld,
                   int64_t wld, int threads, const int half) {
    const int64_t lanes = LANES(half), groups = (n + lanes - 1) / lanes, xstep = lanes * XSIZE(half);
    const int64_t width = MAX(1, CACHE / (m * xstep)) * lanes;
    char *packed = aligned_alloc(64, (groups * m * xstep + 63) / 64 * 64);
    if (!packed) abort();
    pack(x, packed, m, n, xld, half);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++)
        share(packed, w, bias, y, m, out * t / threads, out * (t + 1) / threads, out, n, wld, width, half);
    free(packed);
}

#define EXPORT(NAME, HALF)                                                                                             \
    void NAME(const void *x, const char *w, const char *bias, char *y, int64_t m, int64_t out, int64_t n, int64_t xld, \
              int64_t wld, int threads) {                                                                              \
        linear(x, w, bias, y, m, out, n, xld, wld, threads, HALF);                                                     \
    }

EXPORT(linear_f32, 0)
EXPORT(linear_bf16, 1)
