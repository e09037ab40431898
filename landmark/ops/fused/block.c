// RMSNorm, gated activations and rotary embedding, forward and backward, each one pass over memory.
#include <stdlib.h>
#include "norm.h"
#include "turn.h"

#define PARALLEL() _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")

// scale[j] = offset + weight[j], or 1 without weight.
static float *scales(const void *weight, int weight_half, float offset, int64_t n) {
    float *s = malloc(n * sizeof(float));
    if (!s) abort();
    for (int64_t j = 0; j < n; j++) s[j] = weight ? offset + get(weight, j, weight_half) : 1;
    return s;
}

// x [rows, groups, n] -> y, and rstd [rows, groups]: y = x rstd scale, rstd = 1 / sqrt(mean(x^2) + eps).
INLINE void rms_norm(const void *x, const void *weight, int weight_half, void *y, float *rstd, int64_t rows, int64_t groups,
                     int64_t n, float eps, float offset, int threads, const int half) {
    PARALLEL()
    for (int64_t r = 0; r < rows * groups; r++) {
        const void *w = !weight ? 0 : (const char *)weight + r % groups * n * (weight_half ? 2 : 4);
        rstd[r] = rms_norm_row(AT(x, r * n), w, weight_half, AT(y, r * n), n, eps, offset, half);
    }
}

// With u = x rstd and h = g scale: grad_x = rstd (h - u mean(h u)), grad_weight = sum over rows of g u (if not null).
INLINE void rms_norm_backward(const void *x, const void *weight, int weight_half, const float *rstd, const void *g, void *grad_x,
                              float *grad_weight, int64_t rows, int64_t groups, int64_t n, float offset, int threads,
                              const int half) {
    const int64_t width = groups * n;
    float *scale = scales(weight, weight_half, offset, width), *parts = grad_weight ? calloc(threads * width, sizeof(float)) : 0;
    if (grad_weight && !parts) abort();
    PARALLEL()
    for (int t = 0; t < threads; t++) {
        float *part = parts ? parts + t * width : 0;
        for (int64_t r = rows * t / threads * groups; r < rows * (t + 1) / threads * groups; r++) {
            const void *xr = AT(x, r * n), *gr = AT(g, r * n);
            const float *sr = scale + r % groups * n, k = rstd[r];
            vf a = splat(0);
            for (int64_t i = 0; i < n; i += W) a += take(gr, i, n, half) * take(sr, i, n, 0) * take(xr, i, n, half);
            const float mean = sum(a) * k / (float)n;
            for (int64_t i = 0; i < n; i += W) {
                vf u = take(xr, i, n, half) * k, v = take(gr, i, n, half);
                give(AT(grad_x, r * n), i, n, k * (v * take(sr, i, n, 0) - u * mean), half);
                if (part) {
                    float *w = part + r % groups * n;
                    give(w, i, n, take(w, i, n, 0) + v * u, 0);
                }
            }
        }
    }
    if (parts)
        for (int64_t j = 0; j < width; j++) {
            grad_weight[j] = 0;
            for (int t = 0; t < threads; t++) grad_weight[j] += parts[t * width + j];
        }
    free(parts);
    free(scale);
}

enum { RELU, RELU2, GELU, GELU_TANH, GELU_QUICK, SILU, SIGMOID, TANH, IDENTITY };  // as landmark.ops.activation lists them

// act(x), and its derivative.
INLINE vf act(vf x, vf *slope, const int kind) {
    const vf zero = splat(0), one = splat(1);
    vf s, u;
    switch (kind) {
        case RELU: *slope = select_(x > 0, one, zero); return select_(x < 0, zero, x);
        case RELU2: u = select_(x < 0, zero, x); *slope = 2 * u; return u * u;
        case GELU: s = vphi(x); *slope = s + x * vexp(-0.5f * x * x) * 0.3989422804f; return x * s;
        case GELU_TANH:
            u = x * x * 0.0713548163f;
            s = vsigmoid(x * (1.5957691216f + u));
            *slope = s + x * s * (1 - s) * (1.5957691216f + 3 * u);
            return x * s;
        case GELU_QUICK: s = vsigmoid(1.702f * x); *slope = s + 1.702f * x * s * (1 - s); return x * s;
        case SILU: s = vsigmoid(x); *slope = s * (1 + x * (1 - s)); return x * s;
        case SIGMOID: s = vsigmoid(x); *slope = s * (1 - s); return s;
        case TANH: s = vtanh(x); *slope = 1 - s * s; return s;
        default: *slope = one; return x;
    }
}

// gate, up [rows, n] with row strides -> y = act(gate) up, contiguous; y = act(gate) where up is null.
INLINE void glu(const void *gate, const void *up, void *y, int64_t rows, int64_t n, int64_t gate_ld, int64_t up_ld, int threads,
                const int half, const int kind) {
    PARALLEL()
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i += W) {
            vf slope, a = act(take(AT(gate, r * gate_ld), i, n, half), &slope, kind);
            give(AT(y, r * n), i, n, up ? a * take(AT(up, r * up_ld), i, n, half) : a, half);
        }
}

