"""`POST /v1/chat/completions`: what may be asked and what is answered."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from moe_ray.errors import RequestError
from moe_ray.serving.engine.request import MAX_LOGPROBS, Chunk, Tokenizer, TokenLogprob
from moe_ray.serving.openai.base import Answer, Fields, Usage, parse, short, unsupported
from moe_ray.serving.openai.sampling import PositiveInt, SamplingFields, token_name

_ONLY_TEXT = "this model reads and writes text only"


def _check_part_type(value: Any) -> Any:
    if isinstance(value, str) and value != "text":
        raise RequestError(
            f"content parts of type {short(value)} are not supported: {_ONLY_TEXT}.",
            "send parts of type text.",
            param="messages",
        )
    return value


def _check_role(value: Any) -> Any:
    if value in ("tool", "function"):
        raise RequestError(
            f"messages of role {short(value)} are not supported: the model calls no tools.",
            "send messages of the roles system, developer, user and assistant.",
            param="messages",
        )
    return value


class TextPart(Fields):
    """A part of a message."""

    type: Annotated[Literal["text"], BeforeValidator(_check_part_type)]
    text: str


class Message(Fields):
    """One turn of the conversation; parts are joined by line breaks."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_check_role)]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    refusal: Any = unsupported()
    audio: Any = unsupported()
    tool_calls: Any = unsupported([])
    function_call: Any = unsupported()
    annotations: Any = unsupported([])

    def for_template(self) -> dict[str, str]:
        """As chat templates read it."""
        content = self.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        return {"role": self.role, "content": text} | ({} if self.name is None else {"name": self.name})


class TextFormat(Fields):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Fields):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchema(Fields):
    """A schema with a name."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Fields):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


_Format = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(SamplingFields):
    """Body of `POST /v1/chat/completions`; a field that is null counts as left out."""

    messages: Annotated[list[Message], Field(min_length=1)] = Field(
        description="the conversation so far: role and content of each turn"
    )
    max_completion_tokens: PositiveInt | None = Field(
        None, description="most tokens to generate; default: what the context has room for"
    )
    max_tokens: PositiveInt | None = Field(None, description="older name of max_completion_tokens")
    logprobs: bool = Field(False, description="send the log-probability of each token")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description=f"and of up to {MAX_LOGPROBS} most likely tokens; only with logprobs"
    )
    response_format: _Format | None = Field(
        None, description="text, json_object, or json_schema with a schema that the text fits"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="more variables of the chat template (not in OpenAI's API)"
    )
    metadata: dict[str, str] = Field(default_factory=dict, description="ignored")
    safety_identifier: str | None = Field(None, description="ignored")
    prompt_cache_key: str | None = Field(None, description="ignored")
    store: Any = unsupported(False)
    tools: Any = unsupported([])
    tool_choice: Any = unsupported("none", "auto")
    parallel_tool_calls: Any = unsupported(True, False, description="without tools it asks for nothing")
    functions: Any = unsupported([])
    function_call: Any = unsupported("none", "auto")
    modalities: Any = unsupported(["text"], description=_ONLY_TEXT)
    audio: Any = unsupported()
    prediction: Any = unsupported()
    service_tier: Any = unsupported("auto", "default", description="there is one")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check_stream()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(
                "top_logprobs is set without logprobs.", "set logprobs to true.", param="top_logprobs"
            )
        if (
            None not in (self.max_tokens, self.max_completion_tokens)
            and self.max_tokens != self.max_completion_tokens
        ):
            raise RequestError(
                f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} differ.",
                "send only max_completion_tokens.",
                param="max_tokens",
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many most likely tokens to report; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The schema that the text must fit; None: any text."""
        if isinstance(self.response_format, JsonSchemaFormat):
            return self.response_format.json_schema.schema_
        return {"type": "object"} if isinstance(self.response_format, JsonObjectFormat) else None


class TopLogprob(Answer):
    """A token and its natural-log probability; `bytes` is null where the token is no whole characters."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A generated token beside the most likely ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """Log-probabilities of the tokens of a text, of the raw logits."""

    content: list[ChatLogprob]
    refusal: None


class ChatMessage(Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answer):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Answer):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Answer):
    """The next piece of an answer; the first names the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Answer):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletionChunk(Answer):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


def parse_chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """Validate a decoded JSON body.

    Raises:
        RequestError: a field is unknown, unsupported, missing or of the wrong type.
    """
    return parse(ChatRequest, body)


def message_choice(index: int, chunks: Sequence[Chunk], tokenizer: Tokenizer) -> dict[str, Any]:
    """A `ChatChoice` out of all chunks of a text."""
    text = "".join(chunk.text for chunk in chunks)
    return {
        "index": index,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": _logprobs(chunks, tokenizer),
        "finish_reason": chunks[-1].finish_reason,
    }


def delta_choice(index: int, chunk: Chunk | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """A `ChunkChoice`; None: the first, which names the role."""
    if chunk is None:
        delta: dict[str, str] = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
    return {
        "index": index,
        "delta": {"content": chunk.text} if chunk.text else {},
        "logprobs": _logprobs([chunk], tokenizer),
        "finish_reason": chunk.finish_reason,
    }


def _logprobs(chunks: Sequence[Chunk], tokenizer: Tokenizer) -> dict[str, Any] | None:
    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        text = tokenizer.decode([token_id])
        name = token_name(text, token_id)
        return {"token": name, "logprob": logprob, "bytes": list(text.encode()) if name == text else None}

    def full(lp: TokenLogprob) -> dict[str, Any]:
        return {**entry(lp.token_id, lp.logprob), "top_logprobs": [entry(*pair) for pair in lp.top]}

    content = [full(lp) for chunk in chunks for lp in chunk.logprobs]
    return {"content": content, "refusal": None} if content else None
