// Mamba-2's chunks and their gradient: attention within a chunk and a recurrence between chunks, a head at a time, in buffers
// that the second-level cache holds. Lanes are the last axis of every matrix; rows are padded with zeros to whole vectors.
#include <stdlib.h>
#include "vector.h"

#define AT(p, i) ((char *)(p) + (i) * (half ? 2 : 4))
#define PARTS 8  // of the heads: sums over heads are taken part by part, whatever the number of threads
#define WHOLE(n) (((n) + W - 1) / W * W)

// Small matrix products -------------------------------------------------------------------------------------------------------

enum { ALL, BELOW, ABOVE };  // which k a row i of A has: all, k <= i, k >= i

// R rows from i on, V vectors wide: out += A B, with A[i, k] at a[i ai + k ak].
INLINE void block(float *out, int64_t ld, const float *a, int64_t ai, int64_t ak, const float *b, int64_t bld, int64_t k0,
                  int64_t k1, const int R, const int V) {
    vf acc[24];  // R V of them
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) acc[r * V + v] = load(out + r * ld, v * W, 0);
    for (int64_t k = k0; k < k1; k++) {
        vf row[4];
        for (int v = 0; v < V; v++) row[v] = load(b + k * bld, v * W, 0);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) acc[r * V + v] += a[r * ai + k * ak] * row[v];
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(out + r * ld, v * W, acc[r * V + v], 0);
}

#define ROWS 6
INLINE void band(float *out, int64_t ld, const float *a, int64_t ai, int64_t ak, const float *b, int64_t bld, int64_t m, int64_t K,
                 const int shape, const int V) {
    int64_t i = 0;
    for (; i + ROWS <= m; i += ROWS)
        block(out + i * ld, ld, a + i * ai, ai, ak, b, bld, shape == ABOVE ? i : 0, shape == BELOW ? MIN(K, i + ROWS) : K, ROWS, V);
    for (; i < m; i++)
        block(out + i * ld, ld, a + i * ai, ai, ak, b, bld, shape == ABOVE ? i : 0, shape == BELOW ? MIN(K, i + 1) : K, 1, V);
}

// out [m, n] += A [m, K] B [K, n]; n is a multiple of W. Elements of A outside of its shape are zeros.
static void product(float *out, int64_t ld, const float *a, int64_t ai, int64_t ak, const float *b, int64_t bld, int64_t m,
                    int64_t n, int64_t K, int shape) {
    for (int64_t j = 0; j < n;) {
        const int64_t left = (n - j) / W;
        if (left >= 4)
            band(out + j, ld, a, ai, ak, b + j, bld, m, K, shape, 4), j += 4 * W;
        else if (left >= 2)
            band(out + j, ld, a, ai, ak, b + j, bld, m, K, shape, 2), j += 2 * W;
        else
            band(out + j, ld, a, ai, ak, b + j, bld, m, K, shape, 1), j += W;
    }
}

// to [n, m] = from [m, n] transposed; both are multiples of W.
static void transpose(const float *from, int64_t ld, float *to, int64_t told, int64_t m, int64_t n) {
#if defined(__GNUC__) && !defined(__clang__)
    for (int64_t i = 0; i < m; i += W)
        for (int64_t j = 0; j < n; j += W) {
            vf r[W];
            for (int k = 0; k < W; k++) r[k] = load(from + (i + k) * ld, j, 0);
            for (int step = W / 2; step; step /= 2) {  // swap the off-diagonal blocks of ever smaller squares
                vi low, high;
                for (int k = 0; k < W; k++) low[k] = k & step ? W + k - step : k, high[k] = k & step ? W + k : k + step;
                for (int k = 0; k < W; k++)
                    if (!(k & step)) {
                        const vf a = r[k], b = r[k + step];
                        r[k] = __builtin_shuffle(a, b, low), r[k + step] = __builtin_shuffle(a, b, high);
                    }
            }
            for (int k = 0; k < W; k++) store(to + (j + k) * told, i, r[k], 0);
        }
#else
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < m; i++) to[j * told + i] = from[i * ld + j];
#endif
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    vf s = splat(0);
    for (int64_t i = 0; i < n; i += W) s += load(a, i, 0) * load(b, i, 0);
    return sum(s);
}

// Inputs ----------------------------------------------------------------------------------------------------------------------

