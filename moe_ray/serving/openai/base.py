"""What all bodies share: strict reading, and errors that name the field."""

import difflib
import json
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moe_ray.errors import RequestError

_SHORT = 60
# Parts of pydantic's locations that are no names of fields.
_KINDS = ("list[", "dict[", "constrained-", "function-")
_NULL = {"type": "null"}
_DESCRIPTIONS = ("title", "description", "default")
Body = TypeVar("Body", bound="Fields")


def _allow_null(schema: dict[str, Any]) -> None:
    """In the schema of a request: what may be left out may also be null."""
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        if name not in required and None not in field.get("enum", ()) and _NULL not in field.get("anyOf", ()):
            kept = {key: value for key, value in field.items() if key not in _DESCRIPTIONS}
            described = {key: value for key, value in field.items() if key in _DESCRIPTIONS}
            schema["properties"][name] = {"anyOf": [kept, _NULL], **described}


class _Neutral(dict[str, Any]):
    """The schema of an unsupported field."""


class Fields(BaseModel):
    """Fields of a request; one that is null counts as left out."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_allow_null
    )

    # Of each unsupported field, the values that ask for nothing.
    _neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        found = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        cls._neutral = {n: tuple(e["enum"]) for n, e in found.items() if isinstance(e, _Neutral)}

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        given = {name: item for name, item in value.items() if item is not None}
        for name, item in given.items():
            neutral = cls._neutral.get(name)
            if neutral is not None and not any(_same(item, allowed) for allowed in neutral):
                raise RequestError(f"{name}={short(item)} is not supported.", f"leave {name} out.", param=name)
        return given


class Answer(BaseModel):
    """A body that the server sends; only documents it."""

    model_config = ConfigDict(extra="forbid")


class PromptTokensDetails(Answer):
    """Of the tokens of prompts, those that were not computed anew."""

    cached_tokens: int


class Usage(Answer):
    """Token counts; an end-of-text token counts as generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptUsage(Answer):
    """Token counts where nothing is generated."""

    prompt_tokens: int
    total_tokens: int


def unsupported(*neutral: Any, description: str = "not supported") -> Any:
    """A field of OpenAI's API that is not served, with the values that ask for nothing."""
    return Field(None, description=description, json_schema_extra=_Neutral(enum=[*neutral, None]))


def parse(kind: type[Body], body: Mapping[str, Any]) -> Body:
    """Validate a decoded JSON body.

    Raises:
        RequestError: a field is unknown, unsupported, missing or of the wrong type.
    """
    for name in body:
        if body[name] is not None and name not in kind.model_fields:
            nearest = difflib.get_close_matches(name[:_SHORT], kind.model_fields, n=1)
            fix = f"did you mean {nearest[0]!r}?" if nearest else "leave it out."
            raise RequestError(f"unknown field {short(name)}.", fix, param=name[:_SHORT])
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        _raise_first(kind, error)


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """A `Usage`."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def to_json(body: Mapping[str, Any]) -> bytes:
    """Compact UTF-8 JSON; halves of surrogate pairs, which a client may send, come back as `?`."""
    text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", errors="replace")


def short(value: object) -> str:
    """The beginning of a value as JSON, to show in an error."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}…"


def _same(value: Any, neutral: Any) -> bool:
    # For Python, False is 0.
    return value == neutral and type(value) is type(neutral)


def _raise_first(kind: type[Fields], error: ValidationError) -> NoReturn:
    problems = error.errors(include_url=False, include_context=False)
    # A value that may be of several types fails as each of them; what is wrong with it as its own type says more.
    of_field = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
    details = next((problem for problem in of_field if not problem["type"].endswith("_type")), problems[0])
    location = [str(part) for part in details["loc"] if part != "str" and not str(part).startswith(_KINDS)] or [
        "body"
    ]
    name, param = ".".join(location)[: 2 * _SHORT], location[0]
    if details["type"] == "extra_forbidden":
        raise RequestError(f"unknown field {short(name)}.", "leave it out.", param=param)
    if details["type"] == "missing":
        raise RequestError(f"the field {name!r} is missing.", f"send {name}.", param=param)
    message = details["msg"][0].lower() + details["msg"][1:]
    field = kind.model_fields.get(param)
    fix = f"{param}: {field.description}." if field else "see /openapi.json."
    raise RequestError(f"{name}={short(details['input'])} is not allowed: {message}.", fix, param=param)
