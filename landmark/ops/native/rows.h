// Rows of any length, vector by vector.
#pragma once
#include "vector.h"

#define AT(p, i) ((char *)(p) + (i) * (half ? 2 : 4))

// Lanes i.. of a row of n, padded with zeros; and their way back.
INLINE vf take(const void *p, int64_t i, int64_t n, int half) {
    return i + W <= n ? load(p, i, half) : load_n(p, i, n - i, 0, half);
}
INLINE void give(void *p, int64_t i, int64_t n, vf x, int half) {
    if (i + W <= n)
        store(p, i, x, half);
    else
        store_n(p, i, n - i, x, half);
}
