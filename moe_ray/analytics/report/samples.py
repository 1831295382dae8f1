"""Texts that a checkpoint writes after the beginnings of held-out ones."""

from collections.abc import Mapping, Sequence

from moe_ray.analytics.held_out import HeldOut
from moe_ray.analytics.report.parts import Sample
from moe_ray.checkpoint.inference import InferenceModel
from moe_ray.serving.engine.engine import Engine
from moe_ray.serving.engine.request import Request, SamplingParams

_PROMPT_TOKENS = 24
_NEW_TOKENS = 72
_MOST_SAMPLES = 6


def first_texts(held_out: HeldOut) -> dict[str, list[int]]:
    """Token ids of the first held-out sequence of each domain."""
    firsts = {int(domain): number for number, domain in reversed(list(enumerate(held_out.domains_N.tolist())))}
    return {held_out.domains[domain]: held_out.tokens_NS[firsts[domain]].tolist() for domain in sorted(firsts)}


def write_samples(model: InferenceModel, texts: Mapping[str, Sequence[int]]) -> list[Sample]:
    """One sample for each text, the same for the same checkpoint.

    Args:
        model: on a CPU, in float32.
        texts: token ids of a text by the name of its domain; its beginning is the prompt.
    """
    context = model.config.model.max_sequence_length
    prompts = {
        name: tuple(map(int, tokens[: min(_PROMPT_TOKENS, context // 2)]))
        for name, tokens in list(texts.items())[:_MOST_SAMPLES]
    }
    if not prompts:
        return []
    engine = Engine(
        model.model,
        model.tokenizer,
        max_batch_size=len(prompts),
        max_context=min(context, _PROMPT_TOKENS + _NEW_TOKENS),
        runner="torch",
    )
    for name, ids in prompts.items():
        room = min(_NEW_TOKENS, context - len(ids))
        engine.submit(Request(name, ids, SamplingParams(max_tokens=room, temperature=0.7, top_p=0.95, seed=0)))
    written = dict.fromkeys(prompts, "")
    while engine.has_work:
        for chunk in engine.step():
            written[chunk.request_id] += chunk.text
    engine.close()
    return [Sample(name, model.tokenizer.decode(ids), written[name]) for name, ids in prompts.items()]
