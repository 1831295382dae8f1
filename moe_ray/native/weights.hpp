// Types of weights. Each gives STEP neighbouring columns of a row, one column, and a factor of the whole row. Rows lie one
// after another; `bytes` is how much memory so many columns take.
//
// LEAST columns are multiplied at a time at the end of a row, fewer one by one; ROWS is how many rows are multiplied at a
// time where tokens are few, `many` how many tokens are worth to transpose rows for.

#pragma once

#include "inputs.hpp"

namespace {

template <class Inputs> struct Weights : Inputs {
    static constexpr int64_t LEAST = Inputs::STEP;
    static constexpr int ROWS = 4;
    static constexpr bool SCALED = false;
    static int64_t stride(int64_t columns) { return (columns + 31) / 32 * 32; }
    static int64_t many(int64_t columns) { return std::clamp<int64_t>(16 + columns / 64, 24, 48); }
    static typename Inputs::Values values(const typename Inputs::Input* x) { return load<typename Inputs::Values>(x); }
    float factor(int64_t) const { return 1; }
    vec finish(int64_t, const typename Inputs::Input*, typename Inputs::Sums sums) const { return Inputs::total(sums); }
};

struct Float32 : Weights<Float32Inputs> {
    const float* data;
    int64_t columns;
    explicit Float32(const Matrix& m) : data((const float*)m.data), columns(m.columns) {}
    static int64_t bytes(int64_t columns) { return columns * sizeof *data; }
    vec at(int64_t row, int64_t column) const { return load<vec>(data + row * columns + column); }
    float one(int64_t row, int64_t column) const { return data[row * columns + column]; }
};

template <class Inputs> struct Bfloat16Numbers : Weights<Inputs> {
    const uint16_t* data;
    int64_t columns;
    explicit Bfloat16Numbers(const Matrix& m) : data((const uint16_t*)m.data), columns(m.columns) {}
    static int64_t bytes(int64_t columns) { return columns * sizeof *data; }
    float one(int64_t row, int64_t column) const { return from_bf16(data[row * columns + column]); }
};

// For widths that are no multiple of 32, and as attention mixes values.
struct Bfloat16 : Bfloat16Numbers<Float32Inputs> {
    using Bfloat16Numbers::Bfloat16Numbers;
    vec at(int64_t row, int64_t column) const {
        return (vec)(widen(load<u16>(data + row * columns + column)) << 16);
    }
};

struct Bfloat16Halves : Bfloat16Numbers<HalvesInputs> {
    using Bfloat16Numbers::Bfloat16Numbers;
    vec at(int64_t row, int64_t column) const { return load<vec>(data + row * columns + column); }
    static Values values(const float* x) {
        Values found{load<vec>(x), load<vec>(x + W)};
        load_once(found.even);
        load_once(found.odd);
        return found;
    }
};

template <class Inputs> struct Int8Codes : Weights<Inputs> {
    static constexpr bool SCALED = true;
    const int8_t* data;
    const float* scales;
    int64_t columns;
    explicit Int8Codes(const Matrix& m) : data((const int8_t*)m.data), scales((const float*)m.scales), columns(m.columns) {}
    static int64_t bytes(int64_t columns) { return columns * sizeof *data; }
    float one(int64_t row, int64_t column) const { return data[row * columns + column]; }
    float factor(int64_t row) const { return scales[row]; }
};

struct Int8 : Int8Codes<Float32Inputs> {
    using Int8Codes::Int8Codes;
    vec at(int64_t row, int64_t column) const {
        return __builtin_convertvector(widen(load<i8>(data + row * columns + column)), vec);
    }
};

template <class Inputs> struct Int4Codes : Weights<Inputs> {
    const uint8_t* data;
    const uint16_t* scales;
    int64_t columns;
    explicit Int4Codes(const Matrix& m)
        : data((const uint8_t*)m.data), scales((const uint16_t*)m.scales), columns(m.columns) {}
    static int64_t bytes(int64_t columns) { return columns / 2; }
    float one(int64_t, int64_t) const { return 0; }  // columns are a multiple of 32
    static int64_t many(int64_t) { return 12; }
};

struct Int4 : Int4Codes<Float32Inputs> {
    using Int4Codes::Int4Codes;
    vec at(int64_t row, int64_t column) const {
        int64_t block = (row * columns + column) / 32;
        u8 bytes = load<u8>(data + block * 16);
        u8 codes = column & 16 ? bytes >> 4 : bytes & 15;
        vec value = __builtin_convertvector(widen((i8)codes), vec);
        return value * from_bf16(scales[2 * block]) + from_bf16(scales[2 * block + 1]);
    }
};

#ifdef __AVX512BF16__
struct Bfloat16Pairs : Bfloat16Numbers<Bfloat16Inputs> {
    using Bfloat16Numbers::Bfloat16Numbers;
    __m512bh at(int64_t row, int64_t column) const { return load<__m512bh>(data + row * columns + column); }
};

struct Int4Pairs : Int4Codes<Bfloat16Inputs> {
    using Int4Codes::Int4Codes;
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
};
#else
using Bfloat16Pairs = Bfloat16Halves;
using Int4Pairs = Int4;
#endif

#ifdef __AVX512VNNI__
struct Int8Words : Int8Codes<Int16Inputs> {
    using Int8Codes::Int8Codes;
    __m512i at(int64_t row, int64_t column) const {
        return _mm512_cvtepi8_epi16(load<__m256i>(data + row * columns + column));
    }
};

// For FEW tokens: codes of four groups are unpacked where they lie in a vector, one bit mask for each of four vectors of
// 16-bit words, and inputs are put into that order. Products are scaled group by group; lowest values are multiplied
// with the sums of the inputs of a group, which follow them in the row.
struct Int4Words : Int4Codes<Int16Inputs> {
    using Int4Codes::Int4Codes;
    static constexpr int64_t STEP = 128, LEAST = 32;
    static constexpr int ROWS = 1;
    static constexpr bool SCALED = true;
    using Sums = vec;
    struct Values {
        __m512i word0, word1, word2, word3;
        vec scale;
    };
    static int64_t padded(int64_t columns) { return (columns + STEP - 1) / STEP * STEP; }
    static int64_t groups(int64_t columns) { return (columns / 32 + W - 1) / W * W; }
    static int64_t stride(int64_t columns) { return padded(columns) + 2 * groups(columns); }
    static float encode(const float* x, int64_t columns, int16_t* to) {
        thread_local Buffer<int16_t> plain;
        plain.assign(padded(columns), 0);
        float scale = Int16Inputs::encode(x, columns, plain.data());
        for (int64_t block = 0; block < padded(columns); block += STEP)
            for (int64_t i = 0; i < STEP; ++i) {
                int64_t word = i / 32, group = i % 32 / 8, place = i % 8;
                to[block + i] = plain[block + 32 * group + 16 * (word % 2) + 2 * place + word / 2];
            }
        float* sums = (float*)(to + padded(columns));
        std::fill(sums, sums + groups(columns), 0.0f);
        for (int64_t c = 0; c < columns; ++c) sums[c / 32] += plain[c];
        return scale;
    }
    static Values values(const int16_t* x) {
        return Values{load<__m512i>(x), load<__m512i>(x + 32), load<__m512i>(x + 64), load<__m512i>(x + 96), vec{}};
    }
    Values at(int64_t row, int64_t column) const {
        const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        const __m512i low = _mm512_set1_epi16(15);
        int64_t left = columns - column, block = (row * columns + column) / 32;
        __m512i codes = _mm512_maskz_loadu_epi32(left < STEP ? (1 << left / 8) - 1 : 0xffff, data + block * 16);
        __m128i pairs = _mm_maskz_loadu_epi32(left < STEP ? (1 << left / 32) - 1 : 15, scales + block * 2);
        __m512i scale = _mm512_permutexvar_epi32(spread, _mm512_castsi128_si512(pairs));
        Values found;
        found.word0 = _mm512_and_si512(codes, low);
        found.word1 = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
        found.word2 = _mm512_and_si512(_mm512_srli_epi16(codes, 8), low);
        found.word3 = _mm512_srli_epi16(codes, 12);
        found.scale = (vec)_mm512_slli_epi32(scale, 16);
        return found;
    }
    static vec add(vec sums, const Values& weights, const Values& values) {
        __m512i products = _mm512_dpwssd_epi32(_mm512_setzero_si512(), weights.word0, values.word0);
        products = _mm512_dpwssd_epi32(products, weights.word1, values.word1);
        products = _mm512_dpwssd_epi32(products, weights.word2, values.word2);
        products = _mm512_dpwssd_epi32(products, weights.word3, values.word3);
        return sums + weights.scale * (vec)_mm512_cvtepi32_ps(products);
    }
    vec finish(int64_t row, const int16_t* x, vec sums) const {
        const float* inputs = (const float*)(x + padded(columns));
        int64_t count = columns / 32;
        for (int64_t group = 0; group < count; group += W) {
            int64_t left = count - group;
            __m512i pairs = _mm512_maskz_loadu_epi32(left < W ? (1 << left) - 1 : 0xffff, scales + 2 * (row * count + group));
            sums += (vec)_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)) * load<vec>(inputs + group);
        }
        return sums;
    }
};
#elif defined(__AVX512BF16__)
using Int8Words = Int8;
using Int4Words = Int4Pairs;
#else
using Int8Words = Int8;
using Int4Words = Int4;
#endif

template <class M> inline const char* address(const M& w, int64_t row, int64_t column = 0) {
    return (const char*)w.data + M::bytes(row * w.columns + column);
}

// Tokens up to which codes of int4 are multiplied as integers, if the processor has the instructions: without those for
// bfloat16, what is looked up takes longer.
#ifdef __AVX512BF16__
constexpr int64_t FEW = 2;
#else
constexpr int64_t FEW = 20;
#endif

// Inputs may be rounded unless `exact`, and never for weights in float32. `many`: weights meet more than FEW tokens.
template <class F> inline void with_weights(const Matrix& m, bool exact, bool many, F function) {
    switch (m.type) {
        case FLOAT32: return function(Float32(m));
        case BFLOAT16:
            if (m.columns % Bfloat16Halves::STEP) return function(Bfloat16(m));
            return exact ? function(Bfloat16Halves(m)) : function(Bfloat16Pairs(m));
        case INT8: return exact ? function(Int8(m)) : function(Int8Words(m));
        default:
            if (exact) return function(Int4(m));
            return many ? function(Int4Pairs(m)) : function(Int4Words(m));
    }
}

}  // namespace
