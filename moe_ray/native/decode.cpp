// One forward pass of a Mixture-of-Experts transformer, on a CPU.
//
// Weights are read where they lie and as they are stored; all sums are float32. With few tokens the time goes to reading:
// rows are multiplied as they come, four at a time with up to six tokens. For many tokens that share a weight, rows are
// transposed and unpacked into panels that stay in the cache. Vectors are the compiler's portable ones, which become whatever the processor has.
//
// Shapes: T tokens of the pass, N rows and D columns of a weight, D model dim, H query heads, h key/value heads,
// g = H / h, C head dim, P tokens of a cache block, E experts, K experts a token, F expert hidden dim, G = 2 * F where
// gated, else F; V vocabulary.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int W = 16;
constexpr int AHEAD = 2;  // tiles of rows that are prefetched
constexpr int64_t MANY = 16;  // tokens for which weights are transposed
using vec = float __attribute__((vector_size(4 * W)));
using i32 = int32_t __attribute__((vector_size(4 * W)));
using u32 = uint32_t __attribute__((vector_size(4 * W)));
using u16 = uint16_t __attribute__((vector_size(2 * W)));
using i8 = int8_t __attribute__((vector_size(W)));
using u8 = uint8_t __attribute__((vector_size(W)));

template <class V, class S> inline V load(const S* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// Loads that cross lines of the cache take twice as long.
template <class T> struct Aligned : std::allocator<T> {
    template <class U> struct rebind { using other = Aligned<U>; };
    T* allocate(size_t count) { return (T*)::operator new(count * sizeof(T), std::align_val_t(64)); }
    void deallocate(T* memory, size_t) { ::operator delete(memory, std::align_val_t(64)); }
};
template <class T> using Buffer = std::vector<T, Aligned<T>>;

inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof value); }

// The sums of up to 16 vectors, that of v[i] in lane i. A fold halves their number: of two it keeps, in the lanes whose
// number has the bit and in those without it, what each of them sums to.
template <int bit, int... lane> inline vec fold(vec a, vec b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b, (lane & bit ? W + lane : lane)...) +
           __builtin_shufflevector(a, b, (lane & bit ? W + (lane ^ bit) : lane ^ bit)...);
}

template <int count, int bit = 1> inline vec sums(vec* v) {
    if constexpr (bit == W) return v[0];
    else {
        for (int i = 0; i < count; i += 2)
            v[i / 2] = fold<bit>(v[i], v[std::min(i + 1, count - 1)], std::make_integer_sequence<int, W>());
        return sums<(count + 1) / 2, 2 * bit>(v);
    }
}

inline float sum(vec value) { return sums<1>(&value)[0]; }

inline float from_bf16(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 0x40;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e^x to 1e-7 relative for x <= 0, where it falls to 0 below -87; the polynomial is that of Cephes' expf.
inline vec exp_negative(vec x) {
    vec low = vec{} - 87.33f;
    x = x < low ? low : x;
    i32 n = __builtin_convertvector(x * 1.44269504f - 0.5f, i32);
    vec whole = __builtin_convertvector(n, vec);
    vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
             1.6666665459e-1f) * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((n + 127) << 23);
}

}  // namespace

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

// Spans of tokens, each of one sequence, as moe_ray/serving/engine/layout.py has them.
struct Pass {
    const int64_t *tokens, *positions, *slots;
    const int32_t *counts, *tables;
    const float *cosines, *sines;  // [T, C]
    int64_t num_tokens, num_spans, table_width;
};
}

