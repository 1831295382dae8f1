"""The OpenAI wire format: the completion request, the answers and the error body."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_ray.errors import RequestError
from moe_ray.serving.engine.request import Chunk, SamplingParams, Tokenizer, TokenLogprob

_SHORT = 60
_MAX_CHOICES_PER_PROMPT = 128
# Fields of OpenAI's API that are not served, with the values that ask for nothing.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "suffix": ("",),
}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """How a stream ends."""

    include_usage: bool = Field(False, description="send the token counts in a last event")
    include_obfuscation: Literal[False] = Field(False, description="not supported")


class CompletionRequest(_Strict):
    """Body of `POST /v1/completions`; a field that is null counts as left out."""

    model: str = Field(description="the served model's name, as /v1/models lists it")
    prompt: Any = Field(description="a text, a list of texts, a list of token ids or a list of such lists")
    max_tokens: int = Field(16, description="most tokens to generate for each prompt")
    temperature: float = Field(1.0, description="0 to 2; 0 always takes the most likely token")
    top_p: float = Field(1.0, description="keep the most likely tokens up to this probability")
    top_k: int = Field(0, description="keep this many most likely tokens; 0 keeps all (not in OpenAI's API)")
    n: Annotated[int, Field(ge=1, le=_MAX_CHOICES_PER_PROMPT)] = Field(1, description="choices a prompt")
    seed: int | None = Field(None, description="repeat a call with the same seed to get the same text")
    stop: str | list[str] = Field(default_factory=list, description="up to 4 strings that end the text")
    stream: bool = Field(False, description="send the text as server-sent events")
    stream_options: StreamOptions | None = Field(None, description="only with stream")
    logprobs: int | None = Field(None, description="log-probabilities of up to 5 most likely tokens")
    user: str | None = Field(None, description="ignored")

    def sampling_params(self, choice: int) -> SamplingParams:
        """Parameters of the `choice`-th of the n texts of a prompt, each with a seed of its own.

        Raises:
            RequestError: a value is out of range.
        """
        seed = self.seed
        if seed is not None:
            # Refuses a seed out of range before the others are derived from it, wrapping around.
            SamplingParams(seed=seed)
            seed = (seed + choice + 2**63) % 2**64 - 2**63
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            logprobs=self.logprobs,
        )


def parse_completion_request(body: Mapping[str, Any]) -> CompletionRequest:
    """Validate a decoded JSON body.

    Raises:
        RequestError: a field is unknown, unsupported, missing or of the wrong type.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name, neutral in _UNSUPPORTED.items():
        value = given.pop(name, neutral[0])
        if value not in neutral and not (name == "best_of" and value == given.get("n", 1)):
            raise RequestError(f"{name}={_short(value)} is not supported.", f"leave {name} out.", param=name)
    for name in given:
        if name not in CompletionRequest.model_fields:
            nearest = difflib.get_close_matches(name[:_SHORT], CompletionRequest.model_fields, n=1)
            fix = f"did you mean {nearest[0]!r}?" if nearest else "leave it out."
            raise RequestError(f"unknown field {_short(name)}.", fix, param=name[:_SHORT])
    try:
        request = CompletionRequest.model_validate(given)
    except ValidationError as error:
        _raise_first(error)
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options is set without stream.", "set stream to true.", param="stream_options")
    return request


def parse_prompts(prompt: Any) -> list[str | tuple[int, ...]]:
    """The prompts of a request, each a text or token ids.

    Raises:
        RequestError: it is none of the four forms.
    """
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if _are_ids(prompt):
            return [tuple(prompt)]
        if all(isinstance(item, str) for item in prompt):
            return prompt
        if all(isinstance(item, list) and _are_ids(item) for item in prompt):
            return [tuple(item) for item in prompt]
    raise RequestError(
        "the prompt has the wrong type.",
        "send a string, a list of strings, a list of token ids or a list of lists of token ids.",
        param="prompt",
    )


def completion_body(
    completion_id: str, created: int, model: str, choices: Sequence[Any], usage: dict[str, int] | None = None
) -> dict[str, Any]:
    """A whole completion or one event of a stream."""
    body = {
        "id": completion_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": list(choices),
    }
    return body if usage is None else {**body, "usage": usage}


def choice_body(index: int, chunks: Sequence[Chunk], tokenizer: Tokenizer) -> dict[str, Any]:
    """One choice out of consecutive chunks of its text."""
    logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
    return {
        "index": index,
        "text": "".join(chunk.text for chunk in chunks),
        "logprobs": logprobs_body(logprobs, tokenizer) if logprobs else None,
        "finish_reason": chunks[-1].finish_reason,
    }


def logprobs_body(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """Log-probabilities; tokens that are no whole characters are named `token_id:N`."""

    def name(token_id: int) -> str:
        text = tokenizer.decode([token_id])
        return text if text and "\ufffd" not in text else f"token_id:{token_id}"

    return {
        "tokens": [name(lp.token_id) for lp in logprobs],
        "token_logprobs": [lp.logprob for lp in logprobs],
        "top_logprobs": [
            {name(token_id): value for token_id, value in (*lp.top, (lp.token_id, lp.logprob))} for lp in logprobs
        ],
        "text_offset": [lp.text_offset for lp in logprobs],
    }


def usage_body(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts; an end-of-text token counts as generated."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def model_body(name: str, created: int) -> dict[str, Any]:
    """An entry of `/v1/models`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "moe_ray"}


def error_body(error: RequestError) -> dict[str, Any]:
    """The body of every answer that is no success."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def to_json(body: Mapping[str, Any]) -> bytes:
    """Compact UTF-8 JSON; halves of surrogate pairs, which a client may send, come back as `?`."""
    text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", errors="replace")


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


def _raise_first(error: ValidationError) -> NoReturn:
    details = error.errors(include_url=False, include_context=False)[0]
    location = [str(part) for part in details["loc"] if part not in ("str", "list[str]")] or ["body"]
    name = ".".join(location)
    if details["type"] == "extra_forbidden":
        raise RequestError(f"unknown field {_short(name)}.", "leave it out.", param=location[0])
    if details["type"] == "missing":
        raise RequestError(f"the field {name!r} is missing.", f"send {name}.", param=name)
    message = details["msg"][0].lower() + details["msg"][1:]
    field = CompletionRequest.model_fields.get(location[0])
    fix = f"{location[0]}: {field.description}." if field else "see /openapi.json."
    raise RequestError(f"{name}={_short(details['input'])} is not allowed: {message}.", fix, param=location[0])


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}…"
