// Rotary embedding (Su et al. 2021) of the heads of one token.
#pragma once
#include "rows.h"

// The pairs (i, i + R) of one head, turned by the angles of cosines c and sines s.
INLINE void turn_halves(const void *from, void *to, const float *c, const float *s, int64_t R, float sign, const int half) {
    for (int64_t i = 0; i < R; i += W) {
        const vf a = take(from, i, R, half), b = take(AT(from, R), i, R, half), k = take(c, i, R, 0), t = sign * take(s, i, R, 0);
        give(to, i, R, a * k - b * t, half);
        give(AT(to, R), i, R, b * k + a * t, half);
    }
}

// The pairs (2i, 2i + 1) of one head: each lane times its cosine, plus its neighbour times its signed sine.
INLINE void turn_neighbours(const void *from, void *to, const float *k, const float *t, int64_t n, const int half) {
    for (int64_t i = 0; i < n; i += W) {
        const vf a = take(from, i, n, half);
        typedef uint64_t pairs __attribute__((vector_size(4 * W)));
        const vf b = (vf)((pairs)a << 32 | (pairs)a >> 32);
        give(to, i, n, a * take(k, i, n, 0) + b * take(t, i, n, 0), half);
    }
}

// H heads of D elements, `apart` elements from one to the next, the first 2 R of each turned -> H heads end to end.
INLINE void turn(const char *from, char *to, const float *c, const float *s, int64_t H, int64_t apart, int64_t D, int64_t R,
                 float sign, int interleaved, const int half) {
    for (int64_t h = 0; h < H; h++) memcpy(AT(to, h * D + 2 * R), AT(from, h * apart + 2 * R), (D - 2 * R) * (half ? 2 : 4));
    if (!interleaved)
        for (int64_t h = 0; h < H; h++) turn_halves(AT(from, h * apart), AT(to, h * D), c, s, R, sign, half);
    else
        for (int64_t i = 0; i < R; i += 64) {
            const int64_t n = MIN(64, R - i);
            float k[128], t[128];
            for (int64_t j = 0; j < n; j++) {
                k[2 * j] = k[2 * j + 1] = c[i + j];
                t[2 * j] = -sign * s[i + j], t[2 * j + 1] = sign * s[i + j];
            }
            for (int64_t h = 0; h < H; h++) turn_neighbours(AT(from, h * apart + 2 * i), AT(to, h * D + 2 * i), k, t, 2 * n, half);
        }
}
