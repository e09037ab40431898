// Rows sorted by expert times each expert's own matrix, and the sums over a token's experts.
//
// All three products are tiles of 8 rows of `a`, whose elements are broadcast, times a panel of V vectors of `b` that is
// packed [k][V * W]. A step of k is a float, or two bfloat16 that vdpbf16ps takes at once.
#include <stdlib.h>
#include "lanes.h"

#ifdef __AVX512BF16__
#define PAIRS 1
#else
#define PAIRS 0
#endif
#define TALL 8                       // rows of a tile
#define WIDE 3                       // vectors of a panel
#define LANES (WIDE * W)
#define STEP 4                       // bytes of a step of k: a float or a pair
#define FEW 8                        // rows of an expert that are multiplied as they are, at memory speed
#define AHEAD 4096                   // bytes to prefetch ahead where weights are read in order
#define MANY 128                     // rows of an expert from which its weights are packed, not its rows
#define BLOCK 524288                 // bytes of weights that stay in the second-level cache while panels pass

typedef struct {
    const char *x, *w, *g;           // x [M, in], w [experts, out, in], g [M, out]
    char *y;                         // the result
    const int64_t *counts;           // [experts]
    int64_t experts, rows, in, out, threads;
} Call;

INLINE vf broadcast(const char *p) {
    float f;
    memcpy(&f, p, 4);
    return splat(f);
}

INLINE vf multiply(vf a, vf b, vf c, const int half) {
#ifdef __AVX512BF16__
    if (half) return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
    return c + a * b;
}

// acc[R][V] = sum over k steps of a[r] (rows `row` bytes apart, steps `step`) times b[k][v].
INLINE void tile(const char *a, int64_t row, int64_t step, const char *b, int64_t k, vf *acc, const int R, const int V,
                 const int half) {
    for (int i = 0; i < R * V; i++) acc[i] = splat(0);
    const char *at[TALL];
    for (int r = 0; r < R; r++) at[r] = a + r * row;
#pragma GCC unroll 2
    for (int64_t i = 0; i < k; i++, b += V * W * STEP) {
        vf v[WIDE];
        for (int j = 0; j < V; j++) v[j] = load(b, j * W, 0);
        for (int r = 0; r < R; r++) {
            const vf s = broadcast(at[r] + i * step);
            for (int j = 0; j < V; j++) acc[r * V + j] = multiply(s, v[j], acc[r * V + j], half);
        }
    }
}

// t[R][LANES] = the tile of up to TALL rows and V vectors.
INLINE void product_of(const char *a, int64_t row, int64_t step, const char *b, int64_t k, float *t, int64_t R, int V,
                    const int half) {
    vf acc[TALL * WIDE];
#define RUN(N, M)                                                                                                      \
    {                                                                                                                  \
        tile(a, row, step, b, k, acc, N, M, half);                                                                     \
        for (int i = 0; i < N; i++)                                                                                    \
            for (int j = 0; j < M; j++) store(t, i * LANES + j * W, acc[i * M + j], 0);                                \
    }
    if (R == TALL) {
        if (V == 3) RUN(8, 3) else if (V == 2) RUN(8, 2) else RUN(8, 1)
        return;
    }
    for (; R > 0; R--, a += row, t += LANES) {
        if (V == 3) RUN(1, 3) else if (V == 2) RUN(1, 2) else RUN(1, 1)
    }
}

INLINE int vectors(int64_t n) { return MIN(WIDE, (n + W - 1) / W); }

static void *room(int64_t bytes) {
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
    if (!p) abort();
    return p;
}

// n columns of b [k][ld] as a panel of V vectors, zero-padded; with pairs, rows 2i and 2i + 1 interleave.
INLINE void pack_columns(const char *b, int64_t ld, int64_t k, int64_t n, char *panel, int V, const int half) {
    const int64_t lanes = V * W;
    for (int64_t i = 0; i < k; i += half ? 2 : 1, panel += lanes * STEP) {
        if (half) {
            const bf16 *p = (const bf16 *)b + i * ld, *q = p + ld;
            const int two = i + 1 < k;
            uint32_t *to = (uint32_t *)panel;
            int64_t j = 0;
            if (two)
                for (; j + W <= n; j += W) {
                    vh lo, hi;
                    memcpy(&lo, p + j, sizeof lo), memcpy(&hi, q + j, sizeof hi);
                    vu both = __builtin_convertvector(lo, vu) | (__builtin_convertvector(hi, vu) << 16);
                    memcpy(to + j, &both, sizeof both);
                }
            for (; j < n; j++) to[j] = p[j] | (uint32_t)(two ? q[j] : 0) << 16;
            memset(to + n, 0, (lanes - n) * STEP);
        } else {
            memcpy(panel, b + i * ld * 4, n * 4);
            memset(panel + n * 4, 0, (lanes - n) * STEP);
        }
    }
}

