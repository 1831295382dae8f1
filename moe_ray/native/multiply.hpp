// Products of weights with rows of numbers.
//
// Weights are read where they lie and as they are stored. With few tokens the time goes to reading: rows are multiplied
// as they come, some at a time with up to six tokens. For many tokens that share a weight, rows are transposed and
// unpacked into panels of 32 that stay in the cache, and twelve tokens at a time are multiplied with them.
//
// Shapes: T tokens, N rows and D columns of a weight.

#pragma once

#include <functional>
#include <initializer_list>

#include "weights.hpp"

namespace {

constexpr int AHEAD = 2;           // tiles of rows that are prefetched
constexpr int64_t CHUNK = 2 * W;   // rows that a thread takes at a time
constexpr int64_t TILE = 12;       // tokens that a panel is multiplied with at a time, at most
constexpr int64_t BLOCK = 24;      // tokens whose products with a chunk are kept
constexpr int64_t LANE = 4;        // bytes

// Rows are short: without this the hardware begins each anew. Into the second cache: the first has room for little
// more than the tokens, and half as much comes through it.
inline void fetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// Results are far apart, and stores wait for one another.
inline void fetch_target(const float* y) {
    __builtin_prefetch(y, 1);
    __builtin_prefetch(y + W, 1);
}

// Chunks that a thread takes at a time: few enough for all to end together, but at each start nothing has been fetched.
inline int64_t share(int64_t chunks, int64_t threads) { return std::clamp<int64_t>(chunks / (4 * threads), 1, 32); }

// Two runs of up to 16 rows, and what will be read after the last, if not the rows that follow.
struct Chunk {
    int64_t first[2], count[2];
    const char* after = nullptr;
    int64_t row(int half, int64_t r) const { return count[half] ? first[half] + std::min(r, count[half] - 1) : first[0]; }
    template <class M> const char* following(const M& w, int half) const {
        bool last = half == 1 || !count[1];
        return after && last ? after : address(w, first[half] + count[half]);
    }
};

inline Chunk neighbours(int64_t first, int64_t last) {
    return {{first, first + W}, {std::min<int64_t>(W, last - first), std::clamp<int64_t>(last - first - W, 0, W)}};
}

// Rows of numbers as a type of weight wants them, in groups, each of which has a weight of its own.
template <class M> struct Rows {
    using Input = typename M::Input;
    std::vector<int64_t> ends;
    int64_t stride;
    Buffer<Input> data;
    Buffer<float> scales;

    // Row i is row order[i] of x, or row i.
    Rows(const float* x, int64_t columns, const std::vector<int64_t>& ends, const int64_t* order, int threads)
        : ends(ends), stride(apart(M::stride(columns))), data((ends.back() + TILE) * stride), scales(ends.back()) {
#pragma omp parallel for num_threads(threads) schedule(static) if (ends.back() * columns > 16384)
        for (int64_t i = 0; i < ends.back(); ++i)
            scales[i] = M::encode(x + (order ? order[i] : i) * columns, columns, &data[i * stride]);
    }

    // Rows of a tile would share few sets of the first cache if they were a power of two apart.
    static int64_t apart(int64_t stride) {
        constexpr int64_t LINE = 64 / sizeof(Input);
        return stride % (16 * LINE) ? stride : stride + LINE;
    }
};

// R rows of a weight times n tokens; each weight is read once and used n times. Meanwhile as many bytes as
// `rows_ahead` rows have are fetched from `soon` on.
template <int R, int n, class M>
inline void dot_tile(const M& w, int64_t row, const typename M::Input* x, int64_t stride, const char* soon,
                     int64_t rows_ahead, float* y) {
    typename M::Sums products[n * R];
#pragma GCC unroll 24
    for (auto& product : products) product = typename M::Sums{};
    int64_t column = 0;
    for (; column + M::LEAST <= w.columns; column += M::STEP) {
        decltype(w.at(0, 0)) weights[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            weights[r] = w.at(row + r, column);
            // In the order of memory, but for one token as rows will be read: float32 is 4% faster so.
            int64_t ahead = n == 1 ? r * w.columns + column : column * rows_ahead + r * M::STEP;
            if (R == 1 || r < rows_ahead) fetch(soon + M::bytes(ahead));
        }
#pragma GCC unroll 6
        for (int i = 0; i < n; ++i) {
            auto values = M::values(x + i * stride + column);
            load_once(values);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) products[i * R + r] = M::add(products[i * R + r], weights[r], values);
        }
    }
    auto finished = [&](auto i) { return w.finish(row + i % R, x + i / R * stride, products[i]); };
    float totals[(n * R + W - 1) / W * W];
    store(totals, sums<0, n * R>(finished));
    if constexpr (n * R > W) store(totals + W, sums<W, n * R>(finished));
    for (int i = 0; i < n; ++i) std::memcpy(y + i * CHUNK, totals + i * R, R * sizeof(float));
    // Compilers round the product for some numbers of tokens and not for others, if they may choose.
    for (; column < w.columns; ++column)
        for (int i = 0; i < n; ++i)
            for (int r = 0; r < R; ++r)
                y[i * CHUNK + r] = std::fma(w.one(row + r, column), wide(x[i * stride + column]), y[i * CHUNK + r]);
}

