// Routers, experts and dense feed-forward layers.
//
// Shapes: T tokens of the pass, D model dim, E experts, K experts a token, N pairs of a token and one of its experts,
// F hidden dim of an expert, G = 2 * F where gated, else F.

#pragma once

#include "activations.hpp"
#include "multiply.hpp"

namespace {

// The K best of E scores, best first, lower numbers before higher ones of the same score.
inline void choose(const Model& m, const float* scores, int32_t* ids) {
    std::vector<float> left(scores, scores + m.num_experts);
    for (int64_t k = 0; k < m.top_k; ++k) {
        ids[k] = int32_t(std::max_element(left.begin(), left.end()) - left.begin());
        left[ids[k]] = -INFINITY;
    }
}

// Only the groups with the greatest sums of their best two scores keep them.
inline void limit_groups(const Model& m, float* scores) {
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

// As moe_ray/models/top_k_router.py routes, of the logits of one token.
inline void route(const Model& m, const Layer& layer, const float* logits, int32_t* ids, float* weights) {
    std::vector<float> scores(logits, logits + m.num_experts), biased;
    if (m.sigmoid) std::transform(scores.begin(), scores.end(), scores.begin(), [](float x) { return sigmoid(x); });
    else softmax(scores.data(), m.num_experts);
    biased = scores;
    for (int64_t e = 0; e < m.num_experts && layer.expert_bias; ++e) biased[e] += layer.expert_bias[e];
    if (m.num_groups > 1) limit_groups(m, biased.data());
    choose(m, biased.data(), ids);
    float total = 1e-20f;
    for (int64_t k = 0; k < m.top_k; ++k) weights[k] = m.softmax_after_top_k ? logits[ids[k]] : scores[ids[k]];
    if (m.softmax_after_top_k) softmax(weights, m.top_k);
    for (int64_t k = 0; k < m.top_k; ++k) total += weights[k];
    for (int64_t k = 0; k < m.top_k; ++k) weights[k] *= m.route_scale / (m.route_norm ? total : 1);
}

// Tokens by the experts that they go to: those of expert e are at [ends[e], ends[e + 1]).
struct Groups {
    std::vector<int64_t> ends, tokens;
    std::vector<float> weights;
};

inline Groups group(const std::vector<int32_t>& ids_TK, const std::vector<float>& weights_TK, int64_t E, int64_t K) {
    int64_t N = ids_TK.size();
    Groups groups{std::vector<int64_t>(E + 1), std::vector<int64_t>(N), std::vector<float>(N)};
    for (int32_t id : ids_TK) ++groups.ends[id + 1];
    for (int64_t e = 0; e < E; ++e) groups.ends[e + 1] += groups.ends[e];
    std::vector<int64_t> next(groups.ends.begin(), groups.ends.end() - 1);
    for (int64_t pair = 0; pair < N; ++pair) {
        int64_t at = next[ids_TK[pair]]++;
        groups.tokens[at] = pair / K;
        groups.weights[at] = weights_TK[pair];
    }
    return groups;
}

// The weights of each expert, all of one type and shape, with what is added to their products.
struct Stacked {
    const Matrix* weights;
    const float* bias;
};

// Activations [N, F] of the normalised rows h.
inline void hidden(const Model& m, const Stacked& in, const Groups& groups, const std::vector<int64_t>& chosen,
                   const float* h_TD, int64_t F, bool many, float* active_NF, int threads) {
    bool gated = is_gated(m);
    int64_t G = gated ? 2 * F : F, step = gated ? W : CHUNK;
    // Work in pieces of rows.
    std::vector<std::pair<int64_t, int64_t>> pieces;
    for (int64_t e : chosen)
        for (int64_t f = 0; f < F; f += step) pieces.emplace_back(e, f);
    with_weights(*in.weights, m.cache_type == FLOAT32, many, [&](auto any) {
        using Weight = decltype(any);
        Rows<Weight> x(h_TD, m.dim, groups.ends, groups.tokens.data(), threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, share(pieces.size(), threads))
        for (size_t piece = 0; piece < pieces.size(); ++piece) {
            auto [e, f] = pieces[piece];
            int64_t count = std::min(step, F - f), some = std::min<int64_t>(W, count);
            Chunk rows = gated ? Chunk{{f, f + F}, {some, some}} : neighbours(f, f + count);
            const float* bias = in.bias ? in.bias + e * G : nullptr;
            auto target = [&, f = f](int64_t i) { return active_NF + i * F + f; };
            multiply(Weight(in.weights[e]), rows, x, e, target, [&](int64_t, float* product, float* active) {
                for (int64_t n = 0; n < CHUNK && bias; ++n)
                    if (n % W < rows.count[n / W]) product[n] += bias[rows.first[n / W] + n % W];
                vec low = load<vec>(product), high = load<vec>(product + W);
                store(product, activate(m, low, high));
                if (!gated) store(product + W, activate(m, high, high));
                put(product, nullptr, 1, false, count, active);
            });
        }
    });
}

// x += weighted outputs of each token's experts for the normalised rows h. Only chosen experts are read.
inline void feed_forward(const Model& m, const Stacked& in, const Stacked& out, const Groups& groups, const float* h_TD,
                         float* x_TD, int threads) {
    int64_t D = m.dim, F = out.weights->columns, N = groups.ends.back();
    std::vector<int64_t> chosen;
    for (size_t e = 0; e + 1 < groups.ends.size(); ++e)
        if (groups.ends[e] < groups.ends[e + 1]) chosen.push_back(e);
    bool many = N > FEW * (int64_t)chosen.size();
    Buffer<float> active_NF(N * F);
    hidden(m, in, groups, chosen, h_TD, F, many, active_NF.data(), threads);
    with_weights(*out.weights, m.cache_type == FLOAT32, many, [&](auto any) {
        using Weight = decltype(any);
        Rows<Weight> active(active_NF.data(), F, groups.ends, nullptr, threads);
        // A thread owns columns of the result: several experts add to the same token.
#pragma omp parallel for num_threads(threads) schedule(dynamic, share(D / CHUNK, threads))
        for (int64_t first = 0; first < D; first += CHUNK)
            for (size_t i = 0; i < chosen.size(); ++i) {
                int64_t e = chosen[i], count = std::min(CHUNK, D - first);
                const float* bias = out.bias ? out.bias + e * D + first : nullptr;
                Chunk rows = neighbours(first, first + count);
                rows.after = i + 1 < chosen.size() ? address(Weight(out.weights[chosen[i + 1]]), first)
                                                   : address(Weight(out.weights[chosen[0]]), first + CHUNK);
                auto target = [&](int64_t i) { return x_TD + groups.tokens[i] * D + first; };
                multiply(Weight(out.weights[e]), rows, active, e, target, [&](int64_t i, const float* product, float* x) {
                    put(product, bias, groups.weights[i], true, count, x);
                });
            }
    });
}

// Whether all experts could be had.
inline bool experts(const Model& m, const Layer& layer, const float* h_TD, int64_t T, float* x_TD, int threads) {
    int64_t E = m.num_experts, K = m.top_k;
    Buffer<float> logits(T * E);
    std::vector<float> weights(T * K);
    std::vector<int32_t> ids(T * K);
    linears({{layer.router, layer.router_bias, logits.data()}}, h_TD, T, threads);
    for (int64_t t = 0; t < T; ++t) route(m, layer, &logits[t * E], &ids[t * K], &weights[t * K]);
    if (m.acquire && m.acquire(&layer - m.layers, ids.data(), T * K)) return false;
    Groups groups = group(ids, weights, E, K);
    feed_forward(m, {layer.w_in, layer.b_in}, {layer.w_out, layer.b_out}, groups, h_TD, x_TD, threads);
    return true;
}

// A dense layer or the shared experts: one expert that all tokens go to, with the weight of its gate if there is one.
inline void dense(const Model& m, const Layer& layer, const float* h_TD, int64_t T, float* x_TD, int threads) {
    Groups groups{{0, T}, std::vector<int64_t>(T), std::vector<float>(T, 1)};
    for (int64_t t = 0; t < T; ++t) {
        groups.tokens[t] = t;
        if (!layer.shared_gate) continue;
        float logit = 0;
        for (int64_t d = 0; d < m.dim; ++d) logit += h_TD[t * m.dim + d] * layer.shared_gate[d];
        groups.weights[t] = sigmoid(logit);
    }
    feed_forward(m, {&layer.dense_in, nullptr}, {&layer.dense_out, nullptr}, groups, h_TD, x_TD, threads);
}

}  // namespace
