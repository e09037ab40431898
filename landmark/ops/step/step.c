// Residual sublayers of few tokens by one team of threads: x + scale after(f(before(x))), where f is attention over what is
// cached, a feed-forward function or experts, and before and after are norms or nothing, one after the other.
#include "decode.h"
#include "experts.h"
#include "gated.h"
#include "norm.h"

#define STRIP 256  // elements that a thread takes at a time

typedef struct {
    const char *weight, *bias;  // [dim], of x's type; without a weight there is no norm
    int64_t centred;            // LayerNorm, else RMSNorm
    float eps, offset;
} Norm;

typedef struct {
    Norm before, after;
    const Kind *in_kind, *out_kind;
    int64_t count, in_n, out_n;
    Map in[3], out;  // what f begins with (queries, keys, values; gate and up; up alone), of which `count` are there; its end
    void (*answer)(const Decode *c, float *parts, char *turned);  // between them; null: `act`
    int64_t act, bytes;  // of weights
    int64_t aside;       // whether it reads what the step before read, and is added to what that one came to
    float scale, none;
    // f is experts where `choose` is not null: what chooses them, what they do in how much space, and their threads' work.
    void (*choose)(const Choice *c);
    int64_t (*room)(const Experts *c);
    void (*each)(const Experts *c, char *space);
    Choice choice;    // without tokens, and what goes in and comes out, which `experts` lack too
    Experts experts;
    Decode attend;  // without queries, new keys and values, and answers
} Step;

// Every thread of a team: x [m, n] times maps.
INLINE void team(const Kind *kind, const Map *maps, int64_t count, const char *x, char *packed, int64_t m, int64_t n,
                 int64_t threads) {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < n; k += COLUMNS) kind->pack(x, packed, m, n, k);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < threads; t++) share(kind, maps, count, packed, m, n, t, threads);
}

// Where what is between the parts of a step lies: bytes from one to the next.
typedef struct {
    int64_t packs, floats, row, wide;
} Room;

INLINE Room room_for(const Step *s, int64_t m, int64_t dim, const int64_t size) {
    if (s->choose) {
        Experts experts = s->experts;
        experts.tokens = m;
        return (Room){s->room(&experts), m * experts.active * 3, m * dim * size, 0};
    }
    Room r = {MAX(s->in_kind->room(m, s->in_n), s->out_kind->room(m, s->out_n)), 0, m * dim * size, s->out_n * m * size};
    for (int64_t i = 0; i < s->count; i++) r.wide += s->in[i].out * m * size;
    r.packs = (r.packs + 63) / 64 * 64;
    if (s->answer) r.floats = parts_size(&s->attend) + m * s->in[0].out;
    return r;
}

INLINE int64_t bytes_of(Room r) { return r.packs + r.floats * 4 + 2 * r.row + r.wide; }

// Every thread of a team: rows of x [m, dim] -> y.
INLINE void normed_rows(const Norm *n, const char *x, char *y, int64_t m, int64_t dim, const int half) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m; i++)
        if (n->centred)
            layer_norm_row(AT(x, i * dim), n->weight, n->bias, AT(y, i * dim), dim, n->eps, half);
        else
            rms_norm_row(AT(x, i * dim), n->weight, half, AT(y, i * dim), dim, n->eps, n->offset, half);
}

// Every thread of a team: x through experts -> what these have as their y.
INLINE void mixed(Step *s, const char *x, int64_t *chosen, char *space, int64_t m, int64_t threads) {
    Choice *c = &s->choice;
    Experts *e = &s->experts;
    c->x = e->x = x, c->tokens = e->tokens = m, e->threads = threads;
    e->experts = c->experts = chosen, e->weights = c->weights = (float *)(chosen + m * c->active);
#pragma omp single
    s->choose(c);
    s->each(e, space);
}

// Every thread of a team: x through the maps of a step, attention or `act` between them.
INLINE void mapped(Step *s, const char *x, char *packed, float *parts, char *middle, int64_t m, int64_t threads, const int half) {
    Map *in = s->in;
    Decode *c = &s->attend;
    c->q = in[0].y, c->new_k = in[1].y, c->new_v = in[2].y, c->out = middle;
    team(s->in_kind, in, s->count, x, packed, m, s->in_n, threads);
    if (s->answer)
        s->answer(c, parts, (char *)(parts + parts_size(c)));
    else {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m * s->out_n; i += STRIP)
            activate_any(in[0].y, s->count > 1 ? in[1].y : 0, middle, i, MIN(STRIP, m * s->out_n - i), s->act, half);
    }
    team(s->out_kind, &s->out, 1, middle, packed, m, s->out_n, threads);
}

// Every thread of a team: y = base + scale after(f(before(x))); base and y [m, dim] may be one, and without a step `aside` to
// follow so may x and y.
INLINE void step(const Step *s, const char *x, const char *base, char *y, int64_t m, int64_t dim, int64_t threads, char *packed,
                 const int half) {
    const int64_t size = half ? 2 : 4;
    const Room r = room_for(s, m, dim, size);
    Step own = *s;
    float *parts = (float *)(packed + r.packs);
    char *normed = (char *)(parts + r.floats), *made = normed + r.row, *middle = made + r.row, *next = middle + s->out_n * m * size;
    for (int64_t i = 0; i < s->count; next += own.in[i++].out * m * size) own.in[i].y = next;
    own.out.y = own.experts.y = made;
    if (s->before.weight) {
        normed_rows(&s->before, x, normed, m, dim, half);
        x = normed;
    }
    if (s->choose)
        mixed(&own, x, (int64_t *)parts, packed, m, threads);
    else
        mapped(&own, x, packed, parts, middle, m, threads, half);
    if (s->after.weight) normed_rows(&s->after, made, made, m, dim, half);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m * dim; i += STRIP)
        for (int64_t j = i, end = MIN(i + STRIP, m * dim); j < end; j += W)
            give(y, j, end, take(base, j, end, half) + s->scale * take(made, j, end, half), half);
}

#define ONE_THREAD 131072  // bytes of weights that a second thread would not read any sooner

// One after the other, the first from x, all to y.
INLINE void steps(const Step *s, int64_t count, const char *x, char *y, int64_t m, int64_t dim, int64_t threads, const int half) {
    int64_t room = 0, most = 0;
    for (int64_t i = 0; i < count; i++)
        room = MAX(room, bytes_of(room_for(s + i, m, dim, half ? 2 : 4))), most = MAX(most, s[i].bytes);
    if (most <= ONE_THREAD) threads = 1;
    const int64_t size = m * dim * (half ? 2 : 4), beside = (size + 63) / 64 * 64;
    char *own = room_of(beside + room);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const char *from = x, *now = x;  // what a step reads, and what it is added to
        for (int64_t i = 0; i < count; i++) {
            char *to = y;
            if (s[i].aside)
                to = (char *)now;  // which is not what it reads
            else if (from = now, from == y && i + 1 < count && s[i + 1].aside)
                to = own;
            step(s + i, from, now, to, m, dim, threads, own + beside, half);
            now = to;
        }
        if (now != y) {
#pragma omp single
            memcpy(y, now, size);
        }
    }
    free(own);
}

#define EXPORT(TYPE, HALF)                                                                                             \
    void steps_##TYPE(const Step *s, int64_t count, const char *x, char *y, int64_t m, int64_t dim, int64_t threads) { \
        steps(s, count, x, y, m, dim, threads, HALF);                                                                  \
    }

EXPORT(f32, 0)
EXPORT(bf16, 1)
