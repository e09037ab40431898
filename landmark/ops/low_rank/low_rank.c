// y += scale (x A^T) B^T for few rows and a low rank: both factors are read once, in the order in which they lie.
#include "vector.h"

#define ROWS 16   // of x, at most
#define RANK 256  // at most
#define LINES 4   // of a factor at once
#define PLACES 512 // of y at once

typedef struct {
    const char *x, *a, *b; // x [rows, in], a [rank, in], b [rank, out]: B's columns
    char *y;               // [rows, out]
    int64_t rows, in, out, rank, x_row, y_row, a_row, b_row; // strides in elements
    int64_t threads;
    double scale;
} Call;

// N lines of A times one row of x, at h, h + 1, ...
INLINE void down(const Call *c, const char *a, const char *x, float *h, const int N, const int half) {
    const int64_t size = half ? 2 : 4, line = c->a_row * size, whole = c->in / W * W;
    vf acc[LINES];
    for (int n = 0; n < N; n++) acc[n] = splat(0);
    for (int64_t j = 0; j < whole; j += W) {
        const vf v = load(x, j, half);
        for (int n = 0; n < N; n++) acc[n] += load(a + n * line, j, half) * v;
    }
    if (whole < c->in) {
        const vf v = load_n(x, whole, c->in - whole, 0, half);
        for (int n = 0; n < N; n++) acc[n] += load_n(a + n * line, whole, c->in - whole, 0, half) * v;
    }
    for (int n = 0; n < N; n++) h[n] = sum(acc[n]);
}

// The sums of N lines of B, times h [rows, RANK] from here on, join acc [rows, PLACES] of `count` places of y from `first`.
INLINE void up(const Call *c, const char *b, const float *h, float *acc, int64_t first, int64_t count, const int N,
               const int half) {
    const int64_t size = half ? 2 : 4, line = c->b_row * size;
    for (int64_t j = 0; j < count; j += W) {
        vf v[LINES];
        const int64_t left = count - j;
        for (int n = 0; n < N; n++)
            v[n] = left < W ? load_n(b + n * line, first + j, left, 0, half) : load(b + n * line, first + j, half);
        for (int64_t i = 0; i < c->rows; i++) {
            vf sums = load(acc + i * PLACES, j, 0);
            for (int n = 0; n < N; n++) sums += v[n] * h[i * RANK + n];
            store(acc + i * PLACES, j, sums, 0);
        }
    }
}

INLINE void places(const Call *c, const float *h, int64_t first, const int half) {
    const int64_t size = half ? 2 : 4, count = MIN(PLACES, c->out - first);
    float acc[ROWS * PLACES];
    for (int64_t i = 0; i < c->rows; i++) memset(acc + i * PLACES, 0, sizeof(float) * PLACES);
    int64_t r = 0;
    for (; r + LINES <= c->rank; r += LINES)
        up(c, c->b + r * c->b_row * size, h + r, acc, first, count, LINES, half);
    for (; r < c->rank; r++) up(c, c->b + r * c->b_row * size, h + r, acc, first, count, 1, half);
    for (int64_t i = 0; i < c->rows; i++) {
        char *y = c->y + i * c->y_row * size;
        for (int64_t j = 0; j < count; j += W) {
            const int64_t left = count - j;
            const vf more = load(acc + i * PLACES, j, 0) * (float)c->scale;
            if (left < W)
                store_n(y, first + j, left, load_n(y, first + j, left, 0, half) + more, half);
            else
                store(y, first + j, load(y, first + j, half) + more, half);
        }
    }
}

INLINE void add(const Call *c, const int half) {
    const int64_t size = half ? 2 : 4, whole = c->rank / LINES;
    float h[ROWS * RANK];
#pragma omp parallel for num_threads(c->threads) if (c->threads > 1)
    for (int64_t q = 0; q <= whole; q++) {
        const int64_t end = q < whole ? 0 : c->rank;
        for (int64_t i = 0; i < c->rows; i++) {
            const char *x = c->x + i * c->x_row * size;
            if (q < whole) down(c, c->a + q * LINES * c->a_row * size, x, h + i * RANK + q * LINES, LINES, half);
            for (int64_t r = whole * LINES; r < end; r++)
                down(c, c->a + r * c->a_row * size, x, h + i * RANK + r, 1, half);
        }
    }
#pragma omp parallel for num_threads(c->threads) if (c->threads > 1)
    for (int64_t first = 0; first < c->out; first += PLACES) places(c, h, first, half);
}

void add_f32(const Call *c) { add(c, 0); }
void add_bf16(const Call *c) { add(c, 1); }
