"""How the stages of a plan run on described hardware, from headers alone."""

from typing import Any

import pytest

from pipeline.engine.memory import Room
from pipeline.errors import ConfigError
from pipeline.models.stored_model import Model
from pipeline.planning.machine_speed import Speed
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.compression import CompressSettings
from pipeline.verbs.plan_stages import Hardware, StagePlan, StagePlanner, hardware_of
from tests.unit.pipeline.planning.test_plan import SHAPES, checkpoint_of, plan_of

BEST: dict[str, Any] = {"preset": "best", "bits": 4, "projectors": "q"}


def stages(room: Room) -> dict[str, StagePlan]:
    hardware = Hardware(room, room, lambda tasks, memory: min(tasks, 8))
    model = Model(checkpoint_of(SHAPES, num_hidden_layers=12, hidden_size=64, vocab_size=100), {})
    settings = CompressSettings.model_validate(BEST)
    planner = StagePlanner(model, plan_of(**BEST), settings, CalibrationSettings(), hardware, Speed(5e10, 7e8, 4e8))
    return {stage.stage: stage for stage in planner.stages(60.0)}


def test_every_worker_of_a_model_that_fits_reads_all_of_it() -> None:
    on_cpu, on_gpu = stages(Room("cpu", 10**12)), stages(Room("cuda", 10**12))
    assert list(on_cpu) == ["calibrate", "compress", "tune", "evaluate", "lm-eval", "sweep", "restore"]
    evaluate = on_cpu["evaluate"]
    assert (evaluate.way, evaluate.workers, evaluate.hidden_bytes) == ("whole model per worker", 8, 0)
    assert evaluate.read_bytes == 8 * sum(info.nbytes for info in checkpoint_of(SHAPES).tensors.values())
    assert evaluate.device_bytes == 0 < on_gpu["evaluate"].device_bytes
    assert evaluate.seconds is not None
    assert on_gpu["evaluate"].seconds is None, "the speed of a GPU is not known"


def test_a_stage_that_fits_no_worker_is_impossible_with_the_reason() -> None:
    impossible = stages(Room("cpu", 10**8))["compress"]
    assert not impossible.is_possible
    assert "GB of memory, but may hold 0.1 GB" in impossible.way


def test_without_a_cluster_flags_describe_the_hardware() -> None:
    with hardware_of(ClusterSettings(workers=8, gpus_per_worker=1, memory_per_worker=80)) as hardware:
        assert hardware.room == Room("cuda", 80 * 2**30)
        assert hardware.host.kind == "cpu"
        assert hardware.count(3, None) == 3  # type: ignore[arg-type]


def test_a_gpu_without_its_memory_is_not_described() -> None:
    with pytest.raises(ConfigError, match="--memory-per-worker"), hardware_of(ClusterSettings(gpus_per_worker=1)):
        pass
