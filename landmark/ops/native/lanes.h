// What moves numbers from lane to lane of W vectors.
#pragma once
#include "vector.h"

// v[i][j] and v[j][i] change places.
#if defined(__AVX2__) && !defined(__AVX512F__)  // of variable masks, which gcc sees below, it makes several instructions each
INLINE void transpose(vf *v) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
    }
    for (int i = 0; i < 8; i++) {
        const __m256d first = (__m256d)a[i / 4 * 4 + i % 4 / 2], second = (__m256d)a[i / 4 * 4 + i % 4 / 2 + 2];
        b[i] = (__m256)(i % 2 ? _mm256_unpackhi_pd(first, second) : _mm256_unpacklo_pd(first, second));
    }
    for (int i = 0; i < 4; i++) {
        v[i] = (vf)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        v[i + 4] = (vf)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}
#else
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
#endif

// Lane j is the sum of v[j]; v is lost.
#if defined(__AVX2__) && !defined(__AVX512F__)
INLINE vf sums(vf *v) {
    __m256 a[4];
    for (int i = 0; i < 4; i++) a[i] = _mm256_hadd_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
    const __m256 low = _mm256_hadd_ps(a[0], a[1]), high = _mm256_hadd_ps(a[2], a[3]);
    return (vf)_mm256_permute2f128_ps(low, high, 0x20) + (vf)_mm256_permute2f128_ps(low, high, 0x31);
}
#else
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
#endif