// n rows of x, `row` bytes apart and of k steps each, as a panel [k][V * W]: row i in lane i, zero-padded.
INLINE void pack_rows(const char *x, int64_t row, int64_t k, int64_t n, char *panel, int V) {
    for (int64_t j = 0; j < V; j++, n -= W, x += W * row)
        for (int64_t from = 0; from < k; from += W) {
            const int64_t count = MIN(W, k - from);
            vf v[W];
            for (int i = 0; i < W; i++) v[i] = splat(0);
            if (count == W)
                for (int64_t i = 0; i < MIN(W, n); i++) v[i] = load(x + i * row + from * STEP, 0, 0);
            else
                for (int64_t i = 0; i < MIN(W, n); i++) memcpy(v + i, x + i * row + from * STEP, count * STEP);
            transpose(v);
            for (int64_t i = 0; i < count; i++) store(panel + ((from + i) * V + j) * W * STEP, 0, v[i], 0);
        }
}

// Where each expert's rows begin; experts + 1 numbers.
static int64_t *offsets(const Call *c) {
    int64_t *from = room((c->experts + 1) * 8), sum = 0;
    for (int64_t e = 0; e < c->experts; e++) from[e] = sum, sum += c->counts[e];
    from[c->experts] = sum;
    return from;
}

INLINE void put_rows(char *y, int64_t ld, const float *t, int64_t tall, int64_t n, const int half) {
    for (int64_t r = 0; r < tall; r++, t += LANES) {
        int64_t j = 0;
        for (; j + W <= n; j += W) store(y, r * ld + j, load(t, j, 0), half);
        for (; j < n; j++) put(y, r * ld + j, t[j], half);
    }
}

// y [n][ld] = the transpose of t [tall][LANES], tall <= W.
INLINE void put_columns(char *y, int64_t ld, const float *t, int64_t tall, int64_t n, const int half) {
    for (int64_t from = 0; from < n; from += W) {
        vf v[W];
        for (int i = 0; i < W; i++) v[i] = load(t, i * LANES + from, 0);
        transpose(v);
        for (int64_t i = from; i < MIN(n, from + W); i++)
            if (tall == W)
                store(y, i * ld, v[i - from], half);
            else
                store_n(y, i * ld, tall, v[i - from], half);
    }
}

// acc[R][M] = R rows of w, `row` bytes apart, times M of x, `xrow` apart, of n bytes each.
INLINE void dots(const char *w, int64_t row, const char *x, int64_t xrow, int64_t n, vf *acc, const int R, const int M,
                 const int half) {
    for (int i = 0; i < R * M; i++) acc[i] = splat(0);
    int64_t at = 0;
    for (; at + 4 * W <= n; at += 4 * W) {
        vf v[2];
        for (int r = 0; r < R; r++) {
            v[r] = load(w + r * row + at, 0, 0);
            __builtin_prefetch(w + r * row + at + AHEAD);
        }
        for (int m = 0; m < M; m++) {
            const vf u = load(x + m * xrow + at, 0, 0);
            for (int r = 0; r < R; r++) acc[r * M + m] = multiply(v[r], u, acc[r * M + m], half);
        }
    }
    if (at == n) return;
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) {
            vf v = splat(0), u = splat(0);
            memcpy(&v, w + r * row + at, n - at), memcpy(&u, x + m * xrow + at, n - at);
            acc[r * M + m] = multiply(v, u, acc[r * M + m], half);
        }
}

// y [M, out] at rows [from, to) of w for the M <= FEW rows of x, at the speed of reading w.
INLINE void few_M(const char *w, const char *x, char *y, int64_t from, int64_t to, int64_t out, int64_t bytes, const int M,
                const int half) {
    vf acc[2 * FEW];
    for (int64_t o = from; o < to; o += 2) {
        const int R = MIN(2, to - o);
        if (R == 2)
            dots(w + o * bytes, bytes, x, bytes, bytes, acc, 2, M, half);
        else
            dots(w + o * bytes, bytes, x, bytes, bytes, acc, 1, M, half);
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) put(y, m * out + o + r, sum(acc[r * M + m]), half);
    }
}

