// Feed-forward functions of a few tokens, each through its own experts, in one call that reads every weight once:
// y[n] = sum over j of weights[n, j] down_e (act(gate_e x[n]) up_e x[n]), e = experts[n, j]; act(up_e x[n]) without gates.
#include <stdlib.h>
#include "act.h"
#include "dots.h"

typedef struct {
    const char *x, *gate, *up, *down;  // x [tokens, dim]; gate (or null), up [number, hidden, dim]; down [number, out, hidden]
    const int64_t *experts;            // [tokens, active], -1 for none; null: all tokens pass expert 0
    const float *weights;              // [tokens, active]; null: ones
    const char *up_bias, *down_bias;   // [hidden] and [out], or null, where all tokens pass expert 0
    char *y;                           // [tokens, out]
    int64_t tokens, active, number, dim, out, hidden, kind, on_input, threads;
} Call;

// Up to FEW choices of one expert.
typedef struct {
    int64_t expert, many, choice[FEW];
} Group;

// The choices by expert, at most FEW together; how many groups there are.
static int64_t group(const Call *c, Group *groups) {
    const int64_t choices = c->tokens * c->active;
    int64_t count = 0, *open = malloc(c->number * sizeof *open);
    if (!open) abort();
    for (int64_t e = 0; e < c->number; e++) open[e] = -1;
    for (int64_t i = 0; i < choices; i++) {
        const int64_t e = c->experts ? c->experts[i] : 0;
        if (e < 0) continue;
        if (open[e] < 0 || groups[open[e]].many == FEW) {
            groups[count].expert = e, groups[count].many = 0;
            open[e] = count++;
        }
        Group *g = groups + open[e];
        g->choice[g->many++] = i;
    }
    free(open);
    return count;
}

// Rows [from, to) of gate and up, for M tokens x -> their places in h.
INLINE void inner(const Call *c, int64_t e, const char *const *x, char *const *h, int64_t from, int64_t to, const int M,
                  const int half) {
    const int64_t row = c->dim * (half ? 2 : 4);
    const int kind = c->kind;
    float a[FEW][W] = {0}, b[FEW][W] = {0};
    for (int64_t o = from; o < to; o += W) {
        const int64_t n = MIN(W, to - o), at = (e * c->hidden + o) * row;
        rows(c->up + at, c->dim, n, x, b, M, half);
        if (c->gate) rows(c->gate + at, c->dim, n, x, a, M, half);
        const vf bias = !c->up_bias ? splat(0) : n == W ? load(c->up_bias, o, half) : load_n(c->up_bias, o, n, 0, half);
        for (int m = 0; m < M; m++) {
            const vf up = load(b[m], 0, 0) + bias, y = c->gate ? up * activated(load(a[m], 0, 0), kind) : activated(up, kind);
            if (n == W)
                store(h[m], o, y, half);
            else
                store_n(h[m], o, n, y, half);
        }
    }
}

// Rows [from, to) of down, for M hidden vectors h -> their places in z.
INLINE void outer(const Call *c, int64_t e, const char *const *h, float *const *z, int64_t from, int64_t to, const int M,
                  const int half) {
    float t[FEW][W];
    for (int64_t o = from; o < to; o += W) {
        const int64_t n = MIN(W, to - o);
        rows(c->down + (e * c->out + o) * c->hidden * (half ? 2 : 4), c->hidden, n, h, t, M, half);
        for (int m = 0; m < M; m++) memcpy(z[m] + o, t[m], n * sizeof(float));
    }
}

// Scratch of a call, by choice: inputs where weights multiply them, hidden vectors, answers in float32.
typedef struct {
    char *x, *h;
    float *z;
} Room;

