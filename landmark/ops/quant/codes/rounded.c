// y = x W^T + b by matrices of codes, where x is rounded to 8 bits with a scale for every 32 of its columns: products of
// integers, which are exact, so that neither the number of rows of x nor the processor changes a bit of the sums of a group.
#include "groups.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define QUADS 1  // integer products by vpdpbusd, four columns at a time
#else
#define QUADS 0
#endif

#define OFFSET(bits) ((bits) == 4 ? 8 : 128)  // what makes a number of W positive
#define SPAN (GROUP * (QUADS ? 1 : 4) + 8)    // bytes of a row of x in a group: columns, start and scale

INLINE int64_t row_bytes(int64_t n, const int half) { return groups_of(n) * SPAN; }

// Packed are MOST rows of x at a time, by groups: [columns or quads of them][rows], then where the sums begin (int32) and the
// scales (float), [rows] each.

#if QUADS
typedef int8_t bytes __attribute__((vector_size(GROUP)));

// The order in which a quad of lanes of `quad` has its columns.
INLINE bytes ordered(bytes v, const int bits) {
    if (bits == 8) return v;
    bytes order;
    for (int j = 0; j < GROUP; j++) order[j] = j / 8 * 8 + j / 4 % 2 * 2 + j % 2 * 4 + j / 2 % 2;
    return __builtin_shuffle(v, order);
}

// Four columns of 16 rows of a tile's group, a row a lane, made positive. Of 4 bits, 4 p to 4 p + 3 are columns
// 8 (p / 2) + 2 (p % 2) + (0, 4, 1, 5).
INLINE __m512i quad(const char *w, int p, const int bits) {
    if (bits == 4) {
        const __m512i v = _mm512_loadu_si512(w + p / 2 * 64);
        return _mm512_and_si512(p % 2 ? _mm512_srli_epi16(v, 4) : v, _mm512_set1_epi8(15));
    }
    const __m512i lanes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    const __m512i v = _mm512_shuffle_epi8(_mm512_loadu_si512(w + p * 64), lanes), one = _mm512_set1_epi8(-128);
    const __m512i size = _mm512_andnot_si512(one, v);
    return _mm512_mask_sub_epi8(_mm512_or_si512(size, one), _mm512_movepi8_mask(v), one, size);
}

// acc[TOGETHER][M] = a unit's group times M rows of packed x.
INLINE void products(const char *w, const char *x, vf *acc, const int M, const int bits) {
    const int R = TOGETHER;
    __m512i sum[TOGETHER * MOST];
    const char *start = x + GROUP * M;
    for (int i = 0; i < M; i++) {
        int32_t first;
        memcpy(&first, start + i * 4, 4);
        for (int r = 0; r < R; r++) sum[r * M + i] = _mm512_set1_epi32(first);
    }
#pragma GCC unroll 8
    for (int p = 0; p < GROUP / 4; p++) {
        __m512i v[TOGETHER];
        for (int r = 0; r < R; r++) v[r] = quad(w + r * BYTES(bits), p, bits);
        for (int i = 0; i < M; i++) {
            int32_t four;
            memcpy(&four, x + (p * M + i) * 4, 4);
            const __m512i y = _mm512_set1_epi32(four);
            for (int r = 0; r < R; r++) sum[r * M + i] = _mm512_dpbusd_epi32(sum[r * M + i], v[r], y);
        }
    }
    for (int i = 0; i < R * M; i++) acc[i] = (vf)_mm512_cvtepi32_ps(sum[i]);
}
#endif

