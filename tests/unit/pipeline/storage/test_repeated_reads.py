"""Claims about bytes that come without a checksum: what two readings agree on is right, or nothing is given out."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage import repeated_reads
from pipeline.storage.etag import PART_BYTES, EtagDigest, etag_matches
from pipeline.storage.repeated_reads import ReadsDiffer, confirm_by_rereading


def _object(size: int) -> bytes:
    return (hashlib.shake_128(b"object").digest(40_000) * (size // 40_000 + 1))[:size]


def _flipped(data: bytes, place: int) -> bytearray:
    """One bit is another: of unlike places not the same one, however short the data."""
    spoiled = bytearray(data)
    if data:
        spoiled[place % len(data)] ^= 1 << place % 8
    return spoiled


@given(st.integers(1, 9000), st.data())
def test_corrupt_answers_are_repaired_or_reported(size: int, data: st.DataObject) -> None:
    content = _object(size)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    spoiled = data.draw(st.sets(st.integers(0, 8), max_size=2))  # numbers of the readings, the first one is 0
    first = _flipped(content[start:stop], 7) if 0 in spoiled else bytearray(content[start:stop])
    readings = 0

    def read(a: int, b: int) -> bytes:
        nonlocal readings
        readings += 1
        return bytes(_flipped(content[a:b], 3 * readings)) if readings in spoiled else content[a:b]

    try:
        confirm_by_rereading(first, start, size, read, lambda seconds: None)
    except ReadsDiffer:
        assert spoiled
    else:
        assert first == content[start:stop]


@pytest.mark.parametrize("places", ["0 1 0 - - -", "0 1 1 - - -", "- 1 1 - - -", "0 - 0 - 2 - - -"])
def test_two_readings_that_are_spoiled_alike_are_not_taken_for_right(places: str) -> None:
    """Place that is spoiled in each reading of a small object, "-" in none: chance makes two alike now and then."""
    content, readings = _object(60), iter(places.split())

    def read(a: int, b: int) -> bytearray:
        if (place := next(readings)) == "-":
            return bytearray(content[a:b])
        return _flipped(content[a:b], int(place))

    got = read(0, 60)
    confirm_by_rereading(got, 0, 60, read, lambda seconds: None)
    assert got == content


@given(st.integers(5000, 40_000), st.integers(1, 4096), st.data())
def test_the_same_place_of_every_answer_spoiled_is_never_given_out(size: int, place: int, data: st.DataObject) -> None:
    """A proxy that changes one byte of each block, counted from the start of the answer or from its end."""
    content = _object(size)
    start = data.draw(st.integers(0, size - 4200))
    stop = data.draw(st.integers(start + 4200, size))
    from_end = data.draw(st.booleans())

    def read(a: int, b: int) -> bytes:
        return bytes(_flipped(content[a:b], -place if from_end else place)) if b - a > 4096 else content[a:b]

    got = bytearray(read(start, stop))
    try:
        confirm_by_rereading(got, start, size, read, lambda seconds: None)
    except ReadsDiffer:
        return
    assert got == content[start:stop]


def test_large_ranges_are_compared_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated_reads, "COMPARED_BYTES", 1 << 14)
    content, asked = _object(100_000), []

    def read(a: int, b: int) -> bytes:
        asked.append(b - a)
        return content[a:b]

    got = _flipped(content[10:], 70_000)
    confirm_by_rereading(got, 10, len(content), read, lambda seconds: None)
    assert got == content[10:]
    assert max(asked) <= (1 << 14) + 2 * 7 * 409


@pytest.mark.parametrize("size", [0, 1, 5 << 20, PART_BYTES, 2 * PART_BYTES + 7])
def test_an_etag_proves_its_own_bytes_and_no_others(size: int) -> None:
    content = _object(size)
    digest = EtagDigest()
    for first in range(0, size, 3 << 20):
        digest.update(content[first : first + (3 << 20)])
    parts = [hashlib.md5(content[first : first + PART_BYTES]).digest() for first in range(0, max(1, size), PART_BYTES)]
    assert digest.etags == (
        hashlib.md5(content).hexdigest(),
        f"{hashlib.md5(b''.join(parts)).hexdigest()}-{len(parts)}",
    )
    for etag in digest.etags:
        assert etag_matches(f'"{etag}"', content)
        assert not etag_matches(etag, bytes(_flipped(content, 5)) + b"x")
    assert not etag_matches("", content)
    assert not etag_matches("0123-kms", content)