INLINE void first(const Call *c, const Group *g, Room room, int64_t from, int64_t to, const int half) {
    const int64_t size = half ? 2 : 4;
    const char *x[FEW];
    char *h[FEW];
    for (int64_t m = 0; m < g->many; m++) {
        const int64_t i = g->choice[m];
        x[m] = room.x ? room.x + i * c->dim * size : c->x + i / c->active * c->dim * size;
        h[m] = room.h + i * c->hidden * size;
    }
    EACH(g->many, inner, c, g->expert, x, h, from, to)
}

INLINE void second(const Call *c, const Group *g, Room room, int64_t from, int64_t to, const int half) {
    const char *h[FEW];
    float *z[FEW];
    for (int64_t m = 0; m < g->many; m++)
        h[m] = room.h + g->choice[m] * c->hidden * (half ? 2 : 4), z[m] = room.z + g->choice[m] * c->out;
    EACH(g->many, outer, c, g->expert, h, z, from, to)
}

// Not inlined: within a parallel region `half` is no constant.
#define APART static __attribute__((noinline)) void
#define SHARE const Call *c, const Group *g, Room room, int64_t from, int64_t to
APART first_f32(SHARE) { first(c, g, room, from, to, 0); }
APART first_bf16(SHARE) { first(c, g, room, from, to, 1); }
APART second_f32(SHARE) { second(c, g, room, from, to, 0); }
APART second_bf16(SHARE) { second(c, g, room, from, to, 1); }

// Inputs times their weights, rounded, for all choices.
INLINE void scaled(const Call *c, char *to, const int half) {
    for (int64_t i = 0; i < c->tokens * c->active; i++)
        for (int64_t j = 0; j < c->dim; j++)
            put(to, i * c->dim + j, get(c->x, i / c->active * c->dim + j, half) * c->weights[i], half);
}

INLINE void combined(const Call *c, const float *z, const int half) {
    const int weighted = c->weights && !c->on_input;
    for (int64_t n = 0; n < c->tokens; n++)
        for (int64_t i = 0; i < c->out; i += W) {
            const int64_t count = MIN(W, c->out - i);
            vf y = !c->down_bias ? splat(0) : count == W ? load(c->down_bias, i, half) : load_n(c->down_bias, i, count, 0, half);
            for (int64_t j = n * c->active; j < (n + 1) * c->active; j++) {
                if (c->experts && c->experts[j] < 0) continue;
                const vf part = count == W ? load(z, j * c->out + i, 0) : load_n(z, j * c->out + i, count, 0, 0);
                y += weighted ? c->weights[j] * part : part;
            }
            if (count == W)
                store(c->y, n * c->out + i, y, half);
            else
                store_n(c->y, n * c->out + i, count, y, half);
        }
}

INLINE void few(const Call *c, const int half) {
    const int64_t choices = c->tokens * c->active, size = half ? 2 : 4;
    Group *groups = malloc(choices * sizeof *groups);
    char *space = malloc(choices * ((c->hidden + (c->on_input ? c->dim : 0)) * size + c->out * 4));
    if (!groups || !space) abort();
    Room room = {0, space + choices * c->out * 4, (float *)space};
    if (c->on_input) {
        room.x = room.h + choices * c->hidden * size;
        scaled(c, room.x, half);
    }
    const int64_t count = group(c, groups), cuts = c->threads > 1 ? MAX(1, 4 * c->threads / MAX(1, count)) : 1;
    void (*const one)(SHARE) = half ? first_bf16 : first_f32, (*const two)(SHARE) = half ? second_bf16 : second_f32;
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < count * cuts; t++)
            one(c, groups + t / cuts, room, c->hidden * (t % cuts) / cuts, c->hidden * (t % cuts + 1) / cuts);
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < count * cuts; t++)
            two(c, groups + t / cuts, room, c->out * (t % cuts) / cuts, c->out * (t % cuts + 1) / cuts);
    }
    combined(c, room.z, half);
    free(groups), free(space);
}

void few_f32(const Call *c) { few(c, 0); }
void few_bf16(const Call *c) { few(c, 1); }
