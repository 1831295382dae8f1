"""Text sources to documents: files, globs and the embedded corpora, streamed one document at a time."""

import difflib
import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_ray.data.embedded import CORPORA, corpus_version
from moe_ray.data.files import jsonl_rows, parquet_rows, text_blocks, unreadable
from moe_ray.errors import DataError

# Longer texts become several documents, so that memory stays bounded whatever the size of a file.
MAX_DOCUMENT_CHARS = 4 << 20
_DOMAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Document(NamedTuple):
    """One text. `name` is unique in its source and does not depend on where the files lie."""

    domain: str
    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """One entry of `data.sources`, resolved: an embedded corpus or the files it matches, in sorted order."""

    entry: str
    domain: str
    corpus: str | None
    root: Path
    files: tuple[Path, ...]

    def stamp(self) -> list[Any]:
        """JSON-ready identity of the content: a package version, or each file's path, size and change time.

        Raises:
            DataError: a file or the package of a corpus is gone.
        """
        if self.corpus is not None:
            return [self.domain, self.corpus, corpus_version(self.corpus)]
        return [self.domain, [_file_stamp(path) for path in self.files]]


def resolve_sources(entries: Sequence[str]) -> list[Source]:
    """Find what each entry of `data.sources` stands for; reads no text.

    Raises:
        DataError: a file is missing or no file, a glob matches nothing, a corpus or a label is unknown.
    """
    return [_resolve(entry) for entry in entries]


def read_documents(source: Source, text_field: str) -> Iterator[Document]:
    """Stream the documents of a source; blank ones are left out, long ones cut at line ends.

    Args:
        text_field: column of JSONL and Parquet rows that holds the text.

    Raises:
        DataError: a file is unreadable, binary, not of its format or lacks the column, or no text is left.
    """
    count = 0
    for name, blocks in _texts(source, text_field):
        for number, text in enumerate(_cut(blocks)):
            if text.strip():
                count += 1
                yield Document(source.domain, f"{name}#{number}" if number else name, text)
    if not count:
        raise DataError(
            f"data.sources entry {source.entry!r} holds no text: all it has is empty.",
            "fill it or remove it from data.sources.",
        )


def _resolve(entry: str) -> Source:
    label, target = _split_label(entry)
    if target.startswith("corpus:"):
        name = target.removeprefix("corpus:")
        if name not in CORPORA:
            nearest = difflib.get_close_matches(name, list(CORPORA), n=1, cutoff=0.0)[0]
            raise DataError(
                f"data.sources entry {entry!r} names the unknown corpus {name!r}.",
                f"did you mean corpus:{nearest}? Known: {', '.join(f'corpus:{known}' for known in CORPORA)}.",
            )
        return Source(entry, label or name, name, Path(), ())
    if "://" in target:
        raise DataError(
            f"data.sources entry {entry!r} is a URL; sources are files.", "copy it to a folder and give its path."
        )
    path = Path(target).expanduser()
    try:
        if path.is_file():
            return Source(entry, label or _slug(path.stem), None, path.parent, (path,))
        if path.exists():
            raise _not_a_file(entry, path)
        if not glob.has_magic(target):
            raise DataError(
                f"data.sources entry {entry!r} does not exist (looked for {path.absolute()}).",
                "correct the path, or give a glob such as 'texts/**/*.txt'.",
            )
        return _resolve_glob(entry, label, path)
    except OSError as error:
        raise unreadable(path, error) from None


def _split_label(entry: str) -> tuple[str | None, str]:
    label, separator, target = entry.partition("=")
    if not separator or "/" in label:
        return None, entry
    if not _DOMAIN.fullmatch(label):
        raise DataError(
            f"data.sources entry {entry!r} has the domain label {label!r}.",
            "use letters, digits, '.', '_' and '-', at most 64, such as news=texts/*.txt.",
        )
    if not target:
        raise DataError(f"data.sources entry {entry!r} names no path.", f"write {label}=PATH.")
    return label, target


def _resolve_glob(entry: str, label: str | None, pattern: Path) -> Source:
    fixed = 0
    while not glob.has_magic(pattern.parts[fixed]):
        fixed += 1
    root = Path(*pattern.parts[:fixed])
    files = tuple(path for path in map(Path, sorted(glob.glob(str(pattern), recursive=True))) if path.is_file())
    if not files:
        raise DataError(
            f"data.sources entry {entry!r} matches no file (looked in {root.absolute()}).",
            "correct the pattern; '**' stands for any depth of folders, hidden files are left out.",
        )
    return Source(entry, label or _slug(root.absolute().name), None, root, files)


def _not_a_file(entry: str, path: Path) -> DataError:
    if path.is_dir():
        return DataError(
            f"data.sources entry {entry!r} is a directory.", f"name its files: {str(path / '**' / '*.txt')!r}."
        )
    return DataError(f"data.sources entry {entry!r} is no regular file.", "copy its content to a file.")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:64] or "text"


def _file_stamp(path: Path) -> list[Any]:
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _texts(source: Source, text_field: str) -> Iterator[tuple[str, Iterable[str]]]:
    """Pairs of a document's name and its text in consecutive blocks."""
    if source.corpus is not None:
        try:
            yield from ((name, (text,)) for name, text in CORPORA[source.corpus]())
        except OSError as error:
            raise unreadable(Path(error.filename or source.entry), error) from None
        return
    for path in source.files:
        name = path.relative_to(source.root).as_posix()
        match path.suffix.lower():
            case ".jsonl":
                yield from ((f"{name}:{row}", (text,)) for row, text in jsonl_rows(path, text_field))
            case ".parquet":
                yield from ((f"{name}:{row}", (text,)) for row, text in parquet_rows(path, text_field))
            case _:
                yield name, text_blocks(path)


def _cut(blocks: Iterable[str]) -> Iterator[str]:
    pending = ""
    for block in blocks:
        pending += block
        start = 0
        while len(pending) - start > MAX_DOCUMENT_CHARS:
            stop = pending.rfind("\n", start, start + MAX_DOCUMENT_CHARS) + 1 or start + MAX_DOCUMENT_CHARS
            yield pending[start:stop]
            start = stop
        pending = pending[start:]
    yield pending
