// y = x W^T + b for few rows of x: W is read once, in order, at memory speed. W is float32, bfloat16, or codes of 4 or 8
// bits in groups of 32 columns with a scale (float16) each; in registers it is what x is.
#pragma once
#include <stdlib.h>
#include "vector.h"

#ifdef __AVX512BF16__
#define PAIRS 1  // bfloat16 products by vdpbf16ps, 32 at a time
#else
#define PAIRS 0
#endif
#define LANES(half) ((half) && PAIRS ? 32 : W)  // columns that a vector of W or of packed x holds
#define PLAIN 0                                 // else the bits of a code
#define GROUP 32
#define SPAN 128     // columns that one step of the inner loop takes
#define ROWS 16      // rows of W that share a block of columns, where x needs blocks
#define MOST 8       // rows of x at a time
#define CACHE 32768  // bytes of x that the first-level cache holds beside W's stream
#define BLOCK 16384  // bytes of x in a block of columns, if all of it is more than CACHE
#define AHEAD 8192   // bytes to prefetch ahead where W is read in order

// Bytes of n columns of W, n a multiple of 64 (of 128 for 4 bits) where they are codes.
INLINE int64_t size(int64_t n, const int bits, const int half) { return bits ? n * bits / 8 : n * (half ? 2 : 4); }

INLINE float from_half(uint16_t h) {
#ifdef __F16C__
    return _cvtsh_ss(h);
#else
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
#endif
}

// Vector number u of the span of W at w, whose groups' scales are at s. Of 4 bits, 64 bytes hold 128 columns: byte j has column
// j in its low half and column 64 + j in its high half.
INLINE vf weights(const char *w, const uint16_t *s, int u, const int bits, const int half) {
    const int column = u * LANES(half), high = bits == 4 && column >= 64;
    if (bits == PLAIN) {
        if (!(half && PAIRS)) return load(w, column, half);
        vf v;
        memcpy(&v, w + column * 2, sizeof v);
        return v;
    }
    w += bits == 4 ? column % 64 : column;
#if PAIRS
    if (half) {
        const __m512 scale = _mm512_cvtph_ps(_mm256_set1_epi16(s[column / GROUP]));
        if (bits == 4) {
            const __m512 table = _mm512_mul_ps(_mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8), scale);
            __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)w));  // of an index five bits count
            if (high) code = _mm512_srli_epi16(code, 4);
            return (vf)_mm512_permutexvar_epi16(code, (__m512i)_mm512_cvtne2ps_pbh(table, table));
        }
        const __m512 zero = _mm512_mul_ps(_mm512_set1_ps(128), scale);
        const __m512 a = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)w)));
        const __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(w + 16))));
        return (vf)_mm512_cvtne2ps_pbh(_mm512_fmsub_ps(b, scale, zero), _mm512_fmsub_ps(a, scale, zero));
    }
#endif
    typedef uint8_t vb __attribute__((vector_size(W)));
    vb b;
    memcpy(&b, w, sizeof b);
    vi code = __builtin_convertvector(b, vi);
    if (bits == 4) code = high ? code >> 4 : code & 15;
    return __builtin_convertvector(code - (1 << (bits - 1)), vf) * splat(from_half(s[column / GROUP]));
}

INLINE vf dot(vf w, const char *x, vf acc, const int half) {
    vf v;
    memcpy(&v, x, sizeof v);
#if PAIRS
    if (half) return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)v);
#endif
    return acc + w * v;
}

typedef struct {  // where some rows of W go on
    const char *w;
    const uint16_t *s;
    int64_t wide, spread, ahead;  // bytes and scales to the next row, bytes to what is prefetched
} Rows;

// Adds vector u of R rows of W times M rows of x, of which packed x has m, to acc[R][M].
INLINE void step(Rows at, const char *x, vf *acc, int u, const int R, const int M, const int bits, const int half) {
    vf v[2];
    for (int r = 0; r < R; r++) v[r] = weights(at.w + r * at.wide, at.s + r * at.spread, u, bits, half);
    for (int i = 0; i < M; i++)
        for (int r = 0; r < R; r++) acc[r * M + i] = dot(v[r], x + i * sizeof(vf), acc[r * M + i], half);
}

// Adds n columns of R rows of W times M rows of packed x to part[R][16].
INLINE void strip(Rows at, const char *x, int64_t m, int64_t n, vf *part, const int R, const int M, const int bits, const int half) {
    const int lanes = LANES(half), sets = R * M <= 4 ? 4 : R * M <= 8 ? 2 : 1;
    vf acc[16];  // [sets][R][M]
    for (int i = 0; i < sets * R * M; i++) acc[i] = splat(0);
#pragma GCC unroll 1
    for (; n >= SPAN; n -= SPAN) {
        for (int r = 0; r < R; r++)
            for (int b = 0; b < size(SPAN, bits, half); b += 64) __builtin_prefetch(at.w + at.ahead + r * at.wide + b);
#pragma GCC unroll 4
        for (int u = 0; u < SPAN / lanes; u++, x += m * sizeof(vf)) step(at, x, acc + u % sets * R * M, u, R, M, bits, half);
        at.w += size(SPAN, bits, half), at.s += SPAN / GROUP;
    }
#pragma GCC unroll 1
    for (int u = 0; n > 0; u++, n -= lanes, x += m * sizeof(vf)) {
        char last[2][64] = {0};
        Rows end = at;
        int v = u;
        if (bits == PLAIN && n < lanes) {
            for (int r = 0; r < R; r++) memcpy(last[r], at.w + r * at.wide + size(u * lanes, bits, half), size(n, bits, half));
            end.w = last[0], end.wide = sizeof last[0], v = 0;
        }
        step(end, x, acc, v, R, M, bits, half);
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < M; i++) {
            for (int u = 1; u < sets; u++) acc[r * M + i] += acc[(u * R + r) * M + i];
            part[r * 16 + i] += acc[r * M + i];
        }
}

