// Attention of many queries, forward and backward, a tile of scores at a time (FlashAttention-2, Dao 2023).
//
// A task is one key head of one sequence and some of its rows; row r is query r / group of the sequence, by head r % group
// of those that share the keys. Keys and values are packed once a tile for WIDE rows. A row's result depends on its own
// sequence alone: tiles are counted from the sequence's first key, and every sum has one order.
#include <stdlib.h>
#include "vector.h"

#define TILE 64  // rows and keys of a tile of scores
#define WIDE 256 // rows that share packed keys
#define MR 6     // rows of a product in registers
#ifdef __AVX512F__
#define NR 4 // vectors of each row
#else
#define NR 2
#endif
#ifdef __AVX512BF16__
#define PAIRS 1 // products of bfloat16 take two terms at once: a word is two neighbours of the summed axis
#else
#define PAIRS 0
#endif
#define UP(n, m) (((n) + (m) - 1) / (m) * (m))

typedef struct {
    const void *q, *k, *v;
    void *out;
    float *lse;       // [tokens, heads], of base 2
    const void *grad; // as `out` and the gradients: contiguous
    void *dq, *dk, *dv;
    const int64_t *tasks; // [count, 6]: first query and queries, first key and keys, first row and end
    int64_t count, heads, kv_heads, d, dv_, q_width, k_width;
    int64_t q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head; // strides in elements
    int64_t causal, window, threads;                                                // window 0: none
    float scale, cap;                                                               // cap 0: none
} Call;

typedef struct {
    int64_t q0, queries, k0, keys, first, end, head; // head: of the keys
} Task;

// -- Vectors

// 2^x to about 1 ulp; 0 below -126; NaN stays NaN.
INLINE vf exp2_(vf x) {
#ifdef __AVX512F__
    const vf n = (vf)_mm512_roundscale_ps((__m512)x, 8), r = x - n;
#else
    const vf n = (x + 12582912.0f) - 12582912.0f, r = x - n;
#endif
    vf p = 1.535336188319500e-4f * r + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    p = p * r + 1.0f;
#ifdef __AVX512F__
    const __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)n);
#else
    return select_(x < -126.0f, splat(0), (vf)((vi)p + (__builtin_convertvector(n, vi) << 23)));
#endif
}

INLINE vi lanes(int64_t first) {
    vi x;
    for (int i = 0; i < W; i++) x[i] = i;
    return x + (int32_t)first;
}

// -- Products of packed matrices. A word is one float32 or, where `pair`, two bfloat16.

INLINE vf madd(vf acc, const int32_t *a, vf b, const int pair) {
#if PAIRS
    if (pair) return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(*a), (__m512bh)b);
#endif
    float x;
    memcpy(&x, a, sizeof x);
    return acc + x * b;
}

INLINE void block(const int32_t *a, int64_t rs, int64_t cs, const int32_t *b, int64_t ldb, float *c, int64_t ldc, int64_t k,
                  const float *keep, const int rows, const int cols, const int pair) {
    vf acc[MR][NR];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) acc[i][j] = keep ? keep[i] * load(c, i * ldc + j * W, 0) : splat(0);
    for (int64_t x = 0; x < k; x++) {
        vf value[NR];
        for (int j = 0; j < cols; j++) value[j] = load(b, x * ldb + j * W, 0);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < cols; j++) acc[i][j] = madd(acc[i][j], a + i * rs + x * cs, value[j], pair);
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) store(c, i * ldc + j * W, acc[i][j], 0);
}

// c [m, n] = a [m, k] b [k, n], plus keep[row] c if keep is given. Words of a stand rs (rows) and cs apart; W divides n.
#define PRODUCT(NAME, PAIR)                                                                                               \
    static __attribute__((noinline)) void NAME(const int32_t *a, int64_t rs, int64_t cs, const int32_t *b, int64_t ldb,  \
                                               float *c, int64_t ldc, int64_t m, int64_t n, int64_t k,                   \
                                               const float *keep) {                                                      \
        for (int64_t j = 0, cols; j < n; j += cols * W) {                                                                 \
            cols = MIN(NR, (n - j) / W);                                                                                  \
            for (int64_t i = 0, rows; i < m; i += rows) {                                                                 \
                rows = m - i >= MR ? MR : m - i >= 4 ? 4 : m - i >= 2 ? 2 : 1;                                            \
                switch (rows * 8 + cols) {                                                                                \
                    CASES(MR, PAIR)                                                                                       \
                    CASES(4, PAIR)                                                                                        \
                    CASES(2, PAIR)                                                                                        \
                    CASES(1, PAIR)                                                                                        \
                }                                                                                                         \
            }                                                                                                             \
        }                                                                                                                 \
    }
