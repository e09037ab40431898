// y = x W^T + b for few rows of x: W is read once, in order, at memory speed. Products are added up in the order of columns,
// lane by lane, so that what a row comes to does not depend on how many there are.
#include "lanes.h"
#include "maps.h"

#ifdef __AVX512BF16__
#define PAIRS 1  // bfloat16 products by vdpbf16ps, 32 at a time
#else
#define PAIRS 0
#endif
#define SIZE(half) ((half) ? 2 : 4)             // bytes of an element
#define LANES(half) ((half) && PAIRS ? 32 : W)  // columns that a vector of W or of packed x holds
#define SPAN 128     // columns that one step of the inner loop takes
#define ROWS 32      // rows of W that share a block of columns, where x needs blocks; else half as many
#define MOST 8       // rows of x at a time
#define CACHE 28672  // bytes of x that the first-level cache holds beside W's stream
#define BLOCK 16384  // bytes of x in a block of columns, if all of it is more than CACHE
#define AHEAD 8192   // bytes to prefetch ahead where W is read in order: once, so into the nearest cache alone

// Vector number u of the span of W at w.
INLINE vf weights(const char *w, int u, const int half) {
    if (!(half && PAIRS)) return load(w, u * W, half);
    vf v;
    memcpy(&v, w + u * sizeof v, sizeof v);
    return v;
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
    int64_t wide, ahead;  // bytes to the next row, and to what is prefetched
} Rows;

// Adds vector u of R rows of W times M rows of x, of which packed x has m, to acc[R][M].
INLINE void step(Rows at, const char *x, vf *acc, int u, const int R, const int M, const int half) {
    vf v[4];
    for (int r = 0; r < R; r++) v[r] = weights(at.w + r * at.wide, u, half);
    for (int i = 0; i < M; i++)
        for (int r = 0; r < R; r++) acc[r * M + i] = dot(v[r], x + i * sizeof(vf), acc[r * M + i], half);
}

// n columns of R rows of W times M rows of packed x, after part[M][ROWS] or, if they are the `first`, from 0 on.
INLINE void strip(Rows at, const char *x, int64_t m, int64_t n, int first, vf *part, const int R, const int M, const int half) {
    const int lanes = LANES(half);
    vf acc[3 * MOST];  // [R][M]
    for (int i = 0; i < M; i++)
        for (int r = 0; r < R; r++) acc[r * M + i] = first ? splat(0) : part[i * ROWS + r];
#pragma GCC unroll 1
    for (; n >= SPAN; n -= SPAN) {
        for (int r = 0; r < R; r++)
            for (int b = 0; b < SPAN * SIZE(half); b += 64) __builtin_prefetch(at.w + at.ahead + r * at.wide + b, 0, 0);
#pragma GCC unroll 4
        for (int u = 0; u < SPAN / lanes; u++, x += m * sizeof(vf)) step(at, x, acc, u, R, M, half);
        at.w += SPAN * SIZE(half);
    }
#pragma GCC unroll 1
    for (int u = 0; n > 0; u++, n -= lanes, x += m * sizeof(vf)) {
        char last[4][64] = {0};
        Rows end = at;
        int v = u;
        if (n < lanes) {
            for (int r = 0; r < R; r++) memcpy(last[r], at.w + r * at.wide + u * lanes * SIZE(half), n * SIZE(half));
            end.w = last[0], end.wide = sizeof last[0], v = 0;
        }
        step(end, x, acc, v, R, M, half);
    }
    for (int i = 0; i < M; i++)
        for (int r = 0; r < R; r++) part[i * ROWS + r] = acc[r * M + i];
}

#define FEW 4        // rows of W at a time where they are near, and then the most of x
#define NEAR 1048576  // bytes of W that are likely to be in a cache

INLINE void few_strips(Rows at, const char *x, int64_t m, int64_t n, int first, vf *part, const int half) {
    switch (m) {
        case 1: strip(at, x, m, n, first, part, FEW, 1, half); break;
        case 2: strip(at, x, m, n, first, part, FEW, 2, half); break;
        case 3: strip(at, x, m, n, first, part, FEW, 3, half); break;
        default: strip(at, x, m, n, first, part, FEW, FEW, half);
    }
}

INLINE void strips(Rows at, const char *x, int64_t m, int64_t some, int64_t n, int first, vf *part, const int R,
                   const int half) {
    switch (some) {
        case 1: strip(at, x, m, n, first, part, R, 1, half); break;
        case 2: strip(at, x, m, n, first, part, R, 2, half); break;
        case 3: strip(at, x, m, n, first, part, R, 3, half); break;
        case 4: strip(at, x, m, n, first, part, R, 4, half); break;
        case 5: strip(at, x, m, n, first, part, R, 5, half); break;
        case 6: strip(at, x, m, n, first, part, R, 6, half); break;
        case 7: strip(at, x, m, n, first, part, R, 7, half); break;
        default: strip(at, x, m, n, first, part, R, MOST, half);
    }
}

