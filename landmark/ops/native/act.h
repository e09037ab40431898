// Activation functions, as landmark.ops.activation lists them.
#pragma once
#include "rows.h"

enum { RELU, RELU2, GELU, GELU_TANH, GELU_QUICK, SILU, SIGMOID, TANH, IDENTITY };

INLINE vf activated(vf x, const int kind) {
    const vf low = select_(x < 0, splat(0), x);
    switch (kind) {
        case RELU: return low;
        case RELU2: return low * low;
        case GELU: return x * vphi(x);
        case GELU_TANH: return x * vsigmoid(x * (1.5957691216f + x * x * 0.0713548163f));
        case GELU_QUICK: return x * vsigmoid(1.702f * x);
        case SILU: return x * vsigmoid(x);
        case SIGMOID: return vsigmoid(x);
        case TANH: return vtanh(x);
        default: return x;
    }
}

// log(1 + e^x) = max(x, 0) + 2 atanh(u / (2 + u)) with u = e^-|x|
INLINE vf vsoftplus(vf x) {
    const vf u = vexp(-vmax(x, -x)), s = u / (2.0f + u), q = s * s;
    vf p = q * (1 / 13.0f) + 1 / 11.0f;
    p = p * q + 1 / 9.0f;
    p = p * q + 1 / 7.0f;
    p = p * q + 1 / 5.0f;
    p = p * q + 1 / 3.0f;
    return vmax(x, splat(0)) + 2.0f * s * (p * q + 1.0f);
}

// act(gate) up, or act(gate), of n elements from the i-th.
INLINE void activate(const char *gate, const char *up, char *y, int64_t i, int64_t n, const int kind, const int half) {
    for (int64_t j = i; j < i + n; j += W) {
        const vf a = activated(take(gate, j, i + n, half), kind);
        give(y, j, i + n, up ? a * take(up, j, i + n, half) : a, half);
    }
}

INLINE void activate_any(const char *gate, const char *up, char *y, int64_t i, int64_t n, int64_t kind, const int half) {
    switch (kind) {
        case RELU: activate(gate, up, y, i, n, RELU, half); break;
        case RELU2: activate(gate, up, y, i, n, RELU2, half); break;
        case GELU: activate(gate, up, y, i, n, GELU, half); break;
        case GELU_TANH: activate(gate, up, y, i, n, GELU_TANH, half); break;
        case GELU_QUICK: activate(gate, up, y, i, n, GELU_QUICK, half); break;
        case SILU: activate(gate, up, y, i, n, SILU, half); break;
        case SIGMOID: activate(gate, up, y, i, n, SIGMOID, half); break;
        case TANH: activate(gate, up, y, i, n, TANH, half); break;
        default: activate(gate, up, y, i, n, IDENTITY, half);
    }
}
