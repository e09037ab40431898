// y = x W^T + b for few rows of x: W is read once, in order, at memory speed. Products are added up in the order of columns,
// lane by lane, so that what a row comes to does not depend on how many there are.
#include "lanes.h"
#include "maps.h"

#ifdef __AVX512BF16__
#define PAIRS 1  // bfloat16 products by vdpbf16ps, 32 at a time
#else
#define PAIRS 0
#endif
#define SIZE(half) ((half) ? 2 : 4)                       // bytes of an element
#define LANES(half) ((half) ? 2 * W : W)                  // columns that a vector of W holds
#define PASSES(half) ((half) && !PAIRS ? 2 : 1)           // vectors of packed x for them: as W has them, or floats, the even columns first
#define EACH(half) (PASSES(half) * (int64_t)sizeof(vf))   // their bytes
#define SPAN 128     // columns that one step of the inner loop takes
#define ROWS 32      // rows of W that share a block of columns, where x needs blocks; else half as many
#define MOST 8                  // rows of x at a time
#define SUMS (W == 16 ? 24 : 12)  // the most of them times rows of W, by the number of registers, see `together`
#define ALL 16                  // the most rows of x
#define CACHE 28672  // bytes of x that the first-level cache holds beside W's stream
#define BLOCK 16384  // bytes of x in a block of columns, if all of it is more than CACHE
#define NEXT (W == 16 ? 1 : 3)  // rows of a block to prefetch ahead, at least
#define AHEAD 8192   // bytes to prefetch ahead where W is read in order: once, so into the nearest cache alone

