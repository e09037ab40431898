// Which experts a few tokens pass, and what these make of them: what ops/moe/choose.c and ops/moe/experts.c take.
#pragma once
#include "maps.h"

typedef struct {
    const char *x, *w;    // x [tokens, dim], w [number, dim]
    const float *bias;    // [number] of the choice alone, or null
    int64_t *experts;     // [tokens, active], best first
    float *weights;       // [tokens, active]
    int64_t tokens, dim, number, active, kind;
    int64_t groups, active_groups, best;  // a group's score is the sum of its `best` largest; one group: no limit
    int64_t renormalise;
    int64_t rounded;      // logits are rounded to x's type
    double scale, least;  // least: what is added to the sum that renormalises
} Choice;

// One matrix an expert: as Map has that of the first, and the bytes from one to the next.
typedef struct {
    const char *w, *s;
    int64_t rows, wide, w_each, s_each;
} Stack;

typedef struct {
    const Kind *kind;
    const char *x;           // [tokens, dim]
    const int64_t *experts;  // [tokens, active], -1 for none
    const float *weights;    // [tokens, active], which multiply what experts make or, `on_input`, what they are given
    char *y;                 // [tokens, down.rows]
    Stack inner[2], down;    // gate and up, or up alone
    int64_t inners, tokens, active, number, dim, act, on_input, threads;
} Experts;
