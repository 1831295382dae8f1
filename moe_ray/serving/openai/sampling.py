"""Fields that all generating routes share."""

import math
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from moe_ray.errors import RequestError
from moe_ray.serving.engine.grammar import Grammar
from moe_ray.serving.engine.request import MAX_BIASES, MAX_STOP_CHARACTERS, MAX_STOPS, SamplingParams
from moe_ray.serving.openai.base import Fields

MAX_CHOICES_PER_PROMPT = 128
_MAX_TIMEOUT_SECONDS = 86_400
_MAX_INT = 2**63 - 1

_Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
_Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES_PER_PROMPT)]
PositiveInt = Annotated[int, Field(ge=1, le=_MAX_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=_MAX_INT)]


class StreamOptions(Fields):
    """How a stream ends."""

    include_usage: bool = Field(False, description="send the token counts in a last event")
    include_obfuscation: Literal[False] = Field(False, description="not supported")


class SamplingFields(Fields):
    """How tokens are chosen, and how the answer is sent."""

    model: str = Field(description="the served model's name, as /v1/models lists it")
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(
        1.0, description="0 to 2; 0 always takes the most likely token"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="keep the most likely tokens up to this probability, above 0 and up to 1"
    )
    n: _Choices = Field(1, description=f"choices a prompt, 1 to {MAX_CHOICES_PER_PROMPT}")
    seed: Annotated[int, Field(ge=-(2**63), le=_MAX_INT)] | None = Field(
        None, description="a 64-bit integer; repeat a call with the same seed to get the same text"
    )
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] = Field(
        default_factory=list, description=f"up to {MAX_STOPS} strings that end the text"
    )
    presence_penalty: _Penalty = Field(
        0.0, description="-2 to 2, taken from the logit of each token that the text already has"
    )
    frequency_penalty: _Penalty = Field(
        0.0, description="-2 to 2, taken from the logit of a token for each time that the text has it"
    )
    logit_bias: Annotated[
        dict[_TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)
    ] = Field(
        default_factory=dict,
        description="by token id, -100 to 100 that its logit gets more",
        json_schema_extra={"additionalProperties": False},
    )
    stream: bool = Field(False, description="send the text as server-sent events")
    stream_options: StreamOptions | None = Field(None, description="only with stream")
    user: str | None = Field(None, description="ignored")
    top_k: NonNegativeInt = Field(
        0, description="keep this many most likely tokens; 0 keeps all (not in OpenAI's API)"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="keep tokens at least this fraction as likely as the most likely one (not in OpenAI's API)",
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = Field(
        1.0,
        description="0.01 to 100; lowers logits of tokens that the prompt or the text has (not in OpenAI's API)",
    )
    ignore_eos: bool = Field(False, description="go on after an end-of-text token (not in OpenAI's API)")
    priority: Annotated[int, Field(ge=-100, le=100)] = Field(
        0, description="-100 to 100; waiting requests with a higher one go first (not in OpenAI's API)"
    )
    timeout: Annotated[float, Field(gt=0, le=_MAX_TIMEOUT_SECONDS)] | None = Field(
        None, description="seconds after which the request is given up (not in OpenAI's API)"
    )

    def check_stream(self) -> None:
        """Raise a RequestError if stream_options is given without stream."""
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "stream_options is set without stream.", "set stream to true.", param="stream_options"
            )

    @property
    def sends_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def params(
        self, choice: int, max_tokens: int, logprobs: int | None, grammar: Grammar | None = None
    ) -> SamplingParams:
        """Parameters of the `choice`-th text of a prompt, each with a seed of its own.

        Raises:
            RequestError: values do not go together.
        """
        # Wraps around, as a seed has 64 bits.
        seed = None if self.seed is None else (self.seed + choice + 2**63) % 2**64 - 2**63
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
            grammar=grammar,
            ignore_eos=self.ignore_eos,
            seed=seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            logprobs=logprobs,
        )


def score(logprobs: list[float]) -> float:
    """How likely a text is: the mean log-probability of its tokens. The best of several has the highest."""
    return math.fsum(logprobs) / len(logprobs) if logprobs else -math.inf


def token_name(text: str, token_id: int) -> str:
    """How a token is named; one that is no whole characters is `token_id:N`."""
    return text if text and "\ufffd" not in text else f"token_id:{token_id}"
