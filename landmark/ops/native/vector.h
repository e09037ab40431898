// Portable vectors (GCC and Clang extensions): W float lanes, loads and stores of float32 and bfloat16, exp, tanh, erf.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define W 16
#define IN_ORDER
#else
#define W 8
#define IN_ORDER __asm__ volatile("" ::: "memory")  // what is loaded after it is not loaded before: 16 registers run out soon
#endif
#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint16_t bf16;

INLINE vf splat(float x) { return x - (vf){}; }
INLINE vf select_(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vf vmax(vf a, vf b) {
#ifdef __AVX512F__
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return select_(a > b, a, b);
#endif
}
INLINE vf vmin(vf a, vf b) { return select_(a < b, a, b); }

INLINE float widen(bf16 x) {
    uint32_t u = (uint32_t)x << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

INLINE bf16 narrow(float x) {  // to nearest even
    uint32_t u;
    memcpy(&u, &x, 4);
    return x != x ? 0x7fc0 : (bf16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

INLINE vf widen_v(vh h) {
#ifdef __AVX512F__
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#else
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

INLINE vh narrow_v(vf x) {
#ifdef __AVX512BF16__
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    vu u = (vu)x, r = (u + 0x7fff + (u >> 16 & 1)) >> 16, bad = (vu)(x != x);
    return __builtin_convertvector((r & ~bad) | (0x7fc0 & bad), vh);
#endif
}

// Element i of an array of float32, or of bfloat16 where `half` (a compile-time constant at every call).
INLINE vf load(const void *p, int64_t i, int half) {
    if (half) {
        vh h;
        memcpy(&h, (const bf16 *)p + i, sizeof h);
        return widen_v(h);
    }
    vf x;
    memcpy(&x, (const float *)p + i, sizeof x);
    return x;
}

INLINE void store(void *p, int64_t i, vf x, int half) {
    if (half) {
        vh h = narrow_v(x);
        memcpy((bf16 *)p + i, &h, sizeof h);
    } else
        memcpy((float *)p + i, &x, sizeof x);
}

// The first n < W lanes only; the others are `fill`.
INLINE vf load_n(const void *p, int64_t i, int64_t n, float fill, int half) {
    float t[W];
    for (int j = 0; j < W; j++) t[j] = fill;
    for (int64_t j = 0; j < n; j++) t[j] = half ? widen(((const bf16 *)p)[i + j]) : ((const float *)p)[i + j];
    vf x;
    memcpy(&x, t, sizeof x);
    return x;
}

INLINE void store_n(void *p, int64_t i, int64_t n, vf x, int half) {
    for (int64_t j = 0; j < n; j++)
        if (half)
            ((bf16 *)p)[i + j] = narrow(x[j]);
        else
            ((float *)p)[i + j] = x[j];
}

INLINE float get(const void *p, int64_t i, int half) { return half ? widen(((const bf16 *)p)[i]) : ((const float *)p)[i]; }
INLINE void put(void *p, int64_t i, float x, int half) {
    if (half)
        ((bf16 *)p)[i] = narrow(x);
    else
        ((float *)p)[i] = x;
}

INLINE float sum(vf x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
#endif
}

INLINE float largest(vf x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#else
    float m = x[0];
    for (int j = 1; j < W; j++) m = MAX(m, x[j]);
    return m;
#endif
}

// exp to about 1 ulp: 2^n e^r with |r| <= ln(2)/2; 0 below -87.3, e^88.7 above 88.7; NaN stays NaN.
INLINE vf vexp(vf x) {
    vf y = select_(x > 88.7f, splat(88.7f), x), n = (y * 1.44269504f + 12582912.0f) - 12582912.0f;
    vf r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    vi e = __builtin_convertvector(n, vi);
    vf scaled = (vf)((vi)p + (e << 23));
    return select_(x < -87.3f, splat(0), scaled);
}

INLINE vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

INLINE vf vtanh(vf x) {
    vf s = x * x;
    vf p = -5.70498872745e-3f * s + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    vf small = p * s * x + x;
    return select_(s < 0.390625f, small, 1.0f - 2.0f / (1.0f + vexp(2.0f * x)));
}

// Standard normal distribution function (Abramowitz and Stegun 7.1.26; absolute error below 1e-7).
INLINE vf vphi(vf x) {
    vf z = x * 0.70710678f, a = vmax(z, -z), t = 1.0f / (1.0f + 0.3275911f * a);
    vf p = 1.061405429f * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vf tail = 0.5f * p * t * vexp(-a * a);
    return select_(x < 0, tail, 1.0f - tail);
}