INLINE void strips(Rows at, const char *x, int64_t m, int64_t some, int64_t n, vf *part, const int R, const int bits, const int half) {
    switch (some) {
        case 1: strip(at, x, m, n, part, R, 1, bits, half); break;
        case 2: strip(at, x, m, n, part, R, 2, bits, half); break;
        case 3: strip(at, x, m, n, part, R, 3, bits, half); break;
        case 4: strip(at, x, m, n, part, R, 4, bits, half); break;
        case 5: strip(at, x, m, n, part, R, 5, bits, half); break;
        case 6: strip(at, x, m, n, part, R, 6, bits, half); break;
        case 7: strip(at, x, m, n, part, R, 7, bits, half); break;
        default: strip(at, x, m, n, part, R, MOST, bits, half);
    }
}

// x as [n / lanes][m][lanes], zero-padded: one stream, whatever m. bfloat16 where vdpbf16ps takes it, else float32.
INLINE void pack(const char *x, char *packed, int64_t m, int64_t n, int64_t xld, const int half) {
    const int64_t lanes = LANES(half), each = half ? 2 : 4;
    for (int64_t from = 0; from < n; from += lanes)
        for (int64_t i = 0; i < m; i++, packed += sizeof(vf)) {
            const int64_t at = i * xld + from, count = MIN(lanes, n - from);
            if (half && !PAIRS) {
                for (int64_t j = 0; j < count; j++) ((float *)packed)[j] = get(x, at + j, half);
                for (int64_t j = count; j < lanes; j++) ((float *)packed)[j] = 0;
            } else {
                memcpy(packed, x + at * each, count * each);
                memset(packed + count * each, 0, (lanes - count) * each);
            }
        }
}

// Rows [from, to) of W. All columns of a row in one go if x fits the cache; else `width` columns of ROWS rows, then the next ones.
// From three rows of x on, two rows of W at a time: x is read half as often, and more sums are under way.
INLINE void share(Rows w, const char *packed, const char *bias, char *y, int64_t m, int64_t from, int64_t to, int64_t out, int64_t n,
                  int64_t width, const int bits, const int half) {
    vf part[ROWS][16];
    for (int64_t o = from; o < to; o += ROWS) {
        const int64_t rows = MIN(ROWS, to - o);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < m; i++) part[r][i] = splat(0);
        for (int64_t k = 0; k < n; k += width)
            for (int64_t r = 0; r < rows;) {
                const int R = (m > 2 || width < n) && r + 2 <= rows ? 2 : 1;
                const int64_t far = o * w.wide + size(k + width, bits, half);  // where the next block of columns begins
                Rows at = {w.w + (o + r) * w.wide + size(k, bits, half), w.s ? w.s + (o + r) * w.spread + k / GROUP : 0, w.wide, w.spread, AHEAD};
                if (width < n) at.ahead = r + 2 < rows || k + width >= n ? 2 * w.wide : w.w + far - at.w;
                for (int64_t i = 0; i < m; i += MOST) {
                    const char *x = packed + (k / LANES(half) * m + i) * sizeof(vf);
                    if (R == 2)
                        strips(at, x, m, m - i, MIN(width, n - k), part[r] + i, 2, bits, half);
                    else
                        strips(at, x, m, m - i, MIN(width, n - k), part[r] + i, 1, bits, half);
                }
                r += R;
            }
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < m; i++)
                put(y, i * out + o + r, sum(part[r][i]) + (bias ? get(bias, o + r, half) : 0), half);
    }
}

// Columns of W in a block: all if packed x fits the cache.
INLINE int64_t block(int64_t m, int64_t n, const int half) {
    const int64_t span = m * SPAN / LANES(half) * (int64_t)sizeof(vf);
    return (n + SPAN - 1) / SPAN * span <= CACHE ? n : MAX(1, BLOCK / span) * SPAN;
}

// x [m, n] (row stride xld), W [out, n], bias [out] or null -> y [m, out]; m <= 16. A macro, for a thread's part of the loop is a
// function of its own, which would not see that BITS and HALF are constants.
#define FEW(w, x, bias, y, m, out, n, xld, threads, BITS, HALF)                                                          \
    do {                                                                                                                 \
        const int64_t lanes = LANES(HALF), width = block(m, n, HALF);                                                    \
        char *packed = aligned_alloc(64, ((n + lanes - 1) / lanes * m * sizeof(vf) + 63) / 64 * 64);                     \
        if (!packed) abort();                                                                                            \
        pack(x, packed, m, n, xld, HALF);                                                                                \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")                               \
        for (int t = 0; t < threads; t++)                                                                                \
            share(w, packed, bias, y, m, out * t / threads, out * (t + 1) / threads, out, n, width, BITS, HALF);         \
        free(packed);                                                                                                    \
    } while (0)
