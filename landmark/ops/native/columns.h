// How x is packed where it stays as it is: BLOCK(m, half) of m rows at a time as [columns][rows] of floats or, where the processor has
// products of bfloat16 (PAIRS), as [pairs of columns][rows]; there are zeros up to a whole number of WHOLE columns.
#pragma once
#include "tiles.h"

#define WHOLE 32
#ifndef BLOCK
#define BLOCK(m, half) MOST
#endif

INLINE int64_t wide(int64_t n) { return (n + WHOLE - 1) / WHOLE * WHOLE; }
INLINE int64_t row_bytes(int64_t n, const int half) { return wide(n) * (half && PAIRS ? 2 : 4); }

INLINE void pack(const char *x, char *packed, int64_t m, int64_t n, int64_t k, const int bits, const int half) {
    const int64_t from = k, end = MIN(wide(n), k + COLUMNS);
    for (int64_t first = 0; first < m; first += BLOCK(m, half)) {
        const int64_t rows = MIN(BLOCK(m, half), m - first);
        if (half && PAIRS) {
            const bf16 *row = (const bf16 *)x + first * n;
            uint32_t *to = (uint32_t *)packed + from / 2 * rows;
            for (k = from; k < MIN(end, n - 1); k += 2)
                for (int64_t i = 0; i < rows; i++, to++) memcpy(to, row + i * n + k, 4);
            for (; k < end; k += 2)
                for (int64_t i = 0; i < rows; i++) *to++ = k < n ? row[i * n + k] : 0;
        } else
            for (k = from; k < end; k++)
                for (int64_t i = 0; i < rows; i++) ((float *)packed)[k * rows + i] = k < n ? get(x, (first + i) * n + k, half) : 0;
        packed += row_bytes(n, half) * rows;
    }
}