namespace {

inline float wide(float value) { return value; }
inline float wide(uint16_t bits) { return from_bf16(bits); }

// What a type of weight gives: STEP neighbouring columns of a row, one column, a factor of the whole row, and how
// they are multiplied with inputs.
struct TimesFloat32 {
    using Input = float;
    using Values = vec;
    static constexpr int64_t STEP = W;
    static vec add(vec sums, vec weights, vec values) { return sums + weights * values; }
    static vec spread(const float* x, int64_t i) { return vec{} + x[i]; }
};

struct Float32 : TimesFloat32 {
    const float* data;
    int64_t columns;
    explicit Float32(const Matrix& m) : data((const float*)m.data), columns(m.columns) {}
    const void* address(int64_t row, int64_t column) const { return data + row * columns + column; }
    vec at(int64_t row, int64_t column) const { return load<vec>(data + row * columns + column); }
    float one(int64_t row, int64_t column) const { return data[row * columns + column]; }
    float factor(int64_t) const { return 1; }
};

struct Bfloat16 : TimesFloat32 {
    const uint16_t* data;
    int64_t columns;
    explicit Bfloat16(const Matrix& m) : data((const uint16_t*)m.data), columns(m.columns) {}
    const void* address(int64_t row, int64_t column) const { return data + row * columns + column; }
    vec at(int64_t row, int64_t column) const {
        return (vec)(__builtin_convertvector(load<u16>(data + row * columns + column), u32) << 16);
    }
    float one(int64_t row, int64_t column) const { return from_bf16(data[row * columns + column]); }
    float factor(int64_t) const { return 1; }
};

struct Int8 : TimesFloat32 {
    const int8_t* data;
    const float* scales;
    int64_t columns;
    explicit Int8(const Matrix& m) : data((const int8_t*)m.data), scales((const float*)m.scales), columns(m.columns) {}
    const void* address(int64_t row, int64_t column) const { return data + row * columns + column; }
    vec at(int64_t row, int64_t column) const {
        return __builtin_convertvector(__builtin_convertvector(load<i8>(data + row * columns + column), i32), vec);
    }
    float one(int64_t row, int64_t column) const { return data[row * columns + column]; }
    float factor(int64_t row) const { return scales[row]; }
};

struct Int4 : TimesFloat32 {
    const uint8_t* data;
    const uint16_t* scales;
    int64_t columns;
    explicit Int4(const Matrix& m) : data((const uint8_t*)m.data), scales((const uint16_t*)m.scales), columns(m.columns) {}
    const void* address(int64_t row, int64_t column) const { return data + (row * columns + column) / 2; }
    vec at(int64_t row, int64_t column) const {
        int64_t block = (row * columns + column) / 32;
        u8 bytes = load<u8>(data + block * 16);
        u8 codes = column & 16 ? bytes >> 4 : bytes & 15;
        vec value = __builtin_convertvector(__builtin_convertvector(codes, i32), vec);
        return value * from_bf16(scales[2 * block]) + from_bf16(scales[2 * block + 1]);
    }
    float one(int64_t, int64_t) const { return 0; }  // columns are a multiple of 32
    float factor(int64_t) const { return 1; }
};

#ifdef __AVX512BF16__
// Processors that multiply pairs of bfloat16: inputs are rounded to it, as torch has them, sums are float32.
struct TimesBfloat16 {
    using Input = uint16_t;
    using Values = __m512bh;
    static constexpr int64_t STEP = 2 * W;
    static vec add(vec sums, __m512bh weights, __m512bh values) {
        return (vec)_mm512_dpbf16_ps((__m512)sums, weights, values);
    }
    static __m512bh spread(const uint16_t* x, int64_t i) { return (__m512bh)_mm512_set1_epi32(load<int32_t>(x + 2 * i)); }
};

struct Bfloat16Pairs : TimesBfloat16 {
    const uint16_t* data;
    int64_t columns;
    explicit Bfloat16Pairs(const Matrix& m) : data((const uint16_t*)m.data), columns(m.columns) {}
    const void* address(int64_t row, int64_t column) const { return data + row * columns + column; }
    __m512bh at(int64_t row, int64_t column) const { return load<__m512bh>(data + row * columns + column); }
    float one(int64_t row, int64_t column) const { return from_bf16(data[row * columns + column]); }
    float factor(int64_t) const { return 1; }
};

struct Int8Pairs : TimesBfloat16 {
    const int8_t* data;
    const float* scales;
    int64_t columns;
    explicit Int8Pairs(const Matrix& m) : data((const int8_t*)m.data), scales((const float*)m.scales), columns(m.columns) {}
    const void* address(int64_t row, int64_t column) const { return data + row * columns + column; }
    // The codes are exact in bfloat16.
    __m512bh at(int64_t row, int64_t column) const {
        const int8_t* from = data + row * columns + column;
        __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
        __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from + W)));
        return _mm512_cvtne2ps_pbh(high, low);
    }
    float one(int64_t row, int64_t column) const { return data[row * columns + column]; }
    float factor(int64_t row) const { return scales[row]; }
};

