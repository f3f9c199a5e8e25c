"""Workers whose GPU fails, and several workers on one GPU; skipped without a GPU."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.checkpoints.source import open_checkpoint
from pipeline.compression.job import CompressionVariant, CompressVariants
from pipeline.device import is_out_of_memory, requires_new_process
from pipeline.engine.worker import Worker
from pipeline.errors import TextError
from pipeline.models.matrices import find_matrix
from pipeline.texts.windows import require_within
from swsc_core import RtnSpec
from tests.support.project import ROOT
from tests.support.tiny import contents, make_text, make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
NAME = "model.layers.0.self_attn.q_proj.weight"


def test_a_sweep_hands_on_that_its_gpu_is_full(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, way = open_checkpoint(str(tiny_model)), CompressionVariant((RtnSpec(3),), 0)
    monkeypatch.setattr("pipeline.compression.job.encode", lambda *_, **__: torch.empty(1 << 50, device="cuda"))
    with pytest.raises(torch.OutOfMemoryError) as error:
        Worker(1, "cuda").run(CompressVariants(source.store, find_matrix(source, NAME), (way,)))
    assert requires_new_process(error.value)
    assert is_out_of_memory(error.value)


def test_tokens_beyond_the_vocabulary_never_reach_the_gpu(tiny_model: Path) -> None:
    with pytest.raises(TextError):
        require_within(np.array([[256]]), open_checkpoint(str(tiny_model)))


@pytest.mark.cluster
def test_two_workers_on_one_gpu_give_the_bytes_of_one(tmp_path: Path) -> None:
    model, text = make_tiny_model(tmp_path / "model"), make_text(tmp_path / "text.txt")
    how = ["--bits", "4", "--preset", "best", "--calibration", str(text)]
    how += ["--calibration-windows", "4", "--calibration-seqlen", "64"]
    outs = []
    for name, where in (
        ("one", ["--local"]),
        ("two", ["--address", "local", "--workers", "2", "--gpus-per-worker", "0.5"]),
    ):
        flags = [*how, *where, "--cache-dir", str(tmp_path / f"cache-{name}")]
        command = [sys.executable, "-m", "jobs", "compress", str(model), str(tmp_path / name), *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        outs.append(contents(tmp_path / name))
    assert outs[0] == outs[1]