typedef struct {
    const char *x, *B, *C;       // [tokens, H, P], twice [tokens, G, N], rows with strides
    const float *dt, *A, *D;     // [tokens, H], [H], [H]
    int64_t x_ld, B_ld, C_ld, H, P, G, N, Q;  // Q: tokens of a chunk
} Inputs;

// What a thread works in; Pw, Nw, Qw are whole vectors.
typedef struct {
    int64_t Pw, Nw, Qw;
    float *B, *C, *BT, *Bs, *Cs;        // [Q, N], [Q, N], [N, Q], and B, C scaled
    float *G, *L, *M;                   // [Q, Q]
    float *x, *V, *y;                   // [Q, P]
    float *h;                           // [N, P]
    float *VT, *hT, *dM, *dG, *dB, *dC, *dh, *dV;  // backward
    float *since, *left, *dsum;         // [Q]
    double *sums;                       // [Q]
    void *memory;
} Room;

static Room room(const Inputs *in, int backward) {
    Room r = {WHOLE(in->P), WHOLE(in->N), WHOLE(in->Q)};
    const int64_t qn = r.Qw * r.Nw, qq = r.Qw * r.Qw, qp = r.Qw * r.Pw, np = r.Nw * r.Pw, q = r.Qw;
    const int64_t total = 5 * qn + 3 * qq + 3 * qp + np + 5 * q + (backward ? 2 * qp + 2 * np + 2 * qq + 2 * qn : 0);
    float *p = r.memory = aligned_alloc(64, total * sizeof(float));
    if (!p) abort();
    memset(p, 0, total * sizeof(float));
#define TAKE(name, n) r.name = p, p += n
    r.sums = (double *)p, p += 2 * q;
    TAKE(since, q); TAKE(left, q); TAKE(dsum, q);
    TAKE(B, qn); TAKE(C, qn); TAKE(BT, qn); TAKE(Bs, qn); TAKE(Cs, qn);
    TAKE(G, qq); TAKE(L, qq); TAKE(M, qq);
    TAKE(x, qp); TAKE(V, qp); TAKE(y, qp); TAKE(h, np);
    if (backward) {
        TAKE(VT, qp); TAKE(dV, qp); TAKE(hT, np); TAKE(dh, np);
        TAKE(dM, qq); TAKE(dG, qq); TAKE(dB, qn); TAKE(dC, qn);
    }
    return r;
}

// Rows of n numbers as float32 rows of nw; rows from `count` to `rows` are zeros.
INLINE void gather(const char *from, int64_t ld, float *to, int64_t nw, int64_t n, int64_t count, int64_t rows, const int half) {
    for (int64_t t = 0; t < rows; t++) {
        float *row = to + t * nw;
        if (t >= count) {
            memset(row, 0, nw * sizeof(float));
            continue;
        }
        int64_t i = 0;
        for (; i + W <= n; i += W) store(row, i, load(AT(from, t * ld), i, half), 0);
        for (; i < n; i++) row[i] = get(AT(from, t * ld), i, half);
    }
}

// B and C of a chunk and a group, and what tokens are to each other: G = C B^T.
INLINE void meet(const Inputs *in, Room *r, int64_t from, int64_t count, int64_t g, const int half) {
    gather(AT(in->B, from * in->B_ld + g * in->N), in->B_ld, r->B, r->Nw, in->N, count, r->Qw, half);
    gather(AT(in->C, from * in->C_ld + g * in->N), in->C_ld, r->C, r->Nw, in->N, count, r->Qw, half);
    transpose(r->B, r->Nw, r->BT, r->Qw, r->Qw, r->Nw);
    memset(r->G, 0, r->Qw * r->Qw * sizeof(float));
    product(r->G, r->Qw, r->C, r->Nw, 1, r->BT, r->Qw, count, r->Qw, in->N, ALL);
}