struct Int4Pairs : TimesBfloat16 {
    const uint8_t* data;
    const uint16_t* scales;
    int64_t columns;
    explicit Int4Pairs(const Matrix& m)
        : data((const uint8_t*)m.data), scales((const uint16_t*)m.scales), columns(m.columns) {}
    const void* address(int64_t row, int64_t column) const { return data + (row * columns + column) / 2; }
    // A group has 16 values: they are looked up by code.
    __m512bh at(int64_t row, int64_t column) const {
        constexpr vec numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        int64_t block = (row * columns + column) / 32;
        vec values = numbers * from_bf16(scales[2 * block]) + from_bf16(scales[2 * block + 1]);
        __m512i table = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh((__m512)values));
        __m128i bytes = load<__m128i>(data + block * 16), half = _mm_set1_epi8(15);
        __m256i codes = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(bytes, 4), half), _mm_and_si128(bytes, half));
        return (__m512bh)_mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), table);
    }
    float one(int64_t, int64_t) const { return 0; }  // columns are a multiple of 32
    float factor(int64_t) const { return 1; }
};
#else
using Bfloat16Pairs = Bfloat16;
using Int8Pairs = Int8;
using Int4Pairs = Int4;
#endif

template <class F> inline void with_exact(const Matrix& m, F function) {
    switch (m.type) {
        case FLOAT32: return function(Float32(m));
        case BFLOAT16: return function(Bfloat16(m));
        case INT8: return function(Int8(m));
        default: return function(Int4(m));
    }
}

// Inputs may be rounded to bfloat16, unless the weight is float32.
template <class F> inline void with_rounding(const Matrix& m, F function) {
    switch (m.type) {
        case FLOAT32: return function(Float32(m));
        case BFLOAT16: return function(Bfloat16Pairs(m));
        case INT8: return function(Int8Pairs(m));
        default: return function(Int4Pairs(m));
    }
}

// Rows are short: without this the hardware begins each anew. Into the second cache: the first has room for little
// more than the tokens, and half as much comes through it.
inline void fetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// R rows of a weight times n tokens; each weight is read once and used n times.
template <int R, int n, class M, class Emit>
inline void dot_tile(const M& w, int64_t row, const typename M::Input* const* x, int64_t t, const Emit& emit) {
    vec products[n * R] = {};
    int64_t column = 0;
    for (; column + M::STEP <= w.columns; column += M::STEP) {
        typename M::Values weights[R];
        for (int r = 0; r < R; ++r) {
            weights[r] = w.at(row + r, column);
            if (t == 0) fetch(w.address(row + AHEAD * R + r, column));
        }
        for (int i = 0; i < n; ++i) {
            auto values = load<typename M::Values>(x[t + i] + column);
            for (int r = 0; r < R; ++r) products[i * R + r] = M::add(products[i * R + r], weights[r], values);
        }
    }
    float totals[(n * R + W - 1) / W * W];
    constexpr int whole = n * R / W * W;
    for (int i = 0; i < whole; i += W) store(totals + i, sums<W>(products + i));
    if constexpr (whole < n * R) store(totals + whole, sums<n * R - whole>(products + whole));
    for (int i = 0; i < n; ++i)
        for (int r = 0; r < R; ++r) {
            float total = totals[i * R + r];
            for (int64_t c = column; c < w.columns; ++c) total += w.one(row + r, c) * wide(x[t + i][c]);
            emit(t + i, row + r, total * w.factor(row + r));
        }
}

template <int R, class M, class Emit>
inline void dot_rows(const M& w, int64_t row, const typename M::Input* const* x, int64_t T, const Emit& emit) {
    int64_t t = 0;
    for (; t + 6 <= T; t += 6) dot_tile<R, 6>(w, row, x, t, emit);
    switch (T - t) {
        case 5: return dot_tile<R, 5>(w, row, x, t, emit);
        case 4: return dot_tile<R, 4>(w, row, x, t, emit);
        case 3: return dot_tile<R, 3>(w, row, x, t, emit);
        case 2: return dot_tile<R, 2>(w, row, x, t, emit);
        case 1: return dot_tile<R, 1>(w, row, x, t, emit);
    }
}

// 16 vectors become those of their first lanes, of their second lanes and so on.
template <int bit, int... lane> inline void transpose(vec* v, std::integer_sequence<int, lane...> lanes) {
    for (int i = 0; i < W; ++i) {
        if (i & bit) continue;
        vec a = v[i], b = v[i | bit];
        v[i] = __builtin_shufflevector(a, b, (lane & bit ? W + (lane ^ bit) : lane)...);
        v[i | bit] = __builtin_shufflevector(a, b, (lane & bit ? W + lane : lane ^ bit)...);
    }
    if constexpr (2 * bit < W) transpose<2 * bit>(v, lanes);
}

constexpr int64_t PANEL = 2 * W;  // rows that many tokens are multiplied with at a time

