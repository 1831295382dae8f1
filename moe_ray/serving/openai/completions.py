"""`POST /v1/completions`: what may be asked and what is answered."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, WithJsonSchema, model_validator

from moe_ray.errors import RequestError
from moe_ray.serving.engine.request import Chunk, Tokenizer, TokenLogprob
from moe_ray.serving.openai.base import Answer, Usage, parse, unsupported
from moe_ray.serving.openai.sampling import MAX_CHOICES_PER_PROMPT, NonNegativeInt, SamplingFields, token_name

Prompt = str | tuple[int, ...]
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
# Read by hand: the errors of a union of four would name none of them.
PromptField = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]}),
]


class CompletionRequest(SamplingFields):
    """Body of `POST /v1/completions`; a field that is null counts as left out."""

    prompt: PromptField = Field(description="a text, a list of texts, a list of token ids or a list of such lists")
    max_tokens: NonNegativeInt = Field(16, description="most tokens to generate for each prompt; 0 only with echo")
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(
        None, description="log-probabilities of up to 5 most likely tokens"
    )
    echo: bool = Field(False, description="begin each text with its prompt")
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES_PER_PROMPT)] | None = Field(
        None, description="generate this many texts a prompt and answer the n most likely; not with stream"
    )
    suffix: Any = unsupported("")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check_stream()
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(
                f"best_of={self.best_of} is less than n={self.n}.", "raise best_of.", param="best_of"
            )
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise RequestError("best_of cannot be streamed.", "leave best_of or stream out.", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens=0 is not allowed.", "use at least 1, or echo.", param="max_tokens")
        return self


class Logprobs(Answer):
    """Natural-log probabilities of the tokens of a text, of the raw logits."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One text, or in a stream the next piece of it."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(Answer):
    """Answer of `POST /v1/completions`, and each event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


def parse_completion_request(body: Mapping[str, Any]) -> CompletionRequest:
    """Validate a decoded JSON body.

    Raises:
        RequestError: a field is unknown, unsupported, missing or of the wrong type.
    """
    return parse(CompletionRequest, body)


def parse_prompts(prompt: Any, param: str = "prompt") -> list[Prompt]:
    """The prompts of a request, each a text or token ids.

    Raises:
        RequestError: it is none of the four forms.
    """
    if isinstance(prompt, str):
        return [prompt]
    if prompt == []:
        raise RequestError(f"the {param} is an empty list.", "send at least one text or token id.", param=param)
    if isinstance(prompt, list):
        if _are_ids(prompt):
            return [tuple(prompt)]
        if all(isinstance(item, str) for item in prompt):
            return prompt
        if all(isinstance(item, list) and item and _are_ids(item) for item in prompt):
            return [tuple(item) for item in prompt]
    raise RequestError(
        f"the {param} has the wrong type.",
        "send a string, a list of strings, a list of token ids or a list of lists of token ids.",
        param=param,
    )


def choice_body(index: int, chunks: Sequence[Chunk], tokenizer: Tokenizer) -> dict[str, Any]:
    """A `CompletionChoice` out of consecutive chunks of a text."""
    logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
    return {
        "index": index,
        "text": "".join(chunk.text for chunk in chunks),
        "logprobs": logprobs_body(logprobs, tokenizer) if logprobs else None,
        "finish_reason": chunks[-1].finish_reason,
    }


def logprobs_body(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """A `Logprobs`; a token is among its own most likely ones in any case."""

    def name(token_id: int) -> str:
        return token_name(tokenizer.decode([token_id]), token_id)

    return {
        "tokens": [name(lp.token_id) for lp in logprobs],
        "token_logprobs": [lp.logprob for lp in logprobs],
        "top_logprobs": [
            None
            if lp.logprob is None
            else {name(token_id): value for token_id, value in (*lp.top, (lp.token_id, lp.logprob))}
            for lp in logprobs
        ],
        "text_offset": [lp.text_offset for lp in logprobs],
    }


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)
