// Linear maps of few rows, whatever their weights are kept as.
#pragma once
#include <stdlib.h>
#include "vector.h"

typedef struct {
    const char *w;      // numbers or codes
    const void *s;      // what codes need besides
    const char *bias;   // [out] or null
    char *y;            // [m, out]
    int64_t out, wide;  // rows of W; where they are numbers, elements from one row to the next
} Map;

#define COLUMNS 512  // of x that are packed at a time

typedef struct {
    int64_t unit;                                                                // rows of W that are one piece of work
    int64_t (*room)(int64_t m, int64_t n);                                       // bytes of packed x [m, n]
    void (*pack)(const char *x, char *packed, int64_t m, int64_t n, int64_t k);  // COLUMNS columns from the k-th
    void (*part)(const Map *map, const char *packed, int64_t m, int64_t n, int64_t from, int64_t to);  // these units of W
} Kind;

// What thread t of `threads` does of x times each of `count` maps.
INLINE void share(const Kind *kind, const Map *maps, int64_t count, const char *packed, int64_t m, int64_t n, int64_t t,
                  int64_t threads) {
    int64_t all = 0;
    for (int64_t i = 0; i < count; i++) all += (maps[i].out + kind->unit - 1) / kind->unit;
    for (int64_t i = 0, from = all * t / threads, to = all * (t + 1) / threads; i < count; i++) {
        const int64_t own = (maps[i].out + kind->unit - 1) / kind->unit;
        if (from < own && to > 0) kind->part(maps + i, packed, m, n, MAX(0, from), MIN(own, to));
        from -= own, to -= own;
    }
}

INLINE char *room_of(int64_t bytes) {
    char *p = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
    if (!p) abort();
    return p;
}

// x [m, n] times each of `count` maps.
INLINE void linears(const Kind *kind, const char *x, const Map *maps, int64_t count, int64_t m, int64_t n, int threads) {
    char *packed = room_of(kind->room(m, n));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t k = 0; k < n; k += COLUMNS) kind->pack(x, packed, m, n, k);
#pragma omp for schedule(static)
        for (int t = 0; t < threads; t++) share(kind, maps, count, packed, m, n, t, threads);
    }
    free(packed);
}

// linear_NAME(x, maps, count, m, n, threads), and kind_NAME for those who do more between their threads.
#define EXPORT_MAPS(NAME)                                                                                              \
    const Kind kind_##NAME = {UNIT, room_##NAME, pack_##NAME, part_##NAME};                                            \
    void linear_##NAME(const char *x, const Map *maps, int64_t count, int64_t m, int64_t n, int threads) {             \
        linears(&kind_##NAME, x, maps, count, m, n, threads);                                                          \
    }
