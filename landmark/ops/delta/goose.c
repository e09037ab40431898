// A decoded token of RWKV-7 between its linear maps, in one call: what its state forgets, finds, removes and takes in, what
// it reads of it, the norm of every head, the bonus and the gate.
#include "vector.h"

#define WIDEST 256

typedef struct {
    const char *r, *k, *v, *rate, *decay, *gate;  // [tokens, heads * N]; rate and decay before their sigmoids
    const char *mix, *first;                      // [tokens, heads * N] or null: how much of the first layer's values
    const char *remove, *replace, *bonus, *scale, *shift;  // [heads * N]; scale and shift are the norm's
    const float *before;                          // [tokens, heads, N, N], keys by values
    float *after;
    char *y;                                      // [tokens, heads * N]
    int64_t tokens, heads, N, threads;
    double slowest, eps;
} Call;

INLINE void head(const Call *c, int64_t token, int64_t h, const int half) {
    const int64_t N = c->N, own = h * N, at = (token * c->heads + h) * N;
    float w[WIDEST], a[WIDEST], b[WIDEST], k[WIDEST], r[WIDEST], v[WIDEST], y[WIDEST];
    vf length = splat(0), bonus = splat(0);
    for (int64_t i = 0; i < N; i += W) {
        const vf rate = vsigmoid(load(c->rate, at + i, half)), key = load(c->k, at + i, half), read = load(c->r, at + i, half);
        const vf away = key * load(c->remove, own + i, half);
        const vf in = key * (1 + load(c->replace, own + i, half) * (rate - 1));
        vf value = load(c->v, at + i, half);
        if (c->mix) value += vsigmoid(load(c->mix, at + i, half)) * (load(c->first, at + i, half) - value);
        length += away * away, bonus += read * in * load(c->bonus, own + i, half);
        store(w, i, vexp(-(float)c->slowest * vsigmoid(load(c->decay, at + i, half))), 0);
        store(a, i, away, 0), store(b, i, away * rate, 0);
        store(k, i, in, 0), store(r, i, read, 0), store(v, i, value, 0);
    }
    const float inverse = 1 / MAX(sqrtf(sum(length)), 1e-12f), own_bonus = sum(bonus);
    const float *S = c->before + at * N;
    float *to = c->after + at * N;
    for (int64_t j = 0; j < N; j += 4 * W) {
        const int V = MIN(4, (N - j) / W);
        vf f[4] = {}, out[4] = {}, value[4];
        for (int64_t i = 0; i < N; i++)
            for (int n = 0; n < V; n++) f[n] -= inverse * a[i] * load(S, i * N + j + n * W, 0);
        for (int n = 0; n < V; n++) value[n] = load(v, j + n * W, 0);
        for (int64_t i = 0; i < N; i++)
            for (int n = 0; n < V; n++) {
                const vf s = w[i] * load(S, i * N + j + n * W, 0) + (inverse * b[i] * f[n] + k[i] * value[n]);
                store(to, i * N + j + n * W, s, 0);
                out[n] += r[i] * s;
            }
        for (int n = 0; n < V; n++) store(y, j + n * W, out[n], 0);
    }
    vf all = splat(0), squares = splat(0);
    for (int64_t i = 0; i < N; i += W) all += load(y, i, 0);
    const float mean = sum(all) / (float)N;
    for (int64_t i = 0; i < N; i += W) {
        const vf d = load(y, i, 0) - mean;
        squares += d * d;
    }
    const float by = 1 / sqrtf(sum(squares) / (float)N + (float)c->eps);
    for (int64_t i = 0; i < N; i += W) {
        const vf normed = (load(y, i, 0) - mean) * by * load(c->scale, own + i, half) + load(c->shift, own + i, half);
        store(c->y, at + i, (normed + own_bonus * load(v, i, 0)) * load(c->gate, at + i, half), half);
    }
}

INLINE void all(const Call *c, const int half) {
#pragma omp parallel for schedule(static) num_threads(c->threads) if (c->threads > 1)
    for (int64_t i = 0; i < c->tokens * c->heads; i++) head(c, i / c->heads, i % c->heads, half);
}

void goose_f32(const Call *c) { all(c, 0); }
void goose_bf16(const Call *c) { all(c, 1); }