INLINE void few_rows(const char *w, const char *x, char *y, int64_t from, int64_t to, int64_t out, int64_t bytes, int64_t M,
                     const int half) {
#define ROWS(N)                                                                                                        \
    case N: few_M(w, x, y, from, to, out, bytes, N, half); break;
    switch (M) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) }
}

// Not inlined: within a parallel region `half` is no constant.
#define APART static __attribute__((noinline)) void
#define PRODUCT const char *a, int64_t row, int64_t step, const char *b, int64_t k, float *t, int64_t R, int V
APART product_f32(PRODUCT) { product_of(a, row, step, b, k, t, R, V, 0); }
APART product_bf16(PRODUCT) { product_of(a, row, step, b, k, t, R, V, 1); }
#define FEW_ROWS const char *w, const char *x, char *y, int64_t from, int64_t to, int64_t out, int64_t bytes, int64_t M
APART few_f32(FEW_ROWS) { few_rows(w, x, y, from, to, out, bytes, M, 0); }
APART few_bf16(FEW_ROWS) { few_rows(w, x, y, from, to, out, bytes, M, 1); }

// y [M, out] = x W_e^T. A panel is rows of x, a tile 8 rows of W_e; or, where there are many of x, the other way around.
INLINE void forward(const Call *c, const int half) {
    const int64_t size = half ? 2 : 4, bytes = c->in * size, k = bytes / STEP, *from = offsets(c);
    const int64_t chunk = MAX(1, BLOCK / bytes / LANES) * LANES, chunks = (c->out + chunk - 1) / chunk;
    void (*const product)(PRODUCT) = half ? product_bf16 : product_f32;
    void (*const few)(FEW_ROWS) = half ? few_bf16 : few_f32;
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    {
        char *panel = room(k * LANES * STEP);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < c->experts * chunks; task++) {
            const int64_t e = task / chunks, start = task % chunks * chunk, end = MIN(c->out, start + chunk);
            const char *w = c->w + e * c->out * bytes;
            if (c->counts[e] <= FEW) {
                few(w, c->x + from[e] * bytes, c->y + from[e] * c->out * size, start, end, c->out, bytes, c->counts[e]);
                continue;
            }
            for (int64_t o = start; o < end && c->counts[e] >= MANY; o += LANES) {
                const int64_t n = MIN(LANES, end - o);
                pack_rows(w + o * bytes, bytes, k, n, panel, vectors(n));
                for (int64_t m = from[e]; m < from[e + 1]; m += TALL) {
                    const int64_t tall = MIN(TALL, from[e + 1] - m);
                    float t[TALL * LANES];
                    product(c->x + m * bytes, bytes, STEP, panel, k, t, tall, vectors(n));
                    put_rows(c->y + (m * c->out + o) * size, c->out, t, tall, n, half);
                }
            }
            for (int64_t row = from[e]; row < from[e + 1] && c->counts[e] < MANY; row += LANES) {
                const int64_t n = MIN(LANES, from[e + 1] - row);
                pack_rows(c->x + row * bytes, bytes, k, n, panel, vectors(n));
                for (int64_t o = start; o < end; o += W) {
                    float t[W * LANES];
                    for (int64_t r = o; r < MIN(end, o + W); r += TALL)
                        product(w + r * bytes, bytes, STEP, panel, k, t + (r - o) * LANES, MIN(TALL, end - r), vectors(n));
                    put_columns(c->y + (row * c->out + o) * size, c->out, t, MIN(W, end - o), n, half);
                }
            }
        }
        free(panel);
    }
    free((void *)from);
}

// y [M, in] = g W_e. A panel is columns of W_e; a tile 8 rows of g.
INLINE void backward_rows(const Call *c, const int half) {
    const int64_t size = half ? 2 : 4, k = c->out * size / STEP, *from = offsets(c), panels = (c->in + LANES - 1) / LANES;
    void (*const product)(PRODUCT) = half ? product_bf16 : product_f32;
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    {
        char *panel = room(k * LANES * STEP);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < c->experts * panels; task++) {
            const int64_t e = task / panels, i = task % panels * LANES, n = MIN(LANES, c->in - i);
            if (!c->counts[e]) continue;
            pack_columns(c->w + (e * c->out * c->in + i) * size, c->in, c->out, n, panel, vectors(n), half);
            for (int64_t m = from[e]; m < from[e + 1]; m += TALL) {
                const int64_t tall = MIN(TALL, from[e + 1] - m);
                float t[TALL * LANES];
                product(c->g + m * c->out * size, c->out * size, STEP, panel, k, t, tall, vectors(n));
                put_rows(c->y + (m * c->in + i) * size, c->in, t, tall, n, half);
            }
        }
        free(panel);
    }
    free((void *)from);
}

