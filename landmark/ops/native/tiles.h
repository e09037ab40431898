// Codes of 4 or 8 bits in tiles of 16 rows, a lane of a vector a row, and in groups of 32 columns that share a scale (float16).
#pragma once
#include "lanes.h"
#include "maps.h"

#define TILE 16         // rows of W
#define GROUP 32        // columns that share a scale
#define PARTS (TILE / W)  // vectors of floats for a tile
#define MOST 8          // rows of x at a time
#define AHEAD 4096      // bytes to prefetch ahead of the codes that are read
#define BYTES(bits) (TILE * GROUP * (bits) / 8)  // of a tile's group

INLINE int64_t groups_of(int64_t n) { return (n + GROUP - 1) / GROUP; }
INLINE int64_t tiles_of(int64_t rows) { return (rows + TILE - 1) / TILE; }

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

INLINE vf scales(const uint16_t *s) {
#ifdef __AVX512F__
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)s));
#else
    vf v;
    for (int j = 0; j < W; j++) v[j] = from_half(s[j]);
    return v;
#endif
}

// Column k of W rows of a tile's group at w, from row `first` on, as integers in floats. Of 4 bits, a row owns 4 bytes of
// each of four vectors of 64, for 8 columns: the even ones in the low two, from the low bits on, the odd ones in the
// others. Of 8 bits (a sign and a magnitude), a vector is for 4 columns: bytes 16 j to 16 j + 7 for two of rows 4 j to
// 4 j + 3, and as many for the next two.
INLINE vf column(const char *w, int k, int first, const int bits) {
    if (bits == 4) {
        vu v;
        memcpy(&v, w + k / 8 * 64 + first * 4, sizeof v);
        return __builtin_convertvector((vi)(v >> (k % 8 / 2 * 4 + k % 2 * 16) & 15) - 8, vf);
    }
    typedef int64_t vq __attribute__((vector_size(4 * W)));
    vq all, own;
    for (int j = 0; j < W / 2; j++) own[j] = 2 * j % (W / 2) + k % 4 / 2;
    memcpy(&all, w + k / 4 * 64 + first * 4, sizeof all);
    all = __builtin_shuffle(all, own);
    vh two;
    memcpy(&two, &all, sizeof two);
    const vu v = __builtin_convertvector(two, vu) >> (k % 2 * 8);
    return (vf)((vu)__builtin_convertvector((vi)(v & 127), vf) | (v & 128) << 24);
}

// acc[R][M] = one of R tiles' `PARTS` of a group times M rows of x [GROUP][M], in float32.
INLINE void products_f32(const char *const *w, const float *x, int part, vf *acc, const int R, const int M, const int bits) {
    for (int i = 0; i < R * M; i++) acc[i] = splat(0);
#pragma GCC unroll 32
    for (int k = 0; k < GROUP; k++) {
        vf v[2];
        for (int r = 0; r < R; r++) v[r] = column(w[r], k, part * W, bits);
        for (int i = 0; i < M; i++) {
            const vf y = splat(x[k * M + i]);
            for (int r = 0; r < R; r++) acc[r * M + i] += v[r] * y;
        }
    }
}

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
