// y = x W^T + b for few rows of x and a W of 4 or 8 bit codes in groups of 32 columns, each group with a scale (float16).
// x is cut into the same groups and rounded to 8 bits, so that 64 products are one instruction and W is read once, in order.
#include <stdlib.h>
#include "vector.h"

#define GROUP 32
#define STEP 64    // columns that one step takes: two groups
#define MANY 8     // rows of x at a time
#define AHEAD 4096 // bytes to prefetch ahead where W is read in order

typedef struct {            // 64 columns of one row of x
    int8_t code[STEP];      // round(x / scale)
    int32_t base[STEP / 4]; // -(zero of W) * the sums of four codes
    float scale[STEP / 4];  // of the group that each four columns are in
} Piece;

INLINE float from_half(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    uint32_t u = (rest << 13) + 0x38000000;
    float f;
    if (rest >= 0x7c00) u += 0x38000000;
    memcpy(&f, &u, 4);
    if (rest < 0x400) f = (float)rest * 5.9604644775390625e-8f;
    memcpy(&u, &f, 4);
    u |= sign;
    memcpy(&f, &u, 4);
    return f;
}

// m rows of x as [pieces][m], zero beyond the end.
INLINE void pack(const void *x, Piece *out, int64_t m, int64_t n, int zero, const int half) {
    const vf magic = splat(12582912.0f);  // its last bits become the nearest whole number
    for (int64_t i = 0; i < m; i++)
        for (int64_t from = 0; from < n; from += STEP) {
            Piece *p = out + from / STEP * m + i;
            for (int g = 0; g < STEP; g += GROUP) {
                vf v[GROUP / W], top = splat(0);
                for (int j = 0; j < GROUP / W; j++) {
                    const int64_t at = from + g + j * W, left = n - at;
                    v[j] = left >= W ? load(x, i * n + at, half) : left > 0 ? load_n(x, i * n + at, left, 0, half) : splat(0);
                    top = vmax(top, vmax(v[j], -v[j]));
                }
                const float most = largest(top), scale = most / 127, inverse = most > 0 ? 127 / most : 0;
                for (int j = 0; j < GROUP / W; j++) {
                    const vi code = (vi)(v[j] * inverse + magic);
                    for (int k = 0; k < W; k++) p->code[g + j * W + k] = (int8_t)code[k];
                }
                for (int j = 0; j < GROUP / 4; j++) p->scale[g / 4 + j] = scale;
            }
            for (int j = 0; j < STEP / 4; j++) {
                int sum = 0;
                for (int k = 0; k < 4; k++) sum += p->code[4 * j + k];
                p->base[j] = -zero * sum;
            }
        }
}

#ifdef __AVX512VNNI__
typedef __m512i codes;
INLINE codes bytes(const uint8_t *w) { return _mm512_loadu_si512(w); }
INLINE codes nibbles(const uint8_t *w, const int high) {
    const __m512i v = _mm512_loadu_si512(w), mask = _mm512_set1_epi8(15);
    return high ? _mm512_and_si512(_mm512_srli_epi16(v, 4), mask) : _mm512_and_si512(v, mask);
}
INLINE vf scales(const uint16_t *s) {  // of two groups, each for eight lanes
    int32_t two;
    memcpy(&two, s, 4);
    const __m256i spread = _mm256_set_epi8(3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0);
    return (vf)_mm512_cvtph_ps(_mm256_shuffle_epi8(_mm256_set1_epi32(two), spread));
}
INLINE vf product(codes w, const Piece *p, vf scale, vf acc) {
    const __m512i dots = _mm512_dpbusd_epi32(_mm512_load_si512(p->base), w, _mm512_load_si512(p->code));
    return (vf)_mm512_cvtepi32_ps(dots) * scale * (vf)_mm512_load_ps(p->scale) + acc;
}
typedef vf total;
INLINE total nothing(void) { return splat(0); }
INLINE float whole(total t) { return sum(t); }
#else
typedef struct { uint8_t b[STEP]; } codes;
typedef struct { float s[2]; } pair;
INLINE codes bytes(const uint8_t *w) {
    codes c;
    memcpy(c.b, w, STEP);
    return c;
}
INLINE codes nibbles(const uint8_t *w, const int high) {
    codes c;
    for (int j = 0; j < STEP; j++) c.b[j] = high ? w[j] >> 4 : w[j] & 15;
    return c;
}
INLINE pair scales(const uint16_t *s) { return (pair){{from_half(s[0]), from_half(s[1])}}; }
typedef float total;
INLINE total nothing(void) { return 0; }
INLINE float whole(total t) { return t; }
INLINE float product(codes w, const Piece *p, pair scale, float acc) {
    for (int g = 0; g < 2; g++) {
        int32_t dot = 0;
        for (int j = 0; j < GROUP; j++) dot += (int32_t)w.b[g * GROUP + j] * p->code[g * GROUP + j];
        for (int j = 0; j < GROUP / 4; j++) dot += p->base[g * GROUP / 4 + j];
        acc += (float)dot * scale.s[g] * p->scale[g * GROUP / 4];
    }
    return acc;
}
#endif

