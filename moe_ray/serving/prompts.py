"""From texts of requests to token ids, and back for an echo."""

from collections.abc import Sequence

from moe_ray.data.tokenizer import Tokenizer
from moe_ray.errors import DataError, RequestError
from moe_ray.serving.engine.detokenizer import Detokenizer
from moe_ray.serving.engine.request import Chunk, TokenLogprob

# Characters a token, to begin with, when looking whether a text can fit.
_CHARACTERS_PER_TOKEN = 8


def encode_prompt(tokenizer: Tokenizer, text: str, max_context: int, param: str = "prompt") -> tuple[int, ...]:
    """Token ids of a prompt. An empty text becomes the end-of-text token, which precedes every document.

    Raises:
        RequestError: the text is no Unicode, or surely longer than `max_context`.
    """
    check_length(tokenizer, text, max_context, param)
    try:
        return tuple(tokenizer.encode(text)) or (tokenizer.eos_id,)
    except DataError as error:
        raise RequestError(error.problem, error.fix, param=param) from None


def check_length(tokenizer: Tokenizer, text: str, max_context: int, param: str) -> None:
    """Raise a RequestError if a text is no Unicode, or surely longer than `max_context`.

    Encoding occupies the process, so of a text that is far too long only the beginning is encoded.
    """
    size = _CHARACTERS_PER_TOKEN * max_context
    try:
        while size < len(text):
            # Twice: where a text is cut, a few tokens may come out that the whole text does not have.
            if len(tokenizer.encode(text[:size])) > 2 * max_context:
                raise too_long(max_context, param)
            size *= 2
    except DataError as error:
        raise RequestError(error.problem, error.fix, param=param) from None


def too_long(max_context: int, param: str) -> RequestError:
    """The error of a text that has more tokens than the context."""
    return RequestError(
        f"the {param} has more than the {max_context} tokens of the context.",
        f"shorten the {param}.",
        param=param,
        code="context_length_exceeded",
    )


def echo_chunk(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None, is_all: bool
) -> Chunk:
    """A prompt as the first chunk of its text.

    Args:
        logprobs: of the tokens after the first; None: none were asked for.
        is_all: whether nothing follows.
    """
    detokenizer = Detokenizer(tokenizer, ())
    text, offsets = "", []
    for token_id in token_ids:
        offsets.append(len(text))
        text += detokenizer.push(token_id)
    text += detokenizer.flush()
    known: list[TokenLogprob] = []
    if logprobs is not None:
        known = [TokenLogprob(token_ids[0], 0, None, ())]
        known += [
            TokenLogprob(lp.token_id, offset, lp.logprob, lp.top)
            for offset, lp in zip(offsets[1:], logprobs, strict=True)
        ]
    return Chunk("", text, tuple(known), "length" if is_all else None, 0)
