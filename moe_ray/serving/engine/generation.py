"""One request on its way through the engine: tokens in, chunks of text out."""

from moe_ray.serving.engine.detokenizer import Detokenizer, StopFilter
from moe_ray.serving.engine.request import Chunk, FinishReason, Request, Tokenizer, TokenLogprob
from moe_ray.serving.engine.sampler import Choice, Row
from moe_ray.serving.engine.scheduler import Sequence


class Generation:
    """The state of a request that the scheduler, the sampler and the text output share.

    Attributes:
        sequence: its tokens, as the scheduler sees them.
        row: what the choice of its next token depends on.
        finish_reason: set once nothing follows.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.sequence = Sequence(request.id, list(request.prompt_ids), request.priority)
        self.row = Row(request.params, request.prompt_ids)
        self.finish_reason: FinishReason | None = None
        self._stop_ids = frozenset() if request.params.ignore_eos else tokenizer.stop_ids
        self._detokenizer = Detokenizer(tokenizer, request.prompt_ids)
        self._stop_filter = StopFilter(request.params.stop)
        self._num_tokens = 0
        self._decoded_length = 0
        self._released_length = 0
        self._gathered = ""
        self._logprobs: list[TokenLogprob] = []

    def append(self, choice: Choice) -> Chunk | None:
        """Take the next token; returns what became certain, or None if that is nothing."""
        if choice.token_id is None:
            return self.fail("error")
        if not self.row.accept(choice.token_id):
            return self.fail("grammar")
        self._num_tokens += 1
        if choice.token_id in self._stop_ids:
            self.finish_reason = "stop"
            return self._release(self._stop_filter.push(self._detokenizer.flush()))
        self.sequence.tokens.append(choice.token_id)
        if choice.logprob is not None:
            logprob = choice.logprob
            self._logprobs.append(TokenLogprob(choice.token_id, self._decoded_length, logprob.chosen, logprob.top))
        text = self._detokenizer.push(choice.token_id)
        at_limit = self._num_tokens == self.request.params.max_tokens
        if at_limit:
            text += self._detokenizer.flush()
        self._decoded_length += len(text)
        text = self._stop_filter.push(text)
        if self._stop_filter.stopped:
            self.finish_reason = "stop"
        elif at_limit:
            self.finish_reason = "length"
        return self._release(text)

    def fail(self, reason: FinishReason) -> Chunk:
        """End it here, for a reason that is not in its text."""
        self.finish_reason = reason
        return self._chunk("", ())

    def expire(self) -> list[Chunk]:
        """End it here, as its deadline has passed; what is gathered goes before, to be counted."""
        has_gathered = self.request.piece_tokens > 1 and self._num_tokens
        return [*([self._chunk(self._gathered, ())] if has_gathered else []), self.fail("deadline")]

    def _release(self, text: str) -> Chunk | None:
        if self.finish_reason:
            text += self._stop_filter.flush()
        text = self._gathered + text
        if not self.finish_reason and (not text or self._num_tokens % self.request.piece_tokens):
            self._gathered = text
            return None
        self._gathered = ""
        self._released_length += len(text)
        done = self.finish_reason is not None and not self._stop_filter.stopped
        ready = [lp for lp in self._logprobs if done or lp.text_offset < self._released_length]
        self._logprobs = self._logprobs[len(ready) :]
        return self._chunk(text, tuple(ready))

    def _chunk(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> Chunk:
        num_cached = max(self.sequence.found, 0)
        return Chunk(self.request.id, text, logprobs, self.finish_reason, self._num_tokens, num_cached)
