"""Texts and tables that are damaged: read, or refused in one line, soon and in little memory."""

import contextlib
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import TextError
from pipeline.texts.texts import read_text
from tests.support.bounded import bounded
from tests.support.mutations import changed_bytes, changed_json, patient

ROWS = [{"text": "one two", "n": 1}, {"text": "three", "n": None}]
LINES = "\n".join(map(json.dumps, ROWS)).encode()


def _parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["one two", "three"], "n": [1, 2]}), file)
    return file.getvalue()


FILES = {
    ".txt": b"one two three", ".jsonl": LINES, ".json": json.dumps(ROWS).encode(),
    ".csv": b"text,n\none two,1\nthree,\n",
    ".tsv": b"text\tn\none two\t1\n", ".parquet": _parquet(), ".jsonl.gz": gzip.compress(LINES),
}  # fmt: skip


@patient(60)
@given(data=st.data(), kind=st.sampled_from(sorted(FILES)), column=st.sampled_from([None, "text", "n"]))
def test_a_text(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str, column: str | None) -> None:
    file = tmp_path_factory.getbasetemp() / f"changed{kind}"
    changed = changed_bytes(FILES[kind])
    if kind.startswith(".json") and not kind.endswith(".gz"):
        changed = st.one_of(
            changed, changed_json(json.dumps(ROWS).encode()), changed_json(json.dumps(ROWS[0]).encode())
        )
    file.write_bytes(data.draw(changed))
    with bounded(), contextlib.suppress(TextError):
        read_text(str(file), column)


def test_a_page_of_parquet_that_is_damaged(tmp_path: Path) -> None:
    """What pyarrow calls a failed read is no matter of the disk."""
    content = bytearray(_parquet())
    content[4:12] = b"\xff" * 8
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(TextError, match=r"x\.parquet"):
        read_text(str(tmp_path / "x.parquet"))