// A head's decays L[t, s], its mask M = G L, its values V = dt x, and B and C scaled to the chunk's end and start.
INLINE void decay(const Inputs *in, Room *r, int64_t from, int64_t count, int64_t h, const int half) {
    double total = 0;
    for (int64_t t = 0; t < count; t++) r->sums[t] = total += (double)(in->dt[(from + t) * in->H + h] * in->A[h]);
    for (int64_t t = 0; t < r->Qw; t++) {
        r->since[t] = t < count ? (float)r->sums[t] : 0;
        r->left[t] = t < count ? (float)(total - r->sums[t]) : 0;
    }
    for (int64_t t = 0; t < r->Qw; t += W) {
        store(r->since, t, vexp(load(r->since, t, 0)), 0);
        store(r->left, t, vexp(load(r->left, t, 0)), 0);
    }
    for (int64_t t = 0; t < count; t++) {
        float *L = r->L + t * r->Qw, *M = r->M + t * r->Qw;
        for (int64_t s = 0; s < r->Qw; s++) L[s] = s <= t ? (float)(r->sums[t] - r->sums[s]) : -1000;
        for (int64_t s = 0; s < r->Qw; s += W) {
            const vf l = s <= t ? vexp(load(L, s, 0)) : splat(0);
            store(L, s, l, 0);
            store(M, s, l * load(r->G + t * r->Qw, s, 0), 0);
        }
    }
    gather(AT(in->x, from * in->x_ld + h * in->P), in->x_ld, r->x, r->Pw, in->P, count, r->Qw, half);
    for (int64_t t = 0; t < count; t++) {
        const float dt = in->dt[(from + t) * in->H + h];
        for (int64_t p = 0; p < r->Pw; p += W) store(r->V + t * r->Pw, p, dt * load(r->x + t * r->Pw, p, 0), 0);
        for (int64_t n = 0; n < r->Nw; n += W) {
            store(r->Bs + t * r->Nw, n, r->left[t] * load(r->B + t * r->Nw, n, 0), 0);
            store(r->Cs + t * r->Nw, n, r->since[t] * load(r->C + t * r->Nw, n, 0), 0);
        }
    }
}

// A head's state [N, P], rows with a stride, and its padded copy.
INLINE void fetch(const float *from, int64_t ld, float *to, int64_t pw, int64_t N, int64_t P) {
    for (int64_t n = 0; n < N; n++) memcpy(to + n * pw, from + n * ld, P * sizeof(float));
}
INLINE void put_back(float *to, int64_t ld, const float *from, int64_t pw, int64_t N, int64_t P) {
    for (int64_t n = 0; n < N; n++) memcpy(to + n * ld, from + n * pw, P * sizeof(float));
}
INLINE void scale(float *x, float by, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(x, i, by * load(x, i, 0), 0);
}

INLINE int64_t parts_of(const Inputs *in) { return MIN(in->H / in->G, MAX(1, PARTS / in->G)); }

// Forward ---------------------------------------------------------------------------------------------------------------------

// state [sequences, G, N, H / G P]: before, then after; kept [chunks, H, N, P], or null: the state before every chunk.
INLINE void forward(const Inputs *in, const int64_t *spans, int64_t sequences, float *state, float *kept, char *y, int threads,
                    const int half) {
    const int64_t each = in->H / in->G, P = in->P, N = in->N, wide = each * P, parts = parts_of(in), size = N * P;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Room r = room(in, 0);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < in->G * parts; task++) {
            const int64_t g = task / parts, part = task % parts;
            float *to = kept;
            for (int64_t i = 0; i < sequences; i++)
                for (int64_t t = 0; t < spans[2 * i + 1]; t += in->Q, to += in->H * size) {
                    const int64_t from = spans[2 * i] + t, count = MIN(in->Q, spans[2 * i + 1] - t);
                    meet(in, &r, from, count, g, half);
                    for (int64_t e = each * part / parts; e < each * (part + 1) / parts; e++) {
                        const int64_t h = g * each + e;
                        float *s = state + (i * in->G + g) * N * wide + e * P;
                        decay(in, &r, from, count, h, half);
                        fetch(s, wide, r.h, r.Pw, N, P);
                        if (kept) put_back(to + h * size, P, r.h, r.Pw, N, P);
                        for (int64_t q = 0; q < count; q++)
                            for (int64_t p = 0; p < r.Pw; p += W)
                                store(r.y + q * r.Pw, p, in->D[h] * load(r.x + q * r.Pw, p, 0), 0);
                        product(r.y, r.Pw, r.M, r.Qw, 1, r.V, r.Pw, count, r.Pw, count, BELOW);
                        product(r.y, r.Pw, r.Cs, r.Nw, 1, r.h, r.Pw, count, r.Pw, N, ALL);
                        scale(r.h, r.since[count - 1], N * r.Pw);
                        product(r.h, r.Pw, r.Bs, 1, r.Nw, r.V, r.Pw, N, r.Pw, count, ALL);
                        put_back(s, wide, r.h, r.Pw, N, P);
                        for (int64_t q = 0; q < count; q++) {
                            char *out = AT(y, ((from + q) * in->H + h) * P);
                            int64_t p = 0;
                            for (; p + W <= P; p += W) store(out, p, load(r.y + q * r.Pw, p, 0), half);
                            for (; p < P; p++) put(out, p, r.y[q * r.Pw + p], half);
                        }
                    }
                }
        }
        free(r.memory);
    }
}

