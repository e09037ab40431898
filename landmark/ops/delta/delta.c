// The generalised delta rule and its gradient, token by token: S = (diag(w) + b a^T) S + k v^T, a matrix of keys by values.
// Forward, lanes are values, and columns of S go their own ways; backward, lanes are keys.
#include <stdlib.h>
#include "lanes.h"

#define STEPS 16  // tokens between states that are kept for backward

#define ROWS 6
enum { R, K, V, A, B, G };  // inputs with a row for every token; G is the gradient of y

// Inputs of [tokens, H N] with row strides; without `delta`, A and B are null. log_decay [tokens, H N] float32.
typedef struct {
    const char *rows[ROWS];
    int64_t ld[ROWS], w_ld, heads;
    const float *log_decay;
} Inputs;

static void *room(int64_t bytes) {
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!p) abort();
    return p;
}

// One head's rows of `count` tokens as [ROWS + 1][STEPS][N] float32; the last are decays.
INLINE void gather(const Inputs *in, int64_t from, int64_t count, int64_t head, float *x, const int N, const int half) {
    for (int j = 0; j < ROWS; j++) {
        if (!in->rows[j]) continue;
        for (int64_t t = 0; t < count; t++)
            for (int n = 0; n < N; n += W)
                store(x + (j * STEPS + t) * N, n, load(in->rows[j], (from + t) * in->ld[j] + head * N + n, half), 0);
    }
    for (int64_t t = 0; t < count; t++)
        for (int n = 0; n < N; n += W)
            store(x + (ROWS * STEPS + t) * N, n, vexp(load(in->log_decay, (from + t) * in->w_ld + head * N + n, 0)), 0);
}

// `count` tokens for the values from c on; u [STEPS][N] takes what a finds in memory, y [STEPS][N] what r reads.
INLINE void forward(const float *x, int64_t count, int64_t c, float *S, float *u, float *y, const int N, const int delta) {
    vf s[N];
    for (int i = 0; i < N; i++) s[i] = load(S, i * N + c, 0);
    vf found[4] = {};
    if (delta)
        for (int i = 0; i < N; i += 4)
            for (int j = 0; j < 4; j++) found[j] += x[A * STEPS * N + i + j] * s[i + j];
    for (int64_t t = 0; t < count; t++) {
        const float *r = x + (R * STEPS + t) * N, *k = x + (K * STEPS + t) * N, *w = x + (ROWS * STEPS + t) * N;
        const float *b = x + (B * STEPS + t) * N, *a = x + (A * STEPS + MIN(t + 1, count - 1)) * N;
        const vf v = load(x + (V * STEPS + t) * N, c, 0);
        vf out[4] = {};
        if (delta) {
            const vf known = (found[0] + found[1]) + (found[2] + found[3]);
            vf next[4] = {};
            store(u + t * N, c, known, 0);
            for (int i = 0; i < N; i += 4)
                for (int j = 0; j < 4; j++) {
                    s[i + j] = w[i + j] * s[i + j] + (b[i + j] * known + k[i + j] * v);
                    out[j] += r[i + j] * s[i + j];
                    next[j] += a[i + j] * s[i + j];
                }
            for (int j = 0; j < 4; j++) found[j] = next[j];
        } else
            for (int i = 0; i < N; i += 4)
                for (int j = 0; j < 4; j++) {
                    out[j] += r[i + j] * s[i + j];
                    s[i + j] = w[i + j] * s[i + j] + k[i + j] * v;
                }
        store(y + t * N, c, (out[0] + out[1]) + (out[2] + out[3]), 0);
    }
    for (int i = 0; i < N; i++) store(S, i * N + c, s[i], 0);
}

