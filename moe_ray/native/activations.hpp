// Norms and activation functions.

#pragma once

#include "model.hpp"
#include "vectors.hpp"

namespace {

inline void rms_norm(const float* x, const float* weight, int64_t width, float eps, float* y) {
    vec squares = {};
    int64_t i = 0;
    for (; i + W <= width; i += W) squares += load<vec>(x + i) * load<vec>(x + i);
    float total = sum(squares);
    for (; i < width; ++i) total += x[i] * x[i];
    float factor = 1 / std::sqrt(total / width + eps);
    for (i = 0; i < width; ++i) y[i] = x[i] * factor * weight[i];
}

inline float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

inline vec sigmoid(vec x) {
    vec e = exp_negative(-absolute(x)), positive = 1.0f / (1.0f + e);
    return x < 0 ? e * positive : positive;
}

inline vec gelu(vec x) {
    for (int i = 0; i < W; ++i) x[i] = 0.5f * x[i] * (1 + std::erf(x[i] * 0.70710678f));
    return x;
}

inline vec at_least(vec x, float low) { return x < low ? fill(low) : x; }
inline vec at_most(vec x, float high) { return x > high ? fill(high) : x; }

inline bool is_gated(const Model& m) { return m.activation <= GEGLU; }

// Of the gate and what it lets through; without a gate, of `x` alone.
inline vec activate(const Model& m, vec x, vec up) {
    switch (m.activation) {
        case SWIGLU: return x * sigmoid(x) * up;
        case SWIGLUOAI: {
            vec gate = at_most(x, m.swiglu_limit);
            return gate * sigmoid(m.swiglu_alpha * gate) * (at_most(at_least(up, -m.swiglu_limit), m.swiglu_limit) + 1.0f);
        }
        case GEGLU: return gelu(x) * up;
        case GELU: return gelu(x);
        case RELU: return at_least(x, 0);
        default: return at_least(x, 0) * at_least(x, 0);
    }
}

inline void softmax(float* x, int64_t count) {
    float most = *std::max_element(x, x + count), total = 0;
    for (int64_t i = 0; i < count; ++i) total += x[i] = std::exp(x[i] - most);
    for (int64_t i = 0; i < count; ++i) x[i] /= total;
}

}  // namespace
