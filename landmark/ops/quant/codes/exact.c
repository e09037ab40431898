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
#define MANY 6  // rows of x at a time, with two tiles, where they are more than MOST
#define BLOCK(m, half) (PAIRS && (half) && (m) > MOST ? MANY : MOST)
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

// total [M][16] += the tile's listed numbers times M rows of packed x.
INLINE void add_list(Side side, int64_t tile, const char *x, float *total, int64_t M, const int half) {
    for (int32_t e = side.starts[tile]; e < side.starts[tile + 1]; e++) {
        const int64_t column = side.list[2 * e] / TILE;
        const float own = widen(side.list[2 * e + 1]);
        for (int64_t i = 0; i < M; i++) {
            const int64_t at = half && PAIRS ? (column / 2 * M + i) * 2 + column % 2 : column * M + i;
            total[i * TILE + side.list[2 * e] % TILE] += own * get(x, at, half && PAIRS);
        }
    }
}

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
        fetch(w, 0, 0, BYTES, 1);
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
    add_list(side, tile, from, total, M, half);
    vf sums[MOST * PARTS];
    memcpy(sums, total, M * TILE * 4);
    finish(map, sums, tile, row, R, M, half);
}

#if PAIRS
#define DEEP 256          // columns of W that are unpacked at a time
#define NEAR (86 * MANY)  // rows of x that meet them

#define MANY_OF(some, run)       \
    switch (some) {              \
        case 1: run(1); break;   \
        case 2: run(2); break;   \
        case 3: run(3); break;   \
        case 4: run(4); break;   \
        case 5: run(5); break;   \
        default: run(MANY);      \
    }

// sums [R M][2] += R tiles' numbers w [R][DEEP / 2] times M rows of packed x from column `from` on; even and odd pairs
// of columns apart, as in `tiles`.
INLINE void block(const __m512i *w, const char *x, __m512 *sums, int64_t from, int64_t pairs, const int R, const int M) {
    __m512 acc[2][2 * MANY];
    for (int i = 0; i < R * M; i++)
        for (int c = 0; c < 2; c++) acc[c][i] = from ? sums[2 * i + c] : _mm512_setzero_ps();
    x += from * M * 2;
#pragma GCC unroll 1
    for (int64_t p = 0; p < pairs; p += 2)
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++)
#pragma GCC unroll 6
            for (int i = 0; i < M; i++) {
                int32_t both;
                memcpy(&both, x + ((p + c) * M + i) * 4, 4);
                const __m512bh y = (__m512bh)_mm512_set1_epi32(both);
                for (int r = 0; r < R; r++)
                    acc[c][r * M + i] = _mm512_dpbf16_ps(acc[c][r * M + i], (__m512bh)w[r * DEEP / 2 + p + c], y);
            }
    for (int i = 0; i < R * M; i++)
        for (int c = 0; c < 2; c++) sums[2 * i + c] = acc[c][i];
}

// What `tiles` does, for `rows` rows of packed x. The next columns of W are fetched meanwhile.
INLINE void near_rows(const Map *map, int64_t n, const char *x, int64_t tile, int64_t row, int64_t rows, const int R) {
    const int64_t steps = steps_of(n);
    __m512i w[2 * DEEP / 2];
    __m512 sums[2 * 2 * NEAR];
    Table table[2];
    const Side side = side_of(map->s, map->out);
    for (int r = 0; r < R; r++) table[r] = table_of(side.tables + 16 * (tile + r));
    for (int64_t from = 0; from < steps; from += DEEP / STEP) {
        const int64_t count = MIN(DEEP / STEP, steps - from);
        for (int r = 0; r < R; r++)
            for (int64_t s = 0; s < count; s++)
                numbers(map->w + (tile + r) * tile_bytes(n, 12) + (from + s) * BYTES, table[r],
                        (vu(*)[PARTS])(w + r * DEEP / 2 + s * PAIR));
        for (int64_t i = 0; i < rows; i += MANY) {
            const char *own = x + i * row_bytes(n, 1);
            for (int64_t b = i / MANY * 64; b < count * BYTES; b += (rows + MANY - 1) / MANY * 64)
                for (int r = 0; r < R; r++)
                    __builtin_prefetch(map->w + (tile + r) * tile_bytes(n, 12) + (from + count) * BYTES + b, 0, 2);
#define RUN(M) block(w, own, sums + 2 * R * i, from * STEP, count * PAIR, R, M)
            MANY_OF(rows - i, RUN)
#undef RUN
        }
    }
    for (int64_t i = 0; i < rows; i += MANY) {
        const int64_t M = MIN(MANY, rows - i);
        float total[2 * MANY * TILE];
        for (int j = 0; j < R * M; j++) {
            const vf both = (vf)(sums[2 * (R * i + j)] + sums[2 * (R * i + j) + 1]);
            memcpy(total + j * TILE, &both, sizeof both);
        }
        for (int r = 0; r < R; r++) add_list(side, tile + r, x + i * row_bytes(n, 1), total + r * M * TILE, M, 1);
        vf all[2 * MANY];
        memcpy(all, total, R * M * TILE * 4);
        finish(map, all, tile, row + i, R, M, 1);
    }
}
#endif

// Tiles [from, to) times all rows of x. Of many each number of W is unpacked once for NEAR of them; what a row comes to does
// not depend on how many there are.
INLINE void all_rows(const Map *map, const char *packed, int64_t m, int64_t n, int64_t from, int64_t to, const int bits,
                     const int half) {
#if PAIRS
    if (half && m > MOST) {
        for (; from < to; from += 2)
            for (int64_t row = 0; row < m; row += NEAR) {
                const char *x = packed + row * row_bytes(n, 1);
                if (to - from > 1)
                    near_rows(map, n, x, from, row, MIN(NEAR, m - row), 2);
                else
                    near_rows(map, n, x, from, row, MIN(NEAR, m - row), 1);
            }
        return;
    }
#endif
    part(map, packed, m, n, from, to, bits, half);
}

TILED(12, f32, 0, all_rows)
TILED(12, bf16, 1, all_rows)
const int64_t most_rows_f32 = 96, most_rows_bf16 = PAIRS ? INT64_MAX : 96;  // beyond them restored weights are as fast

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

INLINE void restore_row(const Map *map, int64_t n, int64_t row, char *y, const int bits, const int half) {
    const int64_t t = row / TILE, r = row % TILE;
    const Side side = side_of(map->s, map->out);
    const char *w = map->w + t * tile_bytes(n, bits) + r / 4 * 16 + r % 4 * 2;
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

PICKED(12, f32, 0)
PICKED(12, bf16, 1)

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
