"""The router of an application as an actor that Ray Serve keeps alive, and how a replica asks it."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.config import DeploymentActorConfig

from moe_ray.serving.affinity.router import Choice, PrefixRouter, Report

_REPORT_SECONDS = 0.5
# A dead directory is told at once. This is for one whose machine is lost, and for machines with all cores busy.
_ANSWER_SECONDS = 5.0
_NAME = "prefix-directory"
_logger = logging.getLogger(__name__)


def directory_config() -> DeploymentActorConfig:
    """The actor as a part of a deployment. What it does is little: it takes no CPU from replicas."""
    return DeploymentActorConfig(name=_NAME, actor_class=ray.remote(PrefixRouter), actor_options={"num_cpus": 0})


class DirectoryClient:
    """Reports a replica to the directory and asks it. All calls are from one event loop.

    Args:
        replica: the name of this one.
        report: of it, now.
    """

    def __init__(self, replica: str, report: Callable[[], Report]) -> None:
        self.replica, self._report = replica, report
        self._actor: Any = None
        # While it does not nobody asks, and only reports find it again.
        self._answers = False
        self._has_warned = False
        self._reporting = asyncio.create_task(self._keep_reporting())

    async def choose(self, chain: Sequence[int]) -> Choice | None:
        """Where a prompt should go; None if nobody can tell."""
        if not self._answers:
            return None
        asking = asyncio.create_task(self._ask(chain))
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await asyncio.shield(asking)
        except BaseException as error:
            # The directory may choose all the same, and would wait for the end of it for ever.
            asking.add_done_callback(self._take_back)
            if not isinstance(error, Exception):
                raise
            self._lose(error)
            return None

    async def _ask(self, chain: Sequence[int]) -> Choice:
        return await self._actor.choose.remote(self._report(), chain)

    def _take_back(self, asking: asyncio.Task[Choice]) -> None:
        if not asking.cancelled() and asking.exception() is None:
            self.finish(asking.result())

    def finish(self, choice: Choice) -> None:
        """A request has ended; a directory that was only slow to answer has to know it too."""
        if self._actor is not None:
            self._actor.finish.remote(self.replica, choice)

    def keep(self, choice: Choice, chain: Sequence[int]) -> None:
        """The replica that was chosen did not answer; this one does."""
        if self._answers:
            self._actor.keep.remote(self._report(), choice, chain)

    async def close(self) -> None:
        """Take this replica out of the directory."""
        self._reporting.cancel()
        if self._answers:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await self._actor.remove.remote(self.replica)

    async def _keep_reporting(self) -> None:
        while True:
            try:
                # A new one after each failure: a handle stays bound to the actor that it was made for.
                if not self._answers:
                    self._actor = await asyncio.to_thread(serve.get_deployment_actor, _NAME)
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await self._actor.report.remote(self._report())
                self._answers, self._has_warned = True, False
            except Exception as error:
                self._lose(error)
            await asyncio.sleep(_REPORT_SECONDS)

    def _lose(self, error: Exception) -> None:
        if not self._has_warned:
            _logger.warning("the prefix directory does not answer, requests stay where they come: %r", error)
        self._answers, self._has_warned = False, True