// Backward through `count` tokens; Ss [STEPS + 1][values][keys] are the states, g [values][keys] the gradient of the one
// after them, then of the one before; d [ROWS][STEPS][N] takes the gradients of r, k, v, a, b and, at G, of log decays.
INLINE void backward(const float *x, int64_t count, const float *u, const float *Ss, float *g, float *d, const int N,
                     const int delta) {
    const int M = N / W;
    for (int64_t t = count - 1; t >= 0; t--) {
        const float *before = Ss + t * N * N, *after = before + N * N;
        const float *row[ROWS + 1], *known = u + t * N;
        for (int j = 0; j <= ROWS; j++) row[j] = x + (j * STEPS + t) * N;
        vf dr[M], dk[M], da[M], db[M], dw[M];
        for (int m = 0; m < M; m++) dr[m] = dk[m] = da[m] = db[m] = dw[m] = splat(0);
        for (int c = 0; c < N; c += W) {
            vf dv[W], du[W];
            for (int j = 0; j < W; j++) {
                const float dy = row[G][c + j];
                float *gj = g + (c + j) * N;
                dv[j] = du[j] = splat(0);
                for (int m = 0; m < M; m++) {
                    vf here = load(gj, m * W, 0);
                    if (delta) {
                        here += load(row[R], m * W, 0) * dy;
                        store(gj, m * W, here, 0);
                        du[j] += here * load(row[B], m * W, 0);
                    }
                    dv[j] += here * load(row[K], m * W, 0);
                }
            }
            store(d + (V * STEPS + t) * N, c, sums(dv), 0);
            vf lost = splat(0);
            if (delta) lost = sums(du);
            for (int j = 0; j < W; j++) {
                const float dy = row[G][c + j], v = row[V][c + j], found = delta ? known[c + j] : 0, l = lost[j];
                const float *from = before + (c + j) * N, *to = after + (c + j) * N;
                float *gj = g + (c + j) * N;
                for (int m = 0; m < M; m++) {
                    const vf here = load(gj, m * W, 0), S = load(from, m * W, 0);
                    dr[m] += (delta ? load(to, m * W, 0) : S) * dy;
                    dk[m] += here * v;
                    dw[m] += here * S;
                    vf next = load(row[ROWS], m * W, 0) * here;
                    if (delta) {
                        db[m] += here * found;
                        da[m] += S * l;
                        next += load(row[A], m * W, 0) * l;
                    } else
                        next += load(row[R], m * W, 0) * dy;
                    store(gj, m * W, next, 0);
                }
            }
        }
        for (int m = 0; m < M; m++) {
            store(d + (R * STEPS + t) * N, m * W, dr[m], 0);
            store(d + (K * STEPS + t) * N, m * W, dk[m], 0);
            store(d + (G * STEPS + t) * N, m * W, dw[m] * load(row[ROWS], m * W, 0), 0);
            if (delta) store(d + (A * STEPS + t) * N, m * W, da[m], 0), store(d + (B * STEPS + t) * N, m * W, db[m], 0);
        }
    }
}

INLINE void turn(const float *from, float *to, const int N) {
    for (int i = 0; i < N; i += 8)
        for (int j = 0; j < N; j++)
            for (int k = 0; k < 8; k++) to[j * N + i + k] = from[(i + k) * N + j];
}

// S [sequences, H, N, N]: before, then after; kept [pieces, H, N, N] or null: the state before every STEPS tokens; u, y
// [tokens, H N], u float32 or null.
INLINE void run(const Inputs *in, const int64_t *spans, int64_t sequences, float *S, float *kept, float *u, char *y, int threads,
                const int N, const int delta, const int half) {
    const int64_t H = in->heads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t head = 0; head < H; head++) {
        float *x = room(((ROWS + 3) * STEPS * N) * sizeof(float)), *us = x + (ROWS + 1) * STEPS * N, *ys = us + STEPS * N;
        float *to = kept;
        for (int64_t i = 0; i < sequences; i++) {
            float *here = S + (i * H + head) * N * N;
            for (int64_t t = 0; t < spans[2 * i + 1]; t += STEPS) {
                const int64_t from = spans[2 * i] + t, count = MIN(STEPS, spans[2 * i + 1] - t);
                gather(in, from, count, head, x, N, half);
                if (kept) memcpy(to + head * N * N, here, N * N * sizeof(float)), to += H * N * N;
                for (int64_t c = 0; c < N; c += W) forward(x, count, c, here, us, ys, N, delta);
                for (int64_t s = 0; s < count; s++)
                    for (int n = 0; n < N; n += W) {
                        const int64_t at = (from + s) * H * N + head * N + n;
                        store(y, at, load(ys, s * N + n, 0), half);
                        if (u) store(u, at, load(us, s * N + n, 0), 0);
                    }
            }
        }
        free(x);
    }
}

