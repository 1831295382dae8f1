"""Synthetic prompts that have a pattern, each with a control of as many tokens that lacks it.

On the measured tokens, prompt and control have the same ids, in the same places or in another order: what differs
is the pattern, not the words.

Shapes: P pairs, S tokens of a prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moe_ray.analytics.token_classes import token_texts
from moe_ray.data.tokenizer import Tokenizer

_WORDS = 256
_TRIED_IDS = 16_384
_PHRASE = 3
_QUOTE = 6
_BRACKETS = ("()", "[]", "{}")


@dataclass(frozen=True, eq=False)
class Prompts:
    """Pairs of a pattern.

    Attributes:
        prompts_PS, controls_PS: token ids, int64.
        measured_PS: which tokens count, in both, bool.
    """

    pattern: str
    description: str
    prompts_PS: np.ndarray
    controls_PS: np.ndarray
    measured_PS: np.ndarray


def make_prompts(tokenizer: Tokenizer, vocab_size: int, pairs: int, length: int, seed: int) -> list[Prompts]:
    """All patterns; the same arguments give the same prompts.

    Args:
        vocab_size: ids that the model knows.
        length: tokens of a prompt (S), at least 16.
    """
    generator = np.random.default_rng(seed)
    words = _words(tokenizer, min(vocab_size, tokenizer.vocab_size), generator)
    made = []
    for pattern, make, description in _PATTERNS:
        drawn = [make(tokenizer, words, length, generator) for _ in range(pairs)]
        prompts, controls, measured = (np.stack(rows) for rows in zip(*drawn, strict=True))
        made.append(Prompts(pattern, description, prompts, controls, measured))
    return made


_Pair = tuple[np.ndarray, np.ndarray, np.ndarray]
_Make = Callable[[Tokenizer, np.ndarray, int, np.random.Generator], _Pair]


def _repetition(_: Tokenizer, words: np.ndarray, length: int, generator: np.random.Generator) -> _Pair:
    phrase = generator.choice(words, _PHRASE, replace=False)
    prompt = np.resize(phrase, length)
    half = length // 2
    control = np.concatenate([generator.permutation(prompt[:half]), generator.permutation(prompt[half:])])
    return prompt, control, np.arange(length) >= half


def _copying(tokenizer: Tokenizer, words: np.ndarray, length: int, generator: np.random.Generator) -> _Pair:
    separator = np.array(tokenizer.encode("\n"))
    block = generator.choice(words, (length - len(separator)) // 2)
    rest = length - len(separator) - 2 * len(block)
    before = np.concatenate([block[:rest], block])
    shuffled = generator.permutation(before)
    is_copy = np.arange(length) >= length - len(block)
    return np.concatenate([before, separator, block]), np.concatenate([shuffled, separator, block]), is_copy


def _arithmetic(tokenizer: Tokenizer, _: np.ndarray, length: int, generator: np.random.Generator) -> _Pair:
    def line() -> list[int]:
        first, second = generator.integers(1, 50, size=2)
        return tokenizer.encode(f"{first} + {second} = {first + second}\n")

    return _shuffled_parts(line, length, generator)


def _quotation(tokenizer: Tokenizer, words: np.ndarray, length: int, generator: np.random.Generator) -> _Pair:
    mark, comma = tokenizer.encode('"'), tokenizer.encode(",")[-1]
    prompt: list[int] = []
    control: list[int] = []
    measured: list[bool] = []
    while len(prompt) < length:
        said, quoted = generator.choice(words, 2).tolist(), generator.choice(words, _QUOTE).tolist()
        prompt += [*said, *mark, *quoted, *mark]
        control += [*said, *([comma] * len(mark)), *quoted, *([comma] * len(mark))]
        measured += [False] * (len(said) + len(mark)) + [True] * len(quoted) + [False] * len(mark)
    return np.array(prompt[:length]), np.array(control[:length]), np.array(measured[:length])


def _brackets(tokenizer: Tokenizer, _: np.ndarray, length: int, generator: np.random.Generator) -> _Pair:
    ids = {char: tokenizer.encode(char)[-1] for pair in _BRACKETS for char in pair}

    def nested() -> list[int]:
        kinds = [
            _BRACKETS[kind] for kind in generator.integers(len(_BRACKETS), size=int(generator.integers(2, 6)))
        ]
        return [ids[kind[0]] for kind in kinds] + [ids[kind[1]] for kind in reversed(kinds)]

    return _shuffled_parts(nested, length, generator)


_PATTERNS: tuple[tuple[str, _Make, str], ...] = (
    ("repetition", _repetition, "a phrase of three words over and over; the same words in random order"),
    ("copying", _copying, "a line of words and the same line again; after the same words in random order"),
    ("arithmetic", _arithmetic, "lines such as 12 + 7 = 19; the tokens of each line in random order"),
    ("quotation", _quotation, "words in quotation marks; with commas instead of the marks"),
    ("brackets", _brackets, "brackets that close each other; the same brackets in random order"),
)


def _shuffled_parts(draw: Callable[[], Sequence[int]], length: int, generator: np.random.Generator) -> _Pair:
    """Parts until there are enough tokens, and the same with the tokens of each part shuffled."""
    prompt: list[int] = []
    control: list[int] = []
    while len(prompt) < length:
        part = list(draw())[: length - len(prompt)]
        prompt += part
        control += generator.permutation(part).tolist()
    return np.array(prompt), np.array(control), np.ones(length, bool)


def _words(tokenizer: Tokenizer, num_ids: int, generator: np.random.Generator) -> np.ndarray:
    """Ids of words with the space before them; any ids with text where there are too few."""
    tried = generator.permutation(num_ids)[:_TRIED_IDS].tolist()
    texts = token_texts(tokenizer, tried)
    pairs = list(zip(tried, texts, strict=True))
    words = [token_id for token_id, text in pairs if text[:1] == " " and text[1:].isalpha() and len(text) > 3]
    if len(words) < _WORDS // 8:
        words = [token_id for token_id, text in pairs if text.strip().isprintable() and text.strip()]
    return np.array(words[:_WORDS])
