"""A conversation as the text that a chat model was trained on: the Jinja template of its tokenizer.

Templates see what `transformers` gives them. They are the model's, so they run in Jinja's sandbox, and what users
write can never be taken for a control token such as `<|im_end|>`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe_ray.data.tokenizer import Tokenizer
from moe_ray.errors import CheckpointError, RequestError
from moe_ray.models.hf.sidecars import TOKENIZER_CONFIG

TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATE_JSON = "chat_template.json"
_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
# What expressions on values of the wrong kind raise.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_SHOWN_CHARACTERS = 200
# Noncharacters, which no tokenizer knows and no text should have.
_START, _END = "\ufdd0", "\ufdd1"


class ChatTemplate:
    """The template of one model, compiled.

    Args:
        source: in Jinja.
        special_tokens: names that the template may use, such as `bos_token`, with their tokens.

    Raises:
        CheckpointError: it is no Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], tokenizer: Tokenizer) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source, globals=_GLOBALS)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template is no Jinja: {error}.", f"mend {TEMPLATE_FILE}.") from None
        self._knows_developer = "developer" in source
        self._special_tokens = dict(special_tokens)
        self._tokenizer = tokenizer
        # Longest first: a token may contain another one.
        names = sorted(tokenizer.control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._marked = re.compile(f"{_START}({self._control.pattern}){_END}")

    def encode(self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]) -> list[int]:
        """Token ids of a conversation up to where the model's answer begins.

        Args:
            variables: more of them for the template.

        Raises:
            RequestError: the template refuses the conversation.
        """
        for name in variables:
            if name in _OWN_VARIABLES:
                raise RequestError(
                    f"the variable {name!r} of the chat template cannot be set.",
                    "leave it out.",
                    param="chat_template_kwargs",
                )
        marked = [self._mark(self._known_role(message)) for message in messages]
        try:
            text = self._template.render(
                messages=marked,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens | self._mark(dict(variables)),
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            RecursionError,
        ) as error:
            reason = str(error)[:_SHOWN_CHARACTERS].rstrip(".")
            raise RequestError(
                f"the chat template refuses the messages: {reason}.", "send others.", param="messages"
            ) from None
        ids: list[int] = []
        # Every second piece is a control token that somebody wrote in a message.
        for index, piece in enumerate(self._marked.split(text)):
            if piece:
                ids += self._tokenizer.encode(piece) if index % 2 else self._tokenizer.encode_control(piece)
        return ids

    def _known_role(self, message: Mapping[str, str]) -> dict[str, str]:
        # OpenAI's newer name of the same; most templates know only the older.
        is_new = message["role"] == "developer" and not self._knows_developer
        return {**message, "role": "system"} if is_new else dict(message)

    def _mark(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._control.sub(f"{_START}\\g<0>{_END}", value)
        if isinstance(value, dict):
            return {key: self._mark(item) for key, item in value.items()}
        return [self._mark(item) for item in value] if isinstance(value, list) else value


def find_chat_template(sidecars: Mapping[str, bytes], tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template among the small files of a Hugging Face folder; None if there is none.

    Raises:
        CheckpointError: a file is no JSON, or the template no Jinja.
    """
    config = _read(sidecars, TOKENIZER_CONFIG)
    source = config.get("chat_template") or _read(sidecars, _TEMPLATE_JSON).get("chat_template")
    if TEMPLATE_FILE in sidecars:
        source = sidecars[TEMPLATE_FILE].decode("utf-8", errors="replace")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}
    special = {key: value for key, value in tokens.items() if key.endswith("_token") and isinstance(value, str)}
    return ChatTemplate(source, special, tokenizer)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what a model is trained on, changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The statements inside."""
        next(parser.stream)
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _read(sidecars: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        tree = json.loads(sidecars.get(name, b"{}"))
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{name} is no JSON object.", "mend or remove the file.")
    return tree


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


_GLOBALS = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
