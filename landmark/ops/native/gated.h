// Activation functions of rows, alone or times others.
#pragma once
#include "act.h"
#include "rows.h"

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
