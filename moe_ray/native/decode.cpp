// One forward pass of a Mixture-of-Experts transformer, on a CPU; all sums are float32.
//
// Shapes: T tokens of the pass, D model dim, V vocabulary, N rows of a weight.

#include "attention.hpp"
#include "feed_forward.hpp"

extern "C" {

// Normalised final hidden states [T, D]; the new keys and values go to the cache. Not 0: experts are missing.
int32_t forward(const Model* model, const Pass* pass, float* hidden_TD, int threads) {
    const Model& m = *model;
    int64_t T = pass->num_tokens, D = m.dim;
    Buffer<float> x(T * D), h(T * D);
    Plan plan = make_plan(m, *pass);
    auto normalise = [&](const float* weight, float* to) {
#pragma omp parallel for num_threads(threads) schedule(static) if (T > 8)
        for (int64_t t = 0; t < T; ++t) rms_norm(&x[t * D], weight, D, m.norm_eps, to + t * D);
    };
    with_weights(m.embed, true, false, [&](auto embed) {
        for (int64_t t = 0; t < T; ++t)
            for (int64_t d = 0; d < D; ++d) x[t * D + d] = embed.one(pass->tokens[t], d);
    });
    for (const Layer* layer = m.layers; layer < m.layers + m.num_layers; ++layer) {
        normalise(layer->attention_norm, h.data());
        attention(m, *layer, *pass, plan, h.data(), x.data(), threads);
        normalise(layer->ffn_norm, h.data());
        if (layer->router.data && !experts(m, *layer, h.data(), T, x.data(), threads)) return 1;
        if (layer->dense_in.data) dense(m, *layer, h.data(), T, x.data(), threads);
    }
    normalise(m.norm, hidden_TD);
    return 0;
}

// y [T, N] = x [T, D] w^T.
void multiply(const Matrix* w, const float* x, int64_t num_tokens, float* y, int threads) {
    linears({{*w, nullptr, y}}, x, num_tokens, threads);
}
}
