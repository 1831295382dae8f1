"""What a page is made of, before it is HTML. All text here is plain: the page escapes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

Cell = str | int | float | None
Spec = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Numbers of a figure, or a table in its own right.

    Attributes:
        columns: their heads.
        rows: one cell for each column; None is shown as a dash.
        title: empty where it belongs to a figure.
        note: what was left out.
        id: anchor of the page.
    """

    kind: ClassVar = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""
    id: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        id: anchor of the page.
        text: what it shows, in a sentence or two; what a screen reader says in its place.
        spec: Vega-Lite, or Vega where its `$schema` says so.
        table: its numbers.
    """

    kind: ClassVar = "figure"
    id: str
    title: str
    text: str
    spec: Spec
    table: Table


@dataclass(frozen=True)
class Missing:
    """A picture that could not be drawn."""

    kind: ClassVar = "missing"
    title: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """Text that a model wrote after a prompt."""

    kind: ClassVar = "sample"
    title: str
    prompt: str
    text: str


Part = Table | Figure | Missing | Sample


@dataclass(frozen=True)
class Section:
    """A chapter of the page."""

    id: str
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Finding:
    """A sentence of the summary, and the id of the picture that shows it."""

    text: str
    id: str


@dataclass(frozen=True)
class Page:
    """All of it.

    Attributes:
        lead: what the page is of.
        steps: first and last step of its time axes; None without any.
    """

    title: str
    lead: str
    findings: Sequence[Finding]
    sections: Sequence[Section]
    steps: tuple[int, int] | None
