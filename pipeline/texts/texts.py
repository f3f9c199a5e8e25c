"""Texts to calibrate and to measure on: plain files to the byte, and documents of tables joined by blank lines.

What a file is, its name says: `.txt`, `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, each of them also compressed (`.gz`, `.zst`, `.xz`,
`.bz2`). Only where the name says nothing the content is looked at, and what could be either is refused. What is no file is a data set
of the Hub.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import TextError, first_line
from pipeline.storage.store import Store
from pipeline.texts.decompress import COMPRESSED, Damaged, compression_of, decompressed
from pipeline.texts.tables import AMBIGUOUS, READERS, Misread, table_like

WIKITEXT2 = "wikitext2"
_MOST = 2 << 30  # bytes of a text: it is tokenised as a whole, which takes some twenty times as many
_PLAIN = {".txt", ".text", ".md", ".raw", ".rst", ".log"}
_HUB_ID = re.compile(r"[\w-][\w.-]{0,95}(/[\w.-]{1,96})?(:[^:/]{0,96}){0,2}")
_REMOTE = ("hf://", "http://", "https://")  # read by the library `datasets`
_BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Text:
    """A text as one string.

    Attributes:
        documents: how many documents of a table were joined by blank lines to make it; None for a plain file.
        column: theirs.
    """

    content: str
    documents: int | None = None
    column: str | None = None

    @property
    def origin(self) -> str:
        """How it was made of a table, in words; "" for a plain file."""
        if self.documents is None:
            return ""
        return f"column {self.column!r} of {self.documents:,} documents, joined by blank lines"


def open_text(name: str, column: str | None = None, split: str = "test") -> Text:
    """The text at `name`: a file here or in an object store, `wikitext2`, or a data set of the Hub (NAME[:CONFIG[:SPLIT]]).

    Args:
        column: of a table; by default "text", or its only column of strings.
        split: of a data set of the Hub whose name says none.

    Raises:
        TextError: no such text, one that is damaged, too large or no text, or a table whose column is not clear.
    """
    if name == WIKITEXT2:
        return _of_hub(name, ["Salesforce/wikitext", "wikitext-2-raw-v1"], "test", column)
    if name.startswith(_REMOTE):
        return _of_hub(name, [_builder_of(name)], "train", column, data_files=name)
    if _HUB_ID.fullmatch(name) and not _looks_like_a_file(name) and not Path(name).exists():
        place, config, own = [*name.split(":"), "", ""][:3]
        return _of_hub(name, [place, *([config] if config else [])], own or split, column)
    try:
        return _of_file(name, column)
    except (Misread, Damaged) as error:
        raise TextError(f"text {name}: {error}") from None


def read_text(name: str, column: str | None = None, split: str = "test") -> str:
    """The string alone."""
    return open_text(name, column, split).content


def has_columns(name: str) -> bool:
    """Whether the name is not that of a plain file."""
    path = Path(name)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower() not in _PLAIN


def _looks_like_a_file(name: str) -> bool:
    suffixes = {suffix.lower() for suffix in Path(name).suffixes}
    return bool(suffixes & (_PLAIN | READERS.keys() | COMPRESSED.keys())) or name.count("/") > 1 or name[0] in "./~"


def _of_file(name: str, column: str | None) -> Text:
    data, suffix = _bytes(name), Path(name).suffix.lower()
    if suffix in COMPRESSED:
        data, suffix = (
            decompressed(data, COMPRESSED[suffix], _MOST),
            Path(name.removesuffix(Path(name).suffix)).suffix.lower(),
        )
    elif suffix not in _PLAIN | READERS.keys() and (kind := compression_of(data)):
        data = decompressed(data, kind, _MOST)
    if data[257:262] == b"ustar":  # names and owners of files, which are valid UTF-8, stand between the texts
        raise TextError(f"text {name}: an archive of files (tar); unpack it, and give one of them")
    if suffix not in _PLAIN | READERS.keys():
        suffix = table_like(data)
    if suffix == AMBIGUOUS:
        raise TextError(
            f"text {name}: begins as JSON does, and is none throughout; rename it: .txt if it is to be read as it stands, .jsonl for"
            " one object a line"
        )
    if suffix in READERS:
        return _joined(name, READERS[suffix](data), column)
    try:
        return Text(bytes(data).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise TextError(f"text {name}: not UTF-8 ({error.reason} at byte {error.start}); convert it first") from None


def _bytes(name: str) -> bytearray:
    store = Store.at(name)
    try:
        if store.is_local and store.is_there:
            raise TextError(f"text {name}: a folder; name one file in it")
        if (size := store.parent.size(store.name)) > _MOST:
            raise TextError(_too_large(name, size))
        return store.parent.read(store.name)
    except OSError as error:
        raise TextError(
            f"text {name}: {error.strerror}; give a text file, {WIKITEXT2}, or a data set of the Hub as NAME:CONFIG:SPLIT"
        ) from None


def _too_large(name: str, size: int) -> str:
    return f"text {name}: {size:,} bytes, at most {_MOST:,} are read; give a part of it"


def _joined(name: str, rows: Iterable[Mapping[str, Any]], column: str | None) -> Text:
    """The documents of a table; those that are none are passed over."""
    texts: list[str] = []
    size, names = 0, dict[str, None]()
    for number, row in enumerate(rows, 1):
        column = column or _column_of(name, row)
        names |= dict.fromkeys(row)
        value = row.get(column)
        if value is None:
            continue
        if not isinstance(value, str):
            raise TextError(
                f"text {name}: its column {column!r} holds values of type {type(value).__name__}, not text (row {number:,}); name"
                " another column by --text-column"
            )
        texts.append(value)
        if (size := size + len(value)) > _MOST:
            raise TextError(_too_large(name, size))
    if not texts:
        raise TextError(
            f"text {name}: no column {column or 'text'!r} with text in it among {', '.join(names) or 'none'}"
        )
    content = "\n\n".join(texts)
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"text {name}: half a surrogate pair, which is no character (at {error.start:,}); export it again"
        ) from None
    return Text(content, len(texts), column)


def _column_of(name: str, row: Mapping[str, Any]) -> str:
    """The column that holds the text, as the first row has it."""
    strings = [key for key, value in row.items() if isinstance(value, str)]
    if "text" in row or len(strings) == 1 or len(row) == 1:
        return "text" if "text" in row else (strings or list(row))[0]
    raise TextError(
        f"text {name}: no column 'text' among {', '.join(row) or 'none'}; name the one that holds the text by --text-column"
    )


def _builder_of(name: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    return next((_BUILDERS[suffix] for suffix in suffixes[::-1] if suffix in _BUILDERS), "text")


def _of_hub(name: str, source: list[str], split: str, column: str | None, **how: Any) -> Text:
    from datasets import load_dataset

    how |= {"sample_by": "document"} if source == ["text"] else {}
    how |= {"sep": "\t"} if ".tsv" in name and source == ["csv"] else {}
    try:
        rows = load_dataset(*source, split=split, **how)
    except Exception as error:  # the library has no common root for "offline", "not found" and "refused"
        reason = first_line(error)
        what = (
            "could not be loaded"
            if name == WIKITEXT2
            else "no such file, and no data set of the Hub that can be loaded"
        )
        raise TextError(f"text {name}: {what} ({reason}); name a text file instead") from None
    if column is None:
        strings = [key for key, feature in rows.features.items() if getattr(feature, "dtype", None) in _STRINGS]
        column = strings[0] if "text" not in rows.column_names and len(strings) == 1 else "text"
    if column not in rows.column_names:
        raise TextError(
            f"text {name}: no column {column!r} among {', '.join(rows.column_names)}; name the one that holds the text by --text-column"
        )
    made = _joined(name, ({column: value} for value in rows[column]), column)
    return Text(made.content) if source == ["text"] else made


_STRINGS = ("string", "large_string")
