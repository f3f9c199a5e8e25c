"""The benchmark of a GPU runs on a CPU in small; without a GPU it prints an error."""

import sys

import pytest
import torch

from benchmarks.gpu.__main__ import PARTS, main, run
from benchmarks.gpu.finding import Bench


def test_every_claim_holds_on_a_cpu() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = run(Bench("cpu", True))
    torch.set_num_threads(threads)
    assert not [one for one in found if one.ok is False]
    assert len([one for one in found if one.ok]) > len(PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_an_error_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    assert main() == 2
    assert "no CUDA device" in capsys.readouterr().err
