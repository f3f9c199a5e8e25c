"""Which models of a sweep are evaluated in blocks, by the memory of a worker."""

import pytest

from pipeline.engine.memory import Room
from pipeline.planning.memory import WORKER_BASE
from pipeline.sweep import blocks
from pipeline.sweep.blocks import blocked_models, peak_memory
from tests.unit.pipeline.sweep.test_block_tasks import Sweep


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_worker_needs_room_for_an_evaluated_model_beside_a_compression(kind: str) -> None:
    sweep = Sweep()
    alone, both = (peak_memory(sweep.inputs, sweep.runs, models).limited(kind) for models in ([], [0]))
    assert both > alone > WORKER_BASE.limited(kind)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_only_a_model_that_does_not_fit_runs_in_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep()
    whole = peak_memory(sweep.inputs, sweep.runs, [0]).limited(kind)
    assert blocked_models(sweep.inputs, sweep.runs, Room(kind, whole)) == []
    monkeypatch.setattr(blocks, "_in_blocks", lambda _inputs, runs, *_: [run.name for run in runs])
    assert blocked_models(sweep.inputs, sweep.runs, Room(kind, whole - 1)) == ["uncompressed", "q", "q and k"]
