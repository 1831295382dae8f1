// Attention over the paged cache of keys and values.
//
// Shapes: T tokens of the pass, H query heads, h key/value heads, g = H / h, C head dim, P tokens of a cache block,
// R rows of a tile: the queries of neighbouring tokens of a sequence that share a key/value head.

#pragma once

#include "activations.hpp"
#include "multiply.hpp"

namespace {

// Norm and rotation of one head of a query or key.
inline void place(const Model& m, float* head, const float* norm, const float* cosine, const float* sine) {
    int64_t C = m.head_dim, half = C / 2;
    if (m.norm_heads && norm) rms_norm(head, norm, C, m.norm_eps, head);
    for (int64_t c = 0; c < half; ++c) {
        float first = head[c], second = head[c + half];
        head[c] = first * cosine[c] - second * sine[c];
        head[c + half] = second * cosine[c + half] + first * sine[c + half];
    }
}

inline void clip(float* x, int64_t width, float limit) {
    if (limit > 0)
        for (int64_t i = 0; i < width; ++i) x[i] = std::clamp(x[i], -limit, limit);
}

inline void keep(const Model& m, void* cache, int64_t slot, const float* rows) {
    int64_t C = m.head_dim, P = m.block_tokens;
    for (int64_t h = 0; h < m.kv_heads; ++h) {
        int64_t to = ((slot / P * m.kv_heads + h) * P + slot % P) * C;
        if (m.cache_type == FLOAT32) std::memcpy((float*)cache + to, rows + h * C, C * sizeof(float));
        else round_row(rows + h * C, C, (uint16_t*)cache + to);
    }
}

// Tokens [first, first + count) of the pass, neighbours in a sequence from a position on.
struct Tile {
    const int32_t* table;
    int64_t first, count, position;
};

// Where the tokens of a pass belong, and how they share the work of attention; the same in all layers.
struct Plan {
    std::vector<int64_t> positions, slots;  // a slot is block * P + offset
    std::vector<Tile> tiles;
};

// Where the keys and values of a sequence lie that a tile sees: positions [first, end), from a multiple of 16 on.
struct Sight {
    const int32_t* table;
    int64_t first, end, base, P, kv_heads, head;
    int64_t padded() const { return (end - base + W - 1) / W * W; }
    int64_t row(int64_t position) const { return (table[position / P] * kv_heads + head) * P + position % P; }
    // Of the 16 positions after those from `position` on; there may be none.
    int64_t row_after(int64_t position) const { return row(std::min(position / W * W + W, (end - 1) / W * W)); }
};

// scores [R, padded] = products of queries and keys.
template <class M> void score(const M& keys, const Rows<M>& q, const Sight& sight, float* scores) {
    int64_t padded = sight.padded();
    for (int64_t at = sight.base; at < sight.end; at += CHUNK) {
        int64_t next = std::min(at + W, sight.end - 1);
        Chunk rows{{sight.row(at), sight.row(next / W * W)},
                   {std::min<int64_t>(W, sight.end - at), std::clamp<int64_t>(sight.end - at - W, 0, W)}};
        for (int64_t soon : {sight.row_after(at + W), sight.row_after(at + CHUNK)})
            for (int64_t r = 0; r < W; ++r)
                for (int64_t c = 0; c < keys.columns; c += M::STEP) fetch(address(keys, soon + r, c));
        auto target = [&](int64_t r) { return scores + r * padded + at - sight.base; };
        multiply(keys, rows, q, 0, target, [&](int64_t, const float* products, float* to) {
            store(to, load<vec>(products));
            if (rows.count[1]) store(to + W, load<vec>(products + W));
        });
    }
}

// Exponentials of the scores of a row that sees [first, end); what to multiply their sums with.
inline float weigh(const Model& m, float* s, int64_t first, int64_t end, int64_t padded, const float* sink) {
    std::fill(s, s + first, -INFINITY);
    std::fill(s + end, s + padded, -INFINITY);
    vec highest = vec{} - INFINITY, total = {};
    for (int64_t l = 0; l < padded; l += W) {
        vec score = load<vec>(s + l);
        highest = score > highest ? score : highest;
    }
    float most = sink ? *sink : -INFINITY;
    for (int lane = 0; lane < W; ++lane) most = std::max(most, highest[lane] * m.softmax_scale);
    for (int64_t l = 0; l < padded; l += W) {
        vec score = load<vec>(s + l), e = exp_negative(score * m.softmax_scale - most);
        e = score == -INFINITY ? vec{} : e;
        store(s + l, e);
        total += e;
    }
    return 1 / (sum(total) + (sink ? std::exp(*sink - most) : 0));
}

// Columns [c, c + 16 v) of n rows of the result: sums of values, weighted.
template <int n, int v, class M>
inline void mix(const M& values, const Sight& sight, const float* weights, int64_t padded, int64_t c, float* o, int64_t C) {
    vec sums[n][v] = {};
    for (int64_t at = sight.first; at < sight.end;) {
        int64_t row = sight.row(at), soon = sight.row_after(at) + at % W, stop = std::min(sight.end, (at / W + 1) * W);
        const float* weight = weights + at - sight.base;
        for (; at < stop; ++at, ++row, ++soon, ++weight) {
            vec value[v];
            for (int k = 0; k < v; ++k) {
                value[k] = values.at(row, c + k * W);
                fetch(address(values, soon, c + k * W));
            }
            for (int i = 0; i < n; ++i)
                for (int k = 0; k < v; ++k) sums[i][k] += value[k] * weight[i * padded];
        }
    }
    for (int i = 0; i < n; ++i)
        for (int k = 0; k < v; ++k) store(o + i * C + c + k * W, sums[i][k]);
}

template <int n, class M>
inline void mix_rows(const M& values, const Sight& sight, const float* weights, float* o, int64_t C) {
    int64_t c = 0, padded = sight.padded();
    for (; c + 4 * W <= C; c += 4 * W) mix<n, 4>(values, sight, weights, padded, c, o, C);
    for (; c + W <= C; c += W) mix<n, 1>(values, sight, weights, padded, c, o, C);
    for (; c < C; ++c)
        for (int i = 0; i < n; ++i) {
            float total = 0;
            for (int64_t at = sight.first; at < sight.end; ++at)
                total += values.one(sight.row(at), c) * weights[i * padded + at - sight.base];
            o[i * C + c] = total;
        }
}

// o [T, H, C] of one tile and key/value head.
template <class K, class V>
void attend(const Model& m, const Layer& layer, const K& keys, const V& values, const Tile& tile, int64_t head,
            const float* q_THC, float* o_THC) {
    int64_t C = m.head_dim, g = m.heads / m.kv_heads, R = tile.count * g, start = tile.position;
    auto first_of = [&](int64_t position) { return layer.window ? std::max<int64_t>(0, position + 1 - layer.window) : 0; };
    Sight sight{tile.table, first_of(start), start + tile.count, first_of(start) / W * W, m.block_tokens, m.kv_heads, head};
    int64_t padded = sight.padded();
    thread_local Buffer<float> scores, mixed;
    scores.resize(R * padded);
    mixed.resize(R * C);
    std::vector<int64_t> order(R);
    for (int64_t r = 0; r < R; ++r) order[r] = (tile.first + r / g) * m.heads + head * g + r % g;
    Rows<K> q(q_THC, C, {0, R}, order.data(), 1);
    score(keys, q, sight, scores.data());
    std::vector<float> factors(R);
    for (int64_t r = 0; r < R; ++r) {
        int64_t position = start + r / g;
        factors[r] = weigh(m, &scores[r * padded], first_of(position) - sight.base, position + 1 - sight.base, padded,
                           layer.sinks ? layer.sinks + head * g + r % g : nullptr);
    }
    int64_t r = 0;
    for (; r + 4 <= R; r += 4) mix_rows<4>(values, sight, &scores[r * padded], &mixed[r * C], C);
    if (r + 2 <= R) mix_rows<2>(values, sight, &scores[r * padded], &mixed[r * C], C), r += 2;
    if (r < R) mix_rows<1>(values, sight, &scores[r * padded], &mixed[r * C], C);
    for (r = 0; r < R; ++r)
        for (int64_t c = 0; c < C; ++c) o_THC[order[r] * C + c] = mixed[r * C + c] * factors[r];
}

// Many rows of a tile share the work of transposing keys; their scores should stay in the cache.
inline Plan make_plan(const Model& m, const Pass& pass) {
    Plan plan;
    int64_t g = m.heads / m.kv_heads, P = m.block_tokens;
    for (const Span* span = pass.spans; span < pass.spans + pass.num_spans; ++span) {
        const int32_t* table = pass.tables + span->row * pass.table_width;
        int64_t before = plan.positions.size(), end = span->first + span->count;
        for (int64_t position = span->first; position < end; ++position) {
            plan.positions.push_back(position);
            plan.slots.push_back(table[position / P] * P + position % P);
        }
        int64_t most = std::max<int64_t>(1, std::clamp<int64_t>(65536 / end, TILE, 4 * TILE) / g);
        for (int64_t done = 0; done < span->count; done += most)
            plan.tiles.push_back({table, before + done, std::min(most, span->count - done), span->first + done});
    }
    return plan;
}

// x += attention of the normalised rows h.
inline void attention(const Model& m, const Layer& layer, const Pass& pass, const Plan& plan, const float* h_TD, float* x_TD,
                      int threads) {
    int64_t T = pass.num_tokens, C = m.head_dim, q_width = m.heads * C, kv_width = m.kv_heads * C;
    Buffer<float> q(T * q_width), k(T * kv_width), v(T * kv_width), o(T * q_width);
    linears({{layer.wq, layer.bq, q.data()}, {layer.wk, layer.bk, k.data()}, {layer.wv, layer.bv, v.data()}}, h_TD, T, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (T > 8)
    for (int64_t t = 0; t < T; ++t) {
        float *q_t = &q[t * q_width], *k_t = &k[t * kv_width], *v_t = &v[t * kv_width];
        if (m.norm_all_heads) {
            rms_norm(q_t, layer.q_norm, q_width, m.norm_eps, q_t);
            rms_norm(k_t, layer.k_norm, kv_width, m.norm_eps, k_t);
        }
        clip(q_t, q_width, m.clip_qkv);
        clip(k_t, kv_width, m.clip_qkv);
        clip(v_t, kv_width, m.clip_qkv);
        const float *cosine = pass.cosines + plan.positions[t] * C, *sine = pass.sines + plan.positions[t] * C;
        for (int64_t head = 0; head < m.heads; ++head) place(m, q_t + head * C, layer.q_norm, cosine, sine);
        for (int64_t head = 0; head < m.kv_heads; ++head) place(m, k_t + head * C, layer.k_norm, cosine, sine);
        keep(m, layer.keys, plan.slots[t], k_t);
        keep(m, layer.values, plan.slots[t], v_t);
    }
    auto run = [&](auto keys, auto values) {
        int64_t items = plan.tiles.size() * m.kv_heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (int64_t item = 0; item < items; ++item)
            attend(m, layer, keys, values, plan.tiles[item / m.kv_heads], item % m.kv_heads, q.data(), o.data());
    };
    Matrix keys{layer.keys, nullptr, 0, C, m.cache_type}, values{layer.values, nullptr, 0, C, m.cache_type};
    if (m.cache_type == FLOAT32) run(Float32(keys), Float32(values));
    else if (C % Bfloat16Pairs::STEP) run(Bfloat16(keys), Bfloat16(values));
    else run(Bfloat16Pairs(keys), Bfloat16(values));
    linears({{layer.wo, layer.bo, x_TD, true}}, o.data(), T, threads);
}

}  // namespace
