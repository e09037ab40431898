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
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)s));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const void *)s));
#else
    vf v;
    for (int j = 0; j < W; j++) v[j] = from_half(s[j]);
    return v;
#endif
}

// Columns k to k + 32 / bits - 1 of W rows of a tile's group at w, from row `first` on: a row a lane, as signed numbers of so
// many bits. Of 4 bits (and 8 to make them positive) a row has 4 bytes: the even columns in the low two, from the low bits on,
// the odd ones in the others. Of 8 (a sign and a magnitude) bytes 16 j to 16 j + 7 are for two columns of rows 4 j to 4 j + 3,
// and as many for the next two.
INLINE vi columns(const char *w, int k, int first, const int bits) {
    typedef int8_t bytes __attribute__((vector_size(4 * W)));
    vi v;
    memcpy(&v, w + k * bits / 32 * 64 + first * 4, sizeof v);
    if (bits == 4) return v ^ (int32_t)0x88888888;
    bytes order;
    for (int j = 0; j < 4 * W; j++) order[j] = j / 16 * 16 + j % 4 / 2 * 8 + j % 16 / 4 * 2 + j % 2;
    const bytes own = __builtin_shuffle((bytes)v, order), sign = own < 0;
    return (vi)(((own & 127) ^ sign) - sign);
}

// The k-th column of those.
INLINE vf column_of(vi v, int k, const int bits) {
    const int from = bits == 4 ? k % 8 / 2 * 4 + k % 2 * 16 : k % 4 * 8;
    return __builtin_convertvector(v << (32 - bits - from) >> (32 - bits), vf);
}

INLINE vf column(const char *w, int k, int first, const int bits) {
    return column_of(columns(w, k / (32 / bits) * (32 / bits), first, bits), k, bits);
}

// The same for products: numbers times LIFT, column k of those at hand. Bytes of a row are put on top of its lane, one at a time.
#if defined(__AVX2__) && !defined(__AVX512F__)
#define LIFT 0x1p24f
typedef struct {
    __m256i bytes[2];  // of 4 bits, low and high halves
} Lifted;

INLINE Lifted lifted(const char *w, int k, const int bits) {
    Lifted all;
    const __m256i v = _mm256_loadu_si256((const void *)(w + k * bits / 32 * 64)), low = _mm256_set1_epi8(15);
    if (bits == 4)
        for (int h = 0; h < 2; h++)
            all.bytes[h] = _mm256_sub_epi8(_mm256_and_si256(h ? _mm256_srli_epi16(v, 4) : v, low), _mm256_set1_epi8(8));
    else
        all.bytes[0] = _mm256_sign_epi8(_mm256_and_si256(v, _mm256_set1_epi8(127)), _mm256_or_si256(v, _mm256_set1_epi8(1)));
    return all;
}

INLINE vf lifted_column(const Lifted *all, int k, const int bits) {
    const int half = bits == 4 ? k / 2 % 2 : 0, byte = k % 8 / 4 + k % 2 * 2;  // see `columns`
    char at[32];
    for (int j = 0; j < 32; j++) {
        const int row = j / 4 % 4;
        at[j] = j % 4 < 3 ? -128 : bits == 4 ? row * 4 + byte : k % 4 / 2 * 8 + row * 2 + k % 2;
    }
    __m256i order;
    memcpy(&order, at, 32);
    return (vf)_mm256_cvtepi32_ps(_mm256_shuffle_epi8(all->bytes[half], order));
}
#else
#define LIFT 1.0f
typedef struct {
    vi all;
} Lifted;

INLINE Lifted lifted(const char *w, int k, const int bits) { return (Lifted){columns(w, k, 0, bits)}; }
INLINE vf lifted_column(const Lifted *all, int k, const int bits) { return column_of(all->all, k, bits); }
#endif

#define VECTORS (TOGETHER * PARTS)  // of a unit's rows: parts of the first tile, then of the next
#define AT_ONCE(M) (W == 16 || (M) == 1 ? VECTORS : (M) <= 4 ? 2 : 1)  // as many as have registers for sums with M rows of x

// Where the sums of vector v and the i-th of M rows of x are, among those that `finish` takes.
INLINE vf *total_of(vf *total, int v, int i, const int M) { return total + (v / PARTS * M + i) * PARTS + v % PARTS; }

INLINE const char *vector_of(const char *w, int v, const int bits) { return w + v / PARTS * BYTES(bits) + v % PARTS * W * 4; }

// acc[V][M] = V vectors of rows of a unit's group at w, from the one `first` on, times LIFT and M rows of x [GROUP][M], in float32.
INLINE void products_f32(const char *w, const float *x, int first, vf *acc, const int V, const int M, const int bits) {
    const int some = 32 / bits;
    for (int i = 0; i < V * M; i++) acc[i] = splat(0);
#pragma GCC unroll 8
    for (int k = 0; k < GROUP; k += some) {
        Lifted own[VECTORS];
        for (int v = 0; v < V; v++) own[v] = lifted(vector_of(w, first + v, bits), k, bits);
#pragma GCC unroll 8
        for (int j = k; j < k + some; j++) {
            vf c[VECTORS];
            for (int v = 0; v < V; v++) c[v] = lifted_column(own + v, j, bits);
            for (int i = 0; i < M; i++) {
                const vf y = splat(x[j * M + i]);
                for (int v = 0; v < V; v++) acc[v * M + i] += c[v] * y;
            }
            IN_ORDER;
        }
    }
}
