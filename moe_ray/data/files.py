"""Text out of one file: UTF-8 text, JSONL and Parquet, streamed, with errors that name the place."""

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moe_ray.errors import DataError

_BLOCK_BYTES = 1 << 20
_PARQUET_ROWS = 256


def text_blocks(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in consecutive blocks, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                if (nul := block.find(0)) >= 0:
                    raise _binary(path, offset + nul, 0)
                held_back = len(decoder.getstate()[0])
                text = decoder.decode(block)
                yield text if offset else text.removeprefix("\ufeff")
                offset += len(block)
            held_back = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _binary(path, offset - held_back + error.start, error.object[error.start]) from None
    except OSError as error:
        raise unreadable(path, error) from None


def jsonl_rows(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    """Pairs of a line number, from 1, and the text of that line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _jsonl_text(path, number, line, text_field)
    except OSError as error:
        raise unreadable(path, error) from None


def _jsonl_text(path: Path, number: int, line: bytes, text_field: str) -> str:
    where = f"{path} line {number}"
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise DataError(
            f"{where} is not JSON: {reason}.", "correct or delete the line; each is one object."
        ) from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {type(row).__name__}.", f'write an object: {{"{text_field}": "..."}}.')
    if text_field not in row:
        raise _no_column(where, text_field, row)
    text = row[text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: column {text_field!r} is of type {type(text).__name__}, not a string.",
            "correct or delete the line, or set data.text_field to the column that holds the text.",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: column {text_field!r} has half a surrogate pair at character {error.start}.",
            "correct or delete the line.",
        ) from None
    return text


def parquet_rows(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    """Pairs of a row number, from 1, and the text of that row."""
    try:
        with pq.ParquetFile(path) as file:
            _check_parquet_column(path, file.schema_arrow, text_field)
            number = 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text is None:
                        raise DataError(
                            f"{path} row {number}: column {text_field!r} is null.", "fill or delete the row."
                        )
                    yield number, text
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not a readable Parquet file: {' '.join(str(error).split())}.", "write or copy it again."
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None


def _check_parquet_column(path: Path, schema: pa.Schema, text_field: str) -> None:
    if text_field not in schema.names:
        raise _no_column(f"{path} row 1", text_field, schema.names)
    kind = schema.field(text_field).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise DataError(
            f"{path}: column {text_field!r} is of type {kind}, not strings.",
            f"set data.text_field to a column of strings; present: {', '.join(schema.names)}.",
        )


def _no_column(where: str, text_field: str, columns: Iterable[str]) -> DataError:
    return DataError(
        f"{where} has no column {text_field!r}; columns present: {', '.join(map(repr, columns)) or 'none'}.",
        "set data.text_field to the column that holds the text.",
    )


def _binary(path: Path, offset: int, byte: int) -> DataError:
    return DataError(
        f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {offset}.",
        "convert it (iconv -t utf-8) or leave it out of data.sources.",
    )


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a source that the system refuses to read."""
    return DataError(
        f"{path} cannot be read: {error.strerror or ' '.join(str(error).split())}.",
        "check that the file exists and that this user may read it.",
    )
