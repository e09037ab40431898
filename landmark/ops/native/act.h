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