#define CASE(ROWS, COLS, PAIR)                                                                                            \
    case ROWS * 8 + COLS:                                                                                                 \
        block(a + i * rs, rs, cs, b + j, ldb, c + i * ldc + j, ldc, k, keep ? keep + i : keep, ROWS, COLS, PAIR);         \
        break;
#if NR == 4
#define CASES(ROWS, PAIR) CASE(ROWS, 4, PAIR) CASE(ROWS, 3, PAIR) CASE(ROWS, 2, PAIR) CASE(ROWS, 1, PAIR)
#else
#define CASES(ROWS, PAIR) CASE(ROWS, 2, PAIR) CASE(ROWS, 1, PAIR)
#endif
PRODUCT(product_words, 0)
#if PAIRS
PRODUCT(product_pairs, 1)
#endif

INLINE void product(const void *a, int64_t rs, int64_t cs, const void *b, int64_t ldb, float *c, int64_t ldc, int64_t m,
                    int64_t n, int64_t k, const float *keep, const int pair) {
#if PAIRS
    if (pair) {
        product_pairs(a, rs, cs, b, ldb, c, ldc, m, n, k, keep);
        return;
    }
#endif
    product_words(a, rs, cs, b, ldb, c, ldc, m, n, k, keep);
}

// -- Packing. Rows are D = UP(d, 16) wide and padded with zeros; their elements are float32, or bfloat16 where `pair`.

INLINE void copy_row(char *to, const char *from, int64_t d, const int64_t D, const int half, const int pair) {
    int64_t j = 0;
    for (; j + W <= d; j += W)
        if (pair)
            memcpy(to + 2 * j, from + 2 * j, 2 * W);
        else
            store(to, j, load(from, j, half), 0);
    for (; j < d; j++)
        if (pair)
            memcpy(to + 2 * j, from + 2 * j, 2);
        else
            put(to, j, get(from, j, half), 0);
    const int size = pair ? 2 : 4;
    if (d < D) memset(to + size * d, 0, size * (D - d));
}

// Rows of elements, `step` bytes apart.
typedef struct {
    const char *at;
    int64_t step;
} Rows;

INLINE Rows copy_rows(char *to, Rows from, int64_t n, int64_t d, const int half, const int pair) {
    const int64_t D = UP(d, 16), line = D * (pair ? 2 : 4);
    for (int64_t i = 0; i < n; i++) copy_row(to + i * line, from.at + i * from.step, d, D, half, pair);
    memset(to + n * line, 0, (UP(n, 16) - n) * line);
    return (Rows){to, line};
}

// The rows themselves if they need neither padding nor another type, else a copy.
INLINE Rows tidy(char *to, Rows from, int64_t n, int64_t d, const int half, const int pair) {
    return n % 16 || d % 16 || half != pair ? copy_rows(to, from, n, d, half, pair) : from;
}

INLINE Rows tokens(const void *x, int64_t row, int64_t token, int64_t head, int64_t width, int64_t at, const int half) {
    const int64_t size = half ? 2 : 4;
    return (Rows){(const char *)x + (at / width * row + at % width * token + head) * size, token * size};
}

