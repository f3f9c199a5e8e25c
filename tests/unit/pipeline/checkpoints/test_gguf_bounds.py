"""Headers of GGUF files that claim more than the file can hold are refused before they are used."""

import contextlib
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.checkpoints.sources.gguf_bounds import require_bounded_header
from pipeline.errors import CheckpointError
from tests.support.tiny_gguf import make_tiny_gguf

HUGE = 2**40


def number(value: int) -> bytes:
    return struct.pack("<Q", value)


def word(text: bytes) -> bytes:
    return number(len(text)) + text


def header(keys: bytes = b"", tensors: bytes = b"", n_keys: int = 0, n_tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<I", version) + number(n_tensors) + number(n_keys) + keys + tensors


def array(kind: int, count: int) -> bytes:
    return word(b"a") + struct.pack("<II", 9, kind) + number(count)


def tensor(*dims: int, offset: int = 0) -> bytes:
    shape = struct.pack("<I", len(dims)) + b"".join(map(number, dims))
    return word(b"t") + shape + struct.pack("<I", 0) + number(offset)


@pytest.mark.parametrize(
    "content",
    [
        header(array(0, HUGE), n_keys=1), header(array(8, HUGE), n_keys=1), header(array(9, HUGE), n_keys=1),
        header(array(8, 3) + number(HUGE), n_keys=1), header(array(9, 1) + b"\0" * 64, n_keys=1),
        header(word(b"a") + struct.pack("<I", 8) + number(HUGE), n_keys=1), header(number(HUGE), n_keys=1),
        header(word(b"a") + struct.pack("<I", 77), n_keys=1), header(n_keys=HUGE), header(n_tensors=HUGE),
        header(version=9),
        header(tensors=tensor(HUGE, HUGE), n_tensors=1), header(tensors=tensor(2**63, 2), n_tensors=1),
        header(tensors=tensor(4, offset=HUGE), n_tensors=1), header(tensors=tensor(*[1] * 9), n_tensors=1),
        header(tensors=word(b"t") + struct.pack("<I", 2**32 - 1), n_tensors=1), b"GGUF", b"GGUF\3\0\0\0",
        header(word(b"llama.block_count") + struct.pack("<II", 4, 2**32 - 1), n_keys=1),
        header(word(b"llama.expert_count") + struct.pack("<II", 4, 2**31), n_keys=1),
        struct.pack("<I", 0x46554747) + struct.pack(">IQQ", 3, 0, HUGE),  # of the other byte order
        struct.pack("<I", 0x46554747) + struct.pack(">IQQ", 3, HUGE, 0),
    ],
)  # fmt: skip
def test_counts_that_cannot_fit_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    started = time.process_time()
    with pytest.raises((ValueError, CheckpointError), match=r"\w"):
        require_bounded_header(tmp_path / "x.gguf")
    assert time.process_time() - started < 1


def test_a_whole_file_is_within_all_bounds(tmp_path: Path) -> None:
    require_bounded_header(make_tiny_gguf(tmp_path / "x.gguf"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_tiny_gguf(tmp_path_factory.mktemp("gguf") / "x.gguf").read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    changes=st.lists(st.tuples(st.integers(4, 4000), st.sampled_from([0, 1, 127, 255])), max_size=5),
    cut=st.integers(4, 6000),
)
def test_changed_bytes_end_soon_and_take_no_memory(
    whole: bytes, tmp_path: Path, changes: list[tuple[int, int]], cut: int
) -> None:
    content = bytearray(whole)
    for at, value in changes:
        content[at] = value
    (tmp_path / "x.gguf").write_bytes(content[:cut] if cut < 4000 else content)
    started = time.process_time()
    tracemalloc.start()
    with contextlib.suppress(ValueError, CheckpointError):
        require_bounded_header(tmp_path / "x.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
    assert time.process_time() - started < 1
