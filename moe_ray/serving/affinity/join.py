"""A replica joins its peers: its listener, its reports to the directory, and what hands requests on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from starlette.datastructures import Headers

from moe_ray.serve_config import ServeConfig
from moe_ray.serving.access import identify
from moe_ray.serving.affinity.directory import DirectoryClient
from moe_ray.serving.affinity.forward import Forwarder
from moe_ray.serving.affinity.listener import Listener
from moe_ray.serving.affinity.router import Report, chunks_of_cache
from moe_ray.serving.affinity.stats import AffinityStats
from moe_ray.serving.api_keys import ApiKey
from moe_ray.serving.engine.cache import BLOCK_TOKENS
from moe_ray.serving.engine.stats import EngineStats

# What is remembered of a replica that keeps prefixes below its KV cache too: 4 million tokens, 10 MB.
_TIERED_TOKENS = 2**22


@dataclass(frozen=True)
class Membership:
    """A replica among its peers.

    Attributes:
        app: answers here or elsewhere.
    """

    app: Forwarder
    _directory: DirectoryClient
    _listener: Listener

    @classmethod
    def begin(
        cls,
        app: Any,
        replica: str,
        host: str,
        config: ServeConfig,
        keys: Sequence[ApiKey],
        engine: Callable[[], EngineStats],
        stats: AffinityStats,
    ) -> Self:
        """Open the listener and report it, in the running event loop.

        Args:
            app: answers here.
            replica: its name.
            host: address at which the other replicas reach this one.
            keys: of the endpoint.
            engine: what this replica's engine holds now.
            stats: counted up.
        """
        listener = Listener.open(app, host)
        has_tiers = config.prefix_memory_bytes > 0 or config.prefix_folder is not None

        def report() -> Report:
            tokens = _TIERED_TOKENS if has_tiers else engine().blocks_total * BLOCK_TOKENS
            return Report(replica, listener.address, forwarder.load, chunks_of_cache(tokens))

        def is_free(headers: Headers) -> bool:
            return _is_free(keys, headers)

        directory = DirectoryClient(replica, report)
        sizes = range(config.prefix_routing_bytes, config.max_body_bytes + 1)
        forwarder = Forwarder(app, directory, stats, is_free, sizes)
        return cls(forwarder, directory, listener)

    async def end(self) -> None:
        """Leave the directory, and finish what others have handed over."""
        await self._directory.close()
        await self._listener.close()
        await self.app.close()


def _is_free(keys: Sequence[ApiKey], headers: Headers) -> bool:
    """Whether a request is no business of the replica that it came to.

    A key's limits are counted where requests come, evenly. Counted where its conversations are, they would be
    used up in one replica's share. Requests without a good key are refused where they come.
    """
    if not keys:
        return True
    key = identify(keys, headers.get("authorization", ""))
    return key is not None and key.requests_per_minute is None and key.tokens_per_minute is None
