// y = x W^T + b for few rows of x and matrices of codes, and those matrices restored. A code is an integer; every 32
// columns of a row have a scale (float16).
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define PAIRS 1  // bfloat16 products by vdpbf16ps, two columns at a time
#else
#define PAIRS 0
#endif
#include "groups.h"
#include "columns.h"

#if PAIRS
typedef struct {
    __m512i low[2], high[2];  // of 4 bits, low[0] has their bfloat16; of 8, two bytes of the bfloat16 of 0 to 127
} Tables;

INLINE Tables tables(const int bits) {
    Tables t;
    uint8_t bytes[2][128];
    for (int m = 0; m < 128; m++) {
        const bf16 b = narrow(m);
        bytes[0][m] = b & 255, bytes[1][m] = b >> 8;
    }
    bf16 four[32];  // twice: an index has five bits, of which the last belongs to another code
    for (int j = 0; j < 32; j++) four[j] = narrow(j % 16 - 8);
    for (int i = 0; i < 2; i++) {
        t.low[i] = bits == 4 ? _mm512_loadu_si512(four) : _mm512_loadu_si512(bytes[0] + 64 * i);
        t.high[i] = _mm512_loadu_si512(bytes[1] + 64 * i);
    }
    return t;
}

// Columns 2 p and 2 p + 1 of 16 rows as bfloat16.
INLINE __m512i pair(const char *w, int p, const Tables *t, const int bits) {
    const __m512i v = _mm512_loadu_si512(w + p / (16 / bits) * 64);
    if (bits == 4) return _mm512_permutexvar_epi16(p % 4 ? _mm512_srli_epi16(v, p % 4 * 4) : v, t->low[0]);
    const __m512i low = _mm512_permutex2var_epi8(t->low[0], v, t->low[1]);
    const __m512i high = _mm512_permutex2var_epi8(t->high[0], v, t->high[1]);
    const __m512i signs = _mm512_ternarylogic_epi32(high, v, _mm512_set1_epi8(-128), 0xf8);  // high | v & 128
    return p % 2 ? _mm512_unpackhi_epi8(low, signs) : _mm512_unpacklo_epi8(low, signs);
}

// acc[TOGETHER][M] = a unit's group times M rows of packed x.
INLINE void products(const char *w, const char *x, const Tables *t, vf *acc, const int M, const int bits) {
    const int R = TOGETHER;
    for (int i = 0; i < R * M; i++) acc[i] = splat(0);
#pragma GCC unroll 16
    for (int p = 0; p < GROUP / 2; p++) {
        __m512i v[TOGETHER];
        for (int r = 0; r < R; r++) v[r] = pair(w + r * BYTES(bits), p, t, bits);
        for (int i = 0; i < M; i++) {
            int32_t both;
            memcpy(&both, x + (p * M + i) * 4, 4);
            const __m512bh y = (__m512bh)_mm512_set1_epi32(both);
            for (int r = 0; r < R; r++) acc[r * M + i] = (vf)_mm512_dpbf16_ps((__m512)acc[r * M + i], (__m512bh)v[r], y);
        }
    }
}
#endif

INLINE void units(const Map *map, int64_t n, const char *x, int64_t from, int64_t to, int64_t row, const int M, const int bits,
                  const int half) {
    const char *w = codes_of(map, n, from, 0, bits);
    const uint16_t *s = scales_of(map, n, from, 0);
#if PAIRS
    const Tables t = tables(bits);
#endif
#pragma GCC unroll 1
    for (; from < to; from++) {
        const char *own = x;
        vf total[VECTORS * MOST], acc[VECTORS * MOST];
        for (int i = 0; i < VECTORS * M; i++) total[i] = splat(0);
#pragma GCC unroll 1
        for (int64_t g = groups_of(n); g > 0; g--, w += TOGETHER * BYTES(bits), s += UNIT) {
            fetch(w, TOGETHER * BYTES(bits));
            for (int first = 0; first < VECTORS; first += AT_ONCE(M)) {
#if PAIRS
                if (half)
                    products(w, own, &t, acc, M, bits);
                else
#endif
                    products_f32(w, (const float *)own, first, acc, AT_ONCE(M), M, bits);
                for (int v = first; v < first + AT_ONCE(M); v++) {
                    const vf scale = scales(s + v * W) / (PAIRS && half ? 1 : LIFT);
                    for (int i = 0; i < M; i++) *total_of(total, v, i, M) += acc[(v - first) * M + i] * scale;
                }
            }
            own += GROUP * M * (half && PAIRS ? 2 : 4);
        }
        finish(map, total, from * TOGETHER, row, TOGETHER, M, half);
    }
}

TILED(4, f32, 0, part)
TILED(4, bf16, 1, part)
TILED(8, f32, 0, part)
TILED(8, bf16, 1, part)

// A tile's group at w as numbers -> y, of which there are `rows` rows, n columns apart, and `columns` columns.
INLINE void restore(const char *w, const uint16_t *s, char *y, int64_t rows, int64_t columns, int64_t n, const int bits,
                    const int half) {
    for (int first = 0; first < MIN(rows, TILE); first += W)
        for (int k = 0; k < MIN(columns, GROUP); k += W) {
            vf v[W];
            for (int j = 0; j < W; j++) v[j] = column(w, k + j, first, bits) * scales(s + first);
            transpose(v);
            for (int r = 0; r < MIN(rows - first, W); r++) {
                const int64_t at = (first + r) * n + k, left = columns - k;
                if (left >= W)
                    store(y, at, v[r], half);
                else
                    store_n(y, at, left, v[r], half);
            }
        }
}

INLINE void restore_unit(const Map *map, int64_t n, int64_t u, char *y, const int bits, const int half) {
    for (int64_t g = 0; g < groups_of(n); g++)
        for (int r = 0; r < TOGETHER; r++)
            restore(codes_of(map, n, u, g, bits) + r * BYTES(bits), scales_of(map, n, u, g) + r * TILE,
                    y + (r * TILE * n + g * GROUP) * (half ? 2 : 4), map->out - u * UNIT - r * TILE, n - g * GROUP, n, bits, half);
}

RESTORED(4, f32, 0)
RESTORED(4, bf16, 1)
RESTORED(8, f32, 0)
RESTORED(8, bf16, 1)

INLINE void restore_row(const Map *map, int64_t n, int64_t row, char *y, const int bits, const int half) {
    const int64_t u = row / UNIT, t = row % UNIT / TILE, r = row % TILE;
    for (int64_t k = 0; k < n; k++) {
        const char *w = codes_of(map, n, u, k / GROUP, bits) + t * BYTES(bits);
        const int c = k % GROUP;
        int number;
        if (bits == 4)
            number = (w[c / 8 * 64 + r * 4 + c % 2 * 2 + c % 8 / 4] >> c % 4 / 2 * 4 & 15) - 8;
        else {
            const char own = w[c / 4 * 64 + r / 4 * 16 + c % 4 / 2 * 8 + r % 4 * 2 + c % 2];
            number = own & 128 ? -(own & 127) : own & 127;
        }
        put(y, k, (float)number * from_half(scales_of(map, n, u, k / GROUP)[t * TILE + r]), half);
    }
}

PICKED(4, f32, 0)
PICKED(4, bf16, 1)
PICKED(8, f32, 0)
PICKED(8, bf16, 1)