// Columns [0, n) of g [count][ld] as steps of k: [k][TALL], zero-padded.
INLINE void pack_tile(const char *g, int64_t ld, int64_t count, int64_t n, char *to, const int half) {
    for (int64_t m = 0; m < count; m += half ? 2 : 1, to += TALL * STEP) {
        if (half) {
            const bf16 *p = (const bf16 *)g + m * ld, *q = p + ld;
            typedef uint16_t low __attribute__((vector_size(2 * TALL)));
            typedef uint32_t pairs __attribute__((vector_size(4 * TALL)));
            low a = {0}, b = {0};
            if (n == TALL)
                memcpy(&a, p, sizeof a);
            else
                memcpy(&a, p, n * 2);
            if (m + 1 < count && n == TALL)
                memcpy(&b, q, sizeof b);
            else if (m + 1 < count)
                memcpy(&b, q, n * 2);
            const pairs both = __builtin_convertvector(a, pairs) | __builtin_convertvector(b, pairs) << 16;
            memcpy(to, &both, sizeof both);
        } else {
            memcpy(to, g + m * ld * 4, n * 4);
            memset(to + n * 4, 0, (TALL - n) * STEP);
        }
    }
}

// y [experts, out, in] = g^T x of each expert's rows. A panel is columns of x; a tile 8 columns of g.
INLINE void backward_weight(const Call *c, const int half) {
    const int64_t size = half ? 2 : 4, *from = offsets(c);
    int64_t most = 0;
    for (int64_t e = 0; e < c->experts; e++) most = MAX(most, half ? (c->counts[e] + 1) / 2 : c->counts[e]);
    const int64_t deep = most * TALL * STEP, tiles = (c->out + TALL - 1) / TALL;
    const int64_t chunk = MIN(tiles, MAX(1, BLOCK / MAX(1, deep))), chunks = (tiles + chunk - 1) / chunk;
    void (*const product)(PRODUCT) = half ? product_bf16 : product_f32;
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    {
        char *panel = room(most * LANES * STEP), *packed = room(chunk * deep);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < c->experts * chunks; task++) {
            const int64_t e = task / chunks, count = c->counts[e], k = half ? (count + 1) / 2 : count;
            const int64_t start = task % chunks * chunk * TALL, end = MIN(c->out, start + chunk * TALL);
            char *y = c->y + (e * c->out + start) * c->in * size;
            if (!count) {
                memset(y, 0, (end - start) * c->in * size);
                continue;
            }
            for (int64_t o = start; o < end; o += TALL)
                pack_tile(c->g + (from[e] * c->out + o) * size, c->out, count, MIN(TALL, end - o),
                          packed + (o - start) / TALL * deep, half);
            for (int64_t i = 0; i < c->in; i += LANES) {
                const int64_t n = MIN(LANES, c->in - i);
                pack_columns(c->x + (from[e] * c->in + i) * size, c->in, count, n, panel, vectors(n), half);
                for (int64_t o = 0; o < end - start; o += TALL) {
                    float t[TALL * LANES];
                    product(packed + o / TALL * deep, STEP, TALL * STEP, panel, k, t, TALL, vectors(n));
                    put_rows(y + (o * c->in + i) * size, c->in, t, MIN(TALL, end - start - o), n, half);
                }
            }
        }
        free(panel), free(packed);
    }
    free((void *)from);
}

#define EXPORT(TYPE, HALF)                                                                                             \
    void grouped_forward_##TYPE(const Call *c) { forward(c, HALF); }                                                   \
    void grouped_rows_##TYPE(const Call *c) { backward_rows(c, HALF); }                                                \
    void grouped_weight_##TYPE(const Call *c) { backward_weight(c, HALF); }

EXPORT(f32, 0)
#if PAIRS
EXPORT(bf16, 1)
#endif
void grouped_pairs(int *has) { *has = PAIRS; }
