// A decoded token of Mamba between its linear maps at both ends, in one call: convolution, what it chooses (steps, B and C),
// their norms, the recurrence and the gate.
#include <stdlib.h>
#include "act.h"
#include "dots.h"

#define MOST 256  // states of a channel

typedef struct {
    const char *x, *z;                  // [tokens, channels], rows `ld` elements apart
    const char *taps, *taps_bias;       // [channels, K], [channels] or null
    const char *past;                   // [tokens, K - 1, channels]
    const char *choose;                 // [rank + 2 N, channels]
    const char *scales[3];              // norms of the parts of what it chooses, or null
    const char *step, *step_bias;       // [channels, rank], [channels]
    const char *logs, *skip;            // log of -A [channels, N], D [channels]
    const float *h;                     // [tokens, N, channels]
    char *last;                         // as past
    float *to;                          // as h
    char *y;                            // [tokens, channels]
    int64_t tokens, channels, N, rank, K, ld, logs_half, threads;
    double eps, offset;
} Call;

// Convolved tokens [tokens, channels] and what is chosen, [tokens, rank + 2 N] as it is and in float32.
typedef struct {
    char *x, *chosen;
    float *wide;
} Room;

INLINE vf some(const void *p, int64_t i, int64_t n, const int half) { return n >= W ? load(p, i, half) : load_n(p, i, n, 0, half); }
INLINE void keep(void *p, int64_t i, int64_t n, vf x, const int half) {
    if (n >= W)
        store(p, i, x, half);
    else
        store_n(p, i, n, x, half);
}

// Channels [from, from + W) of a token.
INLINE void convolve(const Call *c, Room room, int64_t token, int64_t from, const int half) {
    const int64_t C = c->channels, K = c->K, n = MIN(W, C - from), before = token * (K - 1) * C + from;
    vf y = c->taps_bias ? some(c->taps_bias, from, n, half) : splat(0);
    for (int64_t k = 0; k < K; k++) {
        vf w = splat(0);
        for (int64_t i = 0; i < n; i++) w[i] = get(c->taps, (from + i) * K + k, half);
        const vf x = k + 1 < K ? some(c->past, before + k * C, n, half) : some(c->x, token * c->ld + from, n, half);
        y += w * x;
        if (k) keep(c->last, before + (k - 1) * C, n, x, half);
    }
    keep(room.x, token * C + from, n, y * vsigmoid(y), half);
}

// Rows [from, from + W) of what the tokens [first, first + M) choose.
INLINE void choose(const Call *c, Room room, int64_t first, int64_t from, const int M, const int half) {
    const int64_t all = c->rank + 2 * c->N, size = half ? 2 : 4, n = MIN(W, all - from);
    const char *x[FEW];
    float t[FEW][W];
    for (int m = 0; m < M; m++) x[m] = room.x + (first + m) * c->channels * size;
    rows(c->choose + from * c->channels * size, c->channels, n, x, t, M, half);
    for (int m = 0; m < M; m++)
        for (int64_t i = 0; i < n; i++) put(room.chosen, (first + m) * all + from + i, t[m][i], half);
}

// The norms of a token's steps, B and C.
INLINE void norms(const Call *c, Room room, int64_t token, const int half) {
    const int64_t sizes[3] = {c->rank, c->N, c->N};
    int64_t at = token * (c->rank + 2 * c->N);
    for (int part = 0; part < 3; part++) {
        float squares = 0, k = 1;
        for (int64_t i = 0; i < sizes[part] && c->scales[part]; i++) {
            const float v = get(room.chosen, at + i, half);
            squares += v * v;
        }
        if (c->scales[part]) k = 1 / sqrtf(squares / (float)sizes[part] + (float)c->eps);
        for (int64_t i = 0; i < sizes[part]; i++, at++) {
            if (c->scales[part])
                put(room.chosen, at, get(room.chosen, at, half) * k * ((float)c->offset + get(c->scales[part], i, half)), half);
            room.wide[at] = get(room.chosen, at, half);
        }
    }
}

