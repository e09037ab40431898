// What moves numbers from lane to lane of W vectors.
#pragma once
#include "vector.h"

// v[i][j] and v[j][i] change places.
INLINE void transpose(vf *v) {
#pragma GCC unroll 5
    for (int s = 1; s < W; s *= 2) {
        vi low, high;  // which lanes of a pair of vectors go to the first and to the second
        for (int j = 0; j < W; j++) low[j] = j & s ? W + j - s : j, high[j] = j & s ? W + j : j + s;
#pragma GCC unroll 16
        for (int i = 0; i < W; i++)
            if (!(i & s)) {
                const vf a = v[i], b = v[i + s];
                v[i] = __builtin_shuffle(a, b, low), v[i + s] = __builtin_shuffle(a, b, high);
            }
    }
}

// Lane j is the sum of v[j]; v is lost.
INLINE vf sums(vf *v) {
#pragma GCC unroll 5
    for (int s = 1; s < W; s *= 2) {
        vi low, high;
        for (int j = 0; j < W; j++) low[j] = j & s ? W + j : j, high[j] = j & s ? W + j - s : j + s;
#pragma GCC unroll 16
        for (int i = 0; i < W; i += 2 * s) v[i] = __builtin_shuffle(v[i], v[i + s], low) + __builtin_shuffle(v[i], v[i + s], high);
    }
    return v[0];
}
