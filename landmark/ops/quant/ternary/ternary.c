// y = x W^T where W is ternary, two bits a weight, and x is rounded to 8 bits a number, a scale a row: sums of whole numbers.
#include "vector.h"

#define LANES (4 * W)  // weights of one vector of bytes
#define PAD 64         // rows of x as bytes are padded to this, with zeros
#define CACHE 262144   // bytes of x that stay near while all of W passes

typedef uint8_t vb __attribute__((vector_size(LANES)));
typedef uint16_t vs __attribute__((vector_size(LANES)));

// acc + sums of four products each of bytes, u without sign (0 to 3) and x with sign.
INLINE vi dot(vi acc, vb u, vb x) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)u, (__m512i)x);
#elif defined(__AVX512BW__)
    return acc + (vi)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)u, (__m512i)x), _mm512_set1_epi16(1));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return acc + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)u, (__m256i)x), _mm256_set1_epi16(1));
#else
    for (int j = 0; j < LANES; j++) acc[j / 4] += (int)u[j] * (int8_t)x[j];
    return acc;
#endif
}

INLINE int32_t total(vi x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_epi32((__m512i)x);
#else
    int32_t t = 0;
    for (int j = 0; j < W; j++) t += x[j];
    return t;
#endif
}

// To the nearest whole number, halves to the even one.
INLINE vi nearest(vf x) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtps_epi32((__m256)x);
#else
    vi y;
    for (int j = 0; j < W; j++) y[j] = (int32_t)nearbyintf(x[j]);
    return y;
#endif
}

// R rows of bytes, which are 4 R rows of W, times M rows of x: sums[4 r + i][m], each weight read as 0, 1 or 2.
INLINE void strip(const uint8_t *w, const int8_t *x, int64_t n, int64_t xld, int32_t (*sums)[8], const int R, const int M) {
    vi acc[32];  // [R][4][M]
#pragma GCC unroll 32
    for (int i = 0; i < 4 * R * M; i++) acc[i] = (vi){};
    for (int64_t k = 0; k < n; k += LANES) {
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
            vb p = {}, u[4], v;
            if (k + LANES <= n)
                memcpy(&p, w + r * n + k, LANES);
            else
                memcpy(&p, w + r * n + k, n - k);
            if (M < 4) __builtin_prefetch(w + r * n + k + 4096);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) u[i] = (vb)((vs)p >> (2 * i)) & 3;
#pragma GCC unroll 6
            for (int m = 0; m < M; m++) {
                memcpy(&v, x + m * xld + k, LANES);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) acc[(r * 4 + i) * M + m] = dot(acc[(r * 4 + i) * M + m], u[i], v);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4 * R; i++)
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) sums[i][m] = total(acc[i * M + m]);
}

INLINE void strips(int64_t m, const uint8_t *w, const int8_t *x, int64_t n, int64_t xld, int32_t (*sums)[8], const int R) {
    switch (m) {
        case 1: strip(w, x, n, xld, sums, R, 1); break;
        case 2: strip(w, x, n, xld, sums, R, 2); break;
        case 3: strip(w, x, n, xld, sums, R, 3); break;
        case 4: strip(w, x, n, xld, sums, 1, 4); break;
        case 5: strip(w, x, n, xld, sums, 1, 5); break;
        default: strip(w, x, n, xld, sums, 1, 6);
    }
}

// Row x [n] to whole numbers q [PAD-padded], what it was multiplied by, and the sum of the numbers.
INLINE void tokens(const void *x, int64_t at, int64_t n, int8_t *q, int64_t xld, float *factor, int32_t *sum_, const int half) {
    vf most = splat(0);
    vi bad = {};
    for (int64_t k = 0; k < n; k += W) {
        const vf v = k + W <= n ? load(x, at + k, half) : load_n(x, at + k, n - k, 0, half);
        most = vmax(most, vmax(v, -v));
        bad |= v != v;
    }
    int is_bad = 0;
    for (int j = 0; j < W; j++) is_bad |= bad[j];
    const float f = is_bad ? NAN : 127.0f / MAX(largest(most), 1e-5f);
    *factor = f;
    int32_t s = 0;
    vi acc = {};
    for (int64_t k = 0; k < n; k += W) {
        const vf v = (k + W <= n ? load(x, at + k, half) : load_n(x, at + k, n - k, 0, half)) * f;
        const vi i = is_bad ? (vi){} : nearest(v);
        acc += i;
        typedef int8_t v8 __attribute__((vector_size(W)));
        const v8 b = __builtin_convertvector(i, v8);
        memcpy(q + k, &b, MIN(W, n - k));
    }
    s = total(acc);
    memset(q + n, 0, xld - n);
    *sum_ = s;
}