// Channels [from, from + W) of the tokens [first, first + M): their steps, then the recurrence.
INLINE void recur(const Call *c, Room room, int64_t first, int64_t from, const int M, const int half) {
    const int64_t C = c->channels, N = c->N, all = c->rank + 2 * N, size = half ? 2 : 4, n = MIN(W, C - from);
    const char *chosen[FEW];
    float t[FEW][W] = {0};
    vf A[MOST], D = splat(0), bias = some(c->step_bias, from, n, half);
    for (int m = 0; m < M; m++) chosen[m] = room.chosen + (first + m) * all * size;
    rows(c->step + from * c->rank * size, c->rank, n, chosen, t, M, half);
    for (int64_t s = 0; s < N; s++) {
        vf log = splat(0);
        for (int64_t i = 0; i < n; i++) log[i] = c->logs_half ? get(c->logs, (from + i) * N + s, 1) : get(c->logs, (from + i) * N + s, 0);
        A[s] = -vexp(log);
    }
    for (int64_t i = 0; i < n; i++) D[i] = c->logs_half ? get(c->skip, from + i, 1) : get(c->skip, from + i, 0);
    for (int m = 0; m < M; m++) {
        const int64_t token = first + m;
        const float *B = room.wide + token * all + c->rank, *Cs = B + N;
        const vf d = vsoftplus(load(t[m], 0, 0) + bias), x = some(room.x, token * C + from, n, half), u = d * x;
        const vf z = some(c->z, token * c->ld + from, n, half);
        vf y = D * x;
        for (int64_t s = 0; s < N; s++) {
            const int64_t at = (token * N + s) * C + from;
            const vf h = vexp(d * A[s]) * some(c->h, at, n, 0) + B[s] * u;
            keep(c->to, at, n, h, 0);
            y += Cs[s] * h;
        }
        keep(c->y, token * C + from, n, y * z * vsigmoid(z), half);
    }
}

// Not inlined: within a parallel region `half` is no constant.
#define APART static __attribute__((noinline)) void
#define SHARE const Call *c, Room room, int64_t first, int64_t from, int64_t M
APART convolve_f32(SHARE) { convolve(c, room, first, from, 0); }
APART convolve_bf16(SHARE) { convolve(c, room, first, from, 1); }
APART choose_f32(SHARE) { const int half = 0; EACH(M, choose, c, room, first, from) }
APART choose_bf16(SHARE) { const int half = 1; EACH(M, choose, c, room, first, from) }
APART norms_f32(SHARE) { norms(c, room, first, 0); }
APART norms_bf16(SHARE) { norms(c, room, first, 1); }
APART recur_f32(SHARE) { const int half = 0; EACH(M, recur, c, room, first, from) }
APART recur_bf16(SHARE) { const int half = 1; EACH(M, recur, c, room, first, from) }

INLINE void step(const Call *c, const int half) {
    const int64_t all = c->rank + 2 * c->N, size = half ? 2 : 4, blocks = (c->channels + W - 1) / W;
    const int64_t groups = (c->tokens + FEW - 1) / FEW, parts = (all + W - 1) / W;
    char *space = malloc(c->tokens * (all * 4 + (c->channels + all) * size));
    if (!space) abort();
    const Room room = {space + c->tokens * all * 4, space + c->tokens * (all * 4 + c->channels * size), (float *)space};
    void (*const one)(SHARE) = half ? convolve_bf16 : convolve_f32, (*const two)(SHARE) = half ? choose_bf16 : choose_f32;
    void (*const three)(SHARE) = half ? norms_bf16 : norms_f32, (*const four)(SHARE) = half ? recur_bf16 : recur_f32;
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < c->tokens * blocks; i++) one(c, room, i / blocks, i % blocks * W, 1);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < groups * parts; i++)
            two(c, room, i / parts * FEW, i % parts * W, MIN(FEW, c->tokens - i / parts * FEW));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < c->tokens; i++) three(c, room, i, 0, 1);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < groups * blocks; i++)
            four(c, room, i / blocks * FEW, i % blocks * W, MIN(FEW, c->tokens - i / blocks * FEW));
    }
    free(space);
}

void step_f32(const Call *c) { step(c, 0); }
void step_bf16(const Call *c) { step(c, 1); }
