"""What kind of token each one is, by its text and, for words, by the token before it.

Shapes: N sequences, S tokens of each, C distinct ids.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

from moe_ray.data.tokenizer import Tokenizer

CLASSES = (
    *("word start", "word continuation", "number", "punctuation", "code symbol", "whitespace"),
    *("rare", "other"),
)
# The rarest tokens are those that together make up this share of the text.
RARE_SHARE = 0.01
_START, _CONTINUATION, _NUMBER, _PUNCTUATION, _CODE, _SPACE, _RARE, _OTHER = range(len(CLASSES))
# What Unicode counts as punctuation but programs use more than prose does; its symbols, such as =, are code too.
_PROGRAM_MARKS = frozenset("{}[]_\\/#@%&*")
_APOSTROPHES = "'\u2019"
# Longest letters after an apostrophe that make a contraction, as in 'll.
_CONTRACTION = 2


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Text of each id within a text; alone, some tokenizers drop the space before it."""
    anchor = tokenizer.encode("a")
    length = len(tokenizer.decode(anchor))
    return [tokenizer.decode([*anchor, token_id])[length:] for token_id in ids]


def classify(tokens_NS: np.ndarray, tokenizer: Tokenizer, counts_V: np.ndarray) -> np.ndarray:
    """Index into `CLASSES` of each token, int64 [N, S].

    Letters after a space begin a word, as do letters after a token that ends in no letter. "rare" comes before
    all others, and after the frequencies of the training text.

    Args:
        counts_V: how often each id occurs in the training text; ids beyond it never do.
    """
    ids_C, where_NS = np.unique(tokens_NS, return_inverse=True)
    where_NS = where_NS.reshape(tokens_NS.shape)
    texts = token_texts(tokenizer, ids_C.tolist())
    classes_NS = np.array([_class_of(text) for text in texts], np.int64)[where_NS]
    ends_word_C = np.array([text[-1:].isalpha() for text in texts])
    follows_other_NS = np.zeros(tokens_NS.shape, bool)
    follows_other_NS[:, 1:] = ~ends_word_C[where_NS[:, :-1]]
    classes_NS[(classes_NS == _CONTINUATION) & follows_other_NS] = _START
    classes_NS[_is_rare(ids_C, counts_V)[where_NS]] = _RARE
    return classes_NS


def _class_of(text: str) -> int:
    body = text.strip()
    if not text or "\ufffd" in text:
        return _OTHER
    if not body:
        return _SPACE
    if all(char.isnumeric() for char in body):
        return _NUMBER
    if body.isalpha():
        return _START if text[0].isspace() else _CONTINUATION
    if not any(char.isalpha() for char in body):
        return _PUNCTUATION if all(_is_prose_mark(char) or char.isspace() for char in body) else _CODE
    letters = body[1:]
    if not letters.isalpha() or body[0] in _PROGRAM_MARKS:
        return _CODE
    if body[0] in _APOSTROPHES and len(letters) <= _CONTRACTION:
        return _CONTINUATION
    return _START if body[0] in "\"'" or unicodedata.category(body[0]) in ("Ps", "Pi", "Pf", "Pd") else _CODE


def _is_prose_mark(char: str) -> bool:
    return unicodedata.category(char).startswith("P") and char not in _PROGRAM_MARKS


def _is_rare(ids_C: np.ndarray, counts_V: np.ndarray) -> np.ndarray:
    """Whether each id is among the rarest that together make up `RARE_SHARE` of the text, bool [C]."""
    order = np.argsort(counts_V, kind="stable")
    number = int(np.searchsorted(np.cumsum(counts_V[order]), RARE_SHARE * counts_V.sum(), side="right"))
    is_rare_V = np.zeros(max(len(counts_V), int(ids_C.max()) + 1), bool)
    is_rare_V[order[:number]] = True
    is_rare_V[len(counts_V) :] = True
    return is_rare_V[ids_C]
