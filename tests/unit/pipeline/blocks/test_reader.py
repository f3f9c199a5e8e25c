"""Tensors of a block are read once, now or ahead of time in a thread."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.blocks import reader as reader_module
from pipeline.blocks.reader import TensorReader
from pipeline.errors import StoreError
from pipeline.models.stored_model import Model, open_model

NAMES = [f"model.layers.1.self_attn.{role}_proj.weight" for role in "qkv"]


class Reads:
    """Counts reads by the name of the tensor; a read waits for `gate`, and fails if its name is in `broken`."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.counts: Counter[str] = Counter()
        self.broken: set[str] = set()
        self.gate, self.started = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, store: Any, info: Any, digests: Any = None) -> Tensor:
        self.counts[info.name] += 1
        self.started.set()
        assert self.gate.wait(30)
        if info.name in self.broken:
            raise StoreError(f"{info.name}: no answer")
        return self._real(store, info, digests)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    counted = Reads(reader_module.read_tensor)
    monkeypatch.setattr(reader_module, "read_tensor", counted)
    return counted


@pytest.fixture
def source(tiny_model: Path) -> Model:
    return open_model(str(tiny_model))


def settle(reader: TensorReader) -> None:
    """Wait until the thread has read everything that is queued."""
    reader._thread.submit(int).result()


def test_what_was_read_ahead_is_not_read_again(source: Model, reads: Reads) -> None:
    reader = TensorReader(source)
    reader.read_ahead(NAMES)
    settle(reader)
    assert reads.counts == dict.fromkeys(NAMES, 1)
    for name in NAMES:
        assert torch.equal(reader.take(name), source.read(name))
    assert reads.counts == dict.fromkeys(NAMES, 1)
    assert reader.bytes_read == sum(source.checkpoint.tensors[name].nbytes for name in NAMES)


def test_a_tensor_that_is_being_read_ahead_is_waited_for(source: Model, reads: Reads) -> None:
    reader = TensorReader(source)
    reads.gate.clear()
    reader.read_ahead(NAMES[:1])
    assert reads.started.wait(30)
    threading.Timer(0.05, reads.gate.set).start()
    assert torch.equal(reader.take(NAMES[0]), source.read(NAMES[0]))
    assert reads.counts[NAMES[0]] == 1


def test_a_repeated_request_reads_nothing_again_and_a_taken_tensor_is_given_once(source: Model, reads: Reads) -> None:
    reader = TensorReader(source)
    for _ in range(3):
        reader.read_ahead(NAMES)
    settle(reader)
    reader.take(NAMES[0])
    assert sum(reads.counts.values()) == len(NAMES)
    reader.take(NAMES[0])
    assert reads.counts[NAMES[0]] == 2


def test_what_is_no_longer_needed_is_dropped_and_not_read(source: Model, reads: Reads) -> None:
    reader = TensorReader(source)
    reads.gate.clear()
    reader.read_ahead(NAMES)
    assert reads.started.wait(30)
    reader.read_ahead(NAMES[2:])
    reads.gate.set()
    settle(reader)
    assert reads.counts[NAMES[1]] == 0  # it was queued
    assert reads.counts[NAMES[2]] == 1
    reader.take(NAMES[0])
    assert reads.counts[NAMES[0]] == 2  # the first reading was dropped
    reader.read_ahead([])
    reader.take(NAMES[2])
    assert reads.counts[NAMES[2]] == 2


def test_an_error_of_the_thread_reaches_the_caller_and_the_next_attempt_reads_again(
    source: Model, reads: Reads
) -> None:
    reader = TensorReader(source)
    reads.broken = {NAMES[1]}
    reader.read_ahead(NAMES)
    assert torch.equal(reader.take(NAMES[0]), source.read(NAMES[0]))
    with pytest.raises(StoreError, match="no answer"):
        reader.take(NAMES[1])
    reads.broken.clear()
    assert torch.equal(reader.take(NAMES[1]), source.read(NAMES[1]))
    assert reads.counts[NAMES[1]] == 2


def test_a_lazy_tensor_reads_nothing_before_it_is_indexed(source: Model, reads: Reads) -> None:
    reader = TensorReader(source)
    lazy = reader.lazy(NAMES)
    assert not reads.counts
    assert torch.equal(lazy[NAMES[2]][...], source.read(NAMES[2]))
    assert reads.counts == {NAMES[2]: 1}
