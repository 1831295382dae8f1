"""A page as HTML: one file that loads nothing, from a template that escapes all text."""

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import vl_convert

from moe_ray.analytics.report.parts import Cell, Figure, Page

_HERE = files("moe_ray.analytics.report")


def render(page: Page) -> bytes:
    """UTF-8 HTML, equal for equal pages."""
    figures = [part for section in page.sections for part in section.parts if isinstance(part, Figure)]
    specs = {figure.id: figure.spec for figure in figures}
    assert len(specs) == len(figures), "ids of figures are unique"
    scripts = [_library(), _text("page.js")]
    html = _template().render(
        page=page,
        style=_text("page.css"),
        scripts=scripts,
        hashes=[_hash(script) for script in scripts],
        specs=_json(specs),
    )
    # Half a character, which a text that was cut may end with, has no code in UTF-8.
    return html.encode(errors="replace")


def shown(cell: Cell) -> str:
    """A cell of a table as people read it."""
    if cell is None:
        return "-"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 10_000 else f"{cell:.4g}"
    return cell


@cache
def _library() -> str:
    """Vega, Vega-Lite and vega-embed."""
    return _script(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


@cache
def _text(name: str) -> str:
    return _script((_HERE / name).read_text(encoding="utf-8"))


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = shown
    return environment.from_string((_HERE / "page.html").read_text(encoding="utf-8"))


def _script(text: str) -> str:
    assert "</script" not in text.lower()
    assert "<!--" not in text or "<script" not in text.lower(), "it would swallow what follows"
    return text


def _json(value: Mapping[str, Any]) -> str:
    """JSON that HTML cannot mistake for a tag, an end of the script or a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(script: str) -> str:
    """As a Content-Security-Policy names the one script that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
