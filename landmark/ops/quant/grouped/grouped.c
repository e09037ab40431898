// y = x W^T + b for few rows of x and matrices of codes, and those matrices restored. A code is an integer; every 32
// columns of a row have a scale (float16). Codes lie in tiles of 16 rows, a lane of a vector a row: sums never leave their
// lane, and are added up in the same order whatever the number of rows of x.
#include "maps.h"
#include "tiles.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define PAIRS 1  // bfloat16 products by vdpbf16ps, two columns at a time
#else
#define PAIRS 0
#endif
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

// acc[R][M] = R tiles' group times M rows of packed x.
INLINE void products(const char *const *w, const char *x, const Tables *t, vf *acc, const int R, const int M, const int bits) {
    for (int i = 0; i < R * M; i++) acc[i] = splat(0);
#pragma GCC unroll 16
    for (int p = 0; p < GROUP / 2; p++) {
        __m512i v[2];
        for (int r = 0; r < R; r++) v[r] = pair(w[r], p, t, bits);
        for (int i = 0; i < M; i++) {
            int32_t both;
            memcpy(&both, x + (p * M + i) * 4, 4);
            const __m512bh y = (__m512bh)_mm512_set1_epi32(both);
            for (int r = 0; r < R; r++) acc[r * M + i] = (vf)_mm512_dpbf16_ps((__m512)acc[r * M + i], (__m512bh)v[r], y);
        }
    }
}
#endif

// R tiles from number `tile` on, times M rows of packed x, which become y's rows from `row` on.
INLINE void tiles(const Map *map, int64_t n, const char *x, int64_t tile, int64_t row, const int R, const int M, const int bits,
                  const int half) {
    const int64_t groups = groups_of(n);
    const char *w[2];
    const uint16_t *s[2];
    for (int r = 0; r < R; r++) w[r] = map->w + (tile + r) * groups * BYTES(bits), s[r] = map->s + (tile + r) * groups * TILE;
    vf total[2 * MOST * PARTS], acc[2 * MOST];
    for (int i = 0; i < R * M * PARTS; i++) total[i] = splat(0);
#if PAIRS
    const Tables t = tables(bits);
#endif
#pragma GCC unroll 1
    for (int64_t g = 0; g < groups; g++) {
        for (int r = 0; r < R; r++)
            for (int b = 0; b < BYTES(bits); b += 64) __builtin_prefetch(w[r] + AHEAD + b);
        for (int part = 0; part < PARTS; part++) {
#if PAIRS
            if (half)
                products(w, x, &t, acc, R, M, bits);
            else
#endif
                products_f32(w, (const float *)x, part, acc, R, M, bits);
            for (int r = 0; r < R; r++) {
                const vf scale = scales(s[r] + part * W);
                for (int i = 0; i < M; i++) total[(r * M + i) * PARTS + part] += acc[r * M + i] * scale;
            }
        }
        for (int r = 0; r < R; r++) w[r] += BYTES(bits), s[r] += TILE;
        x += GROUP * M * (half && PAIRS ? 2 : 4);
    }
    finish(map, total, tile, row, R, M, half);
}

// Tiles [from, to). From three rows of x on, two at a time: x is read half as often, and more sums are under way.
INLINE void some_tiles(const Map *map, int64_t n, const char *x, int64_t from, int64_t to, int64_t row, const int M, const int bits,
                  const int half) {
    if (M > 2)
#pragma GCC unroll 1
        for (; from + 2 <= to; from += 2) tiles(map, n, x, from, row, 2, M, bits, half);
#pragma GCC unroll 1
    for (; from < to; from++) tiles(map, n, x, from, row, 1, M, bits, half);
}

INLINE void part_rows(const Map *map, int64_t n, const char *x, int64_t from, int64_t to, int64_t row, int64_t some, const int bits,
                   const int half) {
#define RUN(M) some_tiles(map, n, x, from, to, row, M, bits, half)
    ROWS_OF(some, RUN)
}

// COLUMNS of x from the k-th. MOST rows of x at a time are packed as [columns or pairs of them][rows], zero-padded to whole
// groups.
INLINE void pack(const char *x, char *packed, int64_t m, int64_t n, int64_t k, const int half) {
    const int64_t wide = groups_of(n) * GROUP, from = k, end = MIN(wide, k + COLUMNS);
    for (int64_t first = 0; first < m; first += MOST) {
        const int64_t rows = MIN(MOST, m - first);
        if (half && PAIRS) {
            const bf16 *row = (const bf16 *)x + first * n;
            uint32_t *to = (uint32_t *)packed + from / 2 * rows;
            for (k = from; k < MIN(end, n - 1); k += 2)
                for (int64_t i = 0; i < rows; i++, to++) memcpy(to, row + i * n + k, 4);
            for (; k < end; k += 2)
                for (int64_t i = 0; i < rows; i++) *to++ = k < n ? row[i * n + k] : 0;
        } else
            for (k = from; k < end; k++)
                for (int64_t i = 0; i < rows; i++) ((float *)packed)[k * rows + i] = k < n ? get(x, (first + i) * n + k, half) : 0;
        packed += wide * rows * (half && PAIRS ? 2 : 4);
    }
}

#define UNIT TILE
#define KIND(BITS, TYPE, HALF)                                                                                             \
    static int64_t room_##BITS##_##TYPE(int64_t m, int64_t n) { return groups_of(n) * GROUP * m * (HALF && PAIRS ? 2 : 4); } \
    static void pack_##BITS##_##TYPE(const char *x, char *packed, int64_t m, int64_t n, int64_t k) {                       \
        pack(x, packed, m, n, k, HALF);                                                                                    \
    }                                                                                                                      \
    static void part_##BITS##_##TYPE(const Map *map, const char *packed, int64_t m, int64_t n, int64_t from, int64_t to) { \
        const int64_t wide = groups_of(n) * GROUP * (HALF && PAIRS ? 2 : 4);                                               \
        for (int64_t row = 0; row < m; row += MOST)                                                                        \
            part_rows(map, n, packed + row * wide, from, to, row, m - row, BITS, HALF);                                    \
    }                                                                                                                      \
    EXPORT_MAPS(BITS##_##TYPE)

KIND(4, f32, 0)
KIND(4, bf16, 1)
KIND(8, f32, 0)
KIND(8, bf16, 1)

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

// Codes w and scales s of a map -> y [rows, n].
#define RESTORE(BITS, TYPE, HALF)                                                                                          \
    void restore##BITS##_##TYPE(const char *w, const uint16_t *s, char *y, int64_t rows, int64_t n, int threads) {         \
        const int64_t groups = groups_of(n);                                                                               \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")                                 \
        for (int64_t t = 0; t < tiles_of(rows); t++)                                                                       \
            for (int64_t g = 0; g < groups; g++)                                                                           \
                restore(w + (t * groups + g) * BYTES(BITS), s + (t * groups + g) * TILE,                                   \
                        y + (t * TILE * n + g * GROUP) * (HALF ? 2 : 4), rows - t * TILE, n - g * GROUP, n, BITS, HALF);   \
    }

RESTORE(4, f32, 0)
RESTORE(4, bf16, 1)
RESTORE(8, f32, 0)
RESTORE(8, bf16, 1)