// y[i * CHUNK + r] = row r of w . x[i].
template <int R, class M>
inline void dot_rows(const M& w, int64_t row, const typename M::Input* x, int64_t stride, int64_t T, const char* soon,
                     float* y) {
    int64_t parts = (T + 5) / 6, t = 0;
    for (int64_t part = 0; part < parts; ++part) {
        int64_t count = (T - t + parts - part - 1) / (parts - part);
        const auto* from = x + t * stride;
        float* to = y + t * CHUNK;
        // Each pass over the rows fetches its share: multiplying waits where too much is on its way. A single
        // row is not shared.
        int64_t before = R == 1 ? 0 : (part * R + parts - 1) / parts;
        int64_t rows_ahead = R == 1 ? 1 : ((part + 1) * R + parts - 1) / parts - before;
        const char* from_here = soon + M::bytes(before * w.columns);
        switch (count) {
            case 6: dot_tile<R, 6>(w, row, from, stride, from_here, rows_ahead, to); break;
            case 5: dot_tile<R, 5>(w, row, from, stride, from_here, rows_ahead, to); break;
            case 4: dot_tile<R, 4>(w, row, from, stride, from_here, rows_ahead, to); break;
            case 3: dot_tile<R, 3>(w, row, from, stride, from_here, rows_ahead, to); break;
            case 2: dot_tile<R, 2>(w, row, from, stride, from_here, rows_ahead, to); break;
            default: dot_tile<R, 1>(w, row, from, stride, from_here, rows_ahead, to);
        }
        t += count;
    }
}

// The rows of a run; `following` is what will be read after them.
template <class M>
inline void dots(const M& w, int64_t first, int64_t count, const char* following, const typename M::Input* x,
                 int64_t stride, int64_t T, float* y) {
    auto soon = [&](int64_t r) {
        return r < count ? address(w, first + r) : following + M::bytes((r - count) * w.columns);
    };
    int64_t r = 0;
    for (; r + M::ROWS <= count; r += M::ROWS)
        dot_rows<M::ROWS>(w, first + r, x, stride, T, soon(r + AHEAD * M::ROWS), y + r);
    if constexpr (M::ROWS > 1)
        for (; r < count; ++r) dot_rows<1>(w, first + r, x, stride, T, soon(r + AHEAD), y + r);
}

// The rows of a chunk with 16 of them in a vector, two vectors for each column, or pair of them.
template <class M> const vec* make_panel(const M& w, const Chunk& rows) {
    thread_local Buffer<vec> panel;
    int64_t steps = w.columns / M::STEP;
    panel.resize(steps * M::PARTS * CHUNK);
    for (int half = 0; half < 2; ++half) {
        const char* following = rows.following(w, half);
        for (int64_t step = 0; step < steps; ++step) {
            vec v[W];
            for (int64_t r = 0; r < W; ++r) {
                v[r] = (vec)w.at(rows.row(half, r), step * M::STEP);
                fetch(following + M::bytes(r * w.columns + step * M::STEP));
            }
            transpose<1>(v, Order());
            for (int part = 0; part < M::PARTS; ++part)
                for (int64_t i = 0; i < W; ++i) panel[((step * M::PARTS + part) * W + i) * 2 + half] = M::part(v[i], part);
        }
    }
    return panel.data();
}

// Rows are addressed from every third of them: with a pointer for each there would be too few registers.
template <int n, class M> inline void panel_tile(const vec* panel, int64_t lanes, const char* x, int64_t stride, float* y) {
    typename M::Sums products[n][2];
#pragma GCC unroll 16
    for (auto& pair : products) pair[0] = pair[1] = typename M::Sums{};
    const char *from0 = x, *from3 = x + 3 * stride, *from6 = x + 6 * stride, *from9 = x + 9 * stride;
    for (const vec* end = panel + 2 * lanes; panel < end; panel += 2) {
        auto low = (typename M::Lanes)panel[0], high = (typename M::Lanes)panel[1];
#pragma GCC unroll 16
        for (int k = 0; k < n; ++k) {
            const char* from = k < 3 ? from0 : k < 6 ? from3 : k < 9 ? from6 : from9;
            auto values = M::spread(from + k % 3 * stride);
            load_once(values);
            products[k][0] = M::add(products[k][0], low, values);
            products[k][1] = M::add(products[k][1], high, values);
        }
        from0 += LANE, from3 += LANE, from6 += LANE, from9 += LANE;
        asm("" : "+r"(from0), "+r"(from3), "+r"(from6), "+r"(from9));
    }
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) store(y + k * CHUNK + half * W, M::total(products[k][half]));
}

