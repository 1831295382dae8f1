"""Who uses which block of the cache, and which blocks hold a prefix that is known.

A full block is known by a digest of its tokens and of all before them. One that nobody uses stays known until its
memory is wanted: the block that was given back first goes first, and of a text its end before its beginning.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def root_digest(identity: str) -> bytes:
    """Digest of no tokens, for the keys and values of one model."""
    return hashlib.blake2b(identity.encode(), digest_size=32).digest()


def chain_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a block of tokens after those of `parent`; 256 bits, so that no prompt is taken for another."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=32).digest()


class BlockPool:
    """Reference-counted blocks 1 to num_blocks - 1; block 0 is nobody's. Each call takes O(1) a block.

    Attributes:
        evicted: known blocks with their digests whose memory was given to somebody else, who has not yet written
            to it; the owner of the pool empties the list between two passes.
    """

    def __init__(self, num_blocks: int) -> None:
        self.evicted: list[tuple[int, bytes]] = []
        self._users = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._blocks: dict[bytes, int] = {}
        self._unknown = list(range(num_blocks - 1, 0, -1))
        self._unused_known: OrderedDict[int, None] = OrderedDict()

    @property
    def num_blocks(self) -> int:
        """Blocks that sequences can have."""
        return len(self._users) - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses, known ones included."""
        return len(self._unknown) + len(self._unused_known)

    @property
    def num_unused_known(self) -> int:
        """Blocks that nobody uses and that hold a known prefix."""
        return len(self._unused_known)

    def __contains__(self, digest: object) -> bool:
        """Whether a block is known by the digest."""
        return digest in self._blocks

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks of the leading digests that are known."""
        found = []
        for digest in digests:
            block = self._blocks.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def count_free(self, blocks: Iterable[int]) -> int:
        """How many of the blocks nobody uses."""
        return sum(not self._users[block] for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Use known blocks."""
        for block in blocks:
            if not self._users[block]:
                del self._unused_known[block]
            self._users[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Use `count` blocks of unknown content, of which there must be as many free."""
        assert count <= self.num_free
        return [self._allocate() for _ in range(count)]

    def release(self, blocks: Sequence[int]) -> None:
        """Stop using the blocks of a text, given in order."""
        for block in reversed(blocks):
            assert self._users[block] > 0
            self._users[block] -= 1
            if not self._users[block]:
                if self._digests[block] is None:
                    self._unknown.append(block)
                else:
                    self._unused_known[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        """Make a computed block known, unless another one is by that digest."""
        assert self._users[block] > 0
        if self._digests[block] is None and digest not in self._blocks:
            self._digests[block] = digest
            self._blocks[digest] = block

    def forget(self, blocks: Iterable[int]) -> None:
        """Share blocks that are in use with nobody else from now on."""
        for block in blocks:
            assert self._users[block] > 0
            self._drop_digest(block)

    def known(self) -> list[tuple[int, bytes]]:
        """All known blocks with their digests."""
        return [(block, digest) for digest, block in self._blocks.items()]

    def check(self) -> None:
        """Assert what always holds; O(number of blocks), for tests."""
        free = [*self._unknown, *self._unused_known]
        assert sorted(free) == [b for b in range(1, len(self._users)) if not self._users[b]]
        assert all(self._digests[block] is None for block in self._unknown)
        known = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        assert known == self._blocks
        assert set(self._unused_known) <= set(known.values())
        assert self._users[0] == 0

    def _allocate(self) -> int:
        if self._unknown:
            block = self._unknown.pop()
        else:
            block, _ = self._unused_known.popitem(last=False)
            digest = self._digests[block]
            assert digest is not None
            self.evicted.append((block, digest))
            self._drop_digest(block)
        assert self._users[block] == 0
        self._users[block] = 1
        return block

    def _drop_digest(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            del self._blocks[digest]
            self._digests[block] = None