// dS [sequences, H, N, N]: the gradient of the states after, then before. d: as Inputs' rows, of [tokens, H N], those of log
// decays, float32, at G.
INLINE void run_backward(const Inputs *in, const int64_t *spans, int64_t sequences, const float *kept, const float *u, float *dS,
                         char *const *d, int threads, const int N, const int delta, const int half) {
    const int64_t H = in->heads;
    int64_t pieces = 0;
    for (int64_t i = 0; i < sequences; i++) pieces += (spans[2 * i + 1] + STEPS - 1) / STEPS;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t head = 0; head < H; head++) {
        float *x = room(((2 * ROWS + 2) * STEPS * N + (STEPS + 2) * N * N) * sizeof(float));
        float *us = x + (ROWS + 1) * STEPS * N, *out = us + STEPS * N, *g = out + ROWS * STEPS * N, *Ss = g + N * N;
        const float *first = kept + pieces * H * N * N;
        for (int64_t i = sequences - 1; i >= 0; i--) {
            turn(dS + (i * H + head) * N * N, g, N);
            for (int64_t t = (spans[2 * i + 1] - 1) / STEPS * STEPS; t >= 0 && spans[2 * i + 1]; t -= STEPS) {
                const int64_t from = spans[2 * i] + t, count = MIN(STEPS, spans[2 * i + 1] - t);
                gather(in, from, count, head, x, N, half);
                if (delta)
                    for (int64_t s = 0; s < count; s++) memcpy(us + s * N, u + ((from + s) * H + head) * N, N * sizeof(float));
                first -= H * N * N;
                turn(first + head * N * N, Ss, N);
                for (int64_t s = 0; s < count - !delta; s++)
                    for (int c = 0; c < N; c++)
                        for (int n = 0; n < N; n += W) {
                            vf next = load(x + (ROWS * STEPS + s) * N, n, 0) * load(Ss + (s * N + c) * N, n, 0) +
                                      load(x + (K * STEPS + s) * N, n, 0) * x[(V * STEPS + s) * N + c];
                            if (delta) next += load(x + (B * STEPS + s) * N, n, 0) * us[s * N + c];
                            store(Ss + ((s + 1) * N + c) * N, n, next, 0);
                        }
                backward(x, count, us, Ss, g, out, N, delta);
                for (int j = 0; j < ROWS; j++)
                    for (int64_t s = 0; d[j] && s < count; s++)
                        for (int n = 0; n < N; n += W)
                            store(d[j], (from + s) * H * N + head * N + n, load(out + (j * STEPS + s) * N, n, 0), j != G && half);
            }
            turn(g, dS + (i * H + head) * N * N, N);
        }
        free(x);
    }
}

// rows: r, k, v, a, b and the gradient of y (null where there is none), with their strides.
#define EXPORT(NAME, HALF)                                                                                                     \
    void delta_##NAME(const char *const *rows, const int64_t *ld, const float *log_decay, const int64_t *spans,                \
                      int64_t sequences, int64_t heads, int64_t N, float *S, float *kept, float *u, char *y, int threads) {    \
        Inputs in = {.w_ld = ld[ROWS], .heads = heads, .log_decay = log_decay};                                                \
        for (int j = 0; j < ROWS; j++) in.rows[j] = rows[j], in.ld[j] = ld[j];                                                 \
        if (N == 64 && rows[A])                                                                                                \
            run(&in, spans, sequences, S, kept, u, y, threads, 64, 1, HALF);                                                   \
        else if (N == 64)                                                                                                      \
            run(&in, spans, sequences, S, kept, 0, y, threads, 64, 0, HALF);                                                   \
        else if (rows[A])                                                                                                      \
            run(&in, spans, sequences, S, kept, u, y, threads, (int)N, 1, HALF);                                               \
        else                                                                                                                   \
            run(&in, spans, sequences, S, kept, 0, y, threads, (int)N, 0, HALF);                                               \
    }                                                                                                                          \
    void delta_backward_##NAME(const char *const *rows, const int64_t *ld, const float *log_decay, const int64_t *spans,       \
                               int64_t sequences, int64_t heads, int64_t N, const float *kept, const float *u, float *dS,      \
                               char *const *d, int threads) {                                                                  \
        Inputs in = {.w_ld = ld[ROWS], .heads = heads, .log_decay = log_decay};                                                \
        for (int j = 0; j < ROWS; j++) in.rows[j] = rows[j], in.ld[j] = ld[j];                                                 \
        if (N == 64 && rows[A])                                                                                                \
            run_backward(&in, spans, sequences, kept, u, dS, d, threads, 64, 1, HALF);                                         \
        else if (N == 64)                                                                                                      \
            run_backward(&in, spans, sequences, kept, u, dS, d, threads, 64, 0, HALF);                                         \
        else if (rows[A])                                                                                                      \
            run_backward(&in, spans, sequences, kept, u, dS, d, threads, (int)N, 1, HALF);                                     \
        else                                                                                                                   \
            run_backward(&in, spans, sequences, kept, u, dS, d, threads, (int)N, 0, HALF);                                     \
    }

EXPORT(f32, 0)
EXPORT(bf16, 1)
