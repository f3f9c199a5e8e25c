"""Readers of JSON lines, JSON, CSV, TSV and Parquet: each yields rows, as mappings from column to value."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import first_line

# Result of `table_suffix` for content that may or may not be meant as a table.
AMBIGUOUS = "?"
# Rows of a Parquet file that are read at a time.
_BATCH_ROWS = 1024
# Lines and bytes that are examined if the file name does not determine the format.
_EXAMINED_LINES, _EXAMINED_BYTES = 16, 1 << 24

Row = Mapping[str, Any]
"""A row of a table that somebody else wrote: its columns and their types are unknown."""


class Misread(ValueError):
    """The content of a file does not have the format that its name states."""


def json_lines(data: bytearray) -> Iterator[Row]:
    """Rows of JSON lines, each an object or a string."""
    for number, line in enumerate(_decoded(data).split("\n"), 1):
        if line.strip():
            yield _row(_parsed(line, f"line {number:,}"), f"line {number:,}")


def json_document(data: bytearray) -> Iterator[Row]:
    """Rows of a JSON document.

    The document is a list of objects or strings, an object of columns, or one object; possibly nested as the only value
    of an object. JSON lines are accepted as well, because their files are often named `.json`.
    """
    try:
        value = _parsed(_decoded(data), "as a whole")
    except Misread:
        if not _is_object(data.lstrip().partition(b"\n")[0]):
            raise
        yield from json_lines(data)
        return
    while isinstance(value, dict) and len(value) == 1 and _contains_rows(next(iter(value.values()))):
        value = next(iter(value.values()))
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = _rows_of_columns(value)
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield _row(row, f"entry {number:,}")


def _contains_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _rows_of_columns(columns: Mapping[str, list[Any]]) -> list[Row]:
    if len({len(column) for column in columns.values()}) > 1:
        raise Misread("its columns differ in length; give JSON lines, one object per line")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def comma_separated(data: bytearray, delimiter: str = ",") -> Iterator[Row]:
    """Rows of CSV with a line of column names; quoted values may contain line breaks."""
    csv.field_size_limit((1 << 31) - 1)
    rows = csv.reader(io.StringIO(_decoded(data), newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(rows, [])
        if len(set(names)) < len(names):
            raise Misread(
                f"its first line names a column twice ({', '.join(names)}); the first line must be the column names"
            )
        if delimiter == ",":
            _require_commas(names)
        for row in filter(None, rows):
            if len(row) != len(names):
                raise Misread(
                    f"line {rows.line_num:,} has {len(row)} values, its first line names {len(names)} columns"
                )
            yield dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise Misread(f"not CSV ({error} at line {rows.line_num:,}); export it again") from None


def _require_commas(names: list[str]) -> None:
    """Raise Misread for a single column whose name contains another delimiter: whole lines would count as the text."""
    if delimiter := next((sign for sign in ";\t|" if len(names) == 1 and sign in names[0]), None):
        raise Misread(
            f"its first line has no comma, but {delimiter!r}; if that separates its columns, save it with commas; if"
            " its lines are the text, name it .txt"
        )


def tab_separated(data: bytearray) -> Iterator[Row]:
    """Rows of TSV, like `comma_separated`."""
    return comma_separated(data, "\t")


def parquet(data: bytearray) -> Iterator[Row]:
    """Rows of Parquet. Columns that cannot hold text, such as vectors and images, are replaced by empty values."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        placeholders = {field.name: _placeholder(field.type) for field in file.schema_arrow}
        columns = [name for name, value in placeholders.items() if value is None]
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
            yield from (placeholders | row for row in batch.to_pylist())
    # The data is in memory, so an OSError does not come from a disk.
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Misread(f"not Parquet ({first_line(error)}); export it again") from None


def _placeholder(column_type: pa.DataType) -> Any:
    """The value that replaces all of a column which cannot hold text; None for a column that can."""
    if pa.types.is_nested(column_type):
        return {} if pa.types.is_struct(column_type) else []
    return b"" if pa.types.is_binary(column_type) or pa.types.is_large_binary(column_type) else None


# Suffix of a file -> its reader.
READERS: dict[str, Callable[[bytearray], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_document,
    ".csv": comma_separated,
    ".tsv": tab_separated,
    ".parquet": parquet,
}


def table_suffix(data: bytearray) -> str:
    """The suffix that fits the content: one of READERS, AMBIGUOUS, or "" for plain text."""
    if data.startswith(b"PAR1"):
        return ".parquet"
    first_byte = bytes(data[:64]).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if first_byte not in (b"{", b"["):
        return ""
    lines = data[:_EXAMINED_BYTES].split(b"\n", _EXAMINED_LINES)[:_EXAMINED_LINES]
    are_objects = [_is_object(line) for line in lines if line.strip()]
    if all(are_objects):
        return ".jsonl"
    try:
        json.loads(bytes(data))
    except (ValueError, RecursionError):
        return AMBIGUOUS if are_objects[0] else ""
    return ".json"


def _is_object(line: bytes | bytearray) -> bool:
    try:
        return isinstance(json.loads(bytes(line)), dict)
    except (ValueError, RecursionError):
        return False


def _row(value: Any, position: str) -> Row:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    raise Misread(f"{position} is {type(value).__name__}, expected an object or a string")


def _parsed(text: str, position: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Misread(f"not JSON {position} ({error}); name it .txt to read it as plain text") from None
    except RecursionError:
        raise Misread(f"JSON nested too deeply {position}") from None


def _decoded(data: bytearray) -> str:
    try:
        return bytes(data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Misread(f"not UTF-8 ({error.reason} at byte {error.start}); convert it first") from None
