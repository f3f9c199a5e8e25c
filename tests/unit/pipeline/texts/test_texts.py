"""Texts: plain files to the byte, and the documents of tables in every format."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import TextError
from pipeline.texts import tables
from pipeline.texts.texts import has_columns, open_text, read_text

DOCUMENTS = ["one two", 'a line\nbreak, "quoted"\ttab', "", "ünï \u2028 {x}"]


def json_lines(documents: list[str]) -> bytes:
    return "\n".join(json.dumps({"id": 1, "text": one}, ensure_ascii=False) for one in documents).encode()


def table(documents: list[str], delimiter: str) -> bytes:
    made = io.StringIO(newline="")
    csv.writer(made, delimiter=delimiter).writerows([["id", "text"], *(["1", one] for one in documents)])
    return made.getvalue().encode()


def parquet(documents: list[str]) -> bytes:
    made = io.BytesIO()
    pq.write_table(pa.table({"id": [1] * len(documents), "text": documents}), made)
    return made.getvalue()


def zstd(data: bytes) -> bytes:
    made = pa.BufferOutputStream()
    with pa.CompressedOutputStream(made, "zstd") as out:
        out.write(data)
    return bytes(made.getvalue())


def rows(documents: list[str]) -> list[dict[str, str]]:
    return [{"text": one} for one in documents]


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": json_lines,
    "A.JSONL": json_lines,
    "crlf.ndjson": lambda documents: json_lines(documents).replace(b"\n", b"\r\n"),
    "lines.json": json_lines,
    "list.json": lambda documents: json.dumps(rows(documents), indent=1).encode(),
    "strings.json": lambda documents: json.dumps(documents).encode(),
    "columns.json": lambda documents: json.dumps({"text": documents}).encode(),
    "inside.json": lambda documents: json.dumps({"data": rows(documents)}).encode(),
    "a.csv": lambda documents: table(documents, ","),
    "bom.csv": lambda documents: b"\xef\xbb\xbf" + table(documents, ","),
    "a.tsv": lambda documents: table(documents, "\t"),
    "a.parquet": parquet,
    "lines": json_lines,
    "list": lambda documents: json.dumps(rows(documents), indent=1).encode(),
    "parquet": parquet,
    "a.jsonl.gz": lambda documents: gzip.compress(json_lines(documents)),
    "two members.jsonl.gz": lambda documents: b"".join(
        gzip.compress(part) for part in (json_lines(documents)[:9], json_lines(documents)[9:])
    ),
    "a.csv.zst": lambda documents: zstd(table(documents, ",")),
    "a.parquet.xz": lambda documents: lzma.compress(parquet(documents)),
    "a.json.bz2": lambda documents: bz2.compress(json_lines(documents)),
    "compressed": lambda documents: zstd(json_lines(documents)),
}


def stored(path: Path, data: bytes | str) -> str:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


@pytest.mark.parametrize("name", FORMATS)
def test_documents_of_every_format_are_concatenated_with_blank_lines(name: str, tmp_path: Path) -> None:
    found = open_text(stored(tmp_path / name, FORMATS[name](DOCUMENTS)))
    assert (found.content, found.documents, found.column) == ("\n\n".join(DOCUMENTS), 4, "text")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0")), min_size=1, max_size=5))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_documents_are(tmp_path: Path, documents: list[str]) -> None:
    for name in ("a.jsonl", "list.json", "a.csv", "a.parquet", "a.csv.zst"):
        assert read_text(stored(tmp_path / name, FORMATS[name](documents))) == "\n\n".join(documents)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "story", "a.txt.gz", "a.zst"])
def test_a_plain_file_is_read_to_the_byte(name: str, tmp_path: Path) -> None:
    content = "\ufeffa\r\n\n\nb \u2028\n"
    packed = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, bytes)(content.encode())
    found = open_text(stored(tmp_path / name, packed))
    assert (found.content, found.documents) == (content, None)


def test_the_extension_counts_before_the_content(tmp_path: Path) -> None:
    lines = json_lines(DOCUMENTS)
    assert read_text(stored(tmp_path / "a.txt", lines)) == lines.decode()
    assert read_text(stored(tmp_path / "latex", "{\\bf hello}\nworld")) == "{\\bf hello}\nworld"
    assert [has_columns(name) for name in ("a.txt", "a.txt.gz", "a.jsonl", "org/set")] == [False, False, True, True]


def test_the_column_is_text_or_the_only_one_or_the_one_that_is_named(tmp_path: Path) -> None:
    assert open_text(stored(tmp_path / "a.csv", "body\nx\ny\n")).column == "body"
    assert read_text(stored(tmp_path / "a.jsonl", '{"n": 1, "body": "x"}\n{"n": 2, "body": null}\n')) == "x"
    two = stored(tmp_path / "two.csv", "title,body\na,x\nb,y\n")
    assert read_text(two, "body") == "x\n\ny"
    with pytest.raises(TextError, match=r"no column 'text' among title, body; .*--text-column"):
        open_text(two)
    with pytest.raises(TextError, match="no column 'lead' with text in it among title, body"):
        open_text(two, "lead")


REFUSED: dict[str, tuple[bytes | str, str]] = {
    "a.jsonl": ('{"text": "a"}\n{oops', "not JSON line 2"),
    "numbers.jsonl": ('{"text": 3}', "values of type int, not text"),
    "lists.jsonl": ("[1]", "line 1 is list"),
    "empty.jsonl": ("", "no column 'text'"),
    "halves.jsonl": ('{"text": "\\ud800"}', "unpaired surrogate"),
    "deep.json": ("[" * 100_000, "nested too deeply"),
    "mixed": ('{"text": "a"}\nprose\n', "rename it"),
    "ragged.csv": ("a,text\n1,2,3\n", "line 2 has 3 values"),
    "open.csv": ('text\n"abc', "not CSV"),
    "twice.csv": ("a,a\n1,2\n", "a column twice"),
    "semicolons.csv": ("text;id\na b;1\n", "no comma"),
    "a.parquet": ("PAR1 and no more", "not Parquet"),
    "latin.csv": (b"text\n\xe9 and more", "not UTF-8"),
    "latin.txt": (b"\xe9 and more", "not UTF-8"),
    "cut.jsonl.gz": (gzip.compress(json_lines(DOCUMENTS) * 50)[:-30], "damaged gzip"),
    "cut.jsonl.xz": (lzma.compress(json_lines(DOCUMENTS) * 50)[:-30], "damaged xz"),
    "cut.jsonl.bz2": (bz2.compress(json_lines(DOCUMENTS) * 50)[:-30], "damaged bzip2"),
    "cut.jsonl.zst": (zstd(b"".join(bytes([n % 251]) * (n % 7) for n in range(90_000)))[:-30], "damaged zstd"),
    "none.gz": (b"hello", "named as gzip"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_contradicts_its_extension_is_refused_by_name(name: str, tmp_path: Path) -> None:
    data, expected = REFUSED[name]
    with pytest.raises(TextError, match=expected) as error:
        open_text(stored(tmp_path / name, data))
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["./nothing", "some/deep/file", "a.txt", "a.jsonl.gz", "~/text"])
def test_a_missing_file_is_no_data_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextError, match=r"No such file or directory"):
        open_text(name)


@pytest.mark.parametrize("name", ["text.tar", "text.tar.gz", "text"])
def test_an_archive_is_no_text(name: str, tmp_path: Path) -> None:
    member = tmp_path / "member.txt"
    member.write_text("some words")
    with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as archive:
        archive.add(member)
    with pytest.raises(TextError, match="archive"):
        read_text(str(tmp_path / name))


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="a folder; name one file"):
        open_text(str(tmp_path))


def test_what_would_fill_memory_is_refused(tmp_path: Path) -> None:
    for name, data in (("a.txt", b"x" * 1001), ("a.txt.gz", gzip.compress(b"x" * 1_000_000))):
        with pytest.raises(TextError, match="1,000"):
            open_text(stored(tmp_path / name, data), max_bytes=1000)


def test_of_a_parquet_file_vectors_and_images_beside_the_text_are_not_read() -> None:
    made = io.BytesIO()
    columns = {
        "text": ["one", None],
        "vector": [[1.0] * 9, None],
        "about": [{"likes": 1}, {"likes": 2}],
        "image": [b"png", b"png"],
    }
    pq.write_table(pa.table(columns), made)
    beside: dict[str, Any] = {"vector": [], "about": {}, "image": b""}
    assert list(tables.parquet(bytearray(made.getvalue()))) == [{"text": "one", **beside}, {"text": None, **beside}]
