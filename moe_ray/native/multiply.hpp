// Products of weights with rows of numbers.
//
// Weights are read where they lie and as they are stored. With few tokens the time goes to reading: rows are multiplied
// as they come, some at a time with up to six tokens. For many tokens that share a weight, rows are transposed and
// unpacked into panels of 32 that stay in the cache, and the tokens lie interleaved by twelve.
//
// Shapes: T tokens, N rows and D columns of a weight.

#pragma once

#include <functional>

#include "weights.hpp"

namespace {

constexpr int AHEAD = 2;           // tiles of rows that are prefetched
constexpr int64_t CHUNK = 2 * W;   // rows that a thread takes at a time
constexpr int64_t TILE = 12;       // tokens that a panel is multiplied with at a time
constexpr int64_t BLOCK = 24;      // tokens whose products with a chunk are kept

// Rows are short: without this the hardware begins each anew. Into the second cache: the first has room for little
// more than the tokens, and half as much comes through it.
inline void fetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// Two runs of up to 16 rows.
struct Chunk {
    int64_t first[2], count[2];
    int64_t row(int half, int64_t r) const { return count[half] ? first[half] + std::min(r, count[half] - 1) : first[0]; }
};

inline Chunk neighbours(int64_t first, int64_t last) {
    return {{first, first + W}, {std::min<int64_t>(W, last - first), std::clamp<int64_t>(last - first - W, 0, W)}};
}

// Rows of numbers as a type of weight wants them, in groups, each of which has a weight of its own. A group of many
// has tiles of 10 to 12 rows, of equal size; of a tile first come the first lanes of all its rows.
template <class M> struct Rows {
    using Input = typename M::Input;
    std::vector<int64_t> ends, starts, tiles;  // tiles: rows of one, or 0
    int64_t stride;
    Buffer<Input> data;
    Buffer<float> scales;

    // Row i is row order[i] of x, or row i.
    Rows(const float* x, int64_t columns, const std::vector<int64_t>& ends, const int64_t* order, int threads)
        : ends(ends), stride(M::stride(columns)), scales(ends.back()) {
        int64_t size = 0;
        for (size_t group = 0; group + 1 < ends.size(); ++group) {
            int64_t count = ends[group + 1] - ends[group];
            int64_t number = (count + TILE - 1) / TILE, tile = number ? (count + number - 1) / number : 0;
            starts.push_back(size);
            tiles.push_back(count >= M::MANY && columns % M::STEP == 0 ? tile : 0);
            size += (tiles.back() ? number * tile : count) * stride;
        }
        data.resize(size);
        for (size_t group = 0; group + 1 < ends.size(); ++group) {
            int64_t first = ends[group], count = ends[group + 1] - first;
#pragma omp parallel for num_threads(threads) schedule(static) if (count * columns > 16384)
            for (int64_t i = 0; i < count; ++i) {
                const float* from = x + (order ? order[first + i] : first + i) * columns;
                scales[first + i] = tiles[group] ? interleave(from, columns, group, i)
                                                 : M::encode(from, columns, &data[starts[group] + i * stride]);
            }
        }
    }

    float interleave(const float* from, int64_t columns, size_t group, int64_t i) {
        thread_local Buffer<Input> row;
        row.resize(stride);
        float scale = M::encode(from, columns, row.data());
        int64_t tile = tiles[group], lanes = columns * sizeof(Input) / 4;
        const char* lane = (const char*)row.data();
        char* to = (char*)&data[starts[group] + i / tile * tile * stride] + i % tile * 4;
        for (int64_t l = 0; l < lanes; ++l) std::memcpy(to + l * tile * 4, lane + l * 4, 4);
        return scale;
    }
};

// R rows of a weight times n tokens; each weight is read once and used n times.
template <int R, int n, class M>
inline void dot_tile(const M& w, int64_t row, const typename M::Input* x, int64_t stride, bool ahead, float* y) {
    typename M::Sums products[n * R];
    for (auto& product : products) product = typename M::Sums{};
    int64_t column = 0;
    for (; column + M::LEAST <= w.columns; column += M::STEP) {
        decltype(w.at(0, 0)) weights[R];
        for (int r = 0; r < R; ++r) {
            weights[r] = w.at(row + r, column);
            if (ahead) fetch(w.address(row + AHEAD * R + r, column));
        }
        for (int i = 0; i < n; ++i) {
            auto values = M::values(x + i * stride + column);
            for (int r = 0; r < R; ++r) products[i * R + r] = M::add(products[i * R + r], weights[r], values);
        }
    }
    auto finished = [&](auto i) { return w.finish(row + i % R, x + i / R * stride, products[i]); };
    float totals[(n * R + W - 1) / W * W];
    store(totals, sums<0, n * R>(finished));
    if constexpr (n * R > W) store(totals + W, sums<W, n * R>(finished));
    for (int i = 0; i < n; ++i) std::memcpy(y + i * CHUNK, totals + i * R, R * sizeof(float));
    for (; column < w.columns; ++column)
        for (int i = 0; i < n; ++i)
            for (int r = 0; r < R; ++r) y[i * CHUNK + r] += w.one(row + r, column) * wide(x[i * stride + column]);
}

// y[i * CHUNK + r] = row r of w . x[i].
template <int R, class M>
inline void dot_rows(const M& w, int64_t row, const typename M::Input* x, int64_t stride, int64_t T, float* y) {
    int64_t parts = (T + 5) / 6, t = 0;
    for (int64_t part = 0; part < parts; ++part) {
        int64_t count = (T - t + parts - part - 1) / (parts - part);
        const auto* from = x + t * stride;
        float* to = y + t * CHUNK;
        switch (count) {
            case 6: dot_tile<R, 6>(w, row, from, stride, t == 0, to); break;
            case 5: dot_tile<R, 5>(w, row, from, stride, t == 0, to); break;
            case 4: dot_tile<R, 4>(w, row, from, stride, t == 0, to); break;
            case 3: dot_tile<R, 3>(w, row, from, stride, t == 0, to); break;
            case 2: dot_tile<R, 2>(w, row, from, stride, t == 0, to); break;
            default: dot_tile<R, 1>(w, row, from, stride, t == 0, to);
        }
        t += count;
    }
}

template <class M>
inline void dots(const M& w, int64_t first, int64_t count, const typename M::Input* x, int64_t stride, int64_t T, float* y) {
    int64_t r = 0;
    for (; r + M::ROWS <= count; r += M::ROWS) dot_rows<M::ROWS>(w, first + r, x, stride, T, y + r);
    if constexpr (M::ROWS > 1)
        for (; r < count; ++r) dot_rows<1>(w, first + r, x, stride, T, y + r);
}

// The rows of a chunk with 16 of them in a vector, two vectors for each column, or pair of them.
template <class M> const vec* make_panel(const M& w, const Chunk& rows) {
    thread_local Buffer<vec> panel;
    int64_t steps = w.columns / M::STEP;
    panel.resize(steps * CHUNK);
    for (int half = 0; half < 2; ++half)
        for (int64_t step = 0; step < steps; ++step) {
            vec v[W];
            for (int64_t r = 0; r < W; ++r) {
                v[r] = (vec)w.at(rows.row(half, r), step * M::STEP);
                fetch(w.address(rows.row(half, r) + W, step * M::STEP));
            }
            transpose<1>(v, Lanes());
            for (int64_t i = 0; i < W; ++i) panel[(step * W + i) * 2 + half] = v[i];
        }
    return panel.data();
}

template <int n, class M> inline void panel_tile(const vec* panel, int64_t lanes, const uint32_t* x, float* y) {
    typename M::Sums products[n][2];
    for (auto& pair : products) pair[0] = pair[1] = typename M::Sums{};
    for (int64_t i = 0; i < lanes; ++i) {
        auto low = (typename M::Values)panel[2 * i], high = (typename M::Values)panel[2 * i + 1];
        for (int k = 0; k < n; ++k) {
            auto values = M::spread(x + i * n + k);
            products[k][0] = M::add(products[k][0], low, values);
            products[k][1] = M::add(products[k][1], high, values);
        }
    }
    for (int k = 0; k < n; ++k)
        for (int half = 0; half < 2; ++half) store(y + k * CHUNK + half * W, M::total(products[k][half]));
}

template <class M> inline void panel_tile(int64_t tile, const vec* panel, int64_t lanes, const uint32_t* x, float* y) {
    switch (tile) {
        case 10: return panel_tile<10, M>(panel, lanes, x, y);
        case 11: return panel_tile<11, M>(panel, lanes, x, y);
        default: return panel_tile<12, M>(panel, lanes, x, y);
    }
}

// sink(i, y) for each row i of a group: its products with the rows of a chunk, those of the second run from y[16] on.
template <class M, class Sink>
void multiply(const M& w, const Chunk& rows, const Rows<M>& x, int64_t group, const Sink& sink) {
    int64_t first = x.ends[group], T = x.ends[group + 1] - first, tile = x.tiles[group];
    const typename M::Input* from = &x.data[x.starts[group]];
    alignas(64) float factors[CHUNK], y[BLOCK * CHUNK];
    if constexpr (M::SCALED)
        for (int r = 0; r < CHUNK; ++r) factors[r] = w.factor(rows.row(r / W, r % W));
    auto give = [&](int64_t begin, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            if constexpr (M::SCALED)
                for (int r = 0; r < CHUNK; ++r) y[i * CHUNK + r] *= factors[r] * x.scales[first + begin + i];
            sink(first + begin + i, y + i * CHUNK);
        }
    };
    if constexpr (M::STEP == M::LEAST)
        if (tile) {
            const vec* panel = make_panel(w, rows);
            for (int64_t t = 0; t < T; t += tile) {
                panel_tile<M>(tile, panel, w.columns / M::STEP * W, (const uint32_t*)(from + t * x.stride), y);
                give(t, std::min(tile, T - t));
            }
            return;
        }
    for (int64_t t = 0; t < T; t += BLOCK) {
        int64_t count = std::min(BLOCK, T - t);
        for (int half = 0; half < 2; ++half)
            dots(w, rows.first[half], rows.count[half], from + t * x.stride, x.stride, count, y + half * W);
        give(t, count);
    }
}

// y = x w^T + bias, or y += that.
inline void linear(const Matrix& m, const float* x_TD, int64_t T, const float* bias_N, float* y_TN, bool add, int threads) {
    with_weights(m, false, T > FEW, [&](auto w) {
        Rows<decltype(w)> x(x_TD, m.columns, {0, T}, nullptr, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t first = 0; first < m.rows; first += CHUNK) {
            int64_t count = std::min(CHUNK, m.rows - first);
            multiply(w, neighbours(first, m.rows), x, 0, [&](int64_t t, const float* product) {
                float* y = y_TN + t * m.rows + first;
                for (int64_t n = 0; n < count; ++n)
                    y[n] = product[n] + (bias_N ? bias_N[first + n] : 0) + (add ? y[n] : 0);
            });
        }
    });
}

}  // namespace