// The rows [row, row + PANEL) of a weight with 16 rows in a vector, two vectors for each of its columns, or pair of them.
template <class M> const vec* make_panel(const M& w, int64_t row) {
    thread_local Buffer<vec> panel;
    panel.resize(w.columns / M::STEP * PANEL);
    for (int64_t half = 0; half < 2; ++half)
        for (int64_t step = 0; step < w.columns / M::STEP; ++step) {
            vec v[W];
            for (int64_t r = 0; r < W; ++r) {
                v[r] = (vec)w.at(row + half * W + r, step * M::STEP);
                fetch(w.address(row + half * W + r + W, step * M::STEP));
            }
            transpose<1>(v, std::make_integer_sequence<int, W>());
            for (int64_t i = 0; i < W; ++i) panel[(step * W + i) * 2 + half] = v[i];
        }
    return panel.data();
}

template <int n, class M, class Emit>
inline void panel_tile(const M& w, const vec* panel, int64_t row, const typename M::Input* const* x, int64_t t, const Emit& emit) {
    vec products[n][2] = {};
    for (int64_t i = 0; i < w.columns / M::STEP * W; ++i)
        for (int k = 0; k < n; ++k) {
            auto values = M::spread(x[t + k], i);
            for (int half = 0; half < 2; ++half)
                products[k][half] = M::add(products[k][half], (typename M::Values)panel[2 * i + half], values);
        }
    for (int k = 0; k < n; ++k) {
        float totals[PANEL];
        for (int half = 0; half < 2; ++half) store(totals + half * W, products[k][half]);
        for (int64_t r = 0; r < PANEL; ++r) emit(t + k, row + r, totals[r] * w.factor(row + r));
    }
}

template <class M, class Emit>
void dot_panel(const M& w, int64_t row, const typename M::Input* const* x, int64_t T, const Emit& emit) {
    const vec* panel = make_panel(w, row);
    int64_t t = 0;
    for (; t + 12 <= T; t += 12) panel_tile<12>(w, panel, row, x, t, emit);
    for (; t + 4 <= T; t += 4) panel_tile<4>(w, panel, row, x, t, emit);
    for (; t < T; ++t) panel_tile<1>(w, panel, row, x, t, emit);
}

// emit(token, row, row of w . x[token]) for the rows [first, last) and all T tokens.
template <class M, class Emit>
void dots(const M& w, int64_t first, int64_t last, const typename M::Input* const* x, int64_t T, const Emit& emit) {
    int64_t row = first;
    // Fewer tokens are not worth the transposition.
    if (T >= MANY && w.columns % M::STEP == 0)
        for (; row + PANEL <= last; row += PANEL) dot_panel(w, row, x, T, emit);
    for (; row + 4 <= last; row += 4) dot_rows<4>(w, row, x, T, emit);
    for (; row < last; ++row) dot_rows<1>(w, row, x, T, emit);
}

// Rows of numbers as a type of weight wants them: float32 where they lie, bfloat16 as a copy.
template <class Input> struct Rows;

template <> struct Rows<float> {
    std::vector<const float*> at;
    Rows(const float* x, int64_t T, int64_t width) : at(T) {
        for (int64_t t = 0; t < T; ++t) at[t] = x + t * width;
    }
};

template <> struct Rows<uint16_t> {
    Buffer<uint16_t> rounded;
    std::vector<const uint16_t*> at;
    Rows(const float* x, int64_t T, int64_t width) : rounded(T * width), at(T) {
        for (int64_t i = 0; i < T * width; ++i) rounded[i] = to_bf16(x[i]);
        for (int64_t t = 0; t < T; ++t) at[t] = rounded.data() + t * width;
    }
};

constexpr int64_t CHUNK = 32;  // rows that a thread takes at a time

// y = x w^T + bias, or y += that.
void linear(const Matrix& m, const float* x_TD, int64_t T, const float* bias_N, float* y_TN, bool add, int threads) {
    with_rounding(m, [&](auto w) {
        Rows<typename decltype(w)::Input> x(x_TD, T, m.columns);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t first = 0; first < m.rows; first += CHUNK)
            dots(w, first, std::min(m.rows, first + CHUNK), x.at.data(), T, [&](int64_t t, int64_t n, float value) {
                float& y = y_TN[t * m.rows + n];
                y = value + (bias_N ? bias_N[n] : 0) + (add ? y : 0);
            });
    });
}

