// y = x W^T + b for few rows of x and a W of codes, and that W restored.
#include "few.h"

#define PIECE 64  // columns that rows of codes are padded to; of 4 bits, twice as many

INLINE int64_t pieces(int64_t n) { return (n + PIECE - 1) / PIECE; }
INLINE int64_t bytes(int64_t n, const int bits) { return bits == 4 ? (pieces(n) + 1) / 2 * PIECE : pieces(n) * PIECE; }

// x [m, n], codes w [out, bytes], scales s [out, pieces * 2], bias [out] or null -> y [m, out]; x, bias and y of one type.
#define EXPORT(BITS, TYPE, HALF)                                                                                           \
    void grouped##BITS##_##TYPE(const void *x, const void *w, const uint16_t *s, const void *bias, void *y, int64_t m,     \
                                int64_t out, int64_t n, int threads) {                                                     \
        const Rows rows = {w, s, bytes(n, BITS), pieces(n) * 2, 0};                                                        \
        FEW(rows, x, bias, y, m, out, n, n, threads, BITS, HALF);                                                          \
    }

EXPORT(4, f32, 0)
EXPORT(4, bf16, 1)
EXPORT(8, f32, 0)
EXPORT(8, bf16, 1)

// Columns [k, k + count) of a row, a whole number of vectors; `count` at most SPAN.
INLINE void restore(const char *w, const uint16_t *s, char *y, int64_t count, const int bits, const int half) {
    const int lanes = LANES(half);
    for (int u = 0; u * lanes < count; u++) {
        const vf v = weights(w, s, u, bits, half);
        const int64_t left = count - u * lanes;
        if (half && PAIRS)
            memcpy(y + u * lanes * 2, &v, MIN(left * 2, (int64_t)sizeof v));
        else if (left >= W)
            store(y, u * W, v, half);
        else
            store_n(y, u * W, left, v, half);
    }
}

// Codes w [rows, bytes] and scales s [rows, pieces * 2] -> y [rows, n].
#define RESTORE(BITS, TYPE, HALF)                                                                                          \
    void restore##BITS##_##TYPE(const char *w, const uint16_t *s, char *y, int64_t rows, int64_t n, int threads) {         \
        const int64_t wide = bytes(n, BITS), spread = pieces(n) * 2, each = HALF ? 2 : 4;                                  \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")                                 \
        for (int64_t o = 0; o < rows; o++)                                                                                 \
            for (int64_t k = 0; k < n; k += SPAN)                                                                          \
                restore(w + o * wide + size(k, BITS, HALF), s + o * spread + k / GROUP, y + (o * n + k) * each,            \
                        MIN(SPAN, n - k), BITS, HALF);                                                                     \
    }

RESTORE(4, f32, 0)
RESTORE(4, bf16, 1)
RESTORE(8, f32, 0)
RESTORE(8, bf16, 1)