template <class M>
inline void panel_tile(int64_t tile, const vec* panel, int64_t lanes, const typename M::Input* x, int64_t stride, float* y) {
    const char* from = (const char*)x;
    stride *= sizeof *x;
    switch (tile) {
        case 7: return panel_tile<7, M>(panel, lanes, from, stride, y);
        case 8: return panel_tile<8, M>(panel, lanes, from, stride, y);
        case 9: return panel_tile<9, M>(panel, lanes, from, stride, y);
        case 10: return panel_tile<10, M>(panel, lanes, from, stride, y);
        case 11: return panel_tile<11, M>(panel, lanes, from, stride, y);
        default: return panel_tile<12, M>(panel, lanes, from, stride, y);
    }
}

// sink(i, y, target(i)) for each row i of a group: its products with the rows of a chunk, those of the second run from
// y[16] on, and where they go.
template <class M, class Target, class Sink>
void multiply(const M& w, const Chunk& rows, const Rows<M>& x, int64_t group, const Target& target, const Sink& sink) {
    int64_t first = x.ends[group], T = x.ends[group + 1] - first;
    const typename M::Input* from = &x.data[first * x.stride];
    alignas(64) float factors[CHUNK], y[BLOCK * CHUNK];
    if constexpr (M::SCALED)
        for (int r = 0; r < CHUNK; ++r) factors[r] = w.factor(rows.row(r / W, r % W));
    auto give = [&](int64_t begin, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            if constexpr (M::SCALED)
                for (int r = 0; r < CHUNK; ++r) y[i * CHUNK + r] *= factors[r] * x.scales[first + begin + i];
            sink(first + begin + i, y + i * CHUNK, target(first + begin + i));
        }
    };
    if constexpr (M::STEP == M::LEAST)
        if (T >= M::many(w.columns) && w.columns % M::STEP == 0) {
            const vec* panel = make_panel(w, rows);
            int64_t number = (T + TILE - 1) / TILE, tile = (T + number - 1) / number;
            for (int64_t t = 0; t < T; t += tile) {
                for (int64_t i = t; i < std::min(t + tile, T); ++i) fetch_target(target(first + i));
                panel_tile<M>(tile, panel, w.columns / M::STEP * M::PARTS * W, from + t * x.stride, x.stride, y);
                give(t, std::min(tile, T - t));
            }
            return;
        }
    for (int64_t t = 0; t < T; t += BLOCK) {
        int64_t count = std::min(BLOCK, T - t);
        for (int half = 0; half < 2; ++half)
            dots(w, rows.first[half], rows.count[half], rows.following(w, half), from + t * x.stride, x.stride, count,
                 y + half * W);
        give(t, count);
    }
}

// Of a chunk: y = share * (product + bias), or y += that.
inline void put(const float* product, const float* bias, float share, bool add, int64_t count, float* y) {
    int64_t n = 0;
    for (; n + W <= count; n += W) {
        vec value = share * (bias ? load<vec>(product + n) + load<vec>(bias + n) : load<vec>(product + n));
        store(y + n, add ? load<vec>(y + n) + value : value);
    }
    for (; n < count; ++n) y[n] = share * (product[n] + (bias ? bias[n] : 0)) + (add ? y[n] : 0);
}

// y = x w^T + bias, or y += that.
struct Linear {
    const Matrix& w;
    const float* bias_N;
    float* y_TN;
    bool add = false;
};

// Several of the same x, whose weights are of one type and width.
inline void linears(std::initializer_list<Linear> all, const float* x_TD, int64_t T, int threads) {
    const Matrix& any = all.begin()->w;
    std::vector<std::pair<const Linear*, int64_t>> chunks;
    for (const Linear& linear : all)
        for (int64_t first = 0; first < linear.w.rows; first += CHUNK) chunks.emplace_back(&linear, first);
    with_weights(any, false, T > FEW, [&](auto weight) {
        using Weight = decltype(weight);
        Rows<Weight> x(x_TD, any.columns, {0, T}, nullptr, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (chunks.size() > 1)
        for (size_t chunk = 0; chunk < chunks.size(); ++chunk) {
            auto [linear, first] = chunks[chunk];
            int64_t N = linear->w.rows, count = std::min(CHUNK, N - first);
            const float* bias = linear->bias_N ? linear->bias_N + first : nullptr;
            auto target = [&, &linear = *linear, first = first](int64_t t) { return linear.y_TN + t * N + first; };
            multiply(Weight(linear->w), neighbours(first, N), x, 0, target,
                     [&, add = linear->add](int64_t, const float* product, float* y) { put(product, bias, 1, add, count, y); });
        }
    });
}

}  // namespace
