"""What a request begins with, as a chain of hashes: equal links stand for equal beginnings."""

import xxhash

# Some 64 tokens of English text.
CHUNK_BYTES = 256
# Of longer prompts, the first megabyte tells them apart well enough.
MAX_LINKS = 4096
# The field of each route in which prompts begin alike.
FIELDS = {"/v1/completions": b'"prompt"', "/v1/chat/completions": b'"messages"'}


def prefix_chain(body: bytes, field: bytes) -> tuple[int, ...]:
    """Link i is a 64-bit hash of the first i + 1 chunks of a JSON body from a field on.

    The body is not parsed: the next turn of a conversation repeats the bytes of the one before, whatever they
    mean. What follows the field only touches the last links. A name of a field cannot occur within a text, whose
    quotes are escaped; a wrong start would cost a hit and nothing else. The chain is empty if there is no whole
    chunk.

    Args:
        field: with its quotes.
    """
    start = body.find(field)
    if start < 0:
        return ()
    chain: list[int] = []
    count = min((len(body) - start) // CHUNK_BYTES, MAX_LINKS)
    view = memoryview(body)[start:]
    for offset in range(0, count * CHUNK_BYTES, CHUNK_BYTES):
        previous = chain[-1] if chain else 0
        chain.append(xxhash.xxh3_64_intdigest(view[offset : offset + CHUNK_BYTES], previous))
    return tuple(chain)
