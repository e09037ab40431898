// What latent attention does to a decoded token between its linear maps and its cache, in one call: the latent vector is
// normed, the parts that carry positions are turned, and the keys' matrix is taken to the side of the queries.
#include "vector.h"

#define STEP 4 // vectors of an answer, and tokens, at once

typedef struct {
    const char *q, *down;          // q [tokens, heads, head_dim + rope_dim], down [tokens, rank + rope_dim], contiguous
    const char *w, *scale;         // w [heads, head_dim, rank], heads `w_head` elements apart; scale [rank] of the norm
    const char *cos, *sin;         // [tokens, rope_dim / 2], or one row for all
    char *y, *entry;               // [tokens, heads, rank + rope_dim], [tokens, rank + rope_dim]
    int64_t tokens, heads, head_dim, rope_dim, rank, w_head, table, interleaved, threads;
    double eps, offset;
} Call;

// rope_dim elements, turned by a token's angles.
INLINE void turn(const Call *c, int64_t token, const char *x, int64_t from, char *y, int64_t to, const int half) {
    const int64_t n = c->rope_dim / 2, at = token * c->table;
    for (int64_t i = 0; i < n; i++) {
        const int64_t a = c->interleaved ? 2 * i : i, b = c->interleaved ? 2 * i + 1 : i + n;
        const float u = get(x, from + a, half), v = get(x, from + b, half);
        const float k = get(c->cos, at + i, half), s = get(c->sin, at + i, half);
        put(y, to + a, u * k - v * s, half), put(y, to + b, v * k + u * s, half);
    }
}

INLINE void keep(const Call *c, int64_t token, const int half) {
    const int64_t n = c->rank, at = token * (n + c->rope_dim);
    const char *x = c->down;
    vf a = splat(0);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const vf u = load(x, at + i, half);
        a += u * u;
    }
    if (i < n) {
        const vf u = load_n(x, at + i, n - i, 0, half);
        a += u * u;
    }
    const float k = 1 / sqrtf(sum(a) / (float)n + (float)c->eps);
    for (i = 0; i + W <= n; i += W)
        store(c->entry, at + i, load(x, at + i, half) * k * ((float)c->offset + load(c->scale, i, half)), half);
    for (; i < n; i++) put(c->entry, at + i, get(x, at + i, half) * k * ((float)c->offset + get(c->scale, i, half)), half);
    turn(c, token, x, at + n, c->entry, at + n, half);
}

// V vectors of places, for M tokens: the sum of all rows of the head's matrix times the values of the query.
INLINE void rows(const Call *c, int64_t head, int64_t token, int64_t o, const int V, const int M, const int half) {
    const int64_t d = c->head_dim + c->rope_dim, out = c->rank + c->rope_dim;
    vf acc[STEP * STEP];
    for (int i = 0; i < V * M; i++) acc[i] = splat(0);
    for (int64_t i = 0; i < c->head_dim; i++) {
        vf v[STEP];
        for (int j = 0; j < V; j++) v[j] = load(c->w, head * c->w_head + i * c->rank + o + j * W, half);
        for (int m = 0; m < M; m++)
            for (int j = 0; j < V; j++) acc[m * V + j] += get(c->q, ((token + m) * c->heads + head) * d + i, half) * v[j];
    }
    for (int m = 0; m < M; m++)
        for (int j = 0; j < V; j++) store(c->y, ((token + m) * c->heads + head) * out + o + j * W, acc[m * V + j], half);
}

INLINE void absorb(const Call *c, int64_t head, const int half) {
    const int64_t d = c->head_dim + c->rope_dim, out = c->rank + c->rope_dim;
    for (int64_t t = 0; t < c->tokens;) {
        const int many = t + STEP <= c->tokens;
        int64_t o = 0;
        for (; o + STEP * W <= c->rank; o += STEP * W)
            many ? rows(c, head, t, o, STEP, STEP, half) : rows(c, head, t, o, STEP, 1, half);
        for (; o + W <= c->rank; o += W) many ? rows(c, head, t, o, 1, STEP, half) : rows(c, head, t, o, 1, 1, half);
        for (int64_t m = 0; m < (many ? STEP : 1); m++, t++) {
            const int64_t x = (t * c->heads + head) * d, y = (t * c->heads + head) * out;
            for (int64_t j = o; j < c->rank; j++) {
                float a = 0;
                for (int64_t i = 0; i < c->head_dim; i++)
                    a += get(c->q, x + i, half) * get(c->w, head * c->w_head + i * c->rank + j, half);
                put(c->y, y + j, a, half);
            }
            turn(c, t, c->q, x + c->head_dim, c->y, y + c->rank, half);
        }
    }
}

INLINE void all(const Call *c, const int half) {
    for (int64_t t = 0; t < c->tokens; t++) keep(c, t, half);
#pragma omp parallel for schedule(static) num_threads(c->threads) if (c->threads > 1)
    for (int64_t h = 0; h < c->heads; h++) absorb(c, h, half);
}

void latent_f32(const Call *c) { all(c, 0); }
void latent_bf16(const Call *c) { all(c, 1); }