void rms_norm(const float* x, const float* weight, int64_t width, float eps, float* y) {
    vec squares = {};
    int64_t i = 0;
    for (; i + W <= width; i += W) squares += load<vec>(x + i) * load<vec>(x + i);
    float total = sum(squares);
    for (; i < width; ++i) total += x[i] * x[i];
    float factor = 1 / std::sqrt(total / width + eps);
    for (i = 0; i < width; ++i) y[i] = x[i] * factor * weight[i];
}

float gelu(float x) { return 0.5f * x * (1 + std::erf(x * 0.70710678f)); }

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

void silu_gate(const float* gate, const float* up, int64_t width, float* out) {
    int64_t i = 0;
    for (; i + W <= width; i += W) {
        vec x = load<vec>(gate + i), e = exp_negative(x < 0 ? x : -x);
        vec positive = 1.0f / (1.0f + e);
        store(out + i, x * (x < 0 ? e * positive : positive) * load<vec>(up + i));
    }
    for (; i < width; ++i) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

// h[G] to out[F]; the gate half of h comes first.
void activate(const Model& m, const float* h, int64_t width, float* out) {
    const float* up = h + width;
    if (m.activation == SWIGLU) return silu_gate(h, up, width, out);
    for (int64_t i = 0; i < width; ++i) switch (m.activation) {
            case SWIGLUOAI: {
                float gate = std::min(h[i], m.swiglu_limit);
                float factor = std::clamp(up[i], -m.swiglu_limit, m.swiglu_limit) + 1;
                out[i] = gate * sigmoid(m.swiglu_alpha * gate) * factor;
                break;
            }
            case GEGLU: out[i] = gelu(h[i]) * up[i]; break;
            case GELU: out[i] = gelu(h[i]); break;
            case RELU: out[i] = std::max(h[i], 0.0f); break;
            default: out[i] = std::max(h[i], 0.0f) * std::max(h[i], 0.0f);
        }
}

// Norm, clip and rotation of one head of a query or key.
void place(const Model& m, float* head, const float* norm, const float* cosine, const float* sine) {
    int64_t C = m.head_dim, half = C / 2;
    if (m.norm_heads && norm) rms_norm(head, norm, C, m.norm_eps, head);
    for (int64_t c = 0; c < half; ++c) {
        float first = head[c], second = head[c + half];
        head[c] = first * cosine[c] - second * sine[c];
        head[c + half] = second * cosine[c + half] + first * sine[c + half];
    }
}

void clip(float* x, int64_t width, float limit) {
    if (limit > 0)
        for (int64_t i = 0; i < width; ++i) x[i] = std::clamp(x[i], -limit, limit);
}

void keep(const Model& m, void* cache, int64_t slot, const float* rows) {
    int64_t C = m.head_dim, P = m.block_tokens;
    for (int64_t h = 0; h < m.kv_heads; ++h) {
        int64_t to = ((slot / P * m.kv_heads + h) * P + slot % P) * C;
        for (int64_t c = 0; c < C; ++c) {
            if (m.cache_type == FLOAT32) ((float*)cache)[to + c] = rows[h * C + c];
            else ((uint16_t*)cache)[to + c] = to_bf16(rows[h * C + c]);
        }
    }
}

// The queries that share a key/value head, of one token, over positions [first, end) of its sequence.
template <class M>
void attend(const Model& m, const Layer& layer, const M& keys, const M& values, const int32_t* table, int64_t first,
            int64_t end, int64_t head, const float* q_gC, float* o_gC) {
    int64_t C = m.head_dim, P = m.block_tokens, g = m.heads / m.kv_heads, length = end - first;
    int64_t padded = (length + W - 1) / W * W;
    thread_local Buffer<float> scores;
    scores.assign(g * padded, -INFINITY);
    Rows<float> q(q_gC, g, C);
    auto each_block = [&](auto function) {
        for (int64_t at = first; at < end;) {
            int64_t stop = std::min(end, (at / P + 1) * P);
            function(at - first, (int64_t(table[at / P]) * m.kv_heads + head) * P + at % P, stop - at);
            at = stop;
        }
    };
    each_block([&](int64_t at, int64_t row, int64_t count) {
        dots(keys, row, row + count, q.at.data(), g, [&](int64_t i, int64_t n, float value) {
            scores[i * padded + at + n - row] = value * m.softmax_scale;
        });
    });
    std::fill(o_gC, o_gC + g * C, 0.0f);
    for (int64_t i = 0; i < g; ++i) {
        float* s = scores.data() + i * padded;
        const float* sink = layer.sinks ? layer.sinks + head * g + i : nullptr;
        float most = *std::max_element(s, s + length);
        if (sink) most = std::max(most, *sink);
        vec total = {};
        for (int64_t l = 0; l < padded; l += W) {
            vec e = exp_negative(load<vec>(s + l) - most);
            store(s + l, e);
            for (int64_t k = length; k < l + W && k >= l; ++k) e[k - l] = 0;
            total += e;
        }
        float factor = 1 / (sum(total) + (sink ? std::exp(*sink - most) : 0));
        for (int64_t l = 0; l < length; ++l) s[l] *= factor;
    }
    each_block([&](int64_t at, int64_t row, int64_t count) {
        for (int64_t l = 0; l < count; ++l)
            for (int64_t c = 0; c < C; c += W) {
                if (c + W <= C) {
                    vec value = values.at(row + l, c);
                    for (int64_t i = 0; i < g; ++i) {
                        float* o = o_gC + i * C + c;
                        store(o, load<vec>(o) + value * scores[i * padded + at + l]);
                    }
                    continue;
                }
                for (int64_t i = 0; i < g; ++i)
                    for (int64_t k = c; k < C; ++k)
                        o_gC[i * C + k] += values.one(row + l, k) * scores[i * padded + at + l];
            }
    });
}

// x += attention of the normalised rows h.
void attention(const Model& m, const Layer& layer, const Pass& pass, const float* h_TD, float* x_TD, int threads) {
    int64_t T = pass.num_tokens, C = m.head_dim, q_width = m.heads * C, kv_width = m.kv_heads * C;
    Buffer<float> q(T * q_width), k(T * kv_width), v(T * kv_width), o(T * q_width);
    linear(layer.wq, h_TD, T, layer.bq, q.data(), false, threads);
    linear(layer.wk, h_TD, T, layer.bk, k.data(), false, threads);
    linear(layer.wv, h_TD, T, layer.bv, v.data(), false, threads);
    for (int64_t t = 0; t < T; ++t) {
        float *q_t = &q[t * q_width], *k_t = &k[t * kv_width], *v_t = &v[t * kv_width];
        if (m.norm_all_heads) {
            rms_norm(q_t, layer.q_norm, q_width, m.norm_eps, q_t);
            rms_norm(k_t, layer.k_norm, kv_width, m.norm_eps, k_t);
        }
        clip(q_t, q_width, m.clip_qkv);
        clip(k_t, kv_width, m.clip_qkv);
        clip(v_t, kv_width, m.clip_qkv);
        const float *cosine = pass.cosines + t * C, *sine = pass.sines + t * C;
        for (int64_t head = 0; head < m.heads; ++head) place(m, q_t + head * C, layer.q_norm, cosine, sine);
        for (int64_t head = 0; head < m.kv_heads; ++head) place(m, k_t + head * C, layer.k_norm, cosine, sine);
        keep(m, layer.keys, pass.slots[t], k_t);
        keep(m, layer.values, pass.slots[t], v_t);
    }
    std::vector<const int32_t*> tables;
    for (int64_t s = 0; s < pass.num_spans; ++s) tables.insert(tables.end(), pass.counts[s], pass.tables + s * pass.table_width);
    Matrix keys{layer.keys, nullptr, 0, C, m.cache_type}, values{layer.values, nullptr, 0, C, m.cache_type};
    int64_t g = m.heads / m.kv_heads;
    with_exact(keys, [&](auto k_cache) {
        decltype(k_cache) v_cache(values);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (int64_t item = 0; item < T * m.kv_heads; ++item) {
            int64_t t = item / m.kv_heads, head = item % m.kv_heads, end = pass.positions[t] + 1;
            int64_t first = layer.window ? std::max<int64_t>(0, end - layer.window) : 0, at = t * q_width + head * g * C;
            attend(m, layer, k_cache, v_cache, tables[t], first, end, head, &q[at], &o[at]);
        }
    });
    linear(layer.wo, o.data(), T, layer.bo, x_TD, true, threads);
}

// The K best of E scores, best first, lower numbers before higher ones of the same score.
void choose(const Model& m, const float* scores, int32_t* ids) {
    std::vector<float> left(scores, scores + m.num_experts);
    for (int64_t k = 0; k < m.top_k; ++k) {
        ids[k] = int32_t(std::max_element(left.begin(), left.end()) - left.begin());
        left[ids[k]] = -INFINITY;
    }
}

// Only the groups with the greatest sums of their best two scores keep them.
void limit_groups(const Model& m, float* scores) {
    int64_t size = m.num_experts / m.num_groups;
    std::vector<std::pair<float, int64_t>> groups;
    for (int64_t i = 0; i < m.num_groups; ++i) {
        std::vector<float> group(scores + i * size, scores + (i + 1) * size);
        int64_t best = std::min<int64_t>(2, size);
        std::partial_sort(group.begin(), group.begin() + best, group.end(), std::greater<float>());
        groups.emplace_back(-(group[0] + (best > 1 ? group[1] : 0)), i);
    }
    std::sort(groups.begin(), groups.end());
    for (int64_t i = m.num_limited_groups; i < m.num_groups; ++i)
        std::fill_n(scores + groups[i].second * size, size, -INFINITY);
}

void softmax(float* x, int64_t count) {
    float most = *std::max_element(x, x + count), total = 0;
    for (int64_t i = 0; i < count; ++i) total += x[i] = std::exp(x[i] - most);
    for (int64_t i = 0; i < count; ++i) x[i] /= total;
}

// As moe_ray/models/top_k_router.py routes, of one token.
void route(const Model& m, const Layer& layer, const float* x, int32_t* ids, float* weights) {
    std::vector<float> logits(m.num_experts), scores, biased;
    dots(Float32(layer.router), 0, m.num_experts, &x, 1, [&](int64_t, int64_t e, float value) {
        logits[e] = value + (layer.router_bias ? layer.router_bias[e] : 0);
    });
    scores = logits;
    if (m.sigmoid) std::transform(scores.begin(), scores.end(), scores.begin(), sigmoid);
    else softmax(scores.data(), m.num_experts);
    biased = scores;
    for (int64_t e = 0; e < m.num_experts && layer.expert_bias; ++e) biased[e] += layer.expert_bias[e];
    if (m.num_groups > 1) limit_groups(m, biased.data());
    choose(m, biased.data(), ids);
    float total = 1e-20f;
    for (int64_t k = 0; k < m.top_k; ++k) weights[k] = (m.softmax_after_top_k ? logits : scores)[ids[k]];
    if (m.softmax_after_top_k) softmax(weights, m.top_k);
    for (int64_t k = 0; k < m.top_k; ++k) total += weights[k];
    for (int64_t k = 0; k < m.top_k; ++k) weights[k] *= m.route_scale / (m.route_norm ? total : 1);
}

bool is_gated(const Model& m) { return m.activation <= GEGLU; }

// Pairs of a token and one of its experts, expert after expert: those of expert e are at [ends[e], ends[e + 1]).
struct Groups {
    std::vector<int64_t> ends, pairs;
    Groups(const std::vector<int32_t>& ids, int64_t E) : ends(E + 1), pairs(ids.size()) {
        for (int32_t id : ids) ++ends[id + 1];
        for (int64_t e = 0; e < E; ++e) ends[e + 1] += ends[e];
        std::vector<int64_t> next(ends.begin(), ends.end() - 1);
        for (size_t pair = 0; pair < ids.size(); ++pair) pairs[next[ids[pair]]++] = pair;
    }
};

// x += weighted outputs of each token's experts for the normalised rows h. Only chosen experts are read.
void experts(const Model& m, const Layer& layer, const float* h_TD, int64_t T, const std::vector<int32_t>& ids_TK,
             const Buffer<float>& weights_TK, float* x_TD, int threads) {
    int64_t E = m.num_experts, K = m.top_k, D = m.dim, F = m.expert_dim, G = is_gated(m) ? 2 * F : F;
    Groups groups(ids_TK, E);
    int64_t N = groups.pairs.size();
    Buffer<float> hidden_NG(N * G), active_NF(N * F);
    auto with_weight = [&](const Matrix* weights, auto function) {
        // Those of a model in bfloat16 need not be exact. All experts are of one type.
        if (m.cache_type == BFLOAT16) with_rounding(*weights, function);
        else with_exact(*weights, function);
    };
    // Work in pieces of rows of those experts that were chosen.
    std::vector<std::pair<int64_t, int64_t>> pieces;
    for (int64_t e = 0; e < E; ++e)
        for (int64_t first = 0; first < G && groups.ends[e] < groups.ends[e + 1]; first += CHUNK)
            pieces.emplace_back(e, first);
    with_weight(layer.w_in, [&](auto any) {
        using Weight = decltype(any);
        using Input = typename Weight::Input;
        Rows<Input> h(h_TD, T, D);
        std::vector<const Input*> x(N);
        for (int64_t i = 0; i < N; ++i) x[i] = h.at[groups.pairs[i] / K];
#pragma omp parallel for num_threads(threads) schedule(static)
        for (size_t piece = 0; piece < pieces.size(); ++piece) {
            auto [e, first] = pieces[piece];
            int64_t begin = groups.ends[e];
            dots(Weight(layer.w_in[e]), first, std::min(G, first + CHUNK), &x[begin], groups.ends[e + 1] - begin,
                 [&](int64_t i, int64_t n, float value) {
                     hidden_NG[(begin + i) * G + n] = value + (layer.b_in ? layer.b_in[e * G + n] : 0);
                 });
        }
    });
#pragma omp parallel for num_threads(threads) schedule(static) if (N > 8)
    for (int64_t i = 0; i < N; ++i) activate(m, &hidden_NG[i * G], F, &active_NF[i * F]);
    with_weight(layer.w_out, [&](auto any) {
        using Weight = decltype(any);
        Rows<typename Weight::Input> active(active_NF.data(), N, F);
        // A thread owns columns of the result: several experts add to the same token.
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t first = 0; first < D; first += CHUNK)
            for (int64_t e = 0; e < E; ++e) {
                int64_t begin = groups.ends[e], count = groups.ends[e + 1] - begin;
                if (!count) continue;
                dots(Weight(layer.w_out[e]), first, std::min(D, first + CHUNK), &active.at[begin], count,
                     [&](int64_t i, int64_t n, float value) {
                         int64_t pair = groups.pairs[begin + i];
                         float bias = layer.b_out ? layer.b_out[e * D + n] : 0;
                         x_TD[pair / K * D + n] += weights_TK[pair] * (value + bias);
                     });
            }
    });
}

