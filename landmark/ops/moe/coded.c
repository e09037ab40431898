// Feed-forward functions of a few tokens, each through its own experts, whose matrices are what maps.h has, codes among them:
// y[n] = sum over j of weights[n, j] down_e (act(gate_e x[n]) up_e x[n]), e = experts[n, j]; act(up_e x[n]) without gates.
#include "act.h"
#include "maps.h"

typedef struct {
    const char *w, *s;            // of the first expert, as Map has them
    int64_t rows, w_each, s_each; // of one expert; bytes from it to the next
} Stack;

typedef struct {
    const Kind *kind;
    const char *x;           // [tokens, dim]
    const int64_t *experts;  // [tokens, active], -1 for none
    const float *weights;    // [tokens, active]
    char *y;                 // [tokens, down.rows]
    Stack inner[2], down;    // gate and up, or up alone
    int64_t inners, tokens, active, number, dim, act, on_input, threads;
} Call;

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

INLINE int64_t packed_bytes(const Kind *kind, int64_t m, int64_t n) { return (kind->room(m, n) + 63) / 64 * 64; }

// Groups of the choices; the bytes of all that is packed at once.
static int64_t group(const Call *c, Room *r) {
    const int64_t choices = c->tokens * c->active, hidden = c->inner[0].rows;
    int64_t *next = calloc(c->number, sizeof *next), bytes[2] = {0, 0};
    if (!next) abort();
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
    free(next);
    return MAX(bytes[0], bytes[1]);
}

// Every thread of a team: rows x [rows, n], packed as the `which`-th product has them, times each of `count` stacks -> y.
INLINE void products(const Call *c, const Room *r, const char *x, int64_t n, const int which, const Stack *stacks, char *const *y,
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
                                 AT(y[i % count], g->first * s->rows), s->rows, 0};
                c->kind->part(&map, r->packed + g->at[which], g->many, n, MAX(0, from), MIN(own, to));
            }
            from -= own, to -= own;
        }
    }
}

// Every thread of a team: each row's token, times its weight if that goes with inputs.
INLINE void gathered(const Call *c, const Room *r, const int half) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < r->rows; i++) {
        const char *x = AT(c->x, r->choice[i] / c->active * c->dim);
        const vf by = splat(c->on_input ? c->weights[r->choice[i]] : 1);
        for (int64_t j = 0; j < c->dim; j += W) give(AT(r->x, i * c->dim), j, c->dim, by * take(x, j, c->dim, half), half);
    }
}

// Every thread of a team: each token's answers, added up in the order of its choices.
INLINE void combined(const Call *c, const Room *r, const int half) {
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

INLINE void few(const Call *c, const int half) {
    const int64_t choices = c->tokens * c->active, hidden = c->inner[0].rows, size = half ? 2 : 4;
    Room r;
    r.groups = malloc(MAX(1, choices) * sizeof *r.groups);
    r.choice = malloc(MAX(1, 2 * choices) * sizeof *r.choice);
    if (!r.groups || !r.choice) abort();
    r.row = r.choice + choices;
    const int64_t packs = group(c, &r), inner = (r.rows * hidden * size + 63) / 64 * 64;
    char *space = r.packed = room_of(packs + c->inners * inner + r.rows * (c->dim + c->down.rows) * size);
    for (int64_t i = 0; i < c->inners; i++) r.inner[i] = space + packs + i * inner;
    r.x = space + packs + c->inners * inner, r.z = r.x + r.rows * c->dim * size;
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    {
        gathered(c, &r, half);
        products(c, &r, r.x, c->dim, 0, c->inner, r.inner, c->inners, half);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < r.rows * hidden; i += STRIP)
            activate_any(r.inner[0], c->inners > 1 ? r.inner[1] : 0, r.inner[0], i, MIN(STRIP, r.rows * hidden - i), c->act, half);
        products(c, &r, r.inner[0], hidden, 1, &c->down, &r.z, 1, half);
        combined(c, &r, half);
    }
    free(space), free(r.choice), free(r.groups);
}

void coded_f32(const Call *c) { few(c, 0); }
void coded_bf16(const Call *c) { few(c, 1); }
