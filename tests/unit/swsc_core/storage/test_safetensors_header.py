"""The safetensors header: what is built is parsed again, agrees with the library, and what cannot be is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from swsc_core.storage.safetensors_header import (
    HEADER_LIMIT,
    HeaderEntry,
    build_header,
    header_length,
    parse_header,
    read_header,
)

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def of_bytes(content: bytes) -> list[HeaderEntry]:
    return read_header(lambda start, count: content[start : start + count], len(content))[1]


def with_data(entries: Any, data: int = 8) -> bytes:
    raw = json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


def test_a_built_header_is_parsed_to_the_same_tensors_and_aligned_data() -> None:
    tensors = [("a", "F32", (2, 3), 24), ("ß", "BF16", (0,), 0), ("b", "F6_E2M3", (4,), 3)]
    header = build_header(tensors)
    entries = of_bytes(header + bytes(27))
    assert [(one.name, one.dtype, one.shape, one.nbytes) for one in entries] == tensors
    assert [one.start - len(header) for one in entries] == [0, 24, 24]
    assert len(header) % 8 == 0


def test_a_file_of_the_library_is_read_as_it_was_written(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    content = (tmp_path / "x.safetensors").read_bytes()
    for entry in of_bytes(content):
        expected = tensors[entry.name]
        assert entry.shape == tuple(expected.shape)
        assert content[entry.start : entry.start + entry.nbytes] == expected.numpy().tobytes()


@pytest.mark.parametrize(
    "entries",
    [
        {"a": F32, "b": F32},
        {"a": {**F32, "data_offsets": [4, 12]}},
        {"a": {**F32, "shape": [3]}},
        {"a": {**F32, "shape": [-2], "data_offsets": [0, -8]}},
        {"a": {**F32, "shape": [2.0]}},
        {"a": {**F32, "dtype": 13}},
        {"a": {**F32, "dtype": "BF17", "data_offsets": [8, 0]}},
        {"a": {}},
        [],
        {},
    ],
)
def test_entries_that_do_not_fill_the_file_are_refused(entries: Any) -> None:
    with pytest.raises(ValueError, match="corrupt"):
        of_bytes(with_data(entries))


def test_a_name_that_occurs_twice_is_refused() -> None:
    one = json.dumps(F32)
    raw = f'{{"a":{one},"a":{one}}}'.encode()
    with pytest.raises(ValueError, match="corrupt"):
        parse_header(raw, 8 + len(raw) + 8)


def test_a_dtype_of_a_later_version_is_left_to_the_caller() -> None:
    (entry,) = of_bytes(with_data({"a": {**F32, "dtype": "BF17"}}))
    assert (entry.dtype, entry.nbytes) == ("BF17", 8)


@pytest.mark.parametrize("length", [0, 1, 93, HEADER_LIMIT + 1])
def test_a_length_that_does_not_fit_the_file_is_refused_before_it_is_read(length: int) -> None:
    with pytest.raises(ValueError, match="truncated"):
        header_length(length.to_bytes(8, "little"), 100 if length < HEADER_LIMIT else 2**61)


def test_a_file_shorter_than_the_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match="truncated"):
        of_bytes(b"\x02\0\0")