// x += the dense feed-forward of the normalised rows h, times a gate if there is one.
void dense(const Model& m, const Layer& layer, const float* h_TD, int64_t T, float* x_TD, int threads) {
    int64_t G = layer.dense_in.rows, F = is_gated(m) ? G / 2 : G;
    Buffer<float> hidden(T * G), active(T * F);
    linear(layer.dense_in, h_TD, T, nullptr, hidden.data(), false, threads);
    for (int64_t t = 0; t < T; ++t) {
        activate(m, &hidden[t * G], F, &active[t * F]);
        if (!layer.shared_gate) continue;
        float logit = 0;
        for (int64_t d = 0; d < m.dim; ++d) logit += h_TD[t * m.dim + d] * layer.shared_gate[d];
        for (int64_t f = 0; f < F; ++f) active[t * F + f] *= sigmoid(logit);
    }
    linear(layer.dense_out, active.data(), T, nullptr, x_TD, true, threads);
}

}  // namespace

extern "C" {

// Normalised final hidden states [T, D]; the new keys and values go to the cache. Not 0: experts are missing.
int32_t forward(const Model* model, const Pass* pass, float* hidden_TD, int threads) {
    const Model& m = *model;
    int64_t T = pass->num_tokens, D = m.dim;
    Buffer<float> x(T * D), h(T * D), weights(T * m.top_k);
    std::vector<int32_t> ids(T * m.top_k);
    auto normalise = [&](const float* weight, float* to) {
        for (int64_t t = 0; t < T; ++t) rms_norm(&x[t * D], weight, D, m.norm_eps, to + t * D);
    };
    with_exact(m.embed, [&](auto embed) {
        for (int64_t t = 0; t < T; ++t)
            for (int64_t d = 0; d < D; ++d) x[t * D + d] = embed.one(pass->tokens[t], d);
    });
    for (const Layer* layer = m.layers; layer < m.layers + m.num_layers; ++layer) {
        normalise(layer->attention_norm, h.data());
        attention(m, *layer, *pass, h.data(), x.data(), threads);
        normalise(layer->ffn_norm, h.data());
        if (layer->router.data) {
#pragma omp parallel for num_threads(threads) schedule(static) if (T > 3)
            for (int64_t t = 0; t < T; ++t) route(m, *layer, &h[t * D], &ids[t * m.top_k], &weights[t * m.top_k]);
            if (m.acquire && m.acquire(layer - m.layers, ids.data(), T * m.top_k)) return 1;
            experts(m, *layer, h.data(), T, ids, weights, x.data(), threads);
        }
        if (layer->dense_in.data) dense(m, *layer, h.data(), T, x.data(), threads);
    }
    normalise(m.norm, hidden_TD);
    return 0;
}

// y [T, N] = x [T, D] w^T.
void multiply(const Matrix* w, const float* x, int64_t num_tokens, float* y, int threads) {
    linear(*w, x, num_tokens, nullptr, y, false, threads);
}
}
