"""Rows of JSON lines, JSON, CSV, TSV and Parquet files, as mappings of column to value."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import first_line

AMBIGUOUS = "?"  # content that may be meant as a table and may be not
_ROWS = 1024  # of a Parquet file at a time
_LOOKED_AT = 16  # lines, where the name of a file says nothing
Row = Mapping[str, Any]


class Misread(ValueError):
    """A file that is not what its name says."""


def json_lines(data: bytearray) -> Iterator[Row]:
    """One object, or one string, a line."""
    for number, line in enumerate(_decoded(data).split("\n"), 1):
        if line.strip():
            yield _row(_parsed(line, f"line {number:,}"), f"line {number:,}")


def json_document(data: bytearray) -> Iterator[Row]:
    """A list of objects or strings, columns of lists, or one object; or these as the only value of an object; or JSON lines."""
    try:
        value = _parsed(_decoded(data), "as a whole")
    except Misread:
        if not _is_row(data.lstrip().partition(b"\n")[0]):
            raise
        yield from json_lines(data)  # often they are named so
        return
    while isinstance(value, dict) and len(value) == 1 and _holds_rows(next(iter(value.values()))):
        value = next(iter(value.values()))
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise Misread("its columns have unlike lengths; give JSON lines, one object a line")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield _row(row, f"entry {number:,}")


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _require_commas(names: list[str]) -> None:
    """Raise Misread for a table of one column whose name looks like several: whole lines would be taken for the text."""
    if other := next((sign for sign in ";\t|" if len(names) == 1 and sign in names[0]), None):
        raise Misread(
            f"its first line holds no comma, and {other!r}: if that parts its columns, save it with commas; if its lines are the"
            " text, name it .txt"
        )


def comma_separated(data: bytearray, delimiter: str = ",") -> Iterator[Row]:
    """A line of column names, then one row after the other; quoted values may hold line breaks."""
    csv.field_size_limit((1 << 31) - 1)
    rows = csv.reader(io.StringIO(_decoded(data), newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(rows, [])
        if len(set(names)) < len(names):
            raise Misread(
                f"its first line names a column twice ({', '.join(names)}); it has to hold the names of the columns"
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
        raise Misread(f"no CSV ({error} at line {rows.line_num:,}); export it again") from None


def tab_separated(data: bytearray) -> Iterator[Row]:
    """The same with tabs."""
    return comma_separated(data, "\t")


def parquet(data: bytearray) -> Iterator[Row]:
    """Rows, batch by batch. Vectors, images and the like beside a text are not read: an empty value says of what type they are."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        empty = {field.name: _empty(field.type) for field in file.schema_arrow}
        columns = [name for name, value in empty.items() if value is None]
        for batch in file.iter_batches(_ROWS, columns=columns):
            yield from (empty | row for row in batch.to_pylist())
    except (pa.ArrowException, OSError, ValueError) as error:  # the bytes are in memory: no disk is to blame
        raise Misread(f"no Parquet ({first_line(error)}); export it again") from None


def _empty(kind: pa.DataType) -> Any:
    """A value that stands for all of a column that can be no text; None: it may be one."""
    if pa.types.is_nested(kind):
        return {} if pa.types.is_struct(kind) else []
    return b"" if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else None


READERS: dict[str, Callable[[bytearray], Iterator[Row]]] = {
    ".jsonl": json_lines, ".ndjson": json_lines, ".json": json_document, ".csv": comma_separated, ".tsv": tab_separated,
    ".parquet": parquet,
}  # fmt: skip


def table_like(data: bytearray) -> str:
    """The suffix that `data` should have had: of a table, AMBIGUOUS, or "" for plain text."""
    if data.startswith(b"PAR1"):
        return ".parquet"
    if data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"{", b"["):
        return ""
    found = [_is_row(line) for line in data[: 1 << 24].split(b"\n", _LOOKED_AT)[:_LOOKED_AT] if line.strip()]
    if all(found):
        return ".jsonl"
    try:
        json.loads(bytes(data))
    except (ValueError, RecursionError):
        return AMBIGUOUS if found[0] else ""
    return ".json"


def _is_row(line: bytes | bytearray) -> bool:
    try:
        return isinstance(json.loads(bytes(line)), dict)
    except (ValueError, RecursionError):
        return False


def _row(value: Any, where: str) -> Row:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    raise Misread(f"{where} is {type(value).__name__}, wanted an object or a string")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Misread(f"no JSON {where} ({error}); name it .txt if it is to be read as it stands") from None
    except RecursionError:
        raise Misread(f"JSON nested too deeply {where}") from None


def _decoded(data: bytearray) -> str:
    try:
        return bytes(data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Misread(f"not UTF-8 ({error.reason} at byte {error.start}); convert it first") from None
