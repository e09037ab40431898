// Which rows each expert gets, and the sums over a token's rows, forward and backward, each one pass over memory.
#include <stdlib.h>
#include "vector.h"

// experts [tokens, active], -1 for a choice that is dropped -> counts [number], the token of each row in the order of
// experts, and the row of each choice (-1 if dropped).
void plan(const int64_t *experts, int64_t tokens, int64_t active, int64_t number, int64_t *counts, int64_t *token,
          int64_t *place) {
    const int64_t choices = tokens * active;
    int64_t *next = malloc((number + 1) * 8), from = 0;
    if (!next) abort();
    memset(counts, 0, number * 8);
    for (int64_t i = 0; i < choices; i++)
        if (experts[i] >= 0) counts[experts[i]]++;
    for (int64_t e = 0; e < number; e++) next[e] = from, from += counts[e];
    for (int64_t i = 0; i < choices; i++)
        if (experts[i] >= 0) {
            place[i] = next[experts[i]]++;
            token[place[i]] = i / active;
        } else
            place[i] = -1;
    free(next);
}

// out[n] = sum over j of weights[n, j] y[places[n, j]]; without weights, of y alone. y [rows, d], out [tokens, d].
INLINE void combine(const char *y, const float *weights, const int64_t *places, char *out, int64_t tokens, int64_t active,
                    int64_t d, int threads, const int half) {
    const int64_t size = half ? 2 : 4;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < tokens; n++) {
        const int64_t *place = places + n * active;
        const float *weight = weights ? weights + n * active : 0;
        char *to = out + n * d * size;
        int64_t i = 0;
        for (; i + 2 * W <= d; i += 2 * W) {
            vf a = splat(0), b = splat(0);
            for (int64_t j = 0; j < active; j++)
                if (place[j] >= 0) {
                    const vf s = splat(weight ? weight[j] : 1);
                    const char *row = y + place[j] * d * size;
                    a += s * load(row, i, half), b += s * load(row, i + W, half);
                }
            store(to, i, a, half), store(to, i + W, b, half);
        }
        for (; i < d; i++) {
            float a = 0;
            for (int64_t j = 0; j < active; j++)
                if (place[j] >= 0) a += (weight ? weight[j] : 1) * get(y + place[j] * d * size, i, half);
            put(to, i, a, half);
        }
    }
}

// The gradients of y and of the weights, from that of out. Every row of y belongs to one choice.
INLINE void combine_backward(const char *g, const char *y, const float *weights, const int64_t *places, char *grad_y,
                             float *grad_weights, int64_t tokens, int64_t active, int64_t d, int threads, const int half) {
    const int64_t size = half ? 2 : 4;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < tokens; n++)
        for (int64_t j = n * active; j < (n + 1) * active; j++) {
            const char *from = g + n * d * size, *row = y + places[j] * d * size;
            char *to = grad_y + places[j] * d * size;
            const vf s = splat(weights[j]);
            vf dot = splat(0);
            float rest = 0;
            grad_weights[j] = 0;
            if (places[j] < 0) continue;
            int64_t i = 0;
            for (; i + W <= d; i += W) {
                const vf u = load(from, i, half);
                dot += u * load(row, i, half);
                store(to, i, s * u, half);
            }
            for (; i < d; i++) {
                rest += get(from, i, half) * get(row, i, half);
                put(to, i, weights[j] * get(from, i, half), half);
            }
            grad_weights[j] = sum(dot) + rest;
        }
}

// rows[i] = x[tokens[i]] of `bytes` bytes each.
void spread(const char *x, const int64_t *tokens, char *rows, int64_t count, int64_t bytes, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++) memcpy(rows + i * bytes, x + tokens[i] * bytes, bytes);
}

#define EXPORT(TYPE, HALF)                                                                                             \
    void combine_##TYPE(const void *y, const float *weights, const int64_t *places, void *out, int64_t tokens,         \
                        int64_t active, int64_t d, int threads) {                                                      \
        combine(y, weights, places, out, tokens, active, d, threads, HALF);                                            \
    }                                                                                                                  \
    void combine_backward_##TYPE(const void *g, const void *y, const float *weights, const int64_t *places,            \
                                 void *grad_y, float *grad_weights, int64_t tokens, int64_t active, int64_t d,         \
                                 int threads) {                                                                        \
        combine_backward(g, y, weights, places, grad_y, grad_weights, tokens, active, d, threads, HALF);               \
    }

EXPORT(f32, 0)
EXPORT(bf16, 1)
