// Which experts a few tokens pass: a linear map to logits, scores, groups, the best, and their weights, in one call.
#include "dots.h"
#include "experts.h"

enum { SOFTMAX, SIGMOID, LOGIT };  // as choose.py lists them

// The place of the largest of n numbers that is not taken; NaN counts as the largest.
INLINE int64_t largest_of(const float *x, const char *taken, int64_t n) {
    int64_t at = -1;
    for (int64_t i = 0; i < n; i++)
        if (!taken[i] && (at < 0 || x[i] > x[at] || (x[i] != x[i] && x[at] == x[at]))) at = i;
    return at;
}

// taken[i] = whether number i is outside of the best groups.
INLINE void limit(const Choice *c, const float *key, char *taken, float *score, char *chosen) {
    const int64_t size = c->number / c->groups;
    memset(chosen, 0, c->groups);
    for (int64_t g = 0; g < c->groups; g++) {
        score[g] = 0;
        for (int64_t i = 0; i < c->best; i++) {
            const int64_t at = largest_of(key + g * size, taken + g * size, size);
            score[g] += key[g * size + at], taken[g * size + at] = 1;
        }
    }
    for (int64_t i = 0; i < c->active_groups; i++) chosen[largest_of(score, chosen, c->groups)] = 1;
    for (int64_t e = 0; e < c->number; e++) taken[e] = !chosen[e / size];
}

// Scores of one token's logits, in their place.
INLINE void scores(const Choice *c, float *s) {
    const int64_t n = c->number;
    if (c->kind == LOGIT) return;
    if (c->kind == SIGMOID) {
        for (int64_t e = 0; e < n; e++) s[e] = 1 / (1 + expf(-s[e]));
        return;
    }
    float most = s[0], all = 0;
    for (int64_t e = 1; e < n; e++) most = MAX(most, s[e]);
    for (int64_t e = 0; e < n; e++) all += s[e] = expf(s[e] - most);
    for (int64_t e = 0; e < n; e++) s[e] /= all;
}

INLINE void choose(const Choice *c, const int half) {
    const int64_t row = c->dim * (half ? 2 : 4), n = c->number;
    float *s = malloc((2 * n + c->groups) * sizeof *s), *key = s + n, *score = key + n;
    char *taken = malloc(n + c->groups), *chosen = taken + n;
    if (!s || !taken) abort();
    for (int64_t t = 0; t < c->tokens; t++) {
        const char *x = c->x + t * row;
        for (int64_t e = 0; e < n; e++) {
            vf acc[2];
            dots((const char *[]){c->w + e * row}, &x, c->dim, acc, 1, 1, half);
            s[e] = sum(acc[0]);
            if (half && c->rounded) s[e] = widen(narrow(s[e]));
        }
        scores(c, s);
        for (int64_t e = 0; e < n; e++) key[e] = c->bias ? s[e] + c->bias[e] : s[e];
        memset(taken, 0, n);
        if (c->active_groups < c->groups) limit(c, key, taken, score, chosen);
        float all = (float)c->least, *weights = c->weights + t * c->active;
        for (int64_t i = 0; i < c->active; i++) {
            const int64_t e = largest_of(key, taken, n);
            taken[e] = 1;
            c->experts[t * c->active + i] = e;
            weights[i] = c->kind == LOGIT ? 1 / (1 + expf(-s[e])) : s[e];
            all += weights[i];
        }
        for (int64_t i = 0; i < c->active; i++)
            weights[i] = (c->renormalise ? weights[i] / all : weights[i]) * (float)c->scale;
    }
    free(s), free(taken);
}

void choose_f32(const Choice *c) { choose(c, 0); }
void choose_bf16(const Choice *c) { choose(c, 1); }