// COLUMNS of x from the k-th, which is packed as [n / lanes][m][lanes], zero-padded: one stream, whatever m. bfloat16 where
// vdpbf16ps takes it, else float32.
INLINE void pack(const char *x, char *packed, int64_t m, int64_t n, int64_t k, const int half) {
    const int64_t lanes = LANES(half), each = SIZE(half), end = MIN(n, k + COLUMNS);
    packed += k / lanes * m * sizeof(vf);
    for (; k < end; k += lanes)
        for (int64_t i = 0; i < m; i++, packed += sizeof(vf)) {
            const int64_t at = i * n + k, count = MIN(lanes, n - k);
            if (half && !PAIRS) {
                for (int64_t j = 0; j < count; j++) ((float *)packed)[j] = get(x, at + j, half);
                for (int64_t j = count; j < lanes; j++) ((float *)packed)[j] = 0;
            } else {
                memcpy(packed, x + at * each, count * each);
                memset(packed + count * each, 0, (lanes - count) * each);
            }
        }
}

// Columns of W in a block: all if packed x fits the cache.
INLINE int64_t block(int64_t m, int64_t n, const int half) {
    const int64_t span = m * SPAN / LANES(half) * (int64_t)sizeof(vf);
    return (n + SPAN - 1) / SPAN * span <= CACHE ? n : MAX(1, BLOCK / span) * SPAN;
}

// Rows [from, to) of W. All columns of a row in one go if x fits the cache; else `width` columns of ROWS rows, then the next
// ones. From five rows of x on, two rows of W at a time, and three where x needs blocks and has MOST rows: x is read less
// often, and more sums are under way; four where W is near, so that sums do not wait for each other.
INLINE void part(const Map *map, const char *packed, int64_t m, int64_t n, int64_t from, int64_t to, const int half) {
    const int64_t wide = map->wide * SIZE(half), width = block(m, n, half);
    const int64_t most = width < n ? ROWS : ROWS / 2;
    const int near = m <= FEW && width == n && map->out * wide <= NEAR;
    vf acc[2 * MOST][ROWS];  // [m][ROWS]
    for (int64_t o = from; o < to; o += most) {
        const int64_t rows = MIN(most, to - o);
        for (int64_t i = 0; i < m && rows % W; i++)
            for (int64_t r = rows; r % W; r++) acc[i][r] = splat(0);  // lanes that no row has
        for (int64_t k = 0; k < n; k += width)
            for (int64_t r = 0; r < rows;) {
                const int64_t left = rows - r;
                if (near && left >= FEW) {
                    few_strips((Rows){map->w + (o + r) * wide, wide, AHEAD}, packed, m, n, 1, acc[0] + r, half);
                    r += FEW;
                    continue;
                }
                const int R = width < n && m >= MOST && left > 2 && left != 4 ? 3 : (m > 4 || width < n) && left > 1 ? 2 : 1;
                const int64_t far = o * wide + (k + width) * SIZE(half);  // where the next block of columns begins
                Rows at = {map->w + (o + r) * wide + k * SIZE(half), wide, AHEAD};
                if (width < n) at.ahead = r + R < rows || k + width >= n ? R * wide : map->w + far - at.w;
                for (int64_t i = 0; i < m; i += MOST) {
                    const char *x = packed + (k / LANES(half) * m + i) * sizeof(vf);
                    if (R == 3)
                        strips(at, x, m, m - i, MIN(width, n - k), k == 0, acc[i] + r, 3, half);
                    else if (R == 2)
                        strips(at, x, m, m - i, MIN(width, n - k), k == 0, acc[i] + r, 2, half);
                    else
                        strips(at, x, m, m - i, MIN(width, n - k), k == 0, acc[i] + r, 1, half);
                }
                r += R;
            }
        for (int64_t i = 0; i < m; i++)
            for (int64_t r = 0; r < rows; r += W) {
                const int64_t at = i * map->out + o + r, left = rows - r;
                vf v = sums(acc[i] + r);
                if (left >= W) {
                    if (map->bias) v += load(map->bias, o + r, half);
                    store(map->y, at, v, half);
                } else {
                    if (map->bias) v += load_n(map->bias, o + r, left, 0, half);
                    store_n(map->y, at, left, v, half);
                }
            }
    }
}

#define UNIT 1
#define KIND(TYPE, HALF)                                                                                                   \
    static int64_t room_##TYPE(int64_t m, int64_t n) { return (n + LANES(HALF) - 1) / LANES(HALF) * m * sizeof(vf); }      \
    static void pack_##TYPE(const char *x, char *packed, int64_t m, int64_t n, int64_t k) { pack(x, packed, m, n, k, HALF); } \
    static void part_##TYPE(const Map *map, const char *packed, int64_t m, int64_t n, int64_t from, int64_t to) {          \
        part(map, packed, m, n, from, to, HALF);                                                                           \
    }                                                                                                                      \
    EXPORT_MAPS(TYPE)

KIND(f32, 0)
KIND(bf16, 1)
