// y = x W^T + b for few rows of x.
#include "few.h"

// x [m, n] (row stride xld), w [out, n] (row stride wld), bias [out] or null -> y [m, out]; m <= 16.
#define EXPORT(TYPE, HALF)                                                                                                 \
    void linear_##TYPE(const void *x, const void *w, const void *bias, void *y, int64_t m, int64_t out, int64_t n,         \
                       int64_t xld, int64_t wld, int threads) {                                                            \
        const Rows rows = {w, 0, size(wld, PLAIN, HALF), 0, 0};                                                            \
        FEW(rows, x, bias, y, m, out, n, xld, threads, PLAIN, HALF);                                                       \
    }

EXPORT(f32, 0)
EXPORT(bf16, 1)