// [n, D] words -> [D, TILE] words; columns up to a multiple of 16 rows are written.
INLINE void transpose(int32_t *to, Rows from, int64_t n, int64_t D) {
    for (int64_t i = 0; i < n; i += 16)
        for (int64_t j = 0; j < D; j += 16) {
            const char *x = from.at + i * from.step + 4 * j;
            int32_t *y = to + j * TILE + i;
            const int cols = MIN(16, D - j);
#ifdef __AVX512F__
            __m512i a[16], b[16];
            for (int r = 0; r < 16; r++) a[r] = _mm512_maskz_loadu_epi32((1 << cols) - 1, x + r * from.step);
            for (int r = 0; r < 8; r++) {
                b[2 * r] = _mm512_unpacklo_epi32(a[2 * r], a[2 * r + 1]);
                b[2 * r + 1] = _mm512_unpackhi_epi32(a[2 * r], a[2 * r + 1]);
            }
            for (int r = 0; r < 4; r++) {
                a[4 * r] = _mm512_unpacklo_epi64(b[4 * r], b[4 * r + 2]);
                a[4 * r + 1] = _mm512_unpackhi_epi64(b[4 * r], b[4 * r + 2]);
                a[4 * r + 2] = _mm512_unpacklo_epi64(b[4 * r + 1], b[4 * r + 3]);
                a[4 * r + 3] = _mm512_unpackhi_epi64(b[4 * r + 1], b[4 * r + 3]);
            }
            for (int c = 0; c < 4; c++) { // a[4 r + c]: rows 4 r to 4 r + 3 of columns c, 4 + c, 8 + c, 12 + c
                const __m512i e0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), e1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
                const __m512i o0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd), o1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
                if (c < cols) _mm512_storeu_si512(y + c * TILE, _mm512_shuffle_i32x4(e0, e1, 0x88));
                if (4 + c < cols) _mm512_storeu_si512(y + (4 + c) * TILE, _mm512_shuffle_i32x4(o0, o1, 0x88));
                if (8 + c < cols) _mm512_storeu_si512(y + (8 + c) * TILE, _mm512_shuffle_i32x4(e0, e1, 0xdd));
                if (12 + c < cols) _mm512_storeu_si512(y + (12 + c) * TILE, _mm512_shuffle_i32x4(o0, o1, 0xdd));
            }
#else
            for (int c = 0; c < cols; c++)
                for (int r = 0; r < 16; r++) memcpy(y + c * TILE + r, x + r * from.step + 4 * c, 4);
#endif
        }
}

#if PAIRS
// Two rows of bfloat16 -> their pairs.
INLINE vi zip(vh even, vh odd) {
    return (vi)_mm512_or_si512(_mm512_cvtepu16_epi32((__m256i)even), _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)odd), 16));
}

INLINE void zip_rows(int32_t *to, Rows from, int64_t n, int64_t D) {
    for (int64_t i = 0; i < n; i += 2)
        for (int64_t j = 0; j < D; j += W) {
            vh even, odd;
            memcpy(&even, from.at + i * from.step + 2 * j, sizeof even);
            memcpy(&odd, from.at + (i + 1) * from.step + 2 * j, sizeof odd);
            const vi x = zip(even, odd);
            memcpy(to + i / 2 * D + j, &x, sizeof x);
        }
}
#endif

// The second factor of a product over rows: [n, D], or the pairs of its rows.
INLINE void pack(int32_t *to, Rows raw, Rows tidied, int64_t n, int64_t d, const int half, const int pair) {
#if PAIRS
    if (pair) {
        zip_rows(to, tidied, n, UP(d, 16));
        return;
    }
#endif
    if (tidied.at != (char *)to) copy_rows((char *)to, raw, n, d, half, pair);
}

// -- What a row sees

typedef struct {
    int64_t from, to;
} Span;

INLINE Span seen(const Call *c, const Task *t, int64_t row, int64_t group) {
    const int64_t at = t->keys - t->queries + row / group;
    Span s = {0, t->keys};
    if (c->window) s.from = MAX(0, at - c->window + 1), s.to = MIN(s.to, at + c->window);
    if (c->causal) s.to = MIN(s.to, at + 1);
    s.from = MIN(s.from, t->keys), s.to = MAX(s.to, s.from);
    return s;
}

// Whether rows first to end see some (1) or all (2) of keys at .. at + TILE.
INLINE int sees(const Call *c, const Task *t, int64_t first, int64_t end, int64_t at, int64_t group) {
    const Span low = seen(c, t, first, group), high = seen(c, t, end - 1, group);
    if (low.from >= at + TILE || high.to <= at) return 0;
    return high.from <= at && low.to >= at + TILE ? 2 : 1;
}

