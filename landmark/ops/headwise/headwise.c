// y[n, h] = W_h x[n, h] for few rows n: reads every head's matrix once from memory, in the order in which it lies there.
#include "vector.h"

#define ROWS 4 // rows of x at once
#define STEP 4 // rows, or vectors of columns, of a matrix at once

typedef struct {
    const char *x, *w;
    char *y; // [n, heads, out], contiguous
    int64_t n, heads, in, out;
    int64_t x_row, x_head, w_head, w_line; // strides in elements; a line is a row of W_h, or, where those lie apart, a column
    int64_t threads;
} Call;

// Lines are rows: R of them times M rows of x.
INLINE void dots(const Call *c, const char *w, const char *x, char *y, const int R, const int M, const int half) {
    const int64_t size = half ? 2 : 4, line = c->w_line * size, row = c->x_row * size, whole = c->in / W * W;
    vf acc[STEP * ROWS];
    for (int i = 0; i < R * M; i++) acc[i] = splat(0);
    for (int64_t j = 0; j < whole; j += W)
        for (int m = 0; m < M; m++) {
            const vf v = load(x + m * row, j, half);
            for (int r = 0; r < R; r++) acc[r * M + m] += load(w + r * line, j, half) * v;
        }
    if (whole < c->in)
        for (int m = 0; m < M; m++) {
            const vf v = load_n(x + m * row, whole, c->in - whole, 0, half);
            for (int r = 0; r < R; r++) acc[r * M + m] += load_n(w + r * line, whole, c->in - whole, 0, half) * v;
        }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) put(y, m * c->heads * c->out + r, sum(acc[r * M + m]), half);
}

// Lines are columns: the sum of all of them times the values of M rows of x, at V vectors of places.
INLINE void lines(const Call *c, const char *w, const char *x, char *y, const int V, const int M, const int half) {
    const int64_t size = half ? 2 : 4;
    vf acc[STEP * ROWS];
    for (int i = 0; i < V * M; i++) acc[i] = splat(0);
    for (int64_t i = 0; i < c->in; i++, w += c->w_line * size) {
        vf v[STEP];
        for (int j = 0; j < V; j++) v[j] = load(w, j * W, half);
        for (int m = 0; m < M; m++)
            for (int j = 0; j < V; j++) acc[m * V + j] += get(x, m * c->x_row + i, half) * v[j];
    }
    for (int m = 0; m < M; m++)
        for (int j = 0; j < V; j++) store(y, m * c->heads * c->out + j * W, acc[m * V + j], half);
}

// What is left of the places, one row of x.
INLINE void rest(const Call *c, const char *w, const char *x, char *y, int64_t n, const int half) {
    vf acc = splat(0);
    for (int64_t i = 0; i < c->in; i++) acc += get(x, i, half) * load_n(w, i * c->w_line, n, 0, half);
    store_n(y, 0, n, acc, half);
}

INLINE void head(const Call *c, int64_t h, const int columns, const int half) {
    const int64_t size = half ? 2 : 4, out = c->out;
    const char *w = c->w + h * c->w_head * size;
    for (int64_t m = 0; m < c->n;) {
        const int many = m + ROWS <= c->n;
        const char *x = c->x + (m * c->x_row + h * c->x_head) * size;
        char *y = c->y + (m * c->heads + h) * out * size;
        int64_t o = 0;
        if (columns) {
            for (; o + STEP * W <= out; o += STEP * W)
                many ? lines(c, w + o * size, x, y + o * size, STEP, ROWS, half) : lines(c, w + o * size, x, y + o * size, STEP, 1, half);
            for (; o + W <= out; o += W)
                many ? lines(c, w + o * size, x, y + o * size, 1, ROWS, half) : lines(c, w + o * size, x, y + o * size, 1, 1, half);
            for (int64_t i = 0; o < out && i < (many ? ROWS : 1); i++)
                rest(c, w + o * size, x + i * c->x_row * size, y + (i * c->heads * out + o) * size, out - o, half);
        } else {
            const int64_t line = c->w_line * size;
            for (; o + STEP <= out; o += STEP)
                many ? dots(c, w + o * line, x, y + o * size, STEP, ROWS, half) : dots(c, w + o * line, x, y + o * size, STEP, 1, half);
            for (; o < out; o++)
                many ? dots(c, w + o * line, x, y + o * size, 1, ROWS, half) : dots(c, w + o * line, x, y + o * size, 1, 1, half);
        }
        m += many ? ROWS : 1;
    }
}

INLINE void all(const Call *c, const int columns, const int half) {
#pragma omp parallel for schedule(static) num_threads(c->threads) if (c->threads > 1)
    for (int64_t h = 0; h < c->heads; h++) head(c, h, columns, half);
}

void rows_f32(const Call *c) { all(c, 0, 0); }
void rows_bf16(const Call *c) { all(c, 0, 1); }
void columns_f32(const Call *c) { all(c, 1, 0); }
void columns_bf16(const Call *c) { all(c, 1, 1); }