// Backward --------------------------------------------------------------------------------------------------------------------

typedef struct {
    char *x;              // [tokens, H, P]
    float *dt, *A, *D;    // [tokens, H], [H], [H]
    float *B, *C;         // [parts, tokens, G, N]
    float *state;         // [sequences, G, N, H / G P]: the gradient of the states after, then before
} Grads;

// One head of one chunk, whose first state is h0 [N, P]; the gradients of G, B and C are added up over heads.
INLINE void head_backward(const Inputs *in, const Grads *out, Room *r, const char *dy, const float *h0, float *s, int64_t wide,
                          int64_t from, int64_t count, int64_t h, const int half) {
    const int64_t P = in->P, N = in->N, Pw = r->Pw, Nw = r->Nw, Qw = r->Qw;
    const float a = in->A[h], whole = r->since[count - 1];
    gather(AT(dy, (from * in->H + h) * P), in->H * P, r->y, Pw, P, count, Qw, half);
    fetch(s, wide, r->dh, Pw, N, P);
    fetch(h0, P, r->h, Pw, N, P);
    memset(r->dsum, 0, Qw * sizeof(float));
    // values: dV = M^T dy + Bs dh
    memset(r->dV, 0, Qw * Pw * sizeof(float));
    product(r->dV, Pw, r->M, 1, Qw, r->y, Pw, count, Pw, count, ABOVE);
    product(r->dV, Pw, r->Bs, Nw, 1, r->dh, Pw, count, Pw, N, ALL);
    // the mask: dM = dy V^T, below the diagonal
    memset(r->V + count * Pw, 0, (Qw - count) * Pw * sizeof(float));
    transpose(r->V, Pw, r->VT, Qw, Qw, Pw);
    memset(r->dM, 0, count * Qw * sizeof(float));
    product(r->dM, Qw, r->y, Pw, 1, r->VT, Qw, count, Qw, P, ALL);
    for (int64_t t = 0; t < count; t++) {
        vf row = splat(0);
        for (int64_t q = 0; q <= t; q += W) {
            const vf d = load(r->dM + t * Qw, q, 0), e = d * load(r->M + t * Qw, q, 0);
            store(r->dG + t * Qw, q, load(r->dG + t * Qw, q, 0) + d * load(r->L + t * Qw, q, 0), 0);
            store(r->dsum, q, load(r->dsum, q, 0) - e, 0);
            row += e;
        }
        r->dsum[t] += sum(row);
    }
    // what C reads of the first state, and what B adds to the last one
    float *T = r->Cs;  // its products are not needed again once dh is known
    double ends = whole * dot(r->dh, r->h, N * Pw);
    transpose(r->dh, Pw, r->hT, Nw, Nw, Pw);
    memset(r->Bs, 0, count * Nw * sizeof(float));
    product(r->Bs, Nw, r->V, Pw, 1, r->hT, Nw, count, Nw, P, ALL);
    for (int64_t t = 0; t < count; t++) {
        const float *row = r->Bs + t * Nw, part = r->left[t] * dot(r->B + t * Nw, row, Nw);
        r->dsum[t] -= part;
        ends += part;
        for (int64_t n = 0; n < Nw; n += W)
            store(r->dB + t * Nw, n, load(r->dB + t * Nw, n, 0) + r->left[t] * load(row, n, 0), 0);
    }
    scale(r->dh, whole, N * Pw);
    product(r->dh, Pw, r->Cs, 1, Nw, r->y, Pw, N, Pw, count, ALL);
    put_back(s, wide, r->dh, Pw, N, P);
    transpose(r->h, Pw, r->hT, Nw, Nw, Pw);
    memset(T, 0, count * Nw * sizeof(float));
    product(T, Nw, r->y, Pw, 1, r->hT, Nw, count, Nw, P, ALL);
    for (int64_t t = 0; t < count; t++) {
        const float *row = T + t * Nw;
        r->dsum[t] += r->since[t] * dot(r->C + t * Nw, row, Nw);
        for (int64_t n = 0; n < Nw; n += W)
            store(r->dC + t * Nw, n, load(r->dC + t * Nw, n, 0) + r->since[t] * load(row, n, 0), 0);
    }
    // steps, A, D and x
    double later = ends, dA = 0, dD = 0;
    for (int64_t t = count - 1; t >= 0; t--) {
        const float dt = in->dt[(from + t) * in->H + h], *dv = r->dV + t * Pw, *x = r->x + t * Pw, *g = r->y + t * Pw;
        later += r->dsum[t];
        dA += later * dt;
        dD += dot(g, x, Pw);
        out->dt[(from + t) * in->H + h] = (float)(later * a) + dot(dv, x, Pw);
        char *to = AT(out->x, ((from + t) * in->H + h) * P);
        int64_t p = 0;
        for (; p + W <= P; p += W) store(to, p, dt * load(dv, p, 0) + in->D[h] * load(g, p, 0), half);
        for (; p < P; p++) put(to, p, dt * dv[p] + in->D[h] * g[p], half);
    }
    out->A[h] += (float)dA;
    out->D[h] += (float)dD;
}

