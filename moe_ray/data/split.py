"""Which text is for training and which for validation, decided by hashes so that it never changes by chance."""

import hashlib
import heapq
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from moe_ray.data.corpus import Document


def document_hash(document: Document) -> int:
    """64-bit hash of domain, name and content."""
    # surrogatepass: the name may come from a file name that is not UTF-8.
    content = "\0".join(document).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


@dataclass
class Census:
    """What one pass over all documents leaves behind, in bounded memory but for 8 bytes a document.

    Args:
        sample_bytes: most text kept as the sample for the tokenizer.

    Attributes:
        text_bytes: UTF-8 bytes of all documents.
        hashes: per domain, the hash of each document.
    """

    sample_bytes: int
    text_bytes: int = 0
    hashes: dict[str, array] = field(default_factory=dict)
    _sample: list[tuple[int, int, Document]] = field(default_factory=list)
    _sampled_bytes: int = 0

    def add(self, document: Document) -> int:
        """Count a document and return its UTF-8 bytes."""
        size = len(document.text.encode())
        key = document_hash(document)
        self.text_bytes += size
        self.hashes.setdefault(document.domain, array("Q")).append(key)
        # Validation takes the lowest hashes, so the highest are a random sample of the training documents.
        heapq.heappush(self._sample, (key, size, document))
        self._sampled_bytes += size
        while self._sampled_bytes > self.sample_bytes and len(self._sample) > 1:
            self._sampled_bytes -= heapq.heappop(self._sample)[1]
        return size

    def sample(self, plan: "SplitPlan") -> Iterator[str]:
        """Training texts to learn the tokenizer from."""
        for _, _, document in self._sample:
            yield from (text for split, text in plan.split(document) if split == "train")


@dataclass(frozen=True)
class SplitPlan:
    """How each domain is split.

    Attributes:
        fraction: share of the documents, or of the text, for validation.
        last_hashes: per domain, the highest hash that is for validation; none for a domain with too few
            documents to hold out whole ones, of which the tail of every document is held out instead.
    """

    fraction: float
    last_hashes: dict[str, int]

    def split(self, document: Document) -> list[tuple[str, str]]:
        """Pairs of a split and the text of it: one pair, or two for a document that is cut."""
        if document.domain in self.last_hashes:
            held_out = document_hash(document) <= self.last_hashes[document.domain]
            return [("validation" if held_out else "train", document.text)]
        cut = _tail_start(document.text, self.fraction)
        parts = [("train", document.text[:cut]), ("validation", document.text[cut:])]
        return [(split, text) for split, text in parts if text.strip()]


def plan_split(census: Census, fraction: float) -> SplitPlan:
    """Hold out `fraction` of the documents of each domain, those of the lowest hashes."""
    last_hashes = {}
    for domain, hashes in census.hashes.items():
        held_out = round(len(hashes) * fraction)
        if 0 < held_out < len(hashes):
            last_hashes[domain] = sorted(hashes)[held_out - 1]
    return SplitPlan(fraction, last_hashes)


def _tail_start(text: str, fraction: float) -> int:
    """Where the held-out tail starts: at the line nearest to its share of the characters."""
    cut = round(len(text) * (1 - fraction))
    before, after = text.rfind("\n", 0, cut) + 1, text.find("\n", cut) + 1
    candidates = [position for position in (before, after) if 0 < position < len(text)]
    return min(candidates, key=lambda position: abs(position - cut), default=cut)