INLINE Task task_of(const Call *c, int64_t i) {
    const int64_t *x = c->tasks + i / c->kv_heads * 6;
    return (Task){x[0], x[1], x[2], x[3], x[4], x[5], i % c->kv_heads};
}

// Where row r of a task lies among [tokens, heads].
INLINE int64_t place(const Call *c, const Task *t, int64_t row, int64_t group) {
    return (t->q0 + row / group) * c->heads + t->head * group + row % group;
}

INLINE void pack_queries(const Call *c, const Task *t, char *to, int64_t first, int64_t n, int64_t group, const int half,
                         const int pair) {
    const int64_t D = UP(c->d, 16), size = half ? 2 : 4, line = D * (pair ? 2 : 4);
    for (int64_t i = 0; i < n; i++) {
        const int64_t token = t->q0 + (first + i) / group, head = t->head * group + (first + i) % group;
        const int64_t at = token / c->q_width * c->q_row + token % c->q_width * c->q_token + head * c->q_head;
        copy_row(to + i * line, (const char *)c->q + at * size, c->d, D, half, pair);
    }
    memset(to + n * line, 0, (UP(n, 16) - n) * line);
}

INLINE vf visible_(vf x, vi at, Span s, float other) {
    return select_((at >= (int32_t)s.from) & (at < (int32_t)s.to), x, splat(other));
}

INLINE void *take(char **arena, int64_t bytes) {
    void *p = *arena;
    *arena += UP(bytes, 64);
    return p;
}

// -- Forward

// Scores [rows, TILE] -> probabilities times 2^(peak of the row so far), packed; keep: what older ones shrink by.
INLINE void soften(const Call *c, const Task *t, float *s, void *p, int64_t first, int64_t rows, int64_t at, int all, int64_t group,
                   float *most, vf *total, float *keep, const int pair) {
    const float unit = c->scale * 1.44269504f, inverse = c->cap > 0 ? c->scale / c->cap : 0, capped = c->cap * 1.44269504f;
    const int raw = all && c->cap <= 0;
    const float factor = raw ? unit : 1;
    float base[TILE] __attribute__((aligned(64)));
    for (int64_t i = 0; i < rows; i++) {
        vf high = splat(-INFINITY), x[TILE / W];
        for (int j = 0; j < TILE / W; j++) x[j] = load(s, i * TILE + j * W, 0);
        if (raw)
            for (int j = 0; j < TILE / W; j++) high = vmax(high, x[j] * unit);
        else {
            const Span span = seen(c, t, first + i, group);
            for (int j = 0; j < TILE / W; j++) {
                x[j] = c->cap > 0 ? capped * vtanh(x[j] * inverse) : x[j] * unit;
                x[j] = visible_(x[j], lanes(at + j * W), span, -INFINITY);
                store(s, i * TILE + j * W, x[j], 0);
                high = vmax(high, x[j]);
            }
        }
        base[i] = largest(high);
    }
    for (int64_t i = 0; i < rows; i += W) {
        const vf old = load(most, i, 0), now = vmax(load(base, i, 0), old), low = select_(now == -INFINITY, splat(0), now);
        store(keep, i, exp2_(old - low), 0);
        store(most, i, now, 0);
        store(base, i, low, 0);
    }
    for (int64_t i = 0; i < rows; i++) {
        vf x[TILE / W], more = splat(0);
        for (int j = 0; j < TILE / W; j++) {
            x[j] = exp2_(load(s, i * TILE + j * W, 0) * factor - base[i]);
            more += x[j];
            store(p, i * TILE + j * W, x[j], pair);
        }
        total[i] = total[i] * keep[i] + more;
    }
}

