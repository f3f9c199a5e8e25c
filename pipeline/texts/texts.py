"""Texts for calibration and evaluation: plain files, byte for byte, and documents of tables, separated by blank lines.

The suffix determines the format: `.txt`, `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, each also compressed (`.gz`,
`.zst`, `.xz`, `.bz2`). The content is examined only without such a suffix, and refused if it is ambiguous. A name
that is not a file is a data set of the Hub.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import TextError, first_line
from pipeline.storage.store import Store
from pipeline.texts.decompress import COMPRESSED, Damaged, compression_of, decompressed
from pipeline.texts.tables import AMBIGUOUS, READERS, Misread, Row, table_suffix

if TYPE_CHECKING:
    from datasets import Dataset

WIKITEXT2 = "wikitext2"
# Largest text in bytes. It is tokenized as a whole, which takes some twenty times as much memory.
_MAX_BYTES = 2 << 30
_PLAIN = {".txt", ".text", ".md", ".raw", ".rst", ".log"}
_HUB_ID = re.compile(r"[\w-][\w.-]{0,95}(/[\w.-]{1,96})?(:[^:/]{0,96}){0,2}")
# Addresses that the library `datasets` reads.
_REMOTE = ("hf://", "http://", "https://")
# Suffix of a remote file -> its builder in the library `datasets`.
_BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# Types of text columns in the library `datasets`.
_STRING_TYPES = ("string", "large_string")


@dataclass(frozen=True)
class Text:
    """A text as one string.

    Attributes:
        documents: number of documents of a table that the text consists of; None for a plain file.
        column: the column of the table; None for a plain file.
    """

    content: str
    documents: int | None = None
    column: str | None = None

    @property
    def origin(self) -> str:
        """How the text was assembled from a table, in words; "" for a plain file."""
        if self.documents is None:
            return ""
        return f"column {self.column!r} of {self.documents:,} documents, separated by blank lines"


def open_text(name: str, column: str | None = None, split: str = "test", max_bytes: int = _MAX_BYTES) -> Text:
    """Read a text: a file on disk or in an object store, `wikitext2`, or a data set of the Hub (NAME[:CONFIG[:SPLIT]]).

    Args:
        column: of a table; by default "text", or its only column of strings.
        split: of a data set of the Hub if its name states none.
        max_bytes: largest size, of a compressed file after decompression.

    Raises:
        TextError: the text does not exist, is damaged, too large or not a text, or the column of a table is ambiguous.
    """
    if name == WIKITEXT2:
        return _open_dataset(name, ["Salesforce/wikitext", "wikitext-2-raw-v1"], "test", column)
    if name.startswith(_REMOTE):
        return _open_dataset(name, [_builder_of(name)], "train", column, is_file=True)
    if _HUB_ID.fullmatch(name) and not _looks_like_a_file(name) and not Path(name).exists():
        repository, config, named_split = [*name.split(":"), "", ""][:3]
        return _open_dataset(name, [repository, *([config] if config else [])], named_split or split, column)
    try:
        return _open_file(name, column, max_bytes)
    except (Misread, Damaged) as error:
        raise TextError(f"text {name}: {error}") from None


def read_text(name: str, column: str | None = None, split: str = "test") -> str:
    """Return the content of `open_text`."""
    return open_text(name, column, split).content


def has_columns(name: str) -> bool:
    """Whether a text of this name may be a table."""
    path = Path(name)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower() not in _PLAIN


def _looks_like_a_file(name: str) -> bool:
    suffixes = {suffix.lower() for suffix in Path(name).suffixes}
    return bool(suffixes & (_PLAIN | READERS.keys() | COMPRESSED.keys())) or name.count("/") > 1 or name[0] in "./~"


def _open_file(name: str, column: str | None, max_bytes: int) -> Text:
    data, suffix = _decompress_file(name, _read_bytes(name, max_bytes), max_bytes)
    if data[257:262] == b"ustar":  # valid UTF-8, but with names and owners of files between the texts
        raise TextError(f"text {name}: an archive of files (tar); unpack it, and give one of them")
    if suffix not in _PLAIN | READERS.keys():
        suffix = table_suffix(data)
    if suffix == AMBIGUOUS:
        raise TextError(
            f"text {name}: begins like JSON, but is not valid JSON; rename it: .txt to read it as plain text, .jsonl"
            " for one object per line"
        )
    if suffix in READERS:
        return _from_rows(name, READERS[suffix](data), column, max_bytes)
    try:
        return Text(bytes(data).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise TextError(f"text {name}: not UTF-8 ({error.reason} at byte {error.start}); convert it first") from None


def _decompress_file(name: str, data: bytearray, max_bytes: int) -> tuple[bytearray, str]:
    """The decompressed content of a file, and the suffix of its name without that of a compression."""
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        inner_suffix = Path(name.removesuffix(path.suffix)).suffix.lower()
        return decompressed(data, COMPRESSED[suffix], max_bytes), inner_suffix
    if suffix not in _PLAIN | READERS.keys() and (kind := compression_of(data)):
        return decompressed(data, kind, max_bytes), suffix
    return data, suffix


def _read_bytes(name: str, max_bytes: int) -> bytearray:
    store = Store.at(name)
    try:
        if store.is_local and store.is_there:
            raise TextError(f"text {name}: a folder; name one file in it")
        _require_size(name, store.parent.size(store.name), max_bytes)
        return store.parent.read(store.name)
    except OSError as error:
        raise TextError(
            f"text {name}: {error.strerror}; give a text file, {WIKITEXT2}, or a data set of the Hub as"
            " NAME:CONFIG:SPLIT"
        ) from None


def _require_size(name: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise TextError(f"text {name}: {size:,} bytes, more than the limit of {max_bytes:,}; give a part of it")


def _from_rows(name: str, rows: Iterable[Row], column: str | None, max_bytes: int = _MAX_BYTES) -> Text:
    """Join the documents of a table; rows without one are skipped."""
    documents: list[str] = []
    size, columns = 0, dict[str, None]()
    for number, row in enumerate(rows, 1):
        column = column or _column_of(name, row)
        columns |= dict.fromkeys(row)
        value = row.get(column)
        if value is None:
            continue
        if not isinstance(value, str):
            raise TextError(
                f"text {name}: its column {column!r} holds values of type {type(value).__name__}, not text (row"
                f" {number:,}); name another column with --text-column"
            )
        documents.append(value)
        size += len(value)
        _require_size(name, size, max_bytes)
    if not documents:
        raise TextError(
            f"text {name}: no column {column or 'text'!r} with text in it among {', '.join(columns) or 'none'}"
        )
    content = "\n\n".join(documents)
    _require_encodable(name, content)
    return Text(content, len(documents), column)


def _require_encodable(name: str, content: str) -> None:
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"text {name}: an unpaired surrogate, which is not a character (at {error.start:,}); export it again"
        ) from None


def _column_of(name: str, row: Row) -> str:
    """The text column, from the values of the first row."""
    strings = [key for key, value in row.items() if isinstance(value, str)]
    if "text" in row or len(strings) == 1 or len(row) == 1:
        return "text" if "text" in row else (strings or list(row))[0]
    raise _no_text_column(name, "text", row)


def _no_text_column(name: str, column: str, columns: Iterable[str]) -> TextError:
    return TextError(
        f"text {name}: no column {column!r} among {', '.join(columns) or 'none'}; name the one that holds the text with"
        " --text-column"
    )


def _builder_of(name: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    return next((_BUILDERS[suffix] for suffix in suffixes[::-1] if suffix in _BUILDERS), "text")


def _open_dataset(name: str, path: list[str], split: str, column: str | None, is_file: bool = False) -> Text:
    """Read a data set with the library `datasets`.

    Args:
        path: repository and configuration, or the builder of a remote file.
        is_file: `name` is a remote file.
    """
    from datasets import load_dataset

    options = _file_options(name, path[0]) if is_file else {}
    try:
        rows = load_dataset(*path, split=split, **options)
    except Exception as error:  # the library has no common base class for "offline", "not found" and "refused"
        problem = (
            "could not be loaded"
            if name == WIKITEXT2
            else "neither an existing file nor a data set of the Hub that can be loaded"
        )
        raise TextError(f"text {name}: {problem} ({first_line(error)}); name a text file instead") from None
    column = column or _text_column(rows)
    if column not in rows.column_names:
        raise _no_text_column(name, column, rows.column_names)
    text = _from_rows(name, ({column: value} for value in rows[column]), column)
    return Text(text.content) if is_file and path == ["text"] else text


def _file_options(name: str, builder: str) -> dict[str, str]:
    """Options of `load_dataset` for a remote file."""
    options = {"data_files": name}
    if builder == "text":
        options["sample_by"] = "document"
    if builder == "csv" and ".tsv" in name:
        options["sep"] = "\t"
    return options


def _text_column(rows: "Dataset") -> str:
    strings = [key for key, feature in rows.features.items() if getattr(feature, "dtype", None) in _STRING_TYPES]
    return strings[0] if "text" not in rows.column_names and len(strings) == 1 else "text"
