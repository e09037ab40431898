// y = x W^T + b by a bfloat16 W of which each number is kept in 12 bits, and those numbers. A number's low byte is kept as
// it is; of high bytes (the sign and seven bits of the exponent) a tile has a table of 16, 0 first, and 4 bits point to one.
// The few numbers whose high byte is not in the table are 0 there and stand in a list.
//
// Of 8 columns a tile has 192 bytes: 64 of pointers, the low four bits for the first 64 low bytes and the high four for the
// other 64, which are for four columns each; of these 16 bytes in a row are for four rows, first their first two columns.
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define PAIRS 1  // bfloat16 products by vdpbf16ps, two columns at a time
#else
#define PAIRS 0
#endif
#define TOGETHER 1
#include "columns.h"

#define STEP 8
#define BYTES (TILE * STEP * 3 / 2)
#define PAIR (STEP / 2)

INLINE int64_t steps_of(int64_t n) { return (n + STEP - 1) / STEP; }
INLINE int64_t tile_bytes(int64_t n, const int bits) { return steps_of(n) * BYTES; }

// What stands beside the codes, int32: 4 a tile for its table, where each tile's part of the list begins and the last one's
// ends, and that list: 16 times the column plus the row in its tile, and the number's 16 bits.
typedef struct {
    const char *tables;
    const int32_t *starts, *list;
} Side;

INLINE Side side_of(const void *s, int64_t rows) {
    const int32_t *at = s;
    const int64_t all = tiles_of(rows);
    return (Side){s, at + 4 * all, at + 5 * all + 1};
}

// Columns 2 p and 2 p + 1 of a tile's 16 rows at w, in the low and high halves of v[p].
#ifdef __AVX512BW__
typedef __m512i Table;

INLINE Table table_of(const char *t) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)t)); }

INLINE void numbers(const char *w, Table table, vu (*v)[PARTS]) {
    const __m512i four = _mm512_set1_epi8(15), codes = _mm512_loadu_si512(w);
    for (int j = 0; j < 2; j++) {
        const __m512i low = _mm512_loadu_si512(w + 64 + 64 * j), own = j ? _mm512_srli_epi16(codes, 4) : codes;
        const __m512i high = _mm512_shuffle_epi8(table, _mm512_and_si512(own, four));
        v[2 * j][0] = (vu)_mm512_unpacklo_epi8(low, high), v[2 * j + 1][0] = (vu)_mm512_unpackhi_epi8(low, high);
    }
}
#else
typedef uint8_t Table __attribute__((vector_size(16)));

INLINE Table table_of(const char *t) {
    Table v;
    memcpy(&v, t, 16);
    return v;
}

INLINE void numbers(const char *w, Table table, vu (*v)[PARTS]) {
    const Table first = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    for (int r = 0; r < TILE; r += 4) {
        const Table codes = table_of(w + r * 4);
        for (int j = 0; j < 2; j++) {
            const Table low = table_of(w + 64 + 64 * j + r * 4), high = __builtin_shuffle(table, j ? codes >> 4 : codes & 15);
            const Table two[2] = {__builtin_shuffle(low, high, first), __builtin_shuffle(low, high, first + 8)};
            for (int p = 0; p < 2; p++) memcpy((char *)v[2 * j + p] + r * 4, two + p, 16);
        }
    }
}
#endif

