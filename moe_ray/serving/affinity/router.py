"""Which replica should answer a prompt: the one that is expected to begin its answer first.

The unit of all work is a chunk of a prompt, some 64 tokens. A replica that is asked for a prompt has to do what
it has been given before, and those chunks that are not in its cache; a hop to it costs a little too. The
replica with the least of it gets the prompt. So a conversation goes where its beginning is known, as long as
the queue there is shorter than the work that it saves, and a beginning that many share spreads over as many
replicas as it keeps busy. The idea is that of the cost function of NVIDIA Dynamo's KV router, without its
weights and its events of blocks.

What a replica knows is not asked for but remembered: the prompts that it was given, forgotten in the order in
which its cache forgets them. An error of it costs time, never an answer.
"""

import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_CHUNK_TOKENS = 64
# A text that is being generated slows a prompt beside it as this many chunks of prompts do.
TEXT_CHUNKS = 4.0
# What handing a request to another replica must save at least. A hop takes less time, but the proxy has chosen by
# load already: that one text more runs here than there shall move nothing.
_HOP_CHUNKS = 4.0
# A replica that has not reported for so long is gone, in seconds. One that is dead is found sooner, as it refuses
# connections; one that is only busy shall not be forgotten with its cache.
_SILENCE = 10.0


def chunks_of_cache(tokens: int) -> int:
    """That a cache with room for so many tokens holds."""
    return tokens // _CHUNK_TOKENS


@dataclass(frozen=True)
class Report:
    """What a replica says of itself.

    Attributes:
        replica: its name.
        address: host:port where others reach it.
        load: chunks of work that it has and that did not come through the router.
        capacity: chunks that its cache has room for.
    """

    replica: str
    address: str
    load: float
    capacity: int


@dataclass(frozen=True)
class Choice:
    """Where a prompt goes.

    Attributes:
        address: where that replica is reached.
        known: leading chunks of it that are expected in the cache there.
        work: chunks of work that it is there, counted until it is finished.
    """

    replica: str
    address: str
    known: int
    work: float


@dataclass
class _Replica:
    """What is believed of a replica.

    Attributes:
        given: work that came through the router and is not finished, by asker.
        known: the links of its cache, oldest first.
    """

    report: Report
    seen: float = 0.0
    given: dict[str, float] = field(default_factory=dict)
    known: OrderedDict[int, None] = field(default_factory=OrderedDict)

    @property
    def load(self) -> float:
        return self.report.load + sum(self.given.values())

    def take(self, report: Report, now: float) -> None:
        self.report, self.seen = report, now
        self.trim()

    def count_known(self, chain: Sequence[int]) -> int:
        # A link is never older than those that go on from it, so the known ones of a chain are its first.
        return bisect_left(chain, True, key=lambda link: link not in self.known)

    def learn(self, chain: Sequence[int]) -> None:
        for link in reversed(chain):
            self.known.pop(link, None)
            self.known[link] = None
        self.trim()

    def trim(self) -> None:
        while len(self.known) > self.report.capacity:
            self.known.popitem(last=False)


class PrefixRouter:
    """Decides where prompts go, and remembers where they went.

    It may be lost at any time: a new one knows its replicas at once, and prefixes as they come again.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._replicas: dict[str, _Replica] = {}

    def report(self, report: Report) -> None:
        """A replica is there; each does so often, and may be chosen from its first report on."""
        self._replicas.setdefault(report.replica, _Replica(report)).take(report, self._clock())

    def remove(self, replica: str) -> None:
        """A replica is gone, and so is what it was working on for others. Nothing changes for the others."""
        self._replicas.pop(replica, None)
        for other in self._replicas.values():
            other.given.pop(replica, None)

    def choose(self, report: Report, chain: Sequence[int]) -> Choice:
        """The replica that should answer a prompt, which from now on is expected to know it.

        Args:
            report: of the asker, the replica that has the request now.
            chain: of the prompt, see `prefix_chain`.
        """
        self.report(report)
        self._drop_silent()
        asker = report.replica
        known = {name: replica.count_known(chain) for name, replica in self._replicas.items()}

        def cost(name: str) -> tuple[float, bool]:
            hop = 0.0 if name == asker else _HOP_CHUNKS
            return self._replicas[name].load + len(chain) - known[name] + hop, name != asker

        best = min(self._replicas, key=cost)
        work = TEXT_CHUNKS + len(chain) - known[best]
        replica = self._replicas[best]
        replica.learn(chain)
        replica.given[asker] = replica.given.get(asker, 0.0) + work
        return Choice(best, replica.report.address, known[best], work)

    def keep(self, report: Report, choice: Choice, chain: Sequence[int]) -> None:
        """The chosen replica did not answer, so the asker does it itself."""
        self.remove(choice.replica)
        self.report(report)
        self._replicas[report.replica].learn(chain)

    def finish(self, asker: str, choice: Choice) -> None:
        """The answer to a prompt has ended, however that was."""
        replica = self._replicas.get(choice.replica)
        if replica is not None and asker in replica.given:
            # Work that was given before the asker or the replica was forgotten in between counts for nothing.
            replica.given[asker] = max(replica.given[asker] - choice.work, 0.0)

    def _drop_silent(self) -> None:
        now = self._clock()
        for name in [name for name, replica in self._replicas.items() if now - replica.seen > _SILENCE]:
            self.remove(name)