INLINE void linear(const void *x, int8_t *q, float *factor, int32_t *sum_, const uint8_t *w, const void *scale, const void *bias,
                   void *y, int64_t m, int64_t out, int64_t n, int64_t xld, int reciprocal, int scale_half, int threads,
                   const int half) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && m > 1)
    for (int64_t i = 0; i < m; i++) tokens(x, i * n, n, q + i * xld, xld, factor + i, sum_ + i, half);
    const float s = reciprocal ? 1.0f / get(scale, 0, scale_half) : get(scale, 0, scale_half);
    const int64_t rows = (out + 3) / 4, near = MAX(6, CACHE / xld / 6 * 6);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        const int64_t first = rows * t / threads, last = rows * (t + 1) / threads;
        for (int64_t from = 0; from < m; from += near) {
            const int64_t to = MIN(m, from + near);
            for (int64_t r = first; r < last;) {
                const int R = to - from <= 3 && r + 2 <= last ? 2 : 1;
                for (int64_t i = from; i < to; i += 6) {
                    int32_t sums[8][8];
                    const int64_t count = MIN(6, to - i);
                    if (R == 2)
                        strips(count, w + r * n, q + i * xld, n, xld, sums, 2);
                    else
                        strips(count, w + r * n, q + i * xld, n, xld, sums, 1);
                    for (int64_t a = 0; a < 4 * R; a++) {
                        const int64_t o = (a & 3) * rows + r + (a >> 2);
                        if (o >= out) continue;
                        const float b = bias ? get(bias, o, half) : 0;
                        for (int64_t j = 0; j < count; j++)
                            put(y, (i + j) * out + o, (float)(sums[a][j] - sum_[i + j]) * (s / factor[i + j]) + b, half);
                    }
                }
                r += R;
            }
        }
    }
}

// w [out, n] -> packed [ceil(out / 4), n]; bits past the last row are 0.
INLINE void pack(const void *w, const float *scale, uint8_t *packed, int64_t out, int64_t n, int threads, const int half) {
    const int64_t rows = (out + 3) / 4;
    const float s = 1.0f / *scale;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < n; k += W) {
            vi bits = {};
            for (int i = 0; i < 4 && i * rows + r < out; i++) {
                const int64_t at = (i * rows + r) * n + k;
                const vf v = (k + W <= n ? load(w, at, half) : load_n(w, at, n - k, 0, half)) * s;
                bits |= (1 - (v > 0.5f) + (v < -0.5f)) << (2 * i);
            }
            typedef uint8_t v8 __attribute__((vector_size(W)));
            const v8 b = __builtin_convertvector(bits, v8);
            memcpy(packed + r * n + k, &b, MIN(W, n - k));
        }
}

#define EXPORT(NAME, HALF)                                                                                                    \
    void linear_##NAME(const void *x, int8_t *q, float *factor, int32_t *sum_, const uint8_t *w, const void *scale,           \
                       const void *bias, void *y, int64_t m, int64_t out, int64_t n, int64_t xld, int reciprocal,             \
                       int scale_half, int threads) {                                                                         \
        linear(x, q, factor, sum_, w, scale, bias, y, m, out, n, xld, reciprocal, scale_half, threads, HALF);                 \
    }                                                                                                                         \
    void pack_##NAME(const void *w, const float *scale, uint8_t *packed, int64_t out, int64_t n, int threads) {               \
        pack(w, scale, packed, out, n, threads, HALF);                                                                        \
    }

EXPORT(f32, 0)
EXPORT(bf16, 1)