// R rows of W times M rows of x; `pieces` of 64 columns. acc[R][M]
INLINE void strip(const uint8_t *w, int64_t wide, const uint16_t *s, int64_t spread, const Piece *x, int64_t m, int64_t pieces,
                  total *out, const int R, const int M, const int bits) {
    total acc[2 * MANY];
    for (int i = 0; i < R * M; i++) acc[i] = nothing();
#pragma GCC unroll 1
    for (int64_t k = 0; k < pieces; k += bits == 4 ? 2 : 1, w += STEP) {
        for (int r = 0; r < R; r++) __builtin_prefetch(w + AHEAD + r * wide);
        for (int high = 0; high < (bits == 4 ? 2 : 1) && k + high < pieces; high++, s += 2, x += m)
            for (int r = 0; r < R; r++) {
                const codes c = bits == 4 ? nibbles(w + r * wide, high) : bytes(w + r * wide);
                const __typeof__(scales(s)) scale = scales(s + r * spread);
                for (int i = 0; i < M; i++) acc[r * M + i] = product(c, x + i, scale, acc[r * M + i]);
            }
    }
    for (int i = 0; i < R * M; i++) out[i] = acc[i];
}

INLINE void strips(int64_t left, const uint8_t *w, int64_t wide, const uint16_t *s, int64_t spread, const Piece *x, int64_t m,
                   int64_t pieces, total *acc, const int R, const int bits) {
    switch (left) {
        case 1: strip(w, wide, s, spread, x, m, pieces, acc, R, 1, bits); break;
        case 2: strip(w, wide, s, spread, x, m, pieces, acc, R, 2, bits); break;
        case 3: strip(w, wide, s, spread, x, m, pieces, acc, R, 3, bits); break;
        case 4: strip(w, wide, s, spread, x, m, pieces, acc, R, 4, bits); break;
        case 5: strip(w, wide, s, spread, x, m, pieces, acc, R, 5, bits); break;
        case 6: strip(w, wide, s, spread, x, m, pieces, acc, R, 6, bits); break;
        case 7: strip(w, wide, s, spread, x, m, pieces, acc, R, 7, bits); break;
        default: strip(w, wide, s, spread, x, m, pieces, acc, R, MANY, bits);
    }
}

// Rows [from, to) of W; two at a time where several rows of x are read with them.
INLINE void share(const Piece *x, const uint8_t *w, const uint16_t *s, const void *bias, void *y, int64_t m, int64_t from, int64_t to,
                  int64_t out, int64_t pieces, int64_t wide, const int bits, const int half) {
    for (int64_t o = from; o < to;) {
        const int R = m > 1 && o + 2 <= to ? 2 : 1;
        for (int64_t i = 0; i < m; i += MANY) {
            total acc[2 * MANY];
            const int64_t here = MIN(MANY, m - i);
            if (R == 2)
                strips(here, w + o * wide, wide, s + o * pieces * 2, pieces * 2, x + i, m, pieces, acc, 2, bits);
            else
                strips(here, w + o * wide, wide, s + o * pieces * 2, pieces * 2, x + i, m, pieces, acc, 1, bits);
            for (int r = 0; r < R; r++)
                for (int64_t j = 0; j < here; j++)
                    put(y, (i + j) * out + o + r, whole(acc[r * here + j]) + (bias ? get(bias, o + r, half) : 0), half);
        }
        o += R;
    }
}

INLINE void linear(const void *x, const uint8_t *w, const uint16_t *s, const void *bias, void *y, int64_t m, int64_t out, int64_t n,
                   int threads, const int bits, const int half) {
    const int64_t pieces = (n + STEP - 1) / STEP, wide = bits == 4 ? (pieces + 1) / 2 * STEP : pieces * STEP;
    Piece *packed = aligned_alloc(64, pieces * m * sizeof(Piece));
    if (!packed) abort();
    pack(x, packed, m, n, 1 << (bits - 1), half);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++)
        share(packed, w, s, bias, y, m, out * t / threads, out * (t + 1) / threads, out, pieces, wide, bits, half);
    free(packed);
}

// x [m, n], codes w [out, bytes], scales s [out, pieces * 2], bias [out] or null -> y [m, out]; x, bias and y of one type.
#define EXPORT(NAME, BITS, HALF)                                                                                             \
    void NAME(const void *x, const uint8_t *w, const uint16_t *s, const void *bias, void *y, int64_t m, int64_t out, int64_t n, \
              int threads) {                                                                                                 \
        linear(x, w, s, bias, y, m, out, n, threads, BITS, HALF);                                                            \
    }
EXPORT(grouped4_f32, 4, 0)
EXPORT(grouped4_bf16, 4, 1)
EXPORT(grouped8_f32, 8, 0)
EXPORT(grouped8_bf16, 8, 1)

// Codes w [rows, bytes] and scales s [rows, pieces * 2] -> y [rows, n].
void grouped_restore(const uint8_t *w, const uint16_t *s, void *y, int64_t rows, int64_t n, int bits, int threads, int half) {
    const int64_t pieces = (n + STEP - 1) / STEP, wide = bits == 4 ? (pieces + 1) / 2 * STEP : pieces * STEP;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t o = 0; o < rows; o++)
        for (int64_t g = 0; g < n; g += GROUP) {
            const int64_t piece = g / STEP, within = g % STEP, count = MIN(GROUP, n - g);
            const uint8_t *at = w + o * wide + (bits == 4 ? piece / 2 * STEP : piece * STEP) + within;
            const int shift = bits == 4 && piece % 2 ? 4 : 0, mask = bits == 4 ? 15 : 255;
            const float scale = from_half(s[o * pieces * 2 + g / GROUP]), zero = 1 << (bits - 1);
            float v[GROUP];
            for (int j = 0; j < GROUP; j++) v[j] = ((float)(at[j] >> shift & mask) - zero) * scale;
            if (half)
                for (int64_t j = 0; j < count; j++) ((bf16 *)y)[o * n + g + j] = narrow(v[j]);
            else
                memcpy((float *)y + o * n + g, v, count * 4);
        }
}