INLINE void tiles(const Map *map, int64_t n, const char *x, int64_t tile, int64_t row, const int R, const int M, const int bits,
                  const int half) {
    const Side side = side_of(map->s, map->out);
    const Table table = table_of(side.tables + 16 * tile);
    const char *w = map->w + tile * tile_bytes(n, bits), *from = x;
    vf acc[MOST * PARTS * 2];
    for (int i = 0; i < M * PARTS * 2; i++) acc[i] = splat(0);
#pragma GCC unroll 1
    for (int64_t g = 0; g < steps_of(n); g++, w += BYTES) {
        vu v[PAIR][PARTS];
        for (int b = 0; b < BYTES; b += 64) __builtin_prefetch(w + AHEAD + b);
        numbers(w, table, v);
#if PAIRS
        if (half) {
            for (int p = 0; p < PAIR; p++)
                for (int i = 0; i < M; i++) {
                    int32_t both;
                    memcpy(&both, x + (p * M + i) * 4, 4);
                    vf *own = acc + i * 2 + p % 2;
                    *own = (vf)_mm512_dpbf16_ps((__m512)*own, (__m512bh)v[p][0], (__m512bh)_mm512_set1_epi32(both));
                }
            x += STEP * M * 2;
            continue;
        }
#endif
        const float *column = (const float *)x;
        for (int k = 0; k < STEP; k++)
            for (int part = 0; part < PARTS; part++) {
                const vf own = (vf)(k % 2 ? v[k / 2][part] & 0xffff0000 : v[k / 2][part] << 16);
                for (int i = 0; i < M; i++) acc[(i * PARTS + part) * 2 + k % 2] += own * column[k * M + i];
            }
        x += STEP * M * 4;
    }
    float total[MOST * TILE];
    for (int i = 0; i < M * PARTS; i++) {
        const vf both = acc[2 * i] + acc[2 * i + 1];
        memcpy(total + i * W, &both, sizeof both);
    }
    for (int32_t e = side.starts[tile]; e < side.starts[tile + 1]; e++) {
        const int64_t column = side.list[2 * e] / TILE;
        const float own = widen(side.list[2 * e + 1]);
        for (int i = 0; i < M; i++) {
            const int64_t at = half && PAIRS ? (column / 2 * M + i) * 2 + column % 2 : column * M + i;
            total[i * TILE + side.list[2 * e] % TILE] += own * get(from, at, half && PAIRS);
        }
    }
    vf sums[MOST * PARTS];
    memcpy(sums, total, M * TILE * 4);
    finish(map, sums, tile, row, R, M, half);
}

TILED(12, f32, 0)
TILED(12, bf16, 1)

// `count` numbers of a row become elements of y from `at` on; as bfloat16 every bit of them.
INLINE void put_row(char *y, int64_t at, const bf16 *v, int64_t count, const int half) {
    if (half)
        memcpy((bf16 *)y + at, v, count * 2);
    else
        for (int64_t j = 0; j < count; j++) ((float *)y)[at + j] = widen(v[j]);
}

INLINE void restore_tile(const Map *map, int64_t n, int64_t t, char *y, const int bits, const int half) {
    const Side side = side_of(map->s, map->out);
    const Table table = table_of(side.tables + 16 * t);
    const char *w = map->w + t * tile_bytes(n, bits);
    const int64_t rows = MIN(TILE, map->out - t * TILE), steps = steps_of(n);
    for (int64_t k = 0; k < n; k += 2 * W, w += W / PAIR * BYTES) {
        vu v[W][PARTS];
        for (int s = 0; s < W / PAIR; s++)
            if (k / STEP + s < steps)
                numbers(w + s * BYTES, table, v + s * PAIR);
            else
                memset(v + s * PAIR, 0, PAIR * sizeof *v);
        for (int part = 0; part < PARTS; part++) {
            vf own[W];
            for (int p = 0; p < W; p++) own[p] = (vf)v[p][part];
            transpose(own);
            for (int r = 0; r < MIN(W, rows - part * W); r++) {
                const int64_t at = (part * W + r) * n + k;
                if (n - k >= 2 * W)
                    put_row(y, at, (const bf16 *)(own + r), 2 * W, half);
                else
                    put_row(y, at, (const bf16 *)(own + r), n - k, half);
            }
        }
    }
    for (int32_t e = side.starts[t]; e < side.starts[t + 1]; e++) {
        const bf16 own = side.list[2 * e + 1];
        put_row(y, side.list[2 * e] % TILE * n + side.list[2 * e] / TILE, &own, 1, half);
    }
}