INLINE void units(const Map *map, int64_t n, const char *x, int64_t from, int64_t to, int64_t row, const int M, const int bits,
                  const int half) {
    const char *w = codes_of(map, n, from, 0, bits);
    const uint16_t *s = scales_of(map, n, from, 0);
#pragma GCC unroll 1
    for (; from < to; from++) {
        const char *own = x;
        vf total[TOGETHER * MOST * PARTS], acc[TOGETHER * MOST];
        for (int i = 0; i < TOGETHER * M * PARTS; i++) total[i] = splat(0);
#pragma GCC unroll 1
        for (int64_t g = groups_of(n); g > 0; g--, own += SPAN * M, w += TOGETHER * BYTES(bits), s += UNIT) {
            fetch(w, TOGETHER * BYTES(bits));
            float by[MOST];
            memcpy(by, own + (SPAN - 4) * M, M * 4);
            for (int part = 0; part < PARTS; part++) {
#if QUADS
                products(w, own, acc, M, bits);
#else
                products_f32(w, (const float *)own, part, acc, M, bits);
#endif
                for (int r = 0; r < TOGETHER; r++) {
                    const vf scale = scales(s + r * TILE + part * W);
                    for (int i = 0; i < M; i++) total[(r * M + i) * PARTS + part] += acc[r * M + i] * (scale * by[i]);
                }
            }
        }
        finish(map, total, from * TOGETHER, row, TOGETHER, M, half);
    }
}

// 32 columns of a row of x from the k-th, rounded, to q; where their sum with W's begins, and their scale.
INLINE float round_(const char *x, int64_t k, int64_t n, float *q, int32_t *start, const int bits, const int half) {
    vf v[GROUP / W], most = splat(0);
    for (int j = 0; j < GROUP / W; j++) {
        const int64_t at = k % n + j * W, left = n - at;
        v[j] = left >= W ? load(x, k + j * W, half) : load_n(x, k + j * W, MAX(0, left), 0, half);
        most = vmax(most, vmax(v[j], -v[j]));
    }
    const float top = largest(most), by = top > 1e-30f ? 127 / top : 0;
    vf all = splat(0);
    for (int j = 0; j < GROUP / W; j++) {
        v[j] = v[j] * by + 12582912 - 12582912;  // to the nearest even integer
        all += v[j];
        memcpy(q + j * W, v + j, sizeof v[j]);
    }
    const float total = sum(all);
    *start = QUADS && total == total ? -OFFSET(bits) * (int32_t)total : 0;
    return total == total ? top / 127 : NAN;  // of numbers that are none nothing is made up
}

INLINE void pack(const char *x, char *packed, int64_t m, int64_t n, int64_t k, const int bits, const int half) {
    const int64_t groups = groups_of(n), end = MIN(n, k + COLUMNS);
    for (int64_t row = 0; row < m; row++) {
        const int64_t first = row / MOST * MOST, M = MIN(MOST, m - first), i = row - first;
        char *to = packed + (groups * first + k / GROUP * M) * SPAN;
        for (int64_t at = k; at < end; at += GROUP, to += SPAN * M) {
            float q[GROUP];
            int32_t start;
            const float scale = round_(x, row * n + at, n, q, &start, bits, half);
#if QUADS
            bytes all;
            for (int j = 0; j < GROUP; j += W) {
                typedef int8_t part __attribute__((vector_size(W)));
                const part some = __builtin_convertvector(__builtin_convertvector(load(q, j, 0), vi), part);
                memcpy((char *)&all + j, &some, sizeof some);
            }
            all = ordered(all, bits);
            int32_t four[GROUP / 4];
            memcpy(four, &all, sizeof all);
            for (int j = 0; j < GROUP / 4; j++) memcpy(to + (j * M + i) * 4, four + j, 4);
#else
            for (int j = 0; j < GROUP; j++) memcpy(to + (j * M + i) * 4, q + j, 4);
#endif
            memcpy(to + (SPAN - 8) * M + i * 4, &start, 4), memcpy(to + (SPAN - 4) * M + i * 4, &scale, 4);
        }
    }
}

TILED(4, f32, 0, part)
TILED(4, bf16, 1, part)
TILED(8, f32, 0, part)
TILED(8, bf16, 1, part)