INLINE void forward(const Call *c, const Task *t, char *arena, const int half, const int pair) {
    const int64_t group = c->heads / c->kv_heads, D = UP(c->d, 16), V = UP(c->dv_, 16), rows = t->end - t->first;
    const int64_t size = pair ? 2 : 4, words = pair ? 2 : 1;
    char *q = take(&arena, WIDE * D * size), *k = take(&arena, TILE * D * size), *v = take(&arena, TILE * V * size);
    int32_t *kt = take(&arena, TILE * D * size), *vp = pair ? take(&arena, TILE * V * size) : (int32_t *)v;
    float *s = take(&arena, TILE * TILE * 4), *acc = take(&arena, WIDE * V * 4), *most = take(&arena, WIDE * 4);
    vf *total = take(&arena, WIDE * sizeof *total);
    void *p = pair ? take(&arena, TILE * TILE * 2) : s;
    float keep[TILE] __attribute__((aligned(64)));
    pack_queries(c, t, q, t->first, rows, group, half, pair);
    memset(acc, 0, rows * V * 4);
    for (int64_t i = 0; i < UP(rows, W); i++) most[i] = -INFINITY, total[i] = splat(0);
    const int64_t end = seen(c, t, t->end - 1, group).to;
    for (int64_t at = seen(c, t, t->first, group).from / TILE * TILE; at < end; at += TILE) {
        const int64_t n = MIN(TILE, t->keys - at);
        const Rows k_raw = tokens(c->k, c->k_row, c->k_token, t->head * c->k_head, c->k_width, t->k0 + at, half);
        const Rows v_raw = tokens(c->v, c->v_row, c->v_token, t->head * c->v_head, c->k_width, t->k0 + at, half);
        transpose(kt, tidy(k, k_raw, n, c->d, half, pair), n, D / words);
        pack(vp, v_raw, tidy(v, v_raw, n, c->dv_, half, pair), n, c->dv_, half, pair);
        for (int64_t i = 0; i < rows; i += TILE) {
            const int64_t m = MIN(TILE, rows - i), first = t->first + i;
            const int some = sees(c, t, first, first + m, at, group);
            if (!some) continue;
            product(q + i * D * size, D / words, 1, kt, TILE, s, TILE, m, UP(n, W), D / words, NULL, pair);
            soften(c, t, s, p, first, m, at, some == 2, group, most + i, total + i, keep, pair);
            product(p, TILE / words, 1, vp, V, acc + i * V, V, m, V, UP(n, words) / words, keep, pair);
        }
    }
    for (int64_t i = 0; i < rows; i++) {
        const float all = sum(total[i]), inverse = all == 0 ? 0 : 1 / all;
        const int64_t to = place(c, t, t->first + i, group);
        c->lse[to] = all == 0 ? INFINITY : most[i] + log2f(all);
        for (int64_t j = 0; j + W <= c->dv_; j += W) store(c->out, to * c->dv_ + j, inverse * load(acc, i * V + j, 0), half);
        for (int64_t j = c->dv_ / W * W; j < c->dv_; j++) put(c->out, to * c->dv_ + j, inverse * acc[i * V + j], half);
    }
}

// -- Backward

// Scores s and gradients g [rows, TILE] of probabilities -> probabilities and gradients of q k^T: in place, and packed.
INLINE void harden(const Call *c, const Task *t, float *s, float *g, bf16 *ds, int32_t *pp, int32_t *dsp, int64_t first, int64_t rows,
                   int64_t at, int all, int64_t group, const float *lse, const float *delta, const int pair) {
    const float unit = c->scale * 1.44269504f, inverse = c->cap > 0 ? c->scale / c->cap : 0, capped = c->cap * 1.44269504f;
    for (int64_t i = 0; i < rows; i += 2) {
        vf p[2][TILE / W], d[2][TILE / W];
        for (int r = 0; r < 2; r++) {
            if (i + r == rows) { // an odd number of rows: pairs end with zeros
                for (int j = 0; j < TILE / W; j++) p[r][j] = d[r][j] = splat(0);
                continue;
            }
            const Span span = seen(c, t, first + i + r, group);
            for (int j = 0; j < TILE / W; j++) {
                const vf x = load(s, (i + r) * TILE + j * W, 0);
                vf y, slope = splat(c->scale);
                if (c->cap > 0) {
                    const vf th = vtanh(x * inverse);
                    y = exp2_(th * capped - lse[i + r]);
                    slope *= 1 - th * th;
                } else
                    y = exp2_(x * unit - lse[i + r]);
                if (!all) y = visible_(y, lanes(at + j * W), span, 0);
                p[r][j] = y;
                y = y * (load(g, (i + r) * TILE + j * W, 0) - delta[i + r]) * slope;
                d[r][j] = all ? y : visible_(y, lanes(at + j * W), span, 0);
            }
        }
        for (int j = 0; j < TILE / W; j++) {
#if PAIRS
            if (pair) {
                const vh p0 = narrow_v(p[0][j]), p1 = narrow_v(p[1][j]), d0 = narrow_v(d[0][j]), d1 = narrow_v(d[1][j]);
                const vi both = zip(p0, p1), dboth = zip(d0, d1);
                memcpy(pp + i / 2 * TILE + j * W, &both, sizeof both);
                memcpy(dsp + i / 2 * TILE + j * W, &dboth, sizeof dboth);
                memcpy(ds + i * TILE + j * W, &d0, sizeof d0);
                memcpy(ds + (i + 1) * TILE + j * W, &d1, sizeof d1);
                continue;
            }
#endif
            for (int r = 0; r < MIN(2, rows - i); r++) {
                store(s, (i + r) * TILE + j * W, p[r][j], 0);
                store(g, (i + r) * TILE + j * W, d[r][j], 0);
            }
        }
    }
}

