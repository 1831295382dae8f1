"""Take secrets out of what is logged."""

import os
import re

_HIDDEN = "***"
_TELLING_NAME = (
    r"[\w-]*(?:(?:api|access|account)[_-]?key|secret|token(?!s)|password|passwd|credential|signature)[\w-]*+"
)
_QUOTE = r"\\*['\"]"
# Words begin where no other does, and give nothing back: the time of a long text is that of its length.
_PATTERNS = (
    # User and password of an address.
    (re.compile(r"(?<!\w)(\w++://)(?:[^/\s'\"]+|[^/\s:'\"]*:(?!\d+/)[^\s'\"]{1,200})@"), rf"\1{_HIDDEN}@"),
    # Parameters, settings and JSON fields whose name says it.
    (
        re.compile(
            rf"(?i)(?<![\w-])({_TELLING_NAME}{_QUOTE}?\s*[=:]\s*)(?:({_QUOTE})(?:(?!\2)[^\n])+|[^\s&'\",;]+)"
        ),
        rf"\1\2{_HIDDEN}",
    ),
    (re.compile(r"(?i)\b((?:bearer|basic)\s+)[\w.~+/=-]{8,}"), rf"\1{_HIDDEN}"),
    # Keys that tell themselves: ours, AWS', OpenAI's, Hugging Face's, GitHub's.
    (
        re.compile(r"\b(?:moe-[\w-]{43}|(?:AKIA|ASIA)[A-Z0-9]{16}|sk-[\w-]{20,}|hf_\w{20,}|gh[pousr]_\w{20,})"),
        _HIDDEN,
    ),
)
_VARIABLE = re.compile(r"(?i)key|token|secret|password|credential")
_SHORTEST = 8


class Redactor:
    """Hides secrets by their form, and the values of this process's variables whose names tell of secrets."""

    def __init__(self) -> None:
        values = {
            value
            for name, value in os.environ.items()
            if _VARIABLE.search(name) and len(value) >= _SHORTEST and not os.path.exists(value)
        }
        longest_first = sorted(values, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, longest_first))) if values else None

    def __call__(self, text: str) -> str:
        """The text without them."""
        if self._values is not None:
            text = self._values.sub(_HIDDEN, text)
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
        return text
