// Attention of a few queries over what is kept of their sequences: what ops/attention/decode.c takes. A slot is a query.
#pragma once
#include "vector.h"

#define PART 1024 // keys of a part

typedef struct {
    const char *q;             // [slots, heads, d] contiguous
    void *out;                 // [slots, heads, dv] contiguous
    const char *new_k, *new_v; // null, or [slots, kv_heads, d] and [.., dv] contiguous
    int64_t heads, kv_heads, d, dv, threads, interleaved;
    const char *q_norm, *k_norm; // null, or [d]: what new queries and keys are normed by before they turn
    float scale, cap; // cap 0: none
    float eps, offset; // of the norms
    // From here on, what changes from token to token.
    const char *k, *v;
    int64_t k_row, k_token, k_head, v_row, v_token, v_head; // strides in elements
    const int64_t *first, *counts, *rows; // slot i sees keys first[i] .. first[i] + counts[i] of row rows[i]
    const int64_t *tables; // null, or [rows, pages]: key t of row i is key t % page of page tables[i, t / page]
    int64_t slots, longest, pages, page;
    const float *cos, *sin;    // null, or [turns, pairs]: slot i turns by row i % turns
    int64_t pairs, turns;
} Decode;

INLINE int64_t parts_of(const Decode *c, int64_t keys) { return MAX(1, (keys + PART - 1) / PART); }

// Floats of what the parts of keys come to, and elements of the turned queries.
INLINE int64_t parts_size(const Decode *c) {
    return c->slots * parts_of(c, c->longest) * c->heads * (c->dv + 2);
}
INLINE int64_t turned_size(const Decode *c) { return c->new_k ? c->slots * c->heads * c->d : 0; }
