// What Python hands over; the structures of native_runner.py and matrix.py are the same, field by field.
//
// Shapes: T tokens of the pass, S spans, C head dim, P tokens of a cache block, h key/value heads, R rows of the tables.

#pragma once

#include <cstdint>

extern "C" {

enum Type : int32_t { FLOAT32, BFLOAT16, INT8, INT4 };

// Row-major [rows, columns]; absent if `data` is null. INT8 has a float32 scale for each row. INT4 has, for each 32
// columns, 16 bytes (the first 16 columns in their low halves) and a bfloat16 pair: value = scale * code + low.
struct Matrix {
    const void* data;
    const void* scales;
    int64_t rows, columns;
    int32_t type;
};

enum Activation : int32_t { SWIGLU, SWIGLUOAI, GEGLU, GELU, RELU, RELU2 };

// Vectors are float32 and may be absent, but for the norms.
struct Layer {
    const float *attention_norm, *ffn_norm;
    Matrix wq, wk, wv, wo;
    const float *bq, *bk, *bv, *bo, *q_norm, *k_norm, *sinks;
    void *keys, *values;  // [blocks, h, P, C]
    int64_t window;       // 0: none
    Matrix router;        // absent in a dense layer
    const float *router_bias, *expert_bias;
    const Matrix *w_in, *w_out;  // of each expert
    const float *b_in, *b_out;
    Matrix dense_in, dense_out;  // of a dense layer or the shared experts
    const float* shared_gate;
};

struct Model {
    const Layer* layers;
    Matrix embed;
    const float* norm;
    int64_t num_layers, dim, heads, kv_heads, head_dim, block_tokens;
    int64_t num_experts, top_k, expert_dim, num_groups, num_limited_groups;
    float norm_eps, softmax_scale, clip_qkv, swiglu_alpha, swiglu_limit, route_scale;
    int32_t cache_type, norm_heads, norm_all_heads, activation, sigmoid, softmax_after_top_k, route_norm;
    // Brings the experts of `count` ids into memory and points the matrices of the layer to them; 0: done. Absent if
    // all of them are there.
    int32_t (*acquire)(int64_t layer, const int32_t* ids, int64_t count);
};

// Consecutive tokens of the sequence of a row, those from a position on.
struct Span {
    int64_t row, first, count;
};

// Tokens of spans, one after another, as moe_ray/serving/engine/layout.py has them.
struct Pass {
    const int64_t* tokens;         // [T]
    const Span* spans;             // [S]
    const int32_t* tables;         // [R, table_width]: blocks of each sequence in order
    const float *cosines, *sines;  // [positions, C]
    int64_t num_tokens, num_spans, table_width;
};
}