INLINE void backward(const Inputs *in, const Grads *out, const int64_t *spans, int64_t sequences, int64_t tokens,
                     const float *kept, const char *dy, int threads, const int half) {
    const int64_t each = in->H / in->G, P = in->P, N = in->N, wide = each * P, parts = parts_of(in), size = N * P;
    int64_t chunks = 0;
    for (int64_t i = 0; i < sequences; i++) chunks += (spans[2 * i + 1] + in->Q - 1) / in->Q;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Room r = room(in, 1);
        const int64_t qn = r.Qw * r.Nw;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < in->G * parts; task++) {
            const int64_t g = task / parts, part = task % parts;
            const float *h0 = kept + chunks * in->H * size;
            for (int64_t i = sequences - 1; i >= 0; i--)
                for (int64_t t = (spans[2 * i + 1] - 1) / in->Q * in->Q; t >= 0 && spans[2 * i + 1]; t -= in->Q) {
                    const int64_t from = spans[2 * i] + t, count = MIN(in->Q, spans[2 * i + 1] - t);
                    h0 -= in->H * size;
                    meet(in, &r, from, count, g, half);
                    memset(r.dG, 0, r.Qw * r.Qw * sizeof(float));
                    memset(r.dB, 0, qn * sizeof(float));
                    memset(r.dC, 0, qn * sizeof(float));
                    for (int64_t e = each * part / parts; e < each * (part + 1) / parts; e++) {
                        const int64_t h = g * each + e;
                        decay(in, &r, from, count, h, half);
                        head_backward(in, out, &r, dy, h0 + h * size, out->state + (i * in->G + g) * N * wide + e * P, wide, from,
                                      count, h, half);
                    }
                    product(r.dC, r.Nw, r.dG, r.Qw, 1, r.B, r.Nw, count, r.Nw, count, BELOW);
                    product(r.dB, r.Nw, r.dG, 1, r.Qw, r.C, r.Nw, count, r.Nw, count, ABOVE);
                    const int64_t at = ((part * tokens + from) * in->G + g) * N;
                    put_back(out->B + at, in->G * N, r.dB, r.Nw, count, N);
                    put_back(out->C + at, in->G * N, r.dC, r.Nw, count, N);
                }
        }
        free(r.memory);
    }
}

#define EXPORT(NAME, HALF)                                                                                                       \
    void ssd_##NAME(const char *x, const char *B, const char *C, const float *dt, const float *A, const float *D,                \
                    const int64_t *sizes, const int64_t *spans, int64_t sequences, float *state, float *kept, char *y,           \
                    int threads) {                                                                                               \
        const Inputs in = {x, B, C, dt, A, D, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]};   \
        forward(&in, spans, sequences, state, kept, y, threads, HALF);                                                           \
    }                                                                                                                            \
    void ssd_backward_##NAME(const char *x, const char *B, const char *C, const float *dt, const float *A, const float *D,       \
                             const int64_t *sizes, const int64_t *spans, int64_t sequences, int64_t tokens, const float *kept,   \
                             const char *dy, char *dx, float *ddt, float *dA, float *dD, float *dB, float *dC, float *dstate,    \
                             int threads) {                                                                                      \
        const Inputs in = {x, B, C, dt, A, D, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]};   \
        const Grads out = {dx, ddt, dA, dD, dB, dC, dstate};                                                                     \
        backward(&in, &out, spans, sequences, tokens, kept, dy, threads, HALF);                                                  \
    }

EXPORT(f32, 0)
EXPORT(bf16, 1)
