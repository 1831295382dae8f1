"""Byte-level BPE: training, loading, and the few methods that the rest of the package uses."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from moe_ray.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
_END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")  # noqa: RUF001
# One end-of-text token and the 256 bytes, which make every text encodable.
MIN_VOCAB_SIZE = 257
# Characters of a text that is encoded in tens of microseconds.
_SHORT_TEXT = 500
# Qwen2's: contractions, words with the space before them, single digits, punctuation, newlines, and
# runs of spaces without the last, so that indentation is one token.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to token ids and back, without a character lost. Safe to share between threads.

    The text is never control: `<|endoftext|>` written in a text is encoded as those characters, so only the
    program can end a document. Nothing is added to a text: no begin or end token, padding or truncation.

    Attributes:
        eos_id: id of the end-of-text token, which precedes every document.
        stop_ids: tokens that end a generated text, `eos_id` among them.
        vocab_size: ids are in [0, vocab_size).
    """

    def __init__(self, serialized: str, eos_id: int | None = None, stop_ids: Iterable[int] = ()) -> None:
        """Read the content of a `tokenizer.json`.

        Args:
            eos_id: the token that ends a text; default: the one with a usual name.
            stop_ids: more tokens that end one.

        Raises:
            DataError: it is no tokenizer or has no end-of-text token.
        """
        self._serialized = serialized
        self._backend = _parse(serialized)
        self.eos_id = _find_end_of_text(self._backend) if eos_id is None else eos_id
        self.stop_ids = frozenset((self.eos_id, *stop_ids))
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def serialized(self) -> str:
        """The `tokenizer.json`."""
        return self._serialized

    @property
    def digest(self) -> str:
        """SHA-256 of the `tokenizer.json`, in hexadecimal."""
        return hashlib.sha256(self._serialized.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text.

        Raises:
            DataError: the text is no Unicode: it has half a surrogate pair.
        """
        try:
            if len(text) < _SHORT_TEXT:
                return self._backend.encode(text, add_special_tokens=False).ids
            # Unlike encode, this lets other threads run meanwhile, for which it waits for them.
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:
            raise DataError("the text has half a surrogate pair.", "send valid Unicode.") from None

    def encode_control(self, text: str) -> list[int]:
        """Ids of a text in which control tokens, such as `<|im_end|>`, mean what they are: of the program's own.

        Raises:
            DataError: the text is no Unicode: it has half a surrogate pair.
        """
        try:
            return self._with_control.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:
            raise DataError("the text has half a surrogate pair.", "send valid Unicode.") from None

    @cached_property
    def control_tokens(self) -> frozenset[str]:
        """The tokens that `encode` takes for text and `encode_control` for what they are."""
        added = self._backend.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    @cached_property
    def _with_control(self) -> tokenizers.Tokenizer:
        backend = _parse(self._serialized)
        backend.encode_special_tokens = False
        return backend

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on all cores. About 100 bytes of memory a token: keep the batch small."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids. Special and unknown ids give nothing; bytes that are no UTF-8 give U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """Id of a token by its name, such as `<|im_start|>`; None if there is none."""
        return self._backend.token_to_id(token)

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json`, the same bytes that were read."""
        path.write_text(self._serialized, encoding="utf-8")


def load_tokenizer(path: str | Path, eos_id: int | None = None, stop_ids: Iterable[int] = ()) -> Tokenizer:
    """Read a `tokenizer.json`, whose end-of-text token is the one with a usual name, unless `eos_id` is given.

    Args:
        stop_ids: more tokens that end a text.

    Raises:
        DataError: it is missing, unreadable, no tokenizer or has no end-of-text token.
    """
    try:
        serialized = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"tokenizer {str(path)!r} cannot be read: {reason}.", "give a tokenizer.json.") from None
    try:
        return Tokenizer(serialized, eos_id, stop_ids)
    except DataError as error:
        raise DataError(f"tokenizer {str(path)!r}: {error.problem}", error.fix) from None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE; the same texts give the same tokenizer. Few texts give fewer ids than asked.

    Raises:
        ConfigError: `vocab_size` has no room for the bytes.
    """
    check_vocab_size(vocab_size)
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend.to_str(pretty=True))


def check_vocab_size(vocab_size: int) -> None:
    """Raise a ConfigError unless byte-level BPE can have this many ids."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"model.vocab_size={vocab_size} has no room for the 256 bytes and {END_OF_TEXT}.",
            f"use at least {MIN_VOCAB_SIZE}.",
        )


def _parse(serialized: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(serialized)
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"it is no tokenizer.json: {error}.", "give one that the tokenizers library wrote."
        ) from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _find_end_of_text(backend: tokenizers.Tokenizer) -> int:
    for name in _END_OF_TEXT_NAMES:
        if (token_id := backend.token_to_id(name)) is not None:
            return token_id
    raise DataError("it has no end-of-text token.", f"add one of {', '.join(_END_OF_TEXT_NAMES)} to it.")
