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
#define ROWS 16                                   // rows of W that share a block of columns, where x needs blocks
#define CACHE 32768                               // bytes of x that the first-level cache holds beside W's stream
#define BLOCK 16384                               // bytes of x in a block of columns, if all of it is more than CACHE
#define AHEAD 8192                                // bytes to prefetch ahead where W is read in order

// v . x[i] added to acc, for a group of lanes of W in v and of M rows of x.
INLINE void dots(const char *w, const char *x, vf *acc, const int M, const int half) {
    const int xstep = LANES(half) * XSIZE(half);
#ifdef __AVX512BF16__
    if (half) {
        const __m512bh v = (__m512bh)_mm512_loadu_si512(w);
        for (int i = 0; i < M; i++)
            acc[i] = (vf)_mm512_dpbf16_ps((__m512)acc[i], v, (__m512bh)_mm512_loadu_si512(x + i * xstep));
        return;
    }
#endif
    const vf v = load(w, 0, half);
    for (int i = 0; i < M; i++) acc[i] += v * load(x + i * xstep, 0, 0);
}

// Adds n columns of R rows of W times M packed rows of x to part[R][16], in float32; U groups of columns at once.
INLINE void strip(const char *w, int64_t row, const char *x, int64_t m, int64_t n, const char *ahead, vf *part, const int R,
                  const int M, const int U, const int half) {
    const int size = half ? 2 : 4, lanes = LANES(half), step = lanes * size, xstep = lanes * XSIZE(half);
    const int64_t groups = n / lanes;
    vf acc[16];  // [U][R][M]
    for (int i = 0; i < U * R * M; i++) acc[i] = splat(0);
    int64_t g = 0;
#pragma GCC unroll 1
    for (; g + U <= groups; g += U)
        for (int u = 0; u < U; u++, w += step, ahead += step, x += m * xstep)
            for (int r = 0; r < R; r++) {
                __builtin_prefetch(ahead + r * row);
                dots(w + r * row, x, acc + (u * R + r) * M, M, half);
            }
    for (; g < groups; g++, w += step, x += m * xstep)
        for (int r = 0; r < R; r++) dots(w + r * row, x, acc + r * M, M, half);
    if (g * lanes < n)
        for (int r = 0; r < R; r++) {
            char last[64] = {0};
            memcpy(last, w + r * row, (n - g * lanes) * size);
            dots(last, x, acc + r * M, M, half);
        }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < M; i++) {
            for (int u = 1; u < U; u++) acc[r * M + i] += acc[(u * R + r) * M + i];
            part[r * 16 + i] += acc[r * M + i];
        }
}

INLINE void strips(int64_t rows, const char *w, int64_t row, const char *x, int64_t m, int64_t n, const char *ahead, vf *part,
                   const int R, const int half) {
    switch (rows) {
        case 1: strip(w, row, x, m, n, ahead, part, R, 1, 4, half); break;
        case 2: strip(w, row, x, m, n, ahead, part, R, 2, 4, half); break;
        case 3: strip(w, row, x, m, n, ahead, part, R, 3, 2, half); break;
        case 4: strip(w, row, x, m, n, ahead, part, R, 4, 2, half); break;
        case 5: strip(w, row, x, m, n, ahead, part, R, 5, 1, half); break;
        case 6: strip(w, row, x, m, n, ahead, part, R, 6, 1, half); break;
        case 7: strip(w, row, x, m, n, ahead, part, R, 7, 1, half); break;
        default: strip(w, row, x, m, n, ahead, part, R, 8, 1, half);
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

// Rows [from, to) of W. All columns of a row in one go if x fits the cache; else `width` columns of ROWS rows, two rows at a
// time so that x is read half as often, then the next columns.
INLINE void share(const char *packed, const char *w, const char *bias, char *y, int64_t m, int64_t from, int64_t to, int64_t out,
                  int64_t n, int64_t wld, int64_t width, const int half) {
    const int64_t size = half ? 2 : 4, row = wld * size, xstep = LANES(half) * XSIZE(half);
    vf part[ROWS][16];
    for (int64_t o = from; o < to; o += ROWS) {
        const int64_t rows = MIN(ROWS, to - o);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < m; i++) part[r][i] = splat(0);
        for (int64_t k = 0; k < n; k += width)
            for (int64_t r = 0; r < rows;) {
                const int pair = width < n && r + 2 <= rows;
                const char *at = w + (o + r) * row + k * size, *x = packed + k / LANES(half) * m * xstep, *ahead = at + AHEAD;
                if (width < n) ahead = r + 2 < rows || k + width >= n ? at + 2 * row : w + o * row + (k + width) * size;
                for (int64_t i = 0; i < m; i += 8)
                    if (pair)
                        strips(m - i, at, row, x + i * xstep, m, MIN(width, n - k), ahead, part[r] + i, 2, half);
                    else
                        strips(m - i, at, row, x + i * xstep, m, MIN(width, n - k), ahead, part[r] + i, 1, half);
                r += pair ? 2 : 1;
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
    const int64_t width = groups * m * xstep <= CACHE ? n : MAX(1, BLOCK / (m * xstep)) * lanes;
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
