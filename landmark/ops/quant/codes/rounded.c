// y = x W^T + b by matrices of codes, where x is rounded to 8 bits with a scale for every 32 of its columns: products of
// integers, which are exact, so that neither the number of rows of x nor the processor changes a bit of the sums of a group.
#include "groups.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define QUADS 512  // integer products, four columns at a time, in vectors of so many bits: by vpdpbusd
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define QUADS 256  // by vpmaddubsw
#else
#define QUADS 0
#endif

#define OFFSET(bits) ((bits) == 4 ? 8 : QUADS == 512 ? 128 : 0)  // what makes a number of W positive
#define SPAN (GROUP * (QUADS ? 1 : 4) + 8)                       // bytes of a row of x in a group: columns, start and scale

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

// Four columns of the i-th of M rows of packed x, the p-th such, and what it begins with.
INLINE int32_t four_of(const char *x, int p, int i, const int M) {
    int32_t four;
    memcpy(&four, x + (p * M + i) * 4, 4);
    return four;
}
INLINE int32_t start_of(const char *x, int i, const int M) { return four_of(x, GROUP / 4, i, M); }

#if QUADS == 512
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

// acc[V][M] = V vectors of rows of a unit's group, from the one `first` on, times M rows of packed x.
INLINE void products(const char *w, const char *x, int first, vf *acc, const int V, const int M, const int bits) {
    __m512i sum[VECTORS * MOST];
    for (int i = 0; i < M; i++)
        for (int v = 0; v < V; v++) sum[v * M + i] = _mm512_set1_epi32(start_of(x, i, M));
#pragma GCC unroll 8
    for (int p = 0; p < GROUP / 4; p++) {
        __m512i own[VECTORS];
        for (int v = 0; v < V; v++) own[v] = quad(vector_of(w, first + v, bits), p, bits);
        for (int i = 0; i < M; i++) {
            const __m512i y = _mm512_set1_epi32(four_of(x, p, i, M));
            for (int v = 0; v < V; v++) sum[v * M + i] = _mm512_dpbusd_epi32(sum[v * M + i], own[v], y);
        }
    }
    for (int i = 0; i < V * M; i++) acc[i] = (vf)_mm512_cvtepi32_ps(sum[i]);
}
#else
// Four columns of 8 rows of a tile's group, a row a lane: of 4 bits made positive, the same columns as above; of 8 as they are.
INLINE __m256i quad(const char *w, int p, const int bits) {
    if (bits == 4) {
        const __m256i v = _mm256_loadu_si256((const void *)(w + p / 2 * 64));
        return _mm256_and_si256(p % 2 ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
    }
    const __m256i lanes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    return _mm256_shuffle_epi8(_mm256_loadu_si256((const void *)(w + p * 64)), lanes);
}

// acc[V][M] = V vectors of rows of a unit's group, from the one `first` on, times M rows of packed x. Sums of 4 bits stay in
// 16 (32 times 15 times 127 is 2 times 30,480); of 8 bits x takes their sign, and two products fit (2 times 127 squared).
INLINE void products(const char *w, const char *x, int first, vf *acc, const int V, const int M, const int bits) {
    const __m256i ones = _mm256_set1_epi16(1), sign = _mm256_set1_epi8(-128);
    __m256i sum[VECTORS * MOST];
    for (int i = 0; i < V * M; i++) sum[i] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int p = 0; p < GROUP / 4; p++) {
        __m256i own[VECTORS];
        for (int v = 0; v < V; v++) own[v] = quad(vector_of(w, first + v, bits), p, bits);
        for (int i = 0; i < M; i++) {
            const __m256i y = _mm256_set1_epi32(four_of(x, p, i, M));
            for (int v = 0; v < V; v++) {
                __m256i *s = sum + v * M + i;
                if (bits == 4)
                    *s = _mm256_add_epi16(*s, _mm256_maddubs_epi16(own[v], y));
                else {
                    const __m256i two = _mm256_maddubs_epi16(_mm256_andnot_si256(sign, own[v]), _mm256_sign_epi8(y, own[v]));
                    *s = _mm256_add_epi32(*s, _mm256_madd_epi16(two, ones));
                }
                __asm__("" : "+x"(*s));  // or the compiler adds up in another order, and registers run out
            }
        }
        IN_ORDER;
    }
    for (int v = 0; v < V; v++)
        for (int i = 0; i < M; i++) {
            __m256i s = sum[v * M + i];
            if (bits == 4) s = _mm256_add_epi32(_mm256_madd_epi16(s, ones), _mm256_set1_epi32(start_of(x, i, M)));
            acc[v * M + i] = (vf)_mm256_cvtepi32_ps(s);
        }
}
#endif
#endif

INLINE void units(const Map *map, int64_t n, const char *x, int64_t from, int64_t to, int64_t row, const int M, const int bits,
                  const int half) {
    const char *w = codes_of(map, n, from, 0, bits);
    const uint16_t *s = scales_of(map, n, from, 0);
#pragma GCC unroll 1
    for (; from < to; from++) {
        const char *own = x;
        vf total[VECTORS * MOST], acc[VECTORS * MOST];
        for (int i = 0; i < VECTORS * M; i++) total[i] = splat(0);
#pragma GCC unroll 1
        for (int64_t g = groups_of(n); g > 0; g--, own += SPAN * M, w += TOGETHER * BYTES(bits), s += UNIT) {
            if (QUADS == 512 && bits == 8) fetch_l2(w, TOGETHER * BYTES(bits));
            else fetch(w, TOGETHER * BYTES(bits));
            float by[MOST];
            memcpy(by, own + (SPAN - 4) * M, M * 4);
            for (int first = 0; first < VECTORS; first += AT_ONCE(M)) {
#if QUADS
                products(w, own, first, acc, AT_ONCE(M), M, bits);
#else
                products_f32(w, (const float *)own, first, acc, AT_ONCE(M), M, bits);
#endif
                for (int v = first; v < first + AT_ONCE(M); v++) {
                    const vf scale = scales(s + v * W) / (QUADS ? 1 : LIFT);
                    for (int i = 0; i < M; i++) *total_of(total, v, i, M) += acc[(v - first) * M + i] * (scale * by[i]);
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
