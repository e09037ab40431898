// Codes of 4 or 8 bits in tiles of 16 rows, in groups of 32 columns that share a scale (float16); of two tiles side by side
// each group's codes follow another, and its scales.
#pragma once
#define TOGETHER 2
#include "tiles.h"

#define GROUP 32  // columns that share a scale
#define BYTES(bits) (TILE * GROUP * (bits) / 8)  // of a tile's group

INLINE int64_t groups_of(int64_t n) { return (n + GROUP - 1) / GROUP; }
INLINE int64_t unit_bytes(int64_t n, const int bits) { return groups_of(n) * TOGETHER * BYTES(bits); }

// Codes and scales of a unit's group g; those of its r-th tile are r BYTES and r TILE on.
INLINE const char *codes_of(const Map *map, int64_t n, int64_t unit, int64_t g, const int bits) {
    return map->w + (unit * groups_of(n) + g) * TOGETHER * BYTES(bits);
}
INLINE const uint16_t *scales_of(const Map *map, int64_t n, int64_t unit, int64_t g) {
    return (const uint16_t *)map->s + (unit * groups_of(n) + g) * UNIT;
}

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

// acc[TOGETHER][M] = one of a unit's tiles' `PARTS` of a group times M rows of x [GROUP][M], in float32.
INLINE void products_f32(const char *w, const float *x, int part, vf *acc, const int M, const int bits) {
    const int R = TOGETHER;
    for (int i = 0; i < R * M; i++) acc[i] = splat(0);
#pragma GCC unroll 32
    for (int k = 0; k < GROUP; k++) {
        vf v[TOGETHER];
        for (int r = 0; r < R; r++) v[r] = column(w + r * BYTES(bits), k, part * W, bits);
        for (int i = 0; i < M; i++) {
            const vf y = splat(x[k * M + i]);
            for (int r = 0; r < R; r++) acc[r * M + i] += v[r] * y;
        }
    }
}
