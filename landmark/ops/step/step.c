// A residual sublayer of few tokens by one team of threads: x + scale f(norm(x)), where f is attention over what is cached
// or a feed-forward function.
#include "act.h"
#include "decode.h"
#include "maps.h"
#include "norm.h"

#define STRIP 256  // elements that a thread takes at a time

typedef struct {
    const char *x;     // [m, dim]
    char *y;           // [m, dim]
    const char *norm;  // [dim], of x's type
    const Kind *in_kind, *out_kind;
    int64_t count, in_n, out_n;
    Map in[3], out;  // what f begins with (queries, keys, values; gate and up; up alone), of which `count` are there; its end
    void (*answer)(const Decode *c, float *parts, char *turned);  // between them; null: `act`
    int64_t m, dim, act, threads;
    Decode attend;  // without queries, new keys and values, and answers
    float eps, offset, scale;
} Step;

// act(gate) up, or act(gate), of n elements from the i-th.
INLINE void activate(const char *gate, const char *up, char *y, int64_t i, int64_t n, const int kind, const int half) {
    for (int64_t j = i; j < i + n; j += W) {
        const vf a = activated(take(gate, j, i + n, half), kind);
        give(y, j, i + n, up ? a * take(up, j, i + n, half) : a, half);
    }
}

INLINE void activate_any(const char *gate, const char *up, char *y, int64_t i, int64_t n, int64_t kind, const int half) {
    switch (kind) {
        case RELU: activate(gate, up, y, i, n, RELU, half); break;
        case RELU2: activate(gate, up, y, i, n, RELU2, half); break;
        case GELU: activate(gate, up, y, i, n, GELU, half); break;
        case GELU_TANH: activate(gate, up, y, i, n, GELU_TANH, half); break;
        case GELU_QUICK: activate(gate, up, y, i, n, GELU_QUICK, half); break;
        case SILU: activate(gate, up, y, i, n, SILU, half); break;
        case SIGMOID: activate(gate, up, y, i, n, SIGMOID, half); break;
        case TANH: activate(gate, up, y, i, n, TANH, half); break;
        default: activate(gate, up, y, i, n, IDENTITY, half);
    }
}

// Every thread of a team: x [m, n] times maps.
INLINE void team(const Kind *kind, const Map *maps, int64_t count, const char *x, char *packed, int64_t m, int64_t n,
                 int64_t threads) {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < n; k += COLUMNS) kind->pack(x, packed, m, n, k);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < threads; t++) share(kind, maps, count, packed, m, n, t, threads);
}

INLINE void step(const Step *s, const int half) {
    const int64_t size = half ? 2 : 4, m = s->m, row = m * s->dim * size;
    Step own = *s;
    Map *in = own.in;
    Decode *c = &own.attend;
    int64_t wide = 0;
    for (int64_t i = 0; i < s->count; i++) wide += in[i].out;
    const int64_t packs = (MAX(s->in_kind->room(m, s->in_n), s->out_kind->room(m, s->out_n)) + 63) / 64 * 64;
    const int64_t floats = s->answer ? parts_size(c) + m * in[0].out : 0;
    char *packed = room_of(packs + floats * 4 + 2 * row + (wide + s->out_n) * m * size);
    float *parts = (float *)(packed + packs);
    char *normed = (char *)(parts + floats), *middle = normed + 2 * row, *next = middle + s->out_n * m * size;
    for (int64_t i = 0; i < s->count; next += in[i++].out * m * size) in[i].y = next;
    own.out.y = normed + row;
    c->q = in[0].y, c->new_k = in[1].y, c->new_v = in[2].y, c->out = middle;
#pragma omp parallel num_threads(s->threads) if (s->threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m; i++)
            rms_norm_row(AT(s->x, i * s->dim), s->norm, half, AT(normed, i * s->dim), s->dim, s->eps, s->offset, half);
        team(s->in_kind, in, s->count, normed, packed, m, s->in_n, s->threads);
        if (s->answer)
            s->answer(c, parts, (char *)(parts + parts_size(c)));
        else {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < m * s->out_n; i += STRIP)
                activate_any(in[0].y, s->count > 1 ? in[1].y : 0, middle, i, MIN(STRIP, m * s->out_n - i), s->act, half);
        }
        team(s->out_kind, &own.out, 1, middle, packed, m, s->out_n, s->threads);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m * s->dim; i += STRIP)
            for (int64_t j = i, end = MIN(i + STRIP, m * s->dim); j < end; j += W)
                give(s->y, j, end, take(s->x, j, end, half) + s->scale * take(own.out.y, j, end, half), half);
    }
    free(packed);
}

void step_f32(const Step *s) { step(s, 0); }
void step_bf16(const Step *s) { step(s, 1); }
