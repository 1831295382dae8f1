// Vectors of 16 numbers: the compiler's portable ones, which become whatever the processor has.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int W = 16;
using vec = float __attribute__((vector_size(4 * W)));
using i32 = int32_t __attribute__((vector_size(4 * W)));
using u32 = uint32_t __attribute__((vector_size(4 * W)));
using u16 = uint16_t __attribute__((vector_size(2 * W)));
using i8 = int8_t __attribute__((vector_size(W)));
using u8 = uint8_t __attribute__((vector_size(W)));
using Order = std::make_integer_sequence<int, W>;

template <class V, class S> inline V load(const S* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof value); }

// Compilers load a value that is used several times anew each time, as operands may lie in memory.
template <class V> inline void load_once(V& value) {
#ifdef __AVX512F__
    if constexpr (sizeof value == 64) asm("" : "+v"(value));
#endif
}

// Compilers widen in halves, which takes five instructions instead of one.
#ifdef __AVX512F__
inline u32 widen(u16 values) { return (u32)_mm512_cvtepu16_epi32((__m256i)values); }
inline i32 widen(i8 values) { return (i32)_mm512_cvtepi8_epi32((__m128i)values); }
#else
inline u32 widen(u16 values) { return __builtin_convertvector(values, u32); }
inline i32 widen(i8 values) { return __builtin_convertvector(values, i32); }
#endif

inline vec fill(float x) { return vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

// Loads that cross lines of the cache take twice as long.
template <class T> struct Aligned : std::allocator<T> {
    template <class U> struct rebind { using other = Aligned<U>; };
    T* allocate(size_t count) { return (T*)::operator new(count * sizeof(T), std::align_val_t(64)); }
    void deallocate(T* memory, size_t) { ::operator delete(memory, std::align_val_t(64)); }
    // What a buffer holds is written before it is read.
    template <class U> void construct(U* at) noexcept { ::new ((void*)at) U; }
    template <class U, class... A> void construct(U* at, A&&... from) { ::new ((void*)at) U(std::forward<A>(from)...); }
};
template <class T> using Buffer = std::vector<T, Aligned<T>>;

// The sums of up to 16 vectors, that of leaf(first + i) in lane i; of those from `count` on, whatever. A fold halves their number: of two it keeps, in the lanes whose
// number has the bit and in those without it, what each of them sums to.
template <int bit, int... lane> __attribute__((always_inline)) inline vec fold(vec a, vec b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b, (lane & bit ? W + lane : lane)...) +
           __builtin_shufflevector(a, b, (lane & bit ? W + (lane ^ bit) : lane ^ bit)...);
}

template <int first, int count, int bit = W, class Leaf> __attribute__((always_inline)) inline vec sums(const Leaf& leaf) {
    if constexpr (bit == 1) return leaf(std::integral_constant<int, first>());
    else {
        vec low = sums<first, count, bit / 2>(leaf);
        if constexpr (first + bit / 2 >= count) return fold<bit / 2>(low, low, Order());
        else return fold<bit / 2>(low, sums<first + bit / 2, count, bit / 2>(leaf), Order());
    }
}

inline float sum(vec value) { return sums<0, 1>([&](auto) { return value; })[0]; }

// 16 vectors become those of their first lanes, of their second lanes and so on.
template <int bit, int... lane> __attribute__((always_inline)) inline void transpose(vec* v, std::integer_sequence<int, lane...> lanes) {
    for (int i = 0; i < W; ++i) {
        if (i & bit) continue;
        vec a = v[i], b = v[i | bit];
        v[i] = __builtin_shufflevector(a, b, (lane & bit ? W + (lane ^ bit) : lane)...);
        v[i | bit] = __builtin_shufflevector(a, b, (lane & bit ? W + lane : lane ^ bit)...);
    }
    if constexpr (2 * bit < W) transpose<2 * bit>(v, lanes);
}

// Lanes first, first + 2 and so on of both.
template <int first, int... lane> inline vec take_every_other(vec a, vec b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b, (2 * lane + first)...);
}

inline vec absolute(vec x) { return (vec)((u32)x & 0x7fffffffu); }

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

inline void round_row(const float* x, int64_t count, uint16_t* to) {
    int64_t i = 0;
#ifdef __AVX512BF16__
    for (; i + W <= count; i += W) {
        __m256bh rounded = _mm512_cvtneps_pbh((__m512)load<vec>(x + i));
        std::memcpy(to + i, &rounded, sizeof rounded);
    }
#endif
    for (; i < count; ++i) to[i] = to_bf16(x[i]);
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
