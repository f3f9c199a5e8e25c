"""The benchmark of the machine reads the largest tensor only, and leaves the process as it was."""

import math
from pathlib import Path

import pytest
import torch

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.planning.machine_speed import measure_speed
from pipeline.storage.store import Store


@pytest.mark.parametrize("nbytes", [1000, 0])
def test_all_rates_are_positive_and_the_number_of_threads_stays(tmp_path: Path, nbytes: int) -> None:
    """The largest tensor may be cut off, and the file of the small one is missing."""
    (tmp_path / "large").write_bytes(bytes(nbytes))
    large, small = TensorInfo("large", "U8", (1000,), "large", 0, 1000), TensorInfo("small", "U8", (1,), "gone", 0, 1)
    threads = torch.get_num_threads()
    speed = measure_speed(Checkpoint(Store.at(str(tmp_path)), {"small": small, "large": large}, {}))
    assert all(rate > 0 and math.isfinite(rate) for rate in (speed.gemm, speed.additions, speed.stream))
    assert torch.get_num_threads() == threads
