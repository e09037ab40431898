// One token of Mamba-2's recurrence for every sequence: h = exp(dt A) h + dt B x^T, y = h^T C + D x, in one pass over h.
#include <stdlib.h>
#include "vector.h"

#define TILE 8  // vectors of a row of h at a time

// x [S, H, P], B and C [S, G, N] contiguous; a, u, y [S, H P] float32 are decays, dt x and outputs; h, to [S, G, N, H / G P].
INLINE void step(const float *a, const float *u, const float *B, const float *C, const float *h, float *to, float *y, int64_t n,
                 int64_t row, const int T) {
    vf av[T], uv[T], yv[T];
    for (int i = 0; i < T; i++) av[i] = load(a, i * W, 0), uv[i] = load(u, i * W, 0), yv[i] = splat(0);
    for (int64_t k = 0; k < n; k++, h += row, to += row)
        for (int i = 0; i < T; i++) {
            const vf next = av[i] * load(h, i * W, 0) + B[k] * uv[i];
            store(to, i * W, next, 0);
            yv[i] += C[k] * next;
        }
    for (int i = 0; i < T; i++) store(y, i * W, yv[i], 0);
}

static void step_rest(const float *a, const float *u, const float *B, const float *C, const float *h, float *to, float *y,
                      int64_t n, int64_t row, int64_t lanes) {
    for (int64_t i = 0; i < lanes; i++) y[i] = 0;
    for (int64_t k = 0; k < n; k++, h += row, to += row)
        for (int64_t i = 0; i < lanes; i++) {
            to[i] = a[i] * h[i] + B[k] * u[i];
            y[i] += C[k] * to[i];
        }
}

INLINE void widen_all(const void *from, float *to, int64_t n, const int half) {
    for (int64_t i = 0; i < n; i++) to[i] = get(from, i, half);
}

// dt [S, H], A and D [H] float32; x, B, C and y of one dtype.
INLINE void steps(const void *x, const float *dt, const float *A, const void *B, const void *C, const float *D, const float *h,
                  float *to, void *y, int64_t S, int64_t H, int64_t P, int64_t G, int64_t N, int threads, const int half) {
    const int64_t row = H / G * P, tiles = (row + TILE * W - 1) / (TILE * W);
    float *room = malloc((3 * S * H * P + 2 * S * G * N) * sizeof(float));
    if (!room) abort();
    float *a = room, *u = a + S * H * P, *out = u + S * H * P, *b = out + S * H * P, *c = b + S * G * N;
    widen_all(B, b, S * G * N, half);
    widen_all(C, c, S * G * N, half);
    for (int64_t i = 0; i < S * H; i++) {
        const float kept = expf(dt[i] * A[i % H]);
        for (int64_t p = 0; p < P; p++) a[i * P + p] = kept, u[i * P + p] = dt[i] * get(x, i * P + p, half);
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < S * G * tiles; task++) {
        const int64_t sg = task / tiles, first = task % tiles * TILE * W, lanes = MIN(TILE * W, row - first);
        const int64_t at = sg * row + first, from = sg * N * row + first;
        int64_t i = 0;
        if (lanes == TILE * W) {
            step(a + at, u + at, b + sg * N, c + sg * N, h + from, to + from, out + at, N, row, TILE);
            continue;
        }
        for (; i + W <= lanes; i += W)
            step(a + at + i, u + at + i, b + sg * N, c + sg * N, h + from + i, to + from + i, out + at + i, N, row, 1);
        step_rest(a + at + i, u + at + i, b + sg * N, c + sg * N, h + from + i, to + from + i, out + at + i, N, row, lanes - i);
    }
    for (int64_t i = 0; i < S * H * P; i++) put(y, i, out[i] + D[i / P % H] * get(x, i, half), half);
    free(room);
}

#define EXPORT(NAME, HALF)                                                                                                     \
    void ssd_step_##NAME(const void *x, const float *dt, const float *A, const void *B, const void *C, const float *D,         \
                         const float *h, float *to, void *y, int64_t S, int64_t H, int64_t P, int64_t G, int64_t N,            \
                         int threads) {                                                                                        \
        steps(x, dt, A, B, C, D, h, to, y, S, H, P, G, N, threads, HALF);                                                      \
    }

EXPORT(f32, 0)
EXPORT(bf16, 1)
