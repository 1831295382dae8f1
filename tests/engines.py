"""A tiny model, requests for an engine of it, and the tokens that a plain forward pass gives."""

import torch

from moe_ray.config import ModelConfig
from moe_ray.data.tokenizer import train_tokenizer
from moe_ray.models.transformer import build_model
from moe_ray.serving.engine.request import Request, SamplingParams

MAX_CONTEXT = 64
LINES = ["the cat sat on the mat and saw the other cat", "naïve café, 東京 🙂 and more text of all kinds"]


def make_tokenizer():
    return train_tokenizer(LINES * 5, 320)


def make_model(tokenizer, **settings):
    # A large init_std sets the logits far apart, so that rounding never decides between two tokens.
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + 8,
        dim=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        num_experts=8,
        expert_dim=32,
        num_dense_layers=1,
        dense_dim=64,
        max_sequence_length=MAX_CONTEXT,
        init_std=0.4,
        **settings,
    )
    return build_model(config, seed=1).eval()


def greedy(model, tokenizer, prompt, max_tokens):
    """Tokens of full forward passes without a cache; the last may be the end-of-text token."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(max_tokens):
            hidden_SD = model(torch.tensor([tokens])).hidden_BSD[0]
            tokens.append(int(model.logits(hidden_SD[-1])[: tokenizer.vocab_size].argmax()))
            if tokens[-1] == tokenizer.eos_id:
                break
    return tokens[len(prompt) :]


def make_request(name, prompt, **params):
    return Request(name, tuple(prompt), SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **params}))


def make_prompt(rng, tokenizer, longest=40):
    return [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, longest))]


def run(engine, *requests):
    """Text, finish reason, number of tokens and chunks of each request, in order."""
    for request in requests:
        engine.submit(request)
    chunks = {request.id: [] for request in requests}
    while engine.has_work:
        for chunk in engine.step():
            chunks[chunk.request_id].append(chunk)
    return [
        (
            "".join(chunk.text for chunk in chunks[r.id]),
            chunks[r.id][-1].finish_reason,
            chunks[r.id][-1].num_tokens,
            chunks[r.id],
        )
        for r in requests
    ]


def expected(model, tokenizer, request):
    tokens = greedy(model, tokenizer, request.prompt_ids, request.params.max_tokens)
    ended = tokens[-1] == tokenizer.eos_id
    return tokenizer.decode(tokens), "stop" if ended else "length", len(tokens)
