// A feed-forward function of a few tokens in one call that reads every weight once: y = down(act(gate(x)) up(x)), or
// down(act(up(x))) without a gate.
#include <stdlib.h>
#include "act.h"
#include "dots.h"
#include "rows.h"

typedef struct {
    const char *x, *gate, *up, *down;  // x [tokens, dim]; gate (or null), up [hidden, dim]; down [out, hidden]
    const char *up_bias, *down_bias;   // [hidden] and [out], or null
    char *y;                           // [tokens, out]
    int64_t tokens, dim, out, hidden, kind, threads;
} Call;

// Rows [from, to) of gate and up, for M tokens x -> their places in h.
INLINE void inner(const Call *c, const char *const *x, char *const *h, int64_t from, int64_t to, const int M, const int half) {
    const int64_t row = c->dim * (half ? 2 : 4);
    const int kind = c->kind;
    float a[FEW][W] = {0}, b[FEW][W] = {0};
    for (int64_t o = from; o < to; o += W) {
        const int64_t n = MIN(W, to - o);
        rows(c->up + o * row, c->dim, n, x, b, M, half);
        if (c->gate) rows(c->gate + o * row, c->dim, n, x, a, M, half);
        const vf bias = c->up_bias ? take(c->up_bias, o, o + n, half) : splat(0);
        for (int m = 0; m < M; m++) {
            const vf up = load(b[m], 0, 0) + bias, y = c->gate ? up * activated(load(a[m], 0, 0), kind) : activated(up, kind);
            give(h[m], o, o + n, y, half);
        }
    }
}

// Rows [from, to) of down, for M hidden vectors h -> their places in y.
INLINE void outer(const Call *c, const char *const *h, char *const *y, int64_t from, int64_t to, const int M, const int half) {
    float t[FEW][W] = {0};
    for (int64_t o = from; o < to; o += W) {
        const int64_t n = MIN(W, to - o);
        rows(c->down + o * c->hidden * (half ? 2 : 4), c->hidden, n, h, t, M, half);
        const vf bias = c->down_bias ? take(c->down_bias, o, o + n, half) : splat(0);
        for (int m = 0; m < M; m++) give(y[m], o, o + n, load(t[m], 0, 0) + bias, half);
    }
}

// Rows [from, to) for the tokens from the i-th on, of which at most FEW are taken; h [tokens, hidden].
INLINE void first(const Call *c, char *hidden, int64_t i, int64_t from, int64_t to, const int half) {
    const int64_t many = MIN(FEW, c->tokens - i);
    const char *x[FEW];
    char *h[FEW];
    for (int64_t m = 0; m < many; m++) x[m] = AT(c->x, (i + m) * c->dim), h[m] = AT(hidden, (i + m) * c->hidden);
    EACH(many, inner, c, x, h, from, to)
}

INLINE void second(const Call *c, char *hidden, int64_t i, int64_t from, int64_t to, const int half) {
    const int64_t many = MIN(FEW, c->tokens - i);
    const char *h[FEW];
    char *y[FEW];
    for (int64_t m = 0; m < many; m++) h[m] = AT(hidden, (i + m) * c->hidden), y[m] = AT(c->y, (i + m) * c->out);
    EACH(many, outer, c, h, y, from, to)
}

// Not inlined: within a parallel region `half` is no constant.
#define APART static __attribute__((noinline)) void
#define SHARE const Call *c, char *hidden, int64_t i, int64_t from, int64_t to
APART first_f32(SHARE) { first(c, hidden, i, from, to, 0); }
APART first_bf16(SHARE) { first(c, hidden, i, from, to, 1); }
APART second_f32(SHARE) { second(c, hidden, i, from, to, 0); }
APART second_bf16(SHARE) { second(c, hidden, i, from, to, 1); }

INLINE void few(const Call *c, const int half) {
    char *hidden = malloc(c->tokens * c->hidden * (half ? 2 : 4));
    if (!hidden) abort();
    const int64_t groups = (c->tokens + FEW - 1) / FEW, cuts = c->threads > 1 ? 4 * c->threads / groups : 1;
    void (*const one)(SHARE) = half ? first_bf16 : first_f32, (*const two)(SHARE) = half ? second_bf16 : second_f32;
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < groups * cuts; t++)
            one(c, hidden, t / cuts * FEW, c->hidden * (t % cuts) / cuts, c->hidden * (t % cuts + 1) / cuts);
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < groups * cuts; t++)
            two(c, hidden, t / cuts * FEW, c->out * (t % cuts) / cuts, c->out * (t % cuts + 1) / cuts);
    }
    free(hidden);
}

void few_f32(const Call *c) { few(c, 0); }
void few_bf16(const Call *c) { few(c, 1); }
