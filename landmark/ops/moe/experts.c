// Feed-forward functions of a few tokens, each through its own experts, whose matrices are whatever maps.h has:
// y[n] = sum over j of weights[n, j] down_e (act(gate_e x[n]) up_e x[n]), e = experts[n, j]; act(up_e x[n]) without gates.
#include "experts.h"
#include "gated.h"

// Rows of one expert: the first of them, how many, and where they lie packed, for either product.
typedef struct {
    int64_t expert, first, many, at[2];
} Group;

// What lies between the parts of a call. A choice that is not dropped has a row; they are sorted by expert.
typedef struct {
    Group *groups;
    int64_t count, rows, *choice, *row;  // of groups and rows; of each row its choice, of each choice its row or -1
    char *x, *inner[2], *z, *packed;     // [rows, dim], [rows, hidden] of what each of `inner` makes, [rows, down.rows]
} Room;

#define LINE(bytes) (((bytes) + 63) / 64 * 64)

INLINE int64_t packed_bytes(const Kind *kind, int64_t m, int64_t n) { return LINE(kind->room(m, n)); }

// Bytes that a call takes, whatever is chosen.
INLINE int64_t room(const Experts *c, const int half) {
    const int64_t rows = c->tokens * c->active, hidden = c->inner[0].rows, size = half ? 2 : 4;
    const int64_t packed = MAX(packed_bytes(c->kind, 1, c->dim), packed_bytes(c->kind, 1, hidden));
    const int64_t between = LINE(rows * c->dim * size) + c->inners * LINE(rows * hidden * size) + LINE(rows * c->down.rows * size);
    return LINE(sizeof(Room)) + LINE(rows * sizeof(Group)) + LINE((2 * rows + c->number) * 8) + rows * packed + between;
}

INLINE char *cut(char **space, int64_t bytes) {
    char *p = *space;
    *space += LINE(bytes);
    return p;
}

// Groups of the choices, and what lies where.
static void arrange(const Experts *c, char *space, const int half) {
    const int64_t choices = c->tokens * c->active, hidden = c->inner[0].rows, size = half ? 2 : 4;
    Room *r = (Room *)cut(&space, sizeof *r);
    r->groups = (Group *)cut(&space, choices * sizeof(Group));
    r->choice = (int64_t *)cut(&space, (2 * choices + c->number) * 8), r->row = r->choice + choices;
    int64_t *next = r->row + choices, bytes[2] = {0, 0};
    memset(next, 0, c->number * 8);
    for (int64_t i = 0; i < choices; i++)
        if (c->experts[i] >= 0) next[c->experts[i]]++;
    r->count = r->rows = 0;
    for (int64_t e = 0; e < c->number; e++) {
        const int64_t many = next[e];
        next[e] = r->rows;
        if (!many) continue;
        r->groups[r->count++] = (Group){e, r->rows, many, {bytes[0], bytes[1]}};
        bytes[0] += packed_bytes(c->kind, many, c->dim), bytes[1] += packed_bytes(c->kind, many, hidden);
        r->rows += many;
    }
    for (int64_t i = 0; i < choices; i++) {
        r->row[i] = c->experts[i] < 0 ? -1 : next[c->experts[i]]++;
        if (r->row[i] >= 0) r->choice[r->row[i]] = i;
    }
    r->packed = cut(&space, MAX(bytes[0], bytes[1])), r->x = cut(&space, r->rows * c->dim * size);
    for (int64_t i = 0; i < c->inners; i++) r->inner[i] = cut(&space, r->rows * hidden * size);
    r->z = cut(&space, r->rows * c->down.rows * size);
}

// Every thread of a team: rows x [rows, n], packed as the `which`-th product has them, times each of `count` stacks -> y.
INLINE void products(const Experts *c, const Room *r, const char *x, int64_t n, const int which, const Stack *stacks, char *const *y,
                     int64_t count, const int half) {
    const int64_t blocks = (n + COLUMNS - 1) / COLUMNS, unit = c->kind->unit;
    int64_t all = 0;
    for (int64_t i = 0; i < count; i++) all += (stacks[i].rows + unit - 1) / unit * r->count;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < r->count * blocks; i++) {
        const Group *g = r->groups + i / blocks;
        c->kind->pack(AT(x, g->first * n), r->packed + g->at[which], g->many, n, i % blocks * COLUMNS);
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < c->threads; t++) {
        int64_t from = all * t / c->threads, to = all * (t + 1) / c->threads;
        for (int64_t i = 0; i < r->count * count && to > 0; i++) {
            const Group *g = r->groups + i / count;
            const Stack *s = stacks + i % count;
            const int64_t own = (s->rows + unit - 1) / unit;
            if (from < own) {
                const Map map = {s->w + g->expert * s->w_each, s->s + g->expert * s->s_each, 0,
                                 AT(y[i % count], g->first * s->rows), s->rows, s->wide};
                c->kind->part(&map, r->packed + g->at[which], g->many, n, MAX(0, from), MIN(own, to));
            }
            from -= own, to -= own;
        }
    }
}

// Every thread of a team: each row's token, times its weight if that goes with inputs.
INLINE void gathered(const Experts *c, const Room *r, const int half) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < r->rows; i++) {
        const char *x = AT(c->x, r->choice[i] / c->active * c->dim);
        const vf by = splat(c->on_input ? c->weights[r->choice[i]] : 1);
        for (int64_t j = 0; j < c->dim; j += W) give(AT(r->x, i * c->dim), j, c->dim, by * take(x, j, c->dim, half), half);
    }
}

// Every thread of a team: each token's answers, added up in the order of its choices.
INLINE void combined(const Experts *c, const Room *r, const int half) {
    const int64_t out = c->down.rows;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < c->tokens; n++)
        for (int64_t j = 0; j < out; j += W) {
            vf y = splat(0);
            for (int64_t i = n * c->active; i < (n + 1) * c->active; i++)
                if (r->row[i] >= 0) y += (c->on_input ? 1 : c->weights[i]) * take(AT(r->z, r->row[i] * out), j, out, half);
            give(AT(c->y, n * out), j, out, y, half);
        }
}

#define STRIP 256  // elements that a thread takes at a time

// Every thread of a team, in so many bytes of space as `room` says.
INLINE void each(const Experts *c, char *space, const int half) {
    const Room *r = (const Room *)space;
    const int64_t hidden = c->inner[0].rows;
#pragma omp single
    arrange(c, space, half);
    gathered(c, r, half);
    products(c, r, r->x, c->dim, 0, c->inner, r->inner, c->inners, half);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < r->rows * hidden; i += STRIP)
        activate_any(r->inner[0], c->inners > 1 ? r->inner[1] : 0, r->inner[0], i, MIN(STRIP, r->rows * hidden - i), c->act, half);
    products(c, r, r->inner[0], hidden, 1, &c->down, &r->z, 1, half);
    combined(c, r, half);
}

#define EXPORT(TYPE, HALF)                                                                    \
    int64_t room_##TYPE(const Experts *c) { return room(c, HALF); }                           \
    void each_##TYPE(const Experts *c, char *space) { each(c, space, HALF); }                 \
    void experts_##TYPE(const Experts *c) {                                                     \
        char *space = room_of(room(c, HALF));                                                 \
        _Pragma("omp parallel num_threads(c->threads) if (c->threads > 1)") each_##TYPE(c, space); \
        free(space);                                                                          \
    }

EXPORT(f32, 0)
EXPORT(bf16, 1)
