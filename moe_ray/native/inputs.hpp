// How numbers are stored that weights are multiplied with: as float32, bfloat16, or 16 bits and a factor.
//
// Each of them has STEP neighbouring columns in Values, `encode`, which stores a row and gives its factor, `add`, which
// adds products to sums of 16 lanes, `spread`, which fills Lanes, a vector of a panel, with one of them, and `total`,
// which makes float32 of sums. A vector of weights becomes PARTS vectors of a panel.

#pragma once

#include "model.hpp"
#include "vectors.hpp"

namespace {

inline float wide(float value) { return value; }
inline float wide(uint16_t bits) { return from_bf16(bits); }
inline float wide(int16_t value) { return value; }

// What a panel holds of a transposed vector of weights.
struct Whole {
    static constexpr int PARTS = 1;
    static vec part(vec transposed, int) { return transposed; }
};

struct Float32Inputs : Whole {
    using Input = float;
    using Values = vec;
    using Lanes = vec;
    using Sums = vec;
    static constexpr int64_t STEP = W;
    static float encode(const float* x, int64_t columns, float* to) {
        std::memcpy(to, x, columns * sizeof(float));
        return 1;
    }
    static vec add(vec sums, vec weights, vec values) { return sums + weights * values; }
    static vec spread(const char* lane) { return fill(load<float>(lane)); }
    static vec total(vec sums) { return sums; }
};

// For weights in bfloat16: of 32 columns first the even ones, then the odd ones. So a vector of weights becomes float32
// by a shift and a mask.
struct HalvesInputs {
    using Input = float;
    struct Values {
        vec even, odd;
    };
    using Lanes = vec;
    using Sums = vec;
    static constexpr int64_t STEP = 2 * W;
    static constexpr int PARTS = 2;
    static float encode(const float* x, int64_t columns, float* to) {
        int64_t c = 0;
        for (; c + STEP <= columns; c += STEP) {
            store(to + c, take_every_other<0>(load<vec>(x + c), load<vec>(x + c + W), Order()));
            store(to + c + W, take_every_other<1>(load<vec>(x + c), load<vec>(x + c + W), Order()));
        }
        std::memcpy(to + c, x + c, (columns - c) * sizeof(float));
        return 1;
    }
    // Of a vector of pairs, as float32.
    static vec part(vec pairs, int odd) { return (vec)(odd ? (u32)pairs & 0xffff0000u : (u32)pairs << 16); }
    static vec add(vec sums, vec weights, const Values& values) {
        return sums + part(weights, 0) * values.even + part(weights, 1) * values.odd;
    }
    static vec add(vec sums, vec weights, vec values) { return sums + weights * values; }
    static vec spread(const char* lane) { return fill(load<float>(lane)); }
    static vec total(vec sums) { return sums; }
};

#ifdef __AVX512BF16__
// Processors that multiply pairs of bfloat16: inputs are rounded to it, as torch has them, sums are float32.
struct Bfloat16Inputs : Whole {
    using Input = uint16_t;
    using Values = __m512bh;
    using Lanes = Values;
    using Sums = vec;
    static constexpr int64_t STEP = 2 * W;
    static float encode(const float* x, int64_t columns, uint16_t* to) {
        round_row(x, columns, to);
        return 1;
    }
    static vec add(vec sums, __m512bh weights, __m512bh values) {
        return (vec)_mm512_dpbf16_ps((__m512)sums, weights, values);
    }
    static __m512bh spread(const char* lane) { return (__m512bh)_mm512_set1_epi32(load<int32_t>(lane)); }
    static vec total(vec sums) { return sums; }
};
#endif

#ifdef __AVX512VNNI__
// Processors that multiply pairs of 16-bit integers: inputs are integers times a factor of their row, twice as many bits
// as bfloat16 has; products with codes of 8 bits and their sums are exact.
struct Int16Inputs : Whole {
    using Input = int16_t;
    using Values = __m512i;
    using Lanes = Values;
    using Sums = i32;
    static constexpr int64_t STEP = 2 * W;
    static float encode(const float* x, int64_t columns, int16_t* to) {
        vec most = {}, finite = {};
        int64_t c = 0;
        for (; c + W <= columns; c += W) {
            vec value = load<vec>(x + c), size = absolute(value);
            most = size > most ? size : most;
            finite += value * 0.0f;
        }
        float greatest = 0, broken = sum(finite);
        for (int64_t lane = 0; lane < W; ++lane) greatest = std::max(greatest, most[lane]);
        for (int64_t k = c; k < columns; ++k) {
            greatest = std::max(greatest, std::abs(x[k]));
            broken += x[k] * 0.0f;
        }
        // A lane sums products with codes of at most 128.
        float limit = std::min(32767.0f, float(0x7fff0000 / (128 * ((columns + W - 1) / W))));
        float scale = std::max(greatest / limit, 1e-30f), inverse = 1 / scale;
        if (broken != 0) {
            std::memset(to, 0, columns * sizeof *to);
            return NAN;
        }
        for (c = 0; c + W <= columns; c += W) {
            __m256i q = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)(load<vec>(x + c) * inverse)));
            std::memcpy(to + c, &q, sizeof q);
        }
        for (; c < columns; ++c) to[c] = int16_t(std::nearbyint(x[c] * inverse));
        return scale;
    }
    static i32 add(i32 sums, __m512i weights, __m512i values) {
        return (i32)_mm512_dpwssd_epi32((__m512i)sums, weights, values);
    }
    static __m512i spread(const char* lane) { return _mm512_set1_epi32(load<int32_t>(lane)); }
    static vec total(i32 sums) { return __builtin_convertvector(sums, vec); }
};
#endif

}  // namespace