RESTORED(12, f32, 0)
RESTORED(12, bf16, 1)

INLINE void restore_row(const Map *map, int64_t n, int64_t row, char *y, const int half) {
    const int64_t t = row / TILE, r = row % TILE;
    const Side side = side_of(map->s, map->out);
    const char *w = map->w + t * tile_bytes(n, 12) + r / 4 * 16 + r % 4 * 2;
    for (int64_t k = 0; k < n; k++) {
        const char *at = w + k / STEP * BYTES + k % 4 / 2 * 8 + k % 2;
        const int second = k % STEP / 4, pointer = *at >> 4 * second & 15;
        const bf16 own = (uint8_t)side.tables[16 * t + pointer] << 8 | (uint8_t)at[64 + 64 * second];
        put_row(y, k, &own, 1, half);
    }
    for (int32_t e = side.starts[t]; e < side.starts[t + 1]; e++) {
        const bf16 own = side.list[2 * e + 1];
        if (side.list[2 * e] % TILE == r) put_row(y, side.list[2 * e] / TILE, &own, 1, half);
    }
}

// rows_NAME(map, ids, count, n): rows `ids` of W become those of y.
#define ROWS(TYPE, HALF)                                                                                         \
    void rows_12_##TYPE(const Map *map, const int64_t *ids, int64_t count, int64_t n) {                          \
        for (int64_t i = 0; i < count; i++) restore_row(map, n, ids[i], map->y + i * n * (HALF ? 2 : 4), HALF);  \
    }

ROWS(f32, 0)
ROWS(bf16, 1)

// The number at [row, k] of w [rows, n], 0 beyond it.
INLINE bf16 number(const bf16 *w, int64_t rows, int64_t n, int64_t row, int64_t k) {
    return row < rows && k < n ? w[row * n + k] : 0;
}

// Tables of w [rows, n], 0 and the 15 other high bytes that most numbers have, the lesser first where as many have them;
// starts[t + 1] becomes how many of tile t have none of them.
void tables(const bf16 *w, char *tables, int32_t *starts, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tiles_of(rows); t++) {
        int32_t count[256] = {0}, left = 0;
        for (int64_t i = t * TILE * n; i < MIN(rows, (t + 1) * TILE) * n; i++) count[w[i] >> 8]++;
        for (int j = 1; j < 256; j++) left += count[j];
        count[0] = -2, tables[16 * t] = 0;
        for (int c = 1; c < 16; c++) {
            int most = 0;
            for (int j = 1; j < 256; j++)
                if (count[j] > count[most]) most = j;
            tables[16 * t + c] = most, left -= count[most], count[most] = -1;
        }
        starts[t + 1] = left;
    }
}

// Codes of w [rows, n], and their list, where tables and starts stand in `side` already.
void encode(const bf16 *w, char *codes, char *side, int64_t rows, int64_t n, int threads) {
    const Side all = side_of(side, rows);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tiles_of(rows); t++) {
        char *own = codes + t * tile_bytes(n, 12);
        int32_t *list = (int32_t *)all.list + 2 * all.starts[t];
        uint8_t code[256];
        memset(code, 16, sizeof code);
        for (int c = 15; c >= 0; c--) code[(uint8_t)all.tables[16 * t + c]] = c;
        memset(own, 0, tile_bytes(n, 12));
        for (int r = 0; r < TILE; r++)
            for (int64_t k = 0; k < n; k++) {
                const bf16 v = number(w, rows, n, t * TILE + r, k);
                if (code[v >> 8] > 15) {
                    *list++ = k * TILE + r, *list++ = v;
                    continue;
                }
                char *step = own + k / STEP * BYTES;
                const int at = r / 4 * 16 + k % 4 / 2 * 8 + r % 4 * 2 + k % 2, second = k % STEP / 4;
                step[at] |= code[v >> 8] << 4 * second;
                step[64 + 64 * second + at] = v;
            }
    }
}
