// Mamba's selective scan and its gradient. Lanes are channels; a block of W channels keeps its N states in registers.
#include <stdlib.h>
#include "act.h"

#define AT(p, i) ((char *)(p) + (i) * (half ? 2 : 4))
#define STEPS 32  // tokens between states that are kept for backward
#define PARTS 16  // of the channels: sums over channels are taken part by part, whatever the number of threads

INLINE vf take(const void *p, int64_t n, const int half) { return n >= W ? load(p, 0, half) : load_n(p, 0, n, 0, half); }
INLINE void give(void *p, int64_t n, vf x, const int half) {
    if (n >= W)
        store(p, 0, x, half);
    else
        store_n(p, 0, n, x, half);
}

// Inputs of [tokens, channels] (z may be null) and [tokens, N], each with a row stride; A [N, channels], D [channels].
typedef struct {
    const char *x, *delta, *z, *B, *C;
    const float *A, *D;
    int64_t x_ld, delta_ld, z_ld, B_ld, C_ld, channels;
} Inputs;

// B and C of some tokens as [tokens][2 N] float32.
INLINE void gather(const Inputs *in, int64_t from, int64_t count, float *bc, const int N, const int half) {
    for (int64_t t = 0; t < count; t++)
        for (int n = 0; n < N; n++) {
            bc[t * 2 * N + n] = get(in->B, (from + t) * in->B_ld + n, half);
            bc[t * 2 * N + N + n] = get(in->C, (from + t) * in->C_ld + n, half);
        }
}

// `count` tokens of the channels from c on; h [N, channels] goes on.
INLINE void forward(const Inputs *in, int64_t from, int64_t count, int64_t c, const float *bc, float *h_, char *y, const int N,
                    const int half) {
    const int64_t lanes = MIN(W, in->channels - c);
    const vf D = take(in->D + c, lanes, 0);
    vf A[N], h[N];
    for (int n = 0; n < N; n++) A[n] = take(in->A + n * in->channels + c, lanes, 0), h[n] = take(h_ + n * in->channels + c, lanes, 0);
    for (int64_t t = 0; t < count; t++, bc += 2 * N) {
        const vf d = vsoftplus(take(AT(in->delta, (from + t) * in->delta_ld + c), lanes, half));
        const vf x = take(AT(in->x, (from + t) * in->x_ld + c), lanes, half), u = d * x;
        vf sum_ = D * x;
        for (int n = 0; n < N; n++) {
            h[n] = vexp(d * A[n]) * h[n] + bc[n] * u;
            sum_ += bc[N + n] * h[n];
        }
        if (in->z) {
            const vf z = take(AT(in->z, (from + t) * in->z_ld + c), lanes, half);
            sum_ *= z * vsigmoid(z);
        }
        give(AT(y, (from + t) * in->channels + c), lanes, sum_, half);
    }
    for (int n = 0; n < N; n++) give(h_ + n * in->channels + c, lanes, h[n], 0);
}

typedef struct {
    char *x, *delta, *z;  // [tokens, channels]
    float *A, *D;         // [N, channels], [channels]
} Grads;

// Backward through `count` tokens, whose first state is h0 [N, channels]; g [N, channels] is the gradient of the state after
// them, then of the one before. hs, es: room for (STEPS + 1) N and STEPS N vectors; sums [count][2 N] over blocks of channels.
INLINE void backward(const Inputs *in, const Grads *out, const char *dy_, int64_t from, int64_t count, int64_t c, const float *bc_,
                     const float *h0, float *g_, vf *hs, vf *es, vf *sums, const int N, const int half) {
    const int64_t lanes = MIN(W, in->channels - c), C = in->channels;
    const vf D = take(in->D + c, lanes, 0);
    vf A[N], g[N], dA[N], steps[STEPS], ys[STEPS], dD = take(out->D + c, lanes, 0);
    for (int n = 0; n < N; n++) A[n] = take(in->A + n * C + c, lanes, 0), hs[n] = take(h0 + n * C + c, lanes, 0);
    for (int64_t t = 0; t < count; t++) {
        const float *bc = bc_ + t * 2 * N;
        const vf d = vsoftplus(take(AT(in->delta, (from + t) * in->delta_ld + c), lanes, half));
        const vf x = take(AT(in->x, (from + t) * in->x_ld + c), lanes, half), u = d * x;
        vf sum_ = D * x, *h = hs + t * N, *e = es + t * N;
        for (int n = 0; n < N; n++) {
            e[n] = vexp(d * A[n]);
            h[N + n] = e[n] * h[n] + bc[n] * u;
            sum_ += bc[N + n] * h[N + n];
        }
        steps[t] = d, ys[t] = sum_;
    }
    for (int n = 0; n < N; n++) g[n] = take(g_ + n * C + c, lanes, 0), dA[n] = take(out->A + n * C + c, lanes, 0);
    for (int64_t t = count - 1; t >= 0; t--) {
        const float *bc = bc_ + t * 2 * N;
        const vf *h = hs + t * N, *e = es + t * N;
        vf *sum_ = sums + t * 2 * N, dy = take(AT(dy_, (from + t) * C + c), lanes, half);
        if (in->z) {
            const vf z = take(AT(in->z, (from + t) * in->z_ld + c), lanes, half), s = vsigmoid(z);
            give(AT(out->z, (from + t) * C + c), lanes, dy * ys[t] * s * (1.0f + z * (1.0f - s)), half);
            dy *= z * s;
        }
        const vf x = take(AT(in->x, (from + t) * in->x_ld + c), lanes, half), d = steps[t], u = d * x;
        vf du = splat(0), dd = splat(0);
        for (int n = 0; n < N; n++) {
            const vf gn = g[n] + bc[N + n] * dy;
            sum_[n] += gn * u;
            sum_[N + n] += dy * h[N + n];
            du += bc[n] * gn;
            g[n] = gn * e[n];
            const vf w = g[n] * h[n];
            dd += w * A[n];
            dA[n] += w * d;
        }
        dD += dy * x;
        dd += du * x;
        const vf s = vsigmoid(take(AT(in->delta, (from + t) * in->delta_ld + c), lanes, half));
        give(AT(out->delta, (from + t) * C + c), lanes, dd * s, half);
        give(AT(out->x, (from + t) * C + c), lanes, du * d + dy * D, half);
    }
    for (int n = 0; n < N; n++) give(g_ + n * C + c, lanes, g[n], 0), give(out->A + n * C + c, lanes, dA[n], 0);
    give(out->D + c, lanes, dD, 0);
}