INLINE void glu_backward(const void *gate, const void *up, const void *g, void *grad_gate, void *grad_up, int64_t rows, int64_t n,
                         int64_t gate_ld, int64_t up_ld, int threads, const int half, const int kind) {
    PARALLEL()
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i += W) {
            vf slope, a = act(take(AT(gate, r * gate_ld), i, n, half), &slope, kind), d = take(AT(g, r * n), i, n, half);
            give(AT(grad_gate, r * n), i, n, (up ? d * take(AT(up, r * up_ld), i, n, half) : d) * slope, half);
            if (up) give(AT(grad_up, r * n), i, n, d * a, half);
        }
}

// x [B, T, H, D] with strides; cos, sin [B or 1, T, R] float32; y contiguous. `sign` is -1 for the inverse rotation.
INLINE void rotary(const void *x, const float *cos, const float *sin, void *y, int64_t B, int64_t T, int64_t H, int64_t D,
                   int64_t R, int64_t xb, int64_t xt, int64_t xh, int64_t cb, float sign, int interleaved, int threads,
                   const int half) {
    PARALLEL()
    for (int64_t bt = 0; bt < B * T; bt++) {
        const float *c = cos + bt / T * cb + bt % T * R, *s = sin + bt / T * cb + bt % T * R;
        const char *from = AT(x, bt / T * xb + bt % T * xt);
        char *to = AT(y, bt * H * D);
        turn(from, to, c, s, H, xh, D, R, sign, interleaved, half);
    }
}

#define EACH_KIND(CALL)                                                                                                \
    switch (kind) {                                                                                                    \
        case RELU: CALL(RELU); break;                                                                                  \
        case RELU2: CALL(RELU2); break;                                                                                \
        case GELU: CALL(GELU); break;                                                                                  \
        case GELU_TANH: CALL(GELU_TANH); break;                                                                        \
        case GELU_QUICK: CALL(GELU_QUICK); break;                                                                      \
        case SILU: CALL(SILU); break;                                                                                  \
        case SIGMOID: CALL(SIGMOID); break;                                                                            \
        case TANH: CALL(TANH); break;                                                                                  \
        default: CALL(IDENTITY);                                                                                       \
    }

#define EXPORT(TYPE, HALF)                                                                                             \
    void rms_norm_##TYPE(const void *x, const void *weight, int weight_half, void *y, float *rstd, int64_t rows,       \
                         int64_t groups, int64_t n, float eps, float offset, int threads) {                            \
        rms_norm(x, weight, weight_half, y, rstd, rows, groups, n, eps, offset, threads, HALF);                        \
    }                                                                                                                  \
    void rms_norm_backward_##TYPE(const void *x, const void *weight, int weight_half, const float *rstd,               \
                                  const void *g, void *grad_x, float *grad_weight, int64_t rows, int64_t groups,       \
                                  int64_t n, float offset, int threads) {                                              \
        rms_norm_backward(x, weight, weight_half, rstd, g, grad_x, grad_weight, rows, groups, n, offset, threads, HALF); \
    }                                                                                                                  \
    void glu_##TYPE(const void *gate, const void *up, void *y, int64_t rows, int64_t n, int64_t gate_ld,               \
                    int64_t up_ld, int kind, int threads) {                                                            \
        EACH_KIND(GLU_##TYPE)                                                                                          \
    }                                                                                                                  \
    void glu_backward_##TYPE(const void *gate, const void *up, const void *g, void *grad_gate, void *grad_up,          \
                             int64_t rows, int64_t n, int64_t gate_ld, int64_t up_ld, int kind, int threads) {         \
        EACH_KIND(GLU_BACKWARD_##TYPE)                                                                                 \
    }                                                                                                                  \
    void rotary_##TYPE(const void *x, const float *cos, const float *sin, void *y, int64_t B, int64_t T, int64_t H,    \
                       int64_t D, int64_t R, int64_t xb, int64_t xt, int64_t xh, int64_t cb, float sign,               \
                       int interleaved, int threads) {                                                                 \
        rotary(x, cos, sin, y, B, T, H, D, R, xb, xt, xh, cb, sign, interleaved, threads, HALF);                       \
    }

#define GLU_f32(KIND) glu(gate, up, y, rows, n, gate_ld, up_ld, threads, 0, KIND)
#define GLU_bf16(KIND) glu(gate, up, y, rows, n, gate_ld, up_ld, threads, 1, KIND)
#define GLU_BACKWARD_f32(KIND) glu_backward(gate, up, g, grad_gate, grad_up, rows, n, gate_ld, up_ld, threads, 0, KIND)
#define GLU_BACKWARD_bf16(KIND) glu_backward(gate, up, g, grad_gate, grad_up, rows, n, gate_ld, up_ld, threads, 1, KIND)

EXPORT(f32, 0)
EXPORT(bf16, 1)