INLINE void unpack(void *to, const float *from, int64_t at, int64_t d, const int half) {
    for (int64_t j = 0; j + W <= d; j += W) store(to, at + j, load(from, j, 0), half);
    for (int64_t j = d / W * W; j < d; j++) put(to, at + j, from[j], half);
}

INLINE void backward(const Call *c, const Task *t, char *arena, const int half, const int pair) {
    const int64_t group = c->heads / c->kv_heads, D = UP(c->d, 16), V = UP(c->dv_, 16), keys = UP(t->keys, TILE);
    const int64_t size = pair ? 2 : 4, words = pair ? 2 : 1, raw = half ? 2 : 4;
    char *q = take(&arena, WIDE * D * size), *o = take(&arena, WIDE * V * size);
    char *k = take(&arena, TILE * D * size), *v = take(&arena, TILE * V * size);
    int32_t *kt = take(&arena, TILE * D * size), *vt = take(&arena, TILE * V * size);
    int32_t *qp = pair ? take(&arena, WIDE * D * size) : (int32_t *)q, *op = pair ? take(&arena, WIDE * V * size) : (int32_t *)o;
    int32_t *kp = pair ? take(&arena, TILE * D * size) : (int32_t *)k;
    float *s = take(&arena, TILE * TILE * 4), *g = take(&arena, TILE * TILE * 4);
    bf16 *ds = pair ? take(&arena, TILE * TILE * 2) : NULL;
    int32_t *pp = pair ? take(&arena, TILE * TILE * 2) : (int32_t *)s, *dsp = pair ? take(&arena, TILE * TILE * 2) : (int32_t *)g;
    float *dq = take(&arena, WIDE * D * 4), *lse = take(&arena, WIDE * 4), *delta = take(&arena, WIDE * 4);
    float *dk = take(&arena, keys * D * 4), *dv = take(&arena, keys * V * 4), one[TILE];
    for (int i = 0; i < TILE; i++) one[i] = 1;
    memset(dk, 0, keys * D * 4);
    memset(dv, 0, keys * V * 4);
    for (int64_t begin = t->first; begin < t->end; begin += WIDE) {
        const int64_t rows = MIN(WIDE, t->end - begin), stop = seen(c, t, begin + rows - 1, group).to;
        pack_queries(c, t, q, begin, rows, group, half, pair);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t from = place(c, t, begin + i, group);
            const char *grad = (const char *)c->grad + from * c->dv_ * raw, *out = (const char *)c->out + from * c->dv_ * raw;
            copy_row(o + i * V * size, grad, c->dv_, V, half, pair);
            vf dot = splat(0);
            int64_t j = 0;
            for (; j + W <= c->dv_; j += W) dot += load(grad, j, half) * load(out, j, half);
            delta[i] = sum(dot), lse[i] = c->lse[from];
            for (; j < c->dv_; j++) delta[i] += get(grad, j, half) * get(out, j, half);
        }
        memset(o + rows * V * size, 0, (UP(rows, 2) - rows) * V * size);
        memset(dq, 0, rows * D * 4);
#if PAIRS
        if (pair) zip_rows(qp, (Rows){q, 2 * D}, rows, D), zip_rows(op, (Rows){o, 2 * V}, rows, V);
#endif
        for (int64_t at = seen(c, t, begin, group).from / TILE * TILE; at < stop; at += TILE) {
            const int64_t n = MIN(TILE, t->keys - at);
            const Rows k_raw = tokens(c->k, c->k_row, c->k_token, t->head * c->k_head, c->k_width, t->k0 + at, half);
            const Rows v_raw = tokens(c->v, c->v_row, c->v_token, t->head * c->v_head, c->k_width, t->k0 + at, half);
            const Rows k_tidy = tidy(k, k_raw, n, c->d, half, pair);
            transpose(kt, k_tidy, n, D / words);
            transpose(vt, tidy(v, v_raw, n, c->dv_, half, pair), n, V / words);
            pack(kp, k_raw, k_tidy, n, c->d, half, pair);
            for (int64_t i = 0; i < rows; i += TILE) {
                const int64_t m = MIN(TILE, rows - i), first = begin + i, m_words = UP(m, words) / words;
                const int some = sees(c, t, first, first + m, at, group);
                if (!some) continue;
                product(q + i * D * size, D / words, 1, kt, TILE, s, TILE, m, UP(n, W), D / words, NULL, pair);
                product(o + i * V * size, V / words, 1, vt, TILE, g, TILE, m, UP(n, W), V / words, NULL, pair);
                harden(c, t, s, g, ds, pp, dsp, first, m, at, some == 2, group, lse + i, delta + i, pair);
                product(pp, 1, TILE, op + i / words * V, V, dv + at * V, V, n, V, m_words, one, pair);
                product(dsp, 1, TILE, qp + i / words * D, D, dk + at * D, D, n, D, m_words, one, pair);
                product(pair ? (void *)ds : g, TILE / words, 1, kp, D, dq + i * D, D, m, D, UP(n, words) / words, one, pair);
            }
        }
        for (int64_t i = 0; i < rows; i++) unpack(c->dq, dq + i * D, place(c, t, begin + i, group) * c->d, c->d, half);
    }
    for (int64_t i = 0; i < t->keys; i++) {
        const int64_t to = (t->k0 + i) * c->kv_heads + t->head;
        unpack(c->dk, dk + i * D, to * c->d, c->d, half);
        unpack(c->dv, dv + i * V, to * c->dv_, c->dv_, half);
    }
}