static void *room(int64_t bytes) {
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!p) abort();
    return p;
}

INLINE int64_t parts(int64_t blocks) { return MIN(PARTS, blocks); }

// h [sequences, N, channels]: before, then after; kept [chunks, N, channels], or null: the state before every STEPS tokens.
INLINE void scan(const Inputs *in, const int64_t *spans, int64_t sequences, int64_t N, float *h, float *kept, char *y, int threads,
                 const int half) {
    const int64_t C = in->channels, blocks = (C + W - 1) / W, P = parts(blocks);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < P; p++) {
        float *bc = room(STEPS * 2 * N * sizeof(float)), *to = kept;
        const int64_t first = blocks * p / P, end = blocks * (p + 1) / P, wide = MIN(end * W, C) - first * W;
        for (int64_t i = 0; i < sequences; i++) {
            float *hi = h + i * N * C;
            for (int64_t t = 0; t < spans[2 * i + 1]; t += STEPS, to += N * C) {
                const int64_t from = spans[2 * i] + t, count = MIN(STEPS, spans[2 * i + 1] - t);
                gather(in, from, count, bc, (int)N, half);
                if (kept)
                    for (int64_t n = 0; n < N; n++) memcpy(to + n * C + first * W, hi + n * C + first * W, wide * sizeof(float));
                for (int64_t b = first; b < end; b++)
                    if (N == 16)
                        forward(in, from, count, b * W, bc, hi, y, 16, half);
                    else
                        forward(in, from, count, b * W, bc, hi, y, (int)N, half);
            }
        }
        free(bc);
    }
}

// g [sequences, N, channels]: the gradient of the states after, then before; dBC [parts, tokens, 2 N].
INLINE void scan_backward(const Inputs *in, const Grads *out, const int64_t *spans, int64_t sequences, int64_t tokens, int64_t N,
                          const float *kept, const char *dy, float *g, float *dBC, int threads, const int half) {
    const int64_t C = in->channels, blocks = (C + W - 1) / W, P = parts(blocks);
    int64_t chunks = 0;
    for (int64_t i = 0; i < sequences; i++) chunks += (spans[2 * i + 1] + STEPS - 1) / STEPS;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < P; p++) {
        float *bc = room(STEPS * 2 * N * sizeof(float));
        vf *hs = room((4 * STEPS + 1) * N * sizeof(vf)), *es = hs + (STEPS + 1) * N, *sums = es + STEPS * N;
        const float *h0 = kept + chunks * N * C;
        for (int64_t i = sequences - 1; i >= 0; i--)
            for (int64_t t = (spans[2 * i + 1] - 1) / STEPS * STEPS; t >= 0 && spans[2 * i + 1]; t -= STEPS) {
                const int64_t from = spans[2 * i] + t, count = MIN(STEPS, spans[2 * i + 1] - t);
                h0 -= N * C;
                gather(in, from, count, bc, (int)N, half);
                memset(sums, 0, count * 2 * N * sizeof(vf));
                for (int64_t b = blocks * p / P; b < blocks * (p + 1) / P; b++)
                    if (N == 16)
                        backward(in, out, dy, from, count, b * W, bc, h0, g + i * N * C, hs, es, sums, 16, half);
                    else
                        backward(in, out, dy, from, count, b * W, bc, h0, g + i * N * C, hs, es, sums, (int)N, half);
                float *to = dBC + (p * tokens + from) * 2 * N;
                for (int64_t k = 0; k < count * 2 * N; k++) to[k] = sum(sums[k]);
            }
        free(hs);
        free(bc);
    }
}

#define EXPORT(NAME, HALF)                                                                                                     \
    void scan_##NAME(const char *x, const char *delta, const char *z, const char *B, const char *C, const float *A,            \
                     const float *D, const int64_t *strides, const int64_t *spans, int64_t sequences, int64_t channels,        \
                     int64_t N, float *h, float *kept, char *y, int threads) {                                                 \
        const Inputs in = {x, delta, z, B, C, A, D, strides[0], strides[1], strides[2], strides[3], strides[4], channels};     \
        scan(&in, spans, sequences, N, h, kept, y, threads, HALF);                                                             \
    }                                                                                                                          \
    void scan_backward_##NAME(const char *x, const char *delta, const char *z, const char *B, const char *C, const float *A,   \
                              const float *D, const int64_t *strides, const int64_t *spans, int64_t sequences,                 \
                              int64_t channels, int64_t N, int64_t tokens, const float *kept, const char *dy, char *dx,        \
                              char *ddelta, char *dz, float *dA, float *dD, float *g, float *dBC, int threads) {               \
        const Inputs in = {x, delta, z, B, C, A, D, strides[0], strides[1], strides[2], strides[3], strides[4], channels};     \
        const Grads out = {dx, ddelta, dz, dA, dD};                                                                            \
        scan_backward(&in, &out, spans, sequences, tokens, N, kept, dy, g, dBC, threads, HALF);                                \
    }

EXPORT(f32, 0)
EXPORT(bf16, 1)
