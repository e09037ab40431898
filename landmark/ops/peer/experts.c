// Experts of one neuron: rows of a table by number, dotted with a token or added up. Only rows that are named are read.
#include <stdlib.h>
#include "vector.h"

#define ROWS 4  // of the table, at a time

INLINE void fetch(const char *row, int64_t bytes) {
    for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(row + k);
}

// y[j] = x . table[at[j]] for m rows
INLINE void dots(const void *x, const char *table, const int64_t *at, float *y, int64_t m, int64_t n, const int half) {
    const int64_t row = n * (half ? 2 : 4);
    for (int64_t j = 0; j < m; j += ROWS) {
        const char *t[ROWS];
        vf acc[ROWS][2];
        for (int i = 0; i < ROWS; i++) {
            t[i] = table + at[MIN(j + i, m - 1)] * row;
            acc[i][0] = acc[i][1] = splat(0);
            if (j + i + ROWS < m) fetch(table + at[j + i + ROWS] * row, row);
        }
        int64_t k = 0;
        for (; k + 2 * W <= n; k += 2 * W) {
            const vf x0 = load(x, k, half), x1 = load(x, k + W, half);
            for (int i = 0; i < ROWS; i++) {
                acc[i][0] += x0 * load(t[i], k, half);
                acc[i][1] += x1 * load(t[i], k + W, half);
            }
        }
        for (; k < n; k += W) {
            const vf x0 = load_n(x, k, MIN(W, n - k), 0, half);
            for (int i = 0; i < ROWS; i++) acc[i][0] += x0 * load_n(t[i], k, MIN(W, n - k), 0, half);
        }
        for (int i = 0; i < ROWS && j + i < m; i++) y[j + i] = sum(acc[i][0] + acc[i][1]);
    }
}

// y = sum over j of a[j] table[at[j]], in float32
INLINE void sums(const float *a, const char *table, const int64_t *at, float *y, int64_t m, int64_t n, const int half) {
    const int64_t row = n * (half ? 2 : 4);
    memset(y, 0, n * sizeof(float));
    for (int64_t j = 0; j < m; j += ROWS) {
        const char *t[ROWS];
        float w[ROWS];
        for (int i = 0; i < ROWS; i++) {
            t[i] = table + at[MIN(j + i, m - 1)] * row;
            w[i] = j + i < m ? a[j + i] : 0;
            if (j + i + ROWS < m) fetch(table + at[j + i + ROWS] * row, row);
        }
        int64_t k = 0;
        for (; k + W <= n; k += W) {
            vf acc = load(y, k, 0);
            for (int i = 0; i < ROWS; i++) acc += w[i] * load(t[i], k, half);
            store(y, k, acc, 0);
        }
        for (; k < n; k++)
            for (int i = 0; i < ROWS; i++) y[k] += w[i] * get(t[i], k, half);
    }
}

static float *buffer(int64_t n) {
    float *p = malloc(MAX(1, n) * sizeof(float));
    if (!p) abort();
    return p;
}

INLINE void narrow_row(const float *from, char *to, int64_t n, const int half) {
    for (int64_t k = 0; k < n; k++) put(to, k, from[k], half);
}

// x [tokens, n], table [.., n], at [tokens, m] -> y [tokens, m] float32
INLINE void gather_dot(const char *x, const char *table, const int64_t *at, float *y, int64_t tokens, int64_t m, int64_t n,
                       int threads, const int half) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < tokens; i++) dots(x + i * n * (half ? 2 : 4), table, at + i * m, y + i * m, m, n, half);
}

// a [tokens, m] float32, table [.., n], at [tokens, m] -> y [tokens, n]
INLINE void gather_sum(const float *a, const char *table, const int64_t *at, char *y, int64_t tokens, int64_t m, int64_t n,
                       int threads, const int half) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *row = half ? buffer(n) : 0;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tokens; i++) {
            sums(a + i * m, table, at + i * m, half ? row : (float *)y + i * n, m, n, half);
            if (half) narrow_row(row, y + i * n * 2, n, half);
        }
        free(row);
    }
}

// grad[expert] = sum of a[entry] x[entry / m] over its entries, in their order: entries [ends[e - 1], ends[e]) of `order` are
// those of experts[e].
INLINE void scatter(const float *a, const char *x, const int64_t *order, const int64_t *experts, const int64_t *ends, char *grad,
                    int64_t used, int64_t m, int64_t n, int threads, const int half) {
    const int64_t row = n * (half ? 2 : 4);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *acc = buffer(n);
#pragma omp for schedule(dynamic, 64)
        for (int64_t e = 0; e < used; e++) {
            memset(acc, 0, n * sizeof(float));
            for (int64_t i = e ? ends[e - 1] : 0; i < ends[e]; i++) {
                const char *from = x + order[i] / m * row;
                const float w = a[order[i]];
                int64_t k = 0;
                for (; k + W <= n; k += W) store(acc, k, load(acc, k, 0) + w * load(from, k, half), 0);
                for (; k < n; k++) acc[k] += w * get(from, k, half);
            }
            narrow_row(acc, grad + experts[e] * row, n, half);
        }
        free(acc);
    }
}

#define EXPORT(NAME, HALF)                                                                                                    \
    void gather_dot_##NAME(const char *x, const char *table, const int64_t *at, float *y, int64_t tokens, int64_t m,          \
                           int64_t n, int threads) {                                                                          \
        gather_dot(x, table, at, y, tokens, m, n, threads, HALF);                                                             \
    }                                                                                                                         \
    void gather_sum_##NAME(const float *a, const char *table, const int64_t *at, char *y, int64_t tokens, int64_t m,          \
                           int64_t n, int threads) {                                                                          \
        gather_sum(a, table, at, y, tokens, m, n, threads, HALF);                                                             \
    }                                                                                                                         \
    void scatter_##NAME(const float *a, const char *x, const int64_t *order, const int64_t *experts, const int64_t *ends,     \
                        char *grad, int64_t used, int64_t m, int64_t n, int threads) {                                        \
        scatter(a, x, order, experts, ends, grad, used, m, n, threads, HALF);                                                 \
    }

EXPORT(f32, 0)
EXPORT(bf16, 1)
