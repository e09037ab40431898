// Linear maps by codes that lie in tiles of 16 rows of W, a lane of a vector a row: sums never leave their lane, and are
// added up in the same order whatever the number of rows of x. TOGETHER tiles whose codes lie side by side are a unit: x is
// read once for all of them. A file that includes this says below what a unit is.
#pragma once
#include "lanes.h"
#include "maps.h"

#define TILE 16           // rows of W
#define UNIT (TILE * TOGETHER)
#define PARTS (TILE / W)  // vectors of floats for a tile
#define MOST 8            // rows of x at a time
#ifndef AHEAD
#define AHEAD 16384       // bytes of codes that are on their way: they are read once, into the nearest cache alone
#endif
#define CHUNK 131072      // bytes of codes that stay near while all rows of x pass

INLINE int64_t units_of(int64_t rows) { return (rows + UNIT - 1) / UNIT; }

// y's rows from `row` on and rows of R tiles from number `tile` on, of their sums [R][M][PARTS].
INLINE void finish(const Map *map, const vf *total, int64_t tile, int64_t row, const int R, const int M, const int half) {
    for (int r = 0; r < R; r++)
        for (int part = 0; part < PARTS; part++) {
            const int64_t o = (tile + r) * TILE + part * W, left = MIN(map->out - o, W);
            for (int i = 0; i < M && left > 0; i++) {
                vf v = total[(r * M + i) * PARTS + part];
                if (map->bias) v += left == W ? load(map->bias, o, half) : load_n(map->bias, o, left, 0, half);
                if (left == W)
                    store(map->y, (row + i) * map->out + o, v, half);
                else
                    store_n(map->y, (row + i) * map->out + o, left, v, half);
            }
        }
}

// Fetch the `bytes` of codes that are read AHEAD bytes after those at w.
INLINE void fetch(const char *w, const int bytes) {
    for (int b = AHEAD; b < AHEAD + bytes; b += 64) __builtin_prefetch(w + b, 0, 0);
}

// The same, into the second-level cache: where products are so fast that lines on their way to the first one hold them up.
INLINE void fetch_l2(const char *w, const int bytes) {
    for (int b = AHEAD; b < AHEAD + bytes; b += 64) __builtin_prefetch(w + b, 0, 2);
}

#define ROWS_OF(some, run)                                                                                             \
    switch (some) {                                                                                                    \
        case 1: run(1); break;                                                                                         \
        case 2: run(2); break;                                                                                         \
        case 3: run(3); break;                                                                                         \
        case 4: run(4); break;                                                                                         \
        case 5: run(5); break;                                                                                         \
        case 6: run(6); break;                                                                                         \
        case 7: run(7); break;                                                                                         \
        default: run(MOST);                                                                                            \
    }

// Bytes of a unit of codes, of a packed row of x, and that packing, of COLUMNS of x from the k-th: [MOST rows] at a time.
INLINE int64_t unit_bytes(int64_t n, const int bits);
INLINE int64_t row_bytes(int64_t n, const int half);
INLINE void pack(const char *x, char *packed, int64_t m, int64_t n, int64_t k, const int bits, const int half);

// Units [from, to) times M rows of packed x, which become y's rows from `row` on.
INLINE void units(const Map *map, int64_t n, const char *x, int64_t from, int64_t to, int64_t row, const int M, const int bits,
                  const int half);

INLINE void part(const Map *map, const char *packed, int64_t m, int64_t n, int64_t from, int64_t to, const int bits,
                 const int half) {
    const int64_t near = m > MOST ? MAX(1, CHUNK / unit_bytes(n, bits)) : to - from;
    for (; from < to; from += near) {
        const char *x = packed;
        for (int64_t row = 0; row < m; row += MOST, x += row_bytes(n, half) * MOST) {
#define RUN(M) units(map, n, x, from, MIN(to, from + near), row, M, bits, half)
            ROWS_OF(m - row, RUN)
#undef RUN
        }
    }
}

// PART(map, packed, m, n, from, to, bits, half): units [from, to) times all rows of x.
#define TILED(BITS, TYPE, HALF, PART)                                                                                      \
    static int64_t room_##BITS##_##TYPE(int64_t m, int64_t n) { return row_bytes(n, HALF) * m; }                           \
    static void pack_##BITS##_##TYPE(const char *x, char *packed, int64_t m, int64_t n, int64_t k) {                       \
        pack(x, packed, m, n, k, BITS, HALF);                                                                              \
    }                                                                                                                      \
    static void part_##BITS##_##TYPE(const Map *map, const char *packed, int64_t m, int64_t n, int64_t from, int64_t to) { \
        PART(map, packed, m, n, from, to, BITS, HALF);                                                                     \
    }                                                                                                                      \
    EXPORT_MAPS(BITS##_##TYPE)

// Unit u's rows as numbers -> y, n columns apart.
INLINE void restore_unit(const Map *map, int64_t n, int64_t u, char *y, const int bits, const int half);

// restore_NAME(map, n, from, to, threads): units [from, to) as numbers -> y, whose first row is that of the first of them.
#define RESTORED(BITS, TYPE, HALF)                                                                     \
    void restore_##BITS##_##TYPE(const Map *map, int64_t n, int64_t from, int64_t to, int threads) {   \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")             \
        for (int64_t u = from; u < to; u++)                                                            \
            restore_unit(map, n, u, map->y + (u - from) * UNIT * n * (HALF ? 2 : 4), BITS, HALF);      \
    }

// One row as numbers -> y.
INLINE void restore_row(const Map *map, int64_t n, int64_t row, char *y, const int bits, const int half);

// rows_NAME(map, n, ids, count): rows `ids` of W become those of y.
#define PICKED(BITS, TYPE, HALF)                                                                                              \
    void rows_##BITS##_##TYPE(const Map *map, int64_t n, const int64_t *ids, int64_t count) {                                 \
        for (int64_t i = 0; i < count; i++) restore_row(map, n, ids[i], map->y + i * n * (HALF ? 2 : 4), BITS, HALF);         \
    }
