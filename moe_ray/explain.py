"""What is told of a mistake in the settings: where it is, the value, what is allowed, and the nearest name."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from moe_ray.errors import ConfigError
from moe_ray.section import Section

_EXAMPLES = 6
_CLOSE = 0.8


def explain(error: ValidationError, root: type[Section]) -> ConfigError:
    """One line a problem, each with the nearest valid key or what is allowed.

    Args:
        root: what was validated, a section of sections.
    """
    # A field of several types has a problem for each: the one that came farthest into the value says most.
    items: dict[str, tuple[_Place, ErrorDetails]] = {}
    for item in error.errors(include_url=False):
        place = _locate(root, item["loc"])
        if place.name not in items or len(item["loc"]) > len(items[place.name][1]["loc"]):
            items[place.name] = place, item
    problems, fixes = zip(*(_told(root, place, item) for place, item in items.values()), strict=True)
    return ConfigError(" ".join(problems), " ".join(fixes))


def nearest(name: str, names: Sequence[str]) -> str:
    """The name that was most likely meant: one nearly the same, that of its initials, or else the most alike."""
    if close := difflib.get_close_matches(name, names, n=1, cutoff=_CLOSE):
        return close[0]
    section, dot, words = name.rpartition(".")
    initials = section + dot + "".join(word[:1] for word in words.split("_"))
    if "_" in words and initials in names:
        return initials
    return difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]


def sections_of(root: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    """The sections of a section of sections, by name."""
    for name, info in root.model_fields.items():
        assert _is_section(info.annotation), name
        yield name, info.annotation


def names_of(root: type[Section]) -> Iterator[str]:
    """Every valid `section.field`, after the section names themselves."""
    yield from root.model_fields
    for name, section in sections_of(root):
        yield from (f"{name}.{field}" for field in section.model_fields)


def type_name(annotation: Any) -> str:
    """A type as people call it."""
    if get_origin(annotation) is Annotated:
        return type_name(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return "|".join(str(value) for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"list of {type_name(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping to {1}".format(*map(type_name, get_args(annotation)))
    if get_args(annotation):
        return " or ".join(type_name(part) for part in get_args(annotation))
    return {type(None): "null"}.get(annotation, getattr(annotation, "__name__", str(annotation)))


@dataclass(frozen=True)
class _Place:
    """Where a mistake is.

    Attributes:
        name: of the setting, or of a key in its mapping.
        kind: its type.
        field: the setting; None if there is none of the name.
        section: what it belongs to, by name and type.
    """

    name: str
    kind: Any
    field: FieldInfo | None
    section: tuple[str, type[Section]]


def _locate(root: type[Section], location: Sequence[str | int]) -> _Place:
    """The setting at fault; what follows its name tells which of its types or items."""
    kind: Any = root
    names: list[str] = []
    field, section = None, ("", root)
    for key in (str(part) for part in location if part != "[key]"):
        inner = _section_in(kind)
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif inner is not None:
            field, section = inner.model_fields.get(key), (".".join(names), inner)
            kind = None if field is None else field.annotation
        else:
            break
        names.append(key)
    return _Place(".".join(names), kind, field, section)


def _told(root: type[Section], place: _Place, item: ErrorDetails) -> tuple[str, str]:
    """The problem and its fix."""
    if item["type"] == "invalid_key" or item["loc"][-1] == "[key]":
        return (
            f"{place.name}: the name {item['input']!r} is no text.",
            "put it in quotes, or use the name of a setting.",
        )
    if item["type"] == "extra_forbidden":
        prefix, section = place.section
        own = [f"{prefix}.{field}" for field in section.model_fields]
        # A setting is often looked for in the wrong section of the root.
        meant = nearest(place.name, own if "." in prefix else list(names_of(root)))
        return f"unknown setting {place.name!r}.", f"did you mean {meant!r}? --help lists all."
    inner = _section_in(place.kind)
    if item["type"] == "model_type" and inner is not None:
        fields = ", ".join(list(inner.model_fields)[:_EXAMPLES])
        return (
            f"{place.name}={item['input']!r} is not a section.",
            f"write {place.name} as a mapping of fields such as {fields}.",
        )
    assert place.field is not None, item
    # Of an item that is missing, the input is what should have it.
    location = item["loc"][:-1] if item["type"] == "missing" else item["loc"]
    where = place.name + "".join(f"[{part}]" for part in location if isinstance(part, int))
    return (
        f"{where}={item['input']!r} is not allowed: {_in_yaml(item['msg'])}.",
        f"{place.name} is {type_name(place.field.annotation)}: {place.field.description}.",
    )


def _in_yaml(message: str) -> str:
    """What pydantic says, in the words of YAML."""
    words = message.replace("dictionary", "mapping").replace("valid tuple", "list")
    return words[0].lower() + words[1:]


def _section_in(kind: Any) -> type[Section] | None:
    """The section that a type is, or may be."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return next((kind for kind in kinds if _is_section(kind)), None)


def _is_section(kind: Any) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)