// Scratch of a task: what a generous count of all its parts comes to.
static int64_t scratch(const Call *c, int64_t keys) {
    const int64_t wide = UP(c->d, 16) + UP(c->dv_, 16);
    return 4 * (wide * (3 * WIDE + 6 * TILE + UP(keys, TILE)) + 5 * TILE * TILE + (W + 4) * WIDE) + 64 * 32;
}

#define EXPORT(NAME, RUN, HALF, KEYS)                                                                                    \
    void NAME(const Call *c) {                                                                                            \
        int64_t keys = 0;                                                                                                 \
        if (KEYS)                                                                                                         \
            for (int64_t i = 0; i < c->count; i++) keys = MAX(keys, c->tasks[i * 6 + 3]);                                 \
        const int64_t bytes = UP(scratch(c, keys), 64);                                                                   \
        _Pragma("omp parallel num_threads(c->threads) if (c->threads > 1)") {                                             \
            char *arena = aligned_alloc(64, bytes);                                                                       \
            _Pragma("omp for schedule(dynamic)")                                                                          \
            for (int64_t i = 0; i < c->count * c->kv_heads; i++) {                                                        \
                const Task t = task_of(c, i);                                                                             \
                RUN(c, &t, arena, HALF, HALF && PAIRS);                                                                   \
            }                                                                                                             \
            free(arena);                                                                                                  \
        }                                                                                                                 \
    }
EXPORT(forward_f32, forward, 0, 0)
EXPORT(forward_bf16, forward, 1, 0)
EXPORT(backward_f32, backward, 0, 1)
EXPORT(backward_bf16, backward, 1, 1)
