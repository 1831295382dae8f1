"""vLLM behind the methods of `EngineThread`: it chooses tokens, and ours becomes of them what would of our own.

AsyncLLM and its event loop have a thread of their own. A request is a task of that loop, which feeds the tokens
that come to a `Generation`; so texts, stop strings and how texts end are the same as with our engine.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

from moe_ray.config import ModelConfig
from moe_ray.errors import RequestError
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.engine.generation import Generation
from moe_ray.serving.engine.request import Chunk, Request, Tokenizer
from moe_ray.serving.engine.sampler import Choice
from moe_ray.serving.engine.stats import EngineStats
from moe_ray.serving.engine.thread import Stream
from moe_ray.serving.vllm_options import check_supported, engine_arguments, sampling_params, to_logprob

_logger = logging.getLogger(__name__)
T = TypeVar("T")


class VllmEngine:
    """An `EngineService` on top of vLLM. The constructor returns when its process is ready.

    Args:
        folder: Hugging Face folder with weights and tokenizer.
        tokenizer: ours of the same.
        model: settings of the same.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        model: ModelConfig,
        config: ServeConfig,
        max_context: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = min(tokenizer.vocab_size, model.vocab_size)
        # Rows of the model beyond the tokens are never chosen.
        self._allowed_ids = list(range(self._vocab_size)) if self._vocab_size < model.vocab_size else None
        self._max_context = max_context
        self._max_unfinished = config.max_unfinished
        # Guards all below.
        self._lock = threading.Lock()
        self._accepting = True
        self._unfinished: dict[str, Request] = {}
        self._running: set[str] = set()
        self._counts = dict.fromkeys(("prompt_tokens", "generated_tokens", "missed_deadlines"), 0)
        # Of the event loop alone.
        self._tasks: dict[str, asyncio.Task[Chunk]] = {}
        self._loop = asyncio.new_event_loop()
        started: Future[Any] = Future()
        arguments = engine_arguments(folder, model, config, max_context)
        self._thread = threading.Thread(target=self._run, args=(arguments, started), name="vllm", daemon=True)
        self._thread.start()
        self._llm = started.result()

    @property
    def is_alive(self) -> bool:
        """Whether requests are accepted."""
        return self._accepting and self._thread.is_alive() and not self._llm.errored

    def check(self, requests: Sequence[Request]) -> None:
        """Raise a RequestError (400) if one cannot be served."""
        for request in requests:
            request.check(self._vocab_size, self._max_context)
            check_supported(request.params)

    def submit(self, requests: Sequence[Request]) -> Stream:
        """As `EngineThread.submit`."""
        self.check(requests)
        stream = Stream(self, requests, asyncio.get_running_loop())
        with self._lock:
            if not self._accepting:
                raise _unavailable("the engine has stopped.")
            if len(self._unfinished) + len(requests) > self._max_unfinished:
                raise _unavailable(f"{len(self._unfinished)} requests are running or waiting already.")
            self._unfinished.update((request.id, request) for request in requests)
            self._counts["prompt_tokens"] += sum(len(request.prompt_ids) for request in requests)
            for request in requests:
                self._loop.call_soon_threadsafe(self._start, request, stream)
        return stream

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Drop requests; those that have ended are ignored."""
        # The loop may be closed: then all have ended.
        with contextlib.suppress(RuntimeError):
            for request_id in request_ids:
                self._loop.call_soon_threadsafe(self._cancel, request_id)

    async def call(self, function: Callable[[], T]) -> T:
        """Raise a RequestError (400): the model is in vLLM's process."""
        raise RequestError(
            "this server runs vLLM, which gives no embeddings, routing or log-probabilities of prompts here.",
            "ask a server with serve.engine=moe_ray.",
            code="unsupported",
        )

    def stats(self) -> EngineStats:
        """Requests now, and what was counted here; of vLLM's caches nothing is known."""
        with self._lock:
            waiting = [r for r in self._unfinished.values() if r.id not in self._running]
            return EngineStats(
                waiting=len(waiting),
                running=len(self._running),
                queued_tokens=sum(len(request.prompt_ids) for request in waiting),
                **self._counts,
            )

    def stop(self) -> None:
        """End all requests with an error, and vLLM's process."""
        with self._lock:
            self._accepting = False
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, arguments: dict[str, Any], started: Future[Any]) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            llm = _start_vllm(arguments)
        except BaseException as error:
            self._loop.close()
            started.set_exception(error)
            return
        started.set_result(llm)
        self._loop.run_forever()
        for task in self._tasks.values():
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._tasks.values(), return_exceptions=True))
        llm.shutdown()
        # What it cancels ends here.
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def _start(self, request: Request, stream: Stream) -> None:
        task = self._loop.create_task(self._generate(request, stream))
        self._tasks[request.id] = task
        task.add_done_callback(lambda task: self._end(request, stream, task))

    def _cancel(self, request_id: str) -> None:
        if task := self._tasks.get(request_id):
            task.cancel()

    def _end(self, request: Request, stream: Stream, task: asyncio.Task[Chunk]) -> None:
        """The last chunk, or an error, ends the stream, also if the task was cancelled before it began."""
        del self._tasks[request.id]
        # Before it ends for the client, who may come back at once.
        with self._lock:
            del self._unfinished[request.id]
            self._running.discard(request.id)
        if task.cancelled():
            # Nobody reads any more, unless all of this stops.
            stream.put_threadsafe([_unavailable("the engine has stopped.")])
        else:
            error = task.exception()
            stream.put_threadsafe([task.result() if error is None else self._failure(error)])

    async def _generate(self, request: Request, stream: Stream) -> Chunk:
        """Pass on all chunks of a text but the last, which is returned."""
        generation = Generation(request, self._tokenizer)
        seconds = None if request.deadline is None else request.deadline - time.monotonic()
        try:
            async with asyncio.timeout(seconds), aclosing(self._outputs(request)) as outputs:
                async for output in outputs:
                    chunks = self._take(generation, output)
                    if generation.finish_reason is not None:
                        stream.put_threadsafe(chunks[:-1])
                        return chunks[-1]
                    stream.put_threadsafe(chunks)
        except TimeoutError:
            with self._lock:
                self._counts["missed_deadlines"] += 1
            return generation.fail("deadline")
        return generation.fail("error")

    def _outputs(self, request: Request) -> Any:
        """vLLM's generator for a request. Its lower priorities go first."""
        params = sampling_params(request.params, self._tokenizer, self._allowed_ids)
        prompt = {"prompt_token_ids": list(request.prompt_ids)}
        return self._llm.generate(prompt, params, request.id, priority=-request.priority)

    def _take(self, generation: Generation, output: Any) -> list[Chunk]:
        """What becomes certain with the tokens of one output; nothing follows the end of the text."""
        generation.sequence.found = output.num_cached_tokens or 0
        (completion,) = output.outputs
        chunks: list[Chunk] = []
        with self._lock:
            self._running.add(generation.request.id)
            self._counts["generated_tokens"] += len(completion.token_ids)
        for index, token_id in enumerate(completion.token_ids):
            wanted = generation.request.params.logprobs
            logprob = None
            if wanted is not None:
                logprob = to_logprob(completion.logprobs[index], token_id, wanted, self._vocab_size)
            chunk = generation.append(Choice(token_id, logprob))
            if chunk is not None:
                chunks.append(chunk)
            if generation.finish_reason is not None:
                break
        return chunks

    def _failure(self, error: BaseException) -> RequestError:
        if self._llm.errored:
            with self._lock:
                self._accepting = False
            _logger.error("vLLM has failed: %s", error)
            return _unavailable("the engine has stopped.")
        from vllm.exceptions import VLLMClientError  # ty: ignore[import-not-found]

        if isinstance(error, VLLMClientError | ValueError):
            reason = " ".join(str(error).split())[:200].rstrip(".")
            return RequestError(f"vLLM refuses the request: {reason}.", "change it, or use serve.engine=moe_ray.")
        _logger.error("vLLM failed on a request", exc_info=error)
        return RequestError("the engine failed on the request.", "try again.", status=500)


def _start_vllm(arguments: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs  # ty: ignore[import-not-found]
    from vllm.v1.engine.async_llm import AsyncLLM  # ty: ignore[import-not-found]

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


def _unavailable(problem: str) -> RequestError:
    return RequestError(problem, "try again later.", status=503, code="overloaded")