INLINE vf vector(const char *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

typedef struct {  // where some rows of W go on
    const char *w;
    int64_t wide, ahead;  // bytes to the next row, and to what is prefetched
} Rows;

// Adds vector u of R rows of W times M rows of x, of which packed x has m, to acc[R][M]: where bfloat16 is widened, the even
// columns before the odd ones, so that one register a row of W will do.
INLINE void step(Rows at, const char *x, int64_t m, vf *acc, int u, const int R, const int M, const int half) {
#pragma GCC unroll 2
    for (int p = 0; p < PASSES(half); p++) {
        vf v[4];
        for (int r = 0; r < R; r++) {
            v[r] = vector(at.w + r * at.wide + u * sizeof(vf));
            if (PASSES(half) == 2) v[r] = (vf)(p ? (vu)v[r] & 0xffff0000 : (vu)v[r] << 16);
        }
        for (int i = 0; i < M; i++) {
            vf y = vector(x + (p * m + i) * sizeof(vf));
#if defined(__AVX2__) && W == 8
            if (R > 1) __asm__("" : "+x"(y));  // loaded once, not with each product: there are two loads a cycle, and two products
#endif
            for (int r = 0; r < R; r++) {
#if PAIRS
                if (half) {
                    acc[r * M + i] = (vf)_mm512_dpbf16_ps((__m512)acc[r * M + i], (__m512bh)v[r], (__m512bh)y);
                    continue;
                }
#endif
                acc[r * M + i] += v[r] * y;
            }
        }
        IN_ORDER;
    }
}

// n columns of R rows of W times M rows of packed x, after part[M][ROWS] or, if they are the `first`, from 0 on.
INLINE void strip(Rows at, const char *x, int64_t m, int64_t n, int first, vf *part, const int R, const int M, const int half) {
    const int lanes = LANES(half);
    if (R * M > SUMS) __builtin_unreachable();
    vf acc[SUMS];  // [R][M]
    for (int i = 0; i < M; i++)
        for (int r = 0; r < R; r++) acc[r * M + i] = first ? splat(0) : part[i * ROWS + r];
#pragma GCC unroll 1
    for (; n >= SPAN; n -= SPAN) {
        for (int r = 0; r < R; r++)
            for (int b = 0; b < SPAN * SIZE(half); b += 64) __builtin_prefetch(at.w + at.ahead + r * at.wide + b, 0, 0);
#pragma GCC unroll 4
        for (int u = 0; u < SPAN / lanes; u++, x += m * EACH(half)) step(at, x, m, acc, u, R, M, half);
        at.w += SPAN * SIZE(half);
    }
#pragma GCC unroll 1
    for (int u = 0; n > 0; u++, n -= lanes, x += m * EACH(half)) {
        char last[4][64] = {0};
        Rows end = at;
        int v = u;
        if (n < lanes) {
            for (int r = 0; r < R; r++) memcpy(last[r], at.w + r * at.wide + u * lanes * SIZE(half), n * SIZE(half));
            end.w = last[0], end.wide = sizeof last[0], v = 0;
        }
        step(end, x, m, acc, v, R, M, half);
    }
    for (int i = 0; i < M; i++)
        for (int r = 0; r < R; r++) part[i * ROWS + r] = acc[r * M + i];
}

#define NEAR 1048576  // bytes of W that are likely to be in a cache

// Rows of x at a time, of m: where there are few registers, as evenly as they go.
INLINE int64_t at_once(int64_t m) {
    const int64_t passes = (m + MOST - 1) / MOST;
    return W == 16 ? MOST : (m + passes - 1) / passes;
}

// Rows of W at a time, of `left`, for m rows of x: the more, the less often x is read, and the more sums are under way, which wait
// for each other; as many as there are registers for them. `blocks`: x does not fit the cache.
INLINE int together(int64_t m, int64_t left, const int blocks, const int near) {
#if W == 16
    if (near && m <= 4 && left >= 4) return 4;
    if (blocks && m >= MOST && left > 2 && left != 4) return 3;
    return (m > 4 || blocks) && left > 1 ? 2 : 1;
#else
    static const int8_t rows[MOST + 1] = {0, 4, 4, 3, 2, 2, 2, 1, 1};
    return (int)MIN(rows[at_once(m)], left);
#endif
}

INLINE void strips(Rows at, const char *x, int64_t m, int64_t some, int64_t n, int first, vf *part, const int R,
                   const int half) {
#define STRIP(M) strip(at, x, m, n, first, part, R, MIN(M, MOST), half)
    switch (MIN(some, MOST)) {
        case 1: STRIP(1); break;
        case 2: STRIP(2); break;
        case 3: STRIP(3); break;
        case 4: STRIP(4); break;
        case 5: STRIP(5); break;
        case 6: STRIP(6); break;
        case 7: STRIP(7); break;
        default: STRIP(8);
    }
#undef STRIP
}

// COLUMNS of x from the k-th, which is packed as [n / lanes][PASSES][m] vectors, zero-padded: one stream, whatever m, and neighbours
// that are loaded at once are half a line apart (two halves of one kind share a bank on Zen 3).
INLINE void pack(const char *x, char *packed, int64_t m, int64_t n, int64_t k, const int half) {
    const int64_t lanes = LANES(half), end = MIN(n, k + COLUMNS);
    packed += k / lanes * m * EACH(half);
    for (; k < end; k += lanes, packed += m * EACH(half))
        for (int64_t i = 0; i < m; i++) {
            vf own = splat(0);
            memcpy(&own, x + (i * n + k) * SIZE(half), MIN(lanes, n - k) * SIZE(half));
            const vf parts[2] = {half && !PAIRS ? (vf)((vu)own << 16) : own, (vf)((vu)own & 0xffff0000)};
            for (int p = 0; p < PASSES(half); p++) memcpy(packed + (p * m + i) * sizeof(vf), parts + p, sizeof(vf));
        }
}

// Columns of W in a block: all if packed x fits the cache.
INLINE int64_t block(int64_t m, int64_t n, const int half) {
    const int64_t span = m * SPAN / LANES(half) * EACH(half);
    return (n + SPAN - 1) / SPAN * span <= CACHE ? n : MAX(1, BLOCK / span) * SPAN;
}

// Rows [from, to) of W. All columns of a row in one go if x fits the cache; else `width` columns of ROWS rows, then the next
// ones.
INLINE void part(const Map *map, const char *packed, int64_t m, int64_t n, int64_t from, int64_t to, const int half) {
    const int64_t wide = map->wide * SIZE(half), width = block(m, n, half);
    const int64_t most = width < n ? ROWS : ROWS / 2;
    const int near = width == n && map->out * wide <= NEAR;
    vf acc[ALL][ROWS];  // [m][ROWS]
    for (int64_t o = from; o < to; o += most) {
        const int64_t rows = MIN(most, to - o);
        for (int64_t i = 0; i < m && rows % W; i++)
            for (int64_t r = rows; r % W; r++) acc[i][r] = splat(0);  // lanes that no row has
        for (int64_t k = 0; k < n; k += width)
            for (int64_t r = 0, R; r < rows; r += R) {
                R = together(m, rows - r, width < n, near);
                Rows at = {map->w + (o + r) * wide + k * SIZE(half), wide, AHEAD};
                if (width < n) {  // rows of this block, or the first ones of the next, which may be that of the next rows
                    const int64_t on = r + MAX(R, NEXT), last = k + width >= n, next = on >= rows;
                    at.ahead = (next && !last ? on - rows - r : on - r) * wide + next * (last ? -k : width) * SIZE(half);
                }
                for (int64_t i = 0; i < m; i += at_once(m)) {
                    const char *x = packed + k / LANES(half) * m * EACH(half) + i * sizeof(vf);
#define STRIPS(R) strips(at, x, m, MIN(m - i, at_once(m)), MIN(width, n - k), k == 0, acc[i] + r, R, half)
                    switch (R) {
                        case 1: STRIPS(1); break;
                        case 2: STRIPS(2); break;
                        case 3: STRIPS(3); break;
                        default: STRIPS(4);
                    }
#undef STRIPS
                }
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
    static int64_t room_##TYPE(int64_t m, int64_t n) { return (n + LANES(HALF) - 1) / LANES(HALF) * m * EACH(HALF); }      \
    static void pack_##TYPE(const char *x, char *packed, int64_t m, int64_t n, int64_t k) { pack(x, packed, m, n, k, HALF); } \
    static void part_##TYPE(const Map *map, const char *packed, int64_t m, int64_t n, int64_t from, int64_t to) {          \
        part(map, packed, m, n, from, to, HALF);                                                                           \
    }                                                                                                                      \
    EXPORT_MAPS(TYPE)

KIND(f32, 0)
KIND(bf16, 1)
