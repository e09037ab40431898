// Activation functions, as landmark.ops.activation lists them.
#pragma once
#include "vector.h"

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
